"""Attention between destinations and their sources, one head at a time, in compiled loops for CPUs.

Scores of some queries of one edge exist at a time and stay in the cache. Products are those of BLAS.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

# Sums may be reordered, as instructions for many numbers at once need it; infinities and NaN stay what they are.
_MATH = {"reassoc", "contract", "nsz", "arcp"}
# Scores held at once: 256 KB of fp32.
_SCORES = 1 << 16
# Scores of no more than this need no shift: exponentials, and sums of them, stay far inside fp32.
_SAFE = np.float32(60.0)

_LOG2E = np.float32(math.log2(math.e))
_LOWEST = np.float32(-126.0)
# Of the series of powers of two.
_C1, _C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(math.log(2) ** i / math.factorial(i)) for i in range(1, 8))


def _compiled(fastmath: Any = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function on first use, and keep the result for later processes where there is a folder for it."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(fastmath=fastmath, nogil=True, cache=True)(function)
        except RuntimeError:
            return numba.njit(fastmath=fastmath, nogil=True)(function)

    return compiled


def _exp(x: Any) -> Any:
    """Stand for the exponential of a number below 88, in either precision."""
    raise NotImplementedError


@overload(_exp, jit_options={"fastmath": {"contract", "nsz"}})
def _exp_of(x: Any) -> Any:
    def double(x: Any) -> Any:
        return math.exp(x)

    # The library's function takes one number at a time; this becomes instructions for many.
    def single(x: Any) -> Any:
        y = x * _LOG2E
        y = _LOWEST if y < _LOWEST else y
        k = np.floor(y + np.float32(0.5))
        f = y - k
        rest = _C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * (_C6 + f * _C7)))))
        return (np.float32(1.0) + f * rest) * np.int32((np.int32(k) + 127) << 23).view(np.float32)

    return single if x == types.float32 else double


@_compiled(fastmath=_MATH)
def _exponentials(scores: NDArray, total: NDArray, padded: NDArray, large: Any) -> None:
    """Turn scores, ``(n_queries, n_tokens)``, into weights of attention times ``total``, which is written."""
    zero = scores.dtype.type(0)
    for r in range(len(scores)):
        row = scores[r]
        largest = zero
        if large:
            largest = scores.dtype.type(-np.inf)
            for c in range(len(row)):
                if not (len(padded) and padded[c]) and not row[c] <= largest:
                    largest = row[c]
        s = zero
        for c in range(len(row)):
            row[c] = e = _exp(row[c] - largest)
            s += e
        if len(padded):
            s = zero
            for c in range(len(row)):
                row[c] = zero if padded[c] else row[c]
                s += row[c]
        total[r] = s


@_compiled(fastmath=_MATH)
def _add(total: NDArray, rows: NDArray) -> None:
    for r in range(len(rows)):
        for c in range(rows.shape[1]):
            total[r, c] += rows[r, c]


@_compiled()
def add_rows(total: NDArray, nodes: NDArray, rows: NDArray) -> None:
    """Add ``rows``, ``(n, n_tokens, head_dim)``, to those of ``total`` at ``nodes``, which differ."""
    for i in range(len(nodes)):
        _add(total[nodes[i]], rows[i])


@_compiled(fastmath=_MATH)
def _largest_norm(tokens: NDArray) -> Any:
    largest = tokens.dtype.type(0)
    for r in range(len(tokens)):
        square = tokens.dtype.type(0)
        for c in range(tokens.shape[1]):
            square += tokens[r, c] * tokens[r, c]
        # NaN is the largest.
        largest = largest if square <= largest else square
    return np.sqrt(largest)


@_compiled()
def largest_norms(nodes: NDArray) -> NDArray:
    """Return the norm of the longest of each node's tokens, ``(n,)``, given ``(n, n_tokens, head_dim)``."""
    out = np.empty(len(nodes), nodes.dtype)
    for j in range(len(nodes)):
        out[j] = _largest_norm(nodes[j])
    return out


@_compiled(fastmath=_MATH)
def forward(
    query: NDArray,
    key: NDArray,
    value: NDArray,
    norm: NDArray,
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
    norm
        :func:`largest_norms` of the keys.
    padded
        ``(n_sources, n_tokens)`` bool, True where a token is padding; ``(n_sources, 0)`` where none is.
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
    tile = min(max(_SCORES // n_tokens, 16), n_queries)
    scores, message, total = np.empty((tile, n_tokens), dtype), np.empty((tile, width), dtype), np.empty(tile, dtype)
    for i in range(rows[0], rows[1]):
        out[i] = 0
        longest = _largest_norm(query[i])
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            large = not longest * norm[j] <= _SAFE
            for a in range(0, n_queries, tile):
                n = min(tile, n_queries - a)
                np.dot(query[i, a : a + n], key[j].T, scores[:n])
                _exponentials(scores[:n], total, padded[j], large)
                np.dot(scores[:n], value[j], message[:n])
                for r in range(n):
                    # Nothing but padding weighs nothing.
                    factor = dtype.type(0) if total[r] == 0 else weight[e] / total[r]
                    for c in range(width):
                        out[i, a + r, c] += message[r, c] * factor


@_compiled(fastmath=_MATH)
def backward(
    query: NDArray,
    key: NDArray,
    value: NDArray,
    norm: NDArray,
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
    query, key, value, norm, padded, weight, indptr, indices, rows
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
    tile = min(max(_SCORES // n_tokens, 16), n_queries)
    scores, d_scores = np.empty((tile, n_tokens), dtype), np.empty((tile, n_tokens), dtype)
    upstream, scaled = np.empty((n_queries, width), dtype), np.empty((tile, width), dtype)
    message = np.empty((tile, width), dtype)
    total = np.empty(tile, dtype)
    received = np.empty((n_tokens, width), dtype)
    for i in range(rows[0], rows[1]):
        d_query[i] = 0
        upstream[:] = grad[i]
        longest = _largest_norm(query[i])
        for e in range(indptr[i], indptr[i + 1]):
            j, at = indices[e], place[e - indptr[rows[0]]]
            large = not longest * norm[j] <= _SAFE
            for a in range(0, n_queries, tile):
                n = min(tile, n_queries - a)
                up = upstream[a : a + n]
                np.dot(query[i, a : a + n], key[j].T, scores[:n])
                _exponentials(scores[:n], total, padded[j], large)
                for r in range(n):
                    total[r] = dtype.type(0) if total[r] == 0 else 1 / total[r]
                if of_values:
                    for r in range(n):
                        for c in range(width):
                            scaled[r, c] = up[r, c] * (weight[e] * total[r])
                    np.dot(scores[:n].T, scaled[:n], received)
                    _add(d_value[at], received)
                if of_scores or of_weights:
                    np.dot(up, value[j].T, d_scores[:n])
                    for r in range(n):
                        mean = dtype.type(0)
                        for c in range(n_tokens):
                            mean += scores[r, c] * d_scores[r, c]
                        mean *= total[r]
                        if of_weights:
                            # That of a query's message with its gradient.
                            d_weight[e] += mean
                        for c in range(n_tokens):
                            d_scores[r, c] = (d_scores[r, c] - mean) * scores[r, c] * (weight[e] * total[r])
                if of_scores:
                    np.dot(d_scores[:n].T, query[i, a : a + n], received)
                    _add(d_key[at], received)
                    np.dot(d_scores[:n], key[j], message[:n])
                    _add(d_query[i, a : a + n], message[:n])
