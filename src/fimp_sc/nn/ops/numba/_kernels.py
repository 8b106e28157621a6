"""Attention between destinations and their sources, one head at a time, in compiled loops for CPUs.

Scores of one destination and one of its sources exist at a time, and stay in the cache. They lie with a column for each
query, so that many queries are worked on at once, and softmax goes down the columns.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from fimp_sc.nn.ops.numba import _vectors as vectors
from fimp_sc.nn.ops.numba._products import add_product, product, scores, weighted_product
from fimp_sc.nn.ops.numba._softmax import exponentials, largest, softmax_backward

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

# Scores of a source held at once, and their gradients: both stay in the cache of a core.
_SCORES = 1 << 14


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function on first use, and keep the result for later processes where there is a folder for it."""
    try:
        # The name is that of a file, which numba replaces when this module changes, but not when what it uses does.
        used = (vectors.__file__, *(x.py_func.__code__.co_filename for x in (product, exponentials)))
        function.__qualname__ += f"_{zlib.crc32(b''.join(Path(x).read_bytes() for x in used)):08x}"
        return numba.njit(nogil=True, cache=True)(function)
    except (RuntimeError, OSError):
        return numba.njit(nogil=True)(function)


@_compiled
def _tile(n_queries: int, n_tokens: int) -> int:
    """Return how many queries are looked at together."""
    return min(max(_SCORES // max(n_tokens, 1) // 32, 1) * 32, n_queries)


@_compiled
def _attention(
    query: NDArray, key: NDArray, padded: NDArray, attention: NDArray, top: NDArray, inverse: NDArray
) -> None:
    """Write the attention of queries, ``(head_dim, n_queries)``, to one source, ``(n_tokens, n_queries)``.

    It is softmax without its last step: to be multiplied with ``inverse``, ``(n_queries,)``, which is written, too.
    """
    scores(key, query, attention, top)
    if padded.any():
        for j in range(len(padded)):
            if padded[j]:
                attention[j] = -np.inf
        largest(attention, top)
    exponentials(attention, top, inverse)


@_compiled
def project(
    tokens: NDArray, rows: tuple[int, int], matrices: NDArray, biases: NDArray, outs: tuple[NDArray, ...]
) -> None:
    """Write what linear maps make of the tokens of some nodes.

    Parameters
    ----------
    tokens
        ``(nodes, n_tokens, d_model)``.
    rows
        First node and the one behind the last.
    matrices, biases
        ``(maps, d_model, head_dim)`` and ``(maps, head_dim)``.
    outs
        ``(nodes, n_tokens, head_dim)`` for each map, or fewer nodes and tokens, which are the first then.
    """
    for i in range(rows[0], rows[1]):
        for m in range(len(matrices)):
            if i < len(outs[m]):
                out = outs[m][i]
                product(tokens[i, : len(out)], matrices[m], out, biases[m])


@_compiled
def project_backward(
    gradients: tuple[NDArray, ...],
    tokens: NDArray,
    rows: tuple[int, int],
    matrices: NDArray,
    d_tokens: NDArray,
    d_matrices: NDArray,
    d_biases: NDArray,
    wanted: tuple[bool, bool],
) -> None:
    """Add the gradients of what :func:`project` makes to those of tokens, matrices and biases.

    Parameters
    ----------
    gradients
        Those of ``outs`` there.
    tokens, rows
        As there.
    matrices
        ``(maps, head_dim, d_model)``, other than there.
    d_tokens, d_matrices, d_biases
        Of the shapes of ``tokens``, ``matrices`` and ``(maps, head_dim)``; added to.
    wanted
        Whether gradients are wanted of tokens, and of maps. What is not wanted is left alone.
    """
    one = np.ones(max(tokens.shape[1:]), tokens.dtype)
    for i in range(rows[0], rows[1]):
        for m in range(len(matrices)):
            if i >= len(gradients[m]):
                continue
            gradient = gradients[m][i]
            n = len(gradient)
            if wanted[0]:
                add_product(gradient, matrices[m], d_tokens[i, :n], one)
            if wanted[1]:
                add_product(gradient.T, tokens[i, :n], d_matrices[m], one)
                add_product(one[:n].reshape(1, n), gradient, d_biases[m : m + 1], one)


@_compiled
def add_rows(total: NDArray, nodes: NDArray, rows: NDArray) -> None:
    """Add ``rows``, ``(n, n_tokens, head_dim)``, to those of ``total`` at ``nodes``, which differ."""
    for i in range(len(nodes)):
        total[nodes[i]] += rows[i]


@_compiled
def forward(
    query: NDArray,
    key: NDArray,
    value: NDArray,
    padded: NDArray,
    weight: NDArray,
    indptr: NDArray,
    indices: NDArray,
    rows: tuple[int, int],
    out: NDArray,
) -> None:
    """Write the reduced messages of some destinations.

    Parameters
    ----------
    query
        ``(n_destinations, n_queries, head_dim)``, times ``head_dim ** -0.5``.
    key, value
        ``(n_sources, n_tokens, head_dim)``.
    padded
        ``(n_sources, n_tokens)`` bool, True where a token is padding; ``(n_sources, 0)`` where none is. Sources with
        nothing else have a weight of zero.
    weight
        ``(n_edges,)`` factor of each message.
    indptr, indices
        Compressed sparse rows over the destinations.
    rows
        First destination and the one behind the last.
    out
        ``(n_destinations, n_queries, head_dim)``, the destinations of which are written.
    """
    n_queries, width = query.shape[1:]
    n_tokens, dtype = key.shape[1], query.dtype
    tile = _tile(n_queries, n_tokens)
    queries, total = np.empty((width, n_queries), dtype), np.empty((width, n_queries), dtype)
    memory, top, inverse = np.empty((n_tokens, tile), dtype), np.empty(tile, dtype), np.empty(tile, dtype)
    for i in range(rows[0], rows[1]):
        queries[:] = query[i].T
        total[:] = 0
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            for a in range(0, n_queries, tile):
                b = min(a + tile, n_queries)
                attention = memory[:, : b - a]
                _attention(queries[:, a:b], key[j], padded[j], attention, top, inverse)
                inverse *= weight[e]
                add_product(value[j].T, attention, total[:, a:b], inverse)
        out[i] = total.T


@_compiled
def backward(
    query: NDArray,
    key: NDArray,
    value: NDArray,
    padded: NDArray,
    weight: NDArray,
    indptr: NDArray,
    indices: NDArray,
    rows: tuple[int, int],
    grad: NDArray,
    place: NDArray,
    d_query: NDArray,
    d_key: NDArray,
    d_value: NDArray,
    d_weight: NDArray,
    wanted: tuple[bool, bool, bool],
) -> None:
    """Write gradients of the queries of some destinations and add to those of their sources.

    Parameters
    ----------
    query, key, value, padded, weight, indptr, indices, rows
        As in :func:`forward`.
    grad
        Gradient of its result.
    place
        For each edge of these destinations, the row of ``d_key`` and ``d_value`` for its source.
    d_query
        Of the shape of ``query``, written; may be ``query`` itself.
    d_key, d_value
        ``(n, n_tokens, head_dim)``; added to.
    d_weight
        ``(n_edges,)``; added to.
    wanted
        Whether gradients are wanted of queries or keys, of values, and of weights. What is not wanted is left alone,
        but for gradients of queries, which are zero then.
    """
    of_scores, of_values, of_weights = wanted
    n_queries, width = query.shape[1:]
    n_tokens, dtype = key.shape[1], query.dtype
    first, tile = indptr[rows[0]], _tile(n_queries, n_tokens)
    queries, upstream = np.empty((width, n_queries), dtype), np.empty((width, n_queries), dtype)
    received, up = np.empty((width, n_queries), dtype), np.empty((n_queries, width), dtype)
    attention, d_scores = np.empty((n_tokens, tile), dtype), np.empty((n_tokens, tile), dtype)
    across, along = np.empty((tile, width), dtype), np.empty((width, tile), dtype)
    top, inverse, mean = np.empty(tile, dtype), np.empty(tile, dtype), np.empty(tile, dtype)
    factor = np.empty(max(tile, width), dtype)
    for i in range(rows[0], rows[1]):
        queries[:] = query[i].T
        up[:] = grad[i]
        upstream[:] = grad[i].T
        received[:] = 0
        for e in range(indptr[i], indptr[i + 1]):
            j, to = indices[e], place[e - first]
            factor[:] = weight[e]
            for a in range(0, n_queries, tile):
                n = min(tile, n_queries - a)
                b = a + n
                _attention(queries[:, a:b], key[j], padded[j], attention[:, :n], top, inverse)
                # Softmax is attention times inverse: inverses go into the smaller factors of products.
                if of_values:
                    for q in range(n):
                        for c in range(width):
                            across[q, c] = up[a + q, c] * inverse[q]
                    add_product(attention[:, :n], across[:n], d_value[to], factor)
                if not (of_scores or of_weights):
                    continue
                for c in range(width):
                    for q in range(n):
                        along[c, q] = upstream[c, a + q] * inverse[q]
                # The mean is the product of a query's message with its gradient.
                weighted_product(value[j], along[:, :n], d_scores[:, :n], attention[:, :n], mean)
                if of_weights:
                    d_weight[e] += mean[:n].sum()
                if of_scores:
                    softmax_backward(attention[:, :n], d_scores[:, :n], inverse, mean)
                    add_product(d_scores[:, :n], query[i, a:b], d_key[to], factor)
                    add_product(key[j].T, d_scores[:, :n], received[:, a:b], factor)
        d_query[i] = received.T
