"""Softmax of the columns of matrices that fit in the cache, for compiled loops."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numba
from numba.core import cgutils

from fimp_sc.nn.ops.numba._vectors import Matrix, Vectors, in_strips, strided

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _lower_largest(v: Vectors, scores: Matrix, top: Matrix) -> None:
    builder, found = v.builder, v.variables(-math.inf)
    with cgutils.for_range(builder, scores.n_rows) as loop:
        for c, place in enumerate(found):
            builder.store(v.max(builder.load(place), scores.load(loop.index, c)), place)
    for c, place in enumerate(found):
        top.store(builder.load(place), v.integer(0), c)


def _lower_exponentials(v: Vectors, scores: Matrix, top: Matrix, inverse: Matrix) -> None:
    builder, log2e, zero = v.builder, v.all(math.log2(math.e)), v.integer(0)
    largest = [top.load(zero, c) for c in range(v.number)]
    # Nothing but padding weighs nothing.
    shift, total = [v.mul(v.zero_for(-math.inf, x, x), log2e) for x in largest], v.variables(0.0)
    with cgutils.for_range(builder, scores.n_rows) as loop:
        for c, place in enumerate(total):
            # Rounding of the largest is the same for all, so that inverses do not have it.
            e = v.exp2(v.sub(v.mul(scores.load(loop.index, c), log2e), shift[c]))
            scores.store(e, loop.index, c)
            builder.store(v.add(builder.load(place), e), place)
    for c, place in enumerate(total):
        found = builder.load(place)
        inverse.store(v.zero_for(0.0, found, builder.fdiv(v.all(1.0), found)), zero, c)


def _lower_softmax_backward(v: Vectors, gradient: Matrix, exponential: Matrix, inverse: Matrix, mean: Matrix) -> None:
    shift = [v.mul(inverse.load(v.integer(0), c), mean.load(v.integer(0), c)) for c in range(v.number)]
    with cgutils.for_range(v.builder, gradient.n_rows) as loop:
        for c, by in enumerate(shift):
            centered = v.sub(gradient.load(loop.index, c), by)
            gradient.store(v.mul(centered, exponential.load(loop.index, c)), loop.index, c)


_largest, _exponentials, _softmax_backward = (
    in_strips(lower) for lower in (_lower_largest, _lower_exponentials, _lower_softmax_backward)
)


@numba.njit(nogil=True)
def largest(scores: NDArray, top: NDArray) -> None:
    """Write the largest of each column of ``scores``, ``(n_tokens, n_queries)``, to ``top``."""
    _largest(scores.shape[1], (strided(scores), top))


@numba.njit(nogil=True)
def exponentials(scores: NDArray, top: NDArray, inverse: NDArray) -> None:
    """Turn scores in place into exponentials of what they are below the largest of their column.

    Parameters
    ----------
    scores
        ``(n_tokens, n_queries)``.
    top
        ``(at least n_queries,)``: the largest of each column.
    inverse
        ``(at least n_queries,)``; the inverse of the sum of each column is written there. Softmax is their product.
        Exponentials and inverse are zero where all scores of a column are minus infinity.
    """
    _exponentials(scores.shape[1], (strided(scores), top, inverse))


@numba.njit(nogil=True)
def softmax_backward(exponential: NDArray, gradient: NDArray, inverse: NDArray, mean: NDArray) -> None:
    """Turn the gradient of a softmax, times ``inverse``, in place into the gradient of scores.

    Parameters
    ----------
    exponential, inverse
        As from :func:`exponentials`.
    gradient
        ``(n_tokens, n_queries)``.
    mean
        ``(at least n_queries,)``: the mean of the gradient under the softmax.
    """
    _softmax_backward(gradient.shape[1], (strided(gradient), strided(exponential), inverse, mean))
