"""What compiled loops do with many numbers at once: products of matrices that fit in the cache, and softmax of columns.

Compilers do not find the registers for this by themselves, so that it is written in vectors. A product keeps a tile of
the result in registers; matrices are taken as they lie in memory, transposed or not, and of any size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

_WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
# Singles in a vector, and the tile of a product: rows, and vectors of each. Larger tiles need more registers than CPUs
# have, smaller ones wait for sums.
_LANES, _ROWS, _VECTORS = (16, 8, 2) if _WIDE else (8, 4, 2)
# Below this power of two, singles and doubles are not normal.
_LOWEST = {32: -126, 64: -1022}
_MANTISSA = {32: 23, 64: 52}
# Terms of the series of powers of two that are more than rounding.
_TERMS = {32: 7, 64: 13}


class _Vectors:
    """Instructions for vectors of the elements of arrays.

    Parameters
    ----------
    context, builder
        Those of numba, where an intrinsic is lowered.
    element
        Type of numbers.
    lanes
        How many make a vector.
    """

    def __init__(self, context: Any, builder: ir.IRBuilder, element: types.Float, lanes: int) -> None:
        self.context, self.builder, self.bits = context, builder, element.bitwidth
        self.lanes, self.element = lanes, ir.FloatType() if self.bits == 32 else ir.DoubleType()
        self.size = self.integer(self.bits // 8)
        self.type, self.whole = ir.VectorType(self.element, lanes), ir.VectorType(ir.IntType(self.bits), lanes)

    def array(self, kind: types.Array, value: Any) -> tuple[Any, list[Any], list[Any]]:
        """Return address, shape and strides of an array."""
        array = self.context.make_array(kind)(self.context, self.builder, value)
        start = self.builder.bitcast(array.data, ir.IntType(8).as_pointer())
        return start, *(cgutils.unpack_tuple(self.builder, x) for x in (array.shape, array.strides))

    def at(self, start: Any, *steps: tuple[Any, Any]) -> Any:
        """Return the address that lies some numbers of steps, of some bytes each, behind another."""
        for number, size in steps:
            count = self.integer(number) if isinstance(number, int) else number
            start = self.builder.gep(start, [self.builder.mul(count, size)])
        return start

    def vectors_behind(self, start: Any, number: int) -> Any:
        return self.at(start, (number * self.lanes, self.size))

    def for_blocks(self, n: Any, size: int, block: Callable[[Any, int], None]) -> None:
        """Have ``block(first, size)`` done for blocks of ``n`` things, and for each of the rest ``block(first, 1)``."""
        blocks = self.builder.sdiv(n, self.integer(size))
        with cgutils.for_range(self.builder, blocks) as loop:
            block(self.builder.mul(loop.index, self.integer(size)), size)
        with cgutils.for_range(self.builder, n, start=self.builder.mul(blocks, self.integer(size))) as loop:
            block(loop.index, 1)

    @staticmethod
    def integer(number: int) -> Any:
        return ir.Constant(ir.IntType(64), number)

    def load(self, address: Any) -> Any:
        vector = self.builder.load(self.builder.bitcast(address, self.type.as_pointer()))
        vector.align = self.bits // 8
        return vector

    def store(self, vector: Any, address: Any) -> None:
        self.builder.store(vector, self.builder.bitcast(address, self.type.as_pointer())).align = self.bits // 8

    def number(self, address: Any) -> Any:
        """Return a vector of one number of an array."""
        return self.all(self.builder.load(self.builder.bitcast(address, self.element.as_pointer())))

    def all(self, number: Any) -> Any:
        """Return a vector of one number."""
        if isinstance(number, (int, float)):
            return ir.Constant(self.type, [number] * self.lanes)
        first = self.builder.insert_element(
            ir.Constant(self.type, ir.Undefined), number, ir.Constant(ir.IntType(32), 0)
        )
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(first, first, zeros)

    def variable(self, start: Any) -> Any:
        """Return a place that loops change; it becomes a register."""
        place = cgutils.alloca_once(self.builder, self.type)
        self.builder.store(start, place)
        return place

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=("contract",))

    def sub(self, a: Any, b: Any) -> Any:
        return self.builder.fsub(a, b, flags=("contract",))

    def mul(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=("contract",))

    def exp(self, x: Any) -> Any:
        """Return the exponential of what is not positive: a power of two, times a series."""
        builder, lowest = self.builder, self.all(_LOWEST[self.bits])
        power = self.mul(x, self.all(math.log2(math.e)))
        gone = builder.fcmp_ordered("<", power, lowest)
        power = builder.select(gone, lowest, power)
        floor = builder.module.declare_intrinsic(
            f"llvm.floor.v{self.lanes}f{self.bits}", (), ir.FunctionType(self.type, [self.type])
        )
        near = builder.call(floor, [self.add(power, self.all(0.5))])
        rest, terms = self.sub(power, near), _TERMS[self.bits]
        series = self.all(math.log(2) ** terms / math.factorial(terms))
        for i in reversed(range(terms)):
            series = self.add(self.mul(series, rest), self.all(math.log(2) ** i / math.factorial(i)))
        # The exponent of a number is in the bits above its mantissa.
        bias, mantissa = (
            ir.Constant(self.whole, [value] * self.lanes) for value in (1 - _LOWEST[self.bits], _MANTISSA[self.bits])
        )
        scale = builder.shl(builder.add(builder.fptosi(near, self.whole), bias), mantissa)
        return builder.select(gone, self.all(0.0), self.mul(series, builder.bitcast(scale, self.type)))


def _in_strips(strip: Callable[[int, int], Any]) -> Callable[..., Any]:
    """Return what does for all columns of a matrix what ``strip(vectors, lanes)`` does for a few, as wide as they fit.

    It takes the number of columns and the arguments of a strip, of which the first is the matrix of the numbers' dtype.
    """
    # Lanes are those of singles: half as many doubles fill a vector.
    several = strip(_VECTORS, _LANES)
    one, half, quarter, single = (strip(1, lanes) for lanes in (_LANES, _LANES // 2, _LANES // 4, 1))

    def all_columns(n: int, out: Any, *others: Any) -> None:
        lanes = _LANES * 4 // out.itemsize
        c = 0
        while n - c >= _VECTORS * lanes:
            several(c, out, *others)
            c += _VECTORS * lanes
        while n - c >= lanes:
            one(c, out, *others)
            c += lanes
        if n - c >= lanes // 2:
            half(c, out, *others)
            c += lanes // 2
        if n - c >= lanes // 4:
            quarter(c, out, *others)
            c += lanes // 4
        while c < n:
            single(c, out, *others)
            c += 1

    return numba.njit(nogil=True)(all_columns)


def _lanes(lanes: int, element: types.Float) -> int:
    return max(lanes * 32 // element.bitwidth, 1)


def _product_strip(*, adds: bool) -> Callable[[int, int], Any]:
    def strip(vectors: int, lanes: int) -> Any:
        @intrinsic
        def columns(_: Any, begin: Any, out: Any, a: Any, b: Any, factor: Any) -> Any:
            def lowered(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[Any]) -> Any:
                v = _Vectors(context, builder, out.dtype, _lanes(lanes, out.dtype))
                (out0, (m, _), (out_row, _)), (a0, (_, depth), (a_row, a_column)), (b0, _, (b_row, _)) = (
                    v.array(kind, value) for kind, value in zip(signature.args[1:4], arguments[1:4], strict=True)
                )
                out0, b0 = (v.at(x, (arguments[0], v.size)) for x in (out0, b0))

                def tile(row: Any, rows: int) -> None:
                    left, to = v.at(a0, (row, a_row)), v.at(out0, (row, out_row))
                    sums = [[v.variable(v.all(0.0)) for _ in range(vectors)] for _ in range(rows)]
                    with cgutils.for_range(builder, depth) as loop:
                        here = v.at(b0, (loop.index, b_row))
                        right = [v.load(v.vectors_behind(here, c)) for c in range(vectors)]
                        for r, places in enumerate(sums):
                            number = v.number(v.at(left, (r, a_row), (loop.index, a_column)))
                            for place, vector in zip(places, right, strict=True):
                                builder.store(v.add(builder.load(place), v.mul(number, vector)), place)
                    for r, places in enumerate(sums):
                        for c, place in enumerate(places):
                            address, total = v.vectors_behind(v.at(to, (r, out_row)), c), builder.load(place)
                            if adds:
                                total = v.add(v.load(address), v.mul(v.all(arguments[4]), total))
                            v.store(total, address)

                v.for_blocks(m, _ROWS, tile)
                return context.get_dummy_value()

            return types.void(begin, out, a, b, out.dtype), lowered

        return columns

    return strip


def _softmax_strip(vectors: int, lanes: int) -> Any:
    @intrinsic
    def columns(_: Any, begin: Any, out: Any) -> Any:
        def lowered(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[Any]) -> Any:
            v = _Vectors(context, builder, out.dtype, _lanes(lanes, out.dtype))
            start, (m, _), (row, _) = v.array(signature.args[1], arguments[1])
            for c in range(vectors):
                here = v.vectors_behind(v.at(start, (arguments[0], v.size)), c)
                largest, total = v.variable(v.all(-math.inf)), v.variable(v.all(0.0))
                with cgutils.for_range(builder, m) as loop:
                    x, before = v.load(v.at(here, (loop.index, row))), builder.load(largest)
                    # NaN is the largest.
                    builder.store(builder.select(builder.fcmp_ordered("<=", x, before), before, x), largest)
                # Nothing but padding weighs nothing.
                none = builder.fcmp_ordered("==", builder.load(largest), v.all(-math.inf))
                builder.store(builder.select(none, v.all(0.0), builder.load(largest)), largest)
                with cgutils.for_range(builder, m) as loop:
                    place = v.at(here, (loop.index, row))
                    e = v.exp(v.sub(v.load(place), builder.load(largest)))
                    v.store(e, place)
                    builder.store(v.add(builder.load(total), e), total)
                none = builder.fcmp_ordered("==", builder.load(total), v.all(0.0))
                share = builder.select(none, v.all(0.0), builder.fdiv(v.all(1.0), builder.load(total)))
                with cgutils.for_range(builder, m) as loop:
                    place = v.at(here, (loop.index, row))
                    v.store(v.mul(v.load(place), share), place)
            return context.get_dummy_value()

        return types.void(begin, out), lowered

    return columns


def _softmax_backward_strip(vectors: int, lanes: int) -> Any:
    @intrinsic
    def columns(_: Any, begin: Any, out: Any, attention: Any, mean: Any) -> Any:
        def lowered(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[Any]) -> Any:
            v = _Vectors(context, builder, out.dtype, _lanes(lanes, out.dtype))
            (out0, (m, _), (out_row, _)), (a0, _, (a_row, _)), (mean0, _, _) = (
                v.array(kind, value) for kind, value in zip(signature.args[1:], arguments[1:], strict=True)
            )
            for c in range(vectors):
                gradient, weight, to = (v.vectors_behind(v.at(x, (arguments[0], v.size)), c) for x in (out0, a0, mean0))
                total = v.variable(v.all(0.0))
                with cgutils.for_range(builder, m) as loop:
                    g, w = v.load(v.at(gradient, (loop.index, out_row))), v.load(v.at(weight, (loop.index, a_row)))
                    builder.store(v.add(builder.load(total), v.mul(g, w)), total)
                v.store(builder.load(total), to)
                with cgutils.for_range(builder, m) as loop:
                    place = v.at(gradient, (loop.index, out_row))
                    w = v.load(v.at(weight, (loop.index, a_row)))
                    v.store(v.mul(v.sub(v.load(place), builder.load(total)), w), place)
            return context.get_dummy_value()

        return types.void(begin, out, attention, mean), lowered

    return columns


_write, _add = _in_strips(_product_strip(adds=False)), _in_strips(_product_strip(adds=True))
_softmax, _softmax_backward = _in_strips(_softmax_strip), _in_strips(_softmax_backward_strip)


@numba.njit(nogil=True)
def product(a: NDArray, b: NDArray, out: NDArray) -> None:
    """Write ``a @ b`` to ``out``, ``(m, depth)`` and ``(depth, n)`` to ``(m, n)``, all of one dtype.

    Numbers of a row of ``b`` and of ``out`` lie next to each other; ``a`` may have any strides.
    """
    _write(out.shape[1], out, a, b, out.dtype.type(1))


@numba.njit(nogil=True)
def add_product(a: NDArray, b: NDArray, out: NDArray, factor: Any) -> None:
    """Add a multiple of ``a @ b`` to ``out``, as :func:`product` writes it."""
    _add(out.shape[1], out, a, b, factor)


@numba.njit(nogil=True)
def softmax(scores: NDArray) -> None:
    """Turn ``scores``, ``(n_tokens, n_queries)``, in place into weights that sum to one in each column."""
    _softmax(scores.shape[1], scores)


@numba.njit(nogil=True)
def softmax_backward(attention: NDArray, gradient: NDArray, mean: NDArray) -> None:
    """Turn the gradient of ``attention``, both ``(n_tokens, n_queries)``, in place into that of scores.

    Its mean under the attention in each column is written to ``mean``, ``(at least n_queries,)``.
    """
    _softmax_backward(gradient.shape[1], gradient, attention, mean)
