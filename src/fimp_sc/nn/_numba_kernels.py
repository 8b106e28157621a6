"""Attention between destinations and their sources, one head at a time, in compiled loops for CPUs.

Scores of some queries of a destination and the tokens of some of its sources exist at a time, and stay in the cache.
Products are those of BLAS, over all of these sources.
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
# Scores held at once: those of one source may fill 256 KB of fp32, those of several 64 KB.
_SCORES = 1 << 16
_SCORES_OF_MANY = 1 << 14
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
def _softmax(row: NDArray, padded: NDArray, large: Any) -> None:
    """Turn scores of one query and the tokens of one source into weights of attention."""
    zero = row.dtype.type(0)
    largest = zero
    if large:
        largest = row.dtype.type(-np.inf)
        for c in range(len(row)):
            if not (len(padded) and padded[c]) and not row[c] <= largest:
                largest = row[c]
    total = zero
    for c in range(len(row)):
        e = _exp(row[c] - largest)
        row[c] = e
        total += e
    if len(padded):
        total = zero
        for c in range(len(row)):
            row[c] = zero if padded[c] else row[c]
            total += row[c]
    # Nothing but padding weighs nothing.
    factor = zero if total == 0 else 1 / total
    for c in range(len(row)):
        row[c] *= factor


@_compiled(fastmath=_MATH)
def _softmax_backward(attention: NDArray, gradient: NDArray, weight: Any) -> Any:
    """Turn the gradient of attention into that of scores, times a weight, and return its mean under the attention."""
    mean = attention.dtype.type(0)
    for c in range(len(attention)):
        mean += attention[c] * gradient[c]
    for c in range(len(attention)):
        gradient[c] = (gradient[c] - mean) * attention[c] * weight
    return mean


@_compiled(fastmath=_MATH)
def _attention(query: NDArray, keys: NDArray, sources: NDArray, padded: NDArray, large: Any, scores: NDArray) -> None:
    """Write attention, ``(n_queries, n_sources * n_tokens)``, with one softmax for each source."""
    np.dot(query, keys.T, scores)
    n_tokens = len(keys) // len(sources)
    for r in range(len(query)):
        for s in range(len(sources)):
            _softmax(scores[r, s * n_tokens : (s + 1) * n_tokens], padded[sources[s]], large)


@_compiled(fastmath=_MATH)
def _add(total: NDArray, rows: NDArray, factor: Any) -> None:
    for r in range(len(rows)):
        for c in range(rows.shape[1]):
            total[r, c] += rows[r, c] * factor


@_compiled()
def _gather(nodes: NDArray, sources: NDArray, rows: NDArray) -> None:
    """Write the tokens of sources one behind the other."""
    n_tokens = nodes.shape[1]
    for s in range(len(sources)):
        for r in range(n_tokens):
            for c in range(nodes.shape[2]):
                rows[s * n_tokens + r, c] = nodes[sources[s], r, c]


@_compiled()
def _sizes(n_queries: int, n_tokens: int, indptr: NDArray, rows: tuple[int, int]) -> tuple[int, int]:
    """Return how many queries, and how many sources, are looked at together."""
    degree = 1
    for i in range(rows[0], rows[1]):
        degree = max(degree, indptr[i + 1] - indptr[i])
    tile = min(max(_SCORES // n_tokens, 16), n_queries)
    return tile, min(max(_SCORES_OF_MANY // (n_tokens * tile), 1), degree)


@_compiled()
def add_rows(total: NDArray, nodes: NDArray, rows: NDArray) -> None:
    """Add ``rows``, ``(n, n_tokens, head_dim)``, to those of ``total`` at ``nodes``, which differ."""
    for i in range(len(nodes)):
        _add(total[nodes[i]], rows[i], rows.dtype.type(1))


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
    tile, together = _sizes(n_queries, n_tokens, indptr, rows)
    keys, values = np.empty((together * n_tokens, width), dtype), np.empty((together * n_tokens, width), dtype)
    memory, message = np.empty(together * n_tokens * tile, dtype), np.empty((tile, width), dtype)
    for i in range(rows[0], rows[1]):
        out[i] = 0
        longest = _largest_norm(query[i])
        for b in range(indptr[i], indptr[i + 1], together):
            sources = indices[b : min(b + together, indptr[i + 1])]
            m, large = len(sources) * n_tokens, False
            _gather(key, sources, keys)
            _gather(value, sources, values)
            for s in range(len(sources)):
                large |= not longest * norm[sources[s]] <= _SAFE
                values[s * n_tokens : (s + 1) * n_tokens] *= weight[b + s]
            for a in range(0, n_queries, tile):
                n = min(tile, n_queries - a)
                scores = memory[: n * m].reshape((n, m))
                _attention(query[i, a : a + n], keys[:m], sources, padded, large, scores)
                np.dot(scores, values[:m], message[:n])
                _add(out[i, a : a + n], message[:n], dtype.type(1))


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
    first, one = indptr[rows[0]], query.dtype.type(1)
    tile, together = _sizes(n_queries, n_tokens, indptr, rows)
    keys, values = np.empty((together * n_tokens, width), dtype), np.empty((together * n_tokens, width), dtype)
    memory, d_memory = np.empty(together * n_tokens * tile, dtype), np.empty(together * n_tokens * tile, dtype)
    received, message = np.empty((together * n_tokens, width), dtype), np.empty((tile, width), dtype)
    upstream = np.empty((n_queries, width), dtype)
    for i in range(rows[0], rows[1]):
        d_query[i] = 0
        upstream[:] = grad[i]
        longest = _largest_norm(query[i])
        for b in range(indptr[i], indptr[i + 1], together):
            sources = indices[b : min(b + together, indptr[i + 1])]
            m, large = len(sources) * n_tokens, False
            _gather(key, sources, keys)
            _gather(value, sources, values)
            for s in range(len(sources)):
                large |= not longest * norm[sources[s]] <= _SAFE
            for a in range(0, n_queries, tile):
                n = min(tile, n_queries - a)
                q, up = query[i, a : a + n], upstream[a : a + n]
                scores = memory[: n * m].reshape((n, m))
                _attention(q, keys[:m], sources, padded, large, scores)
                if of_values:
                    np.dot(scores.T, up, received[:m])
                    for s in range(len(sources)):
                        _add(d_value[place[b + s - first]], received[s * n_tokens : (s + 1) * n_tokens], weight[b + s])
                if not (of_scores or of_weights):
                    continue
                d_scores = d_memory[: n * m].reshape((n, m))
                np.dot(up, values[:m].T, d_scores)
                for r in range(n):
                    for s in range(len(sources)):
                        part = slice(s * n_tokens, (s + 1) * n_tokens)
                        # The mean is the product of a query's message with its gradient.
                        mean = _softmax_backward(scores[r, part], d_scores[r, part], weight[b + s])
                        if of_weights:
                            d_weight[b + s] += mean
                if of_scores:
                    np.dot(d_scores.T, q, received[:m])
                    for s in range(len(sources)):
                        _add(d_key[place[b + s - first]], received[s * n_tokens : (s + 1) * n_tokens], one)
                    np.dot(d_scores, keys[:m], message[:n])
                    _add(d_query[i, a : a + n], message[:n], one)
