"""Products of matrices that fit in the cache, for compiled loops.

A tile of the result is kept in registers; matrices are taken as they lie in memory, and of any size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numba
from numba.core import cgutils

from fimp_sc.nn.ops.numba._vectors import Matrix, Vectors, in_strips, strided

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


def _product(kind: str) -> Callable[..., None]:
    """Return what makes some columns of a product. What becomes of them, the functions below say for each kind."""

    def lower(v: Vectors, out: Matrix, a: Matrix, b: Matrix, of_columns: Matrix, *weights: Matrix) -> None:
        builder, zero = v.builder, v.integer(0)
        down = v.variables(-math.inf if kind == "scores" else 0.0)

        def finish(total: Any, row: Any, c: int) -> Any:
            if kind == "add":
                return v.add(out.load(row, c), v.mul(of_columns.load(zero, c), total))
            before = builder.load(down[c])
            if kind == "scores":
                builder.store(v.max(before, total), down[c])
            if kind == "weighted":
                builder.store(v.add(before, v.mul(weights[0].load(row, c), total)), down[c])
            return total

        def tile(begin: Any, n_rows: int) -> None:
            rows = [builder.add(begin, v.integer(r)) for r in range(n_rows)]
            start = [of_columns.load(zero, c) if kind == "start" else v.all(0.0) for c in range(v.number)]
            sums = [[v.variable(x) for x in start] for _ in rows]
            with cgutils.for_range(builder, a.n_columns) as loop:
                right = [b.load(loop.index, c) for c in range(v.number)]
                for row, places in zip(rows, sums, strict=True):
                    left = a.number(row, loop.index)
                    for place, vector in zip(places, right, strict=True):
                        builder.store(v.add(builder.load(place), v.mul(left, vector)), place)
            for row, places in zip(rows, sums, strict=True):
                for c, place in enumerate(places):
                    out.store(finish(builder.load(place), row, c), row, c)

        v.for_rows(out.n_rows, tile)
        if kind in ("scores", "weighted"):
            for c, place in enumerate(down):
                of_columns.store(builder.load(place), zero, c)

    return lower


_start, _add, _scores, _weighted = (in_strips(_product(kind)) for kind in ("start", "add", "scores", "weighted"))


@numba.njit(nogil=True)
def product(a: NDArray, b: NDArray, out: NDArray, start: NDArray) -> None:
    """Write ``a @ b + start`` to ``out``, all of one dtype.

    Parameters
    ----------
    a
        ``(m, depth)``, of any strides.
    b
        ``(depth, n)``. Here and in ``out``, numbers of a row lie next to each other.
    out
        ``(m, n)``.
    start
        ``(at least n,)``.
    """
    _start(out.shape[1], (strided(out), strided(a), strided(b), start))


@numba.njit(nogil=True)
def add_product(a: NDArray, b: NDArray, out: NDArray, factor: NDArray) -> None:
    """Add ``a @ b`` to ``out``, as in :func:`product`, each column times its ``factor``, ``(at least n,)``."""
    _add(out.shape[1], (strided(out), strided(a), strided(b), factor))


@numba.njit(nogil=True)
def scores(a: NDArray, b: NDArray, out: NDArray, top: NDArray) -> None:
    """Write ``a @ b`` to ``out``, as in :func:`product`, and the largest of each column to ``top``."""
    _scores(out.shape[1], (strided(out), strided(a), strided(b), top))


@numba.njit(nogil=True)
def weighted_product(a: NDArray, b: NDArray, out: NDArray, weights: NDArray, total: NDArray) -> None:
    """Write ``a @ b`` to ``out``, as in :func:`product`, and add it up in each column, with weights, to ``total``.

    Weights are of the shape of ``out``; ``total``, ``(at least n,)``, is written.
    """
    _weighted(out.shape[1], (strided(out), strided(a), strided(b), total, strided(weights)))
