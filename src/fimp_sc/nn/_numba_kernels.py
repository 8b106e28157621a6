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

from fimp_sc.nn._numba_vectors import add_product, product, softmax, softmax_backward

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

# Scores of a source held at once, and their gradients: both stay in the cache of a core.
_SCORES = 1 << 14


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function on first use, and keep the result for later processes where there is a folder for it."""
    try:
        # The name is that of a file, which numba replaces when this module changes, but not when the products do.
        products = zlib.crc32(Path(product.py_func.__code__.co_filename).read_bytes())
        function.__qualname__ += f"_{products:08x}"
        return numba.njit(nogil=True, cache=True)(function)
    except (RuntimeError, OSError):
        return numba.njit(nogil=True)(function)


@_compiled
def _tile(n_queries: int, n_tokens: int) -> int:
    """Return how many queries are looked at together."""
    return min(max(_SCORES // max(n_tokens, 1) // 32, 1) * 32, n_queries)


@_compiled
def _attention(query: NDArray, key: NDArray, padded: NDArray, attention: NDArray) -> None:
    """Write the attention of queries, ``(head_dim, n_queries)``, to one source, ``(n_tokens, n_queries)``."""
    product(key, query, attention)
    for j in range(len(padded)):
        if padded[j]:
            attention[j] = -np.inf
    softmax(attention)


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
    memory = np.empty((n_tokens, tile), dtype)
    for i in range(rows[0], rows[1]):
        queries[:] = query[i].T
        total[:] = 0
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            for a in range(0, n_queries, tile):
                b = min(a + tile, n_queries)
                attention = memory[:, : b - a]
                _attention(queries[:, a:b], key[j], padded[j], attention)
                add_product(value[j].T, attention, total[:, a:b], weight[e])
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
        Of the shape of ``query``, written.
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
    received = np.empty((width, n_queries), dtype)
    up = np.empty((n_queries, width), dtype)
    memory, d_memory, mean = np.empty((n_tokens, tile), dtype), np.empty((n_tokens, tile), dtype), np.empty(tile, dtype)
    for i in range(rows[0], rows[1]):
        up[:] = grad[i]
        queries[:] = query[i].T
        upstream[:] = grad[i].T
        received[:] = 0
        for e in range(indptr[i], indptr[i + 1]):
            j, to = indices[e], place[e - first]
            for a in range(0, n_queries, tile):
                b = min(a + tile, n_queries)
                attention, d_scores = memory[:, : b - a], d_memory[:, : b - a]
                _attention(queries[:, a:b], key[j], padded[j], attention)
                if of_values:
                    add_product(attention, up[a:b], d_value[to], weight[e])
                if not (of_scores or of_weights):
                    continue
                product(value[j], upstream[:, a:b], d_scores)
                # The mean is the product of a query's message with its gradient.
                softmax_backward(attention, d_scores, mean)
                if of_weights:
                    d_weight[e] += mean[: b - a].sum()
                if of_scores:
                    add_product(d_scores, query[i, a:b], d_key[to], weight[e])
                    add_product(key[j].T, d_scores, received[:, a:b], weight[e])
        d_query[i] = received.T
