"""Vector instructions of CPUs for compiled loops: operations on many columns of matrices at once.

Compilers do not find the registers for this by themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.polynomial import Chebyshev, Polynomial

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
# Bytes of a vector, and the tile of a product that is kept in registers: its rows, and vectors of each. Larger tiles
# need more registers than CPUs have, smaller ones wait for sums.
_BYTES, _ROWS, _VECTORS = (64, 8, 2) if _WIDE else (32, 4, 2)
# Below this power of two, singles and doubles are not normal.
_LOWEST = {32: -126, 64: -1022}
_MANTISSA = {32: 23, 64: 52}
# Polynomials nearest to powers of two between -1/2 and 1/2, but for rounding.
_SERIES = {
    bits: Chebyshev.interpolate(np.exp2, degree, [-0.5, 0.5]).convert(kind=Polynomial).coef.tolist()
    for bits, degree in ((32, 6), (64, 12))
}


class Vectors:
    """Instructions for some columns of matrices, which are as wide as a few vectors.

    Parameters
    ----------
    context, builder
        Those of numba, where an intrinsic is lowered.
    element
        Type of numbers.
    number
        How many vectors these columns are.
    live
        How many columns there are, where they may be fewer than a vector has numbers.
    """

    def __init__(self, context: Any, builder: ir.IRBuilder, element: types.Float, number: int, live: Any) -> None:
        self.context, self.builder, self.bits, self.number = context, builder, element.bitwidth, number
        self.lanes, self.element = _BYTES * 8 // self.bits, ir.FloatType() if self.bits == 32 else ir.DoubleType()
        self.type, self.whole = (ir.VectorType(x, self.lanes) for x in (self.element, ir.IntType(self.bits)))
        self.live = live
        if live is not None:
            lanes = ir.Constant(self.whole, list(range(self.lanes)))
            count = self.all(builder.trunc(live, self.whole.element) if self.bits == 32 else live)
            self.live = builder.icmp_signed("<", lanes, count)

    @staticmethod
    def integer(number: int) -> Any:
        return ir.Constant(ir.IntType(64), number)

    def for_rows(self, n: Any, block: Callable[[Any, int], None]) -> None:
        """Have ``block(first, _ROWS)`` done for so many rows at a time, ``block(first, 1)`` for each of the rest."""
        builder, size = self.builder, self.integer(_ROWS)
        whole = builder.mul(builder.sdiv(n, size), size)
        with cgutils.for_range_slice(builder, self.integer(0), whole, size) as (row, _):
            block(row, _ROWS)
        with cgutils.for_range(builder, n, start=whole) as loop:
            block(loop.index, 1)

    def load(self, address: Any) -> Any:
        place, name = self._vector(address), f"llvm.masked.load.{self._name}.p0{self._name}"
        if self.live is None:
            vector = self.builder.load(place)
            vector.align = self.bits // 8
            return vector
        kinds = [place.type, ir.IntType(32), self.live.type, self.type]
        masked = self.builder.module.declare_intrinsic(name, (), ir.FunctionType(self.type, kinds))
        return self.builder.call(masked, [place, self._align, self.live, self.all(0.0)])

    def store(self, vector: Any, address: Any) -> None:
        place, name = self._vector(address), f"llvm.masked.store.{self._name}.p0{self._name}"
        if self.live is None:
            self.builder.store(vector, place).align = self.bits // 8
            return
        kinds = [self.type, place.type, ir.IntType(32), self.live.type]
        masked = self.builder.module.declare_intrinsic(name, (), ir.FunctionType(ir.VoidType(), kinds))
        self.builder.call(masked, [vector, place, self._align, self.live])

    @property
    def _name(self) -> str:
        return f"v{self.lanes}f{self.bits}"

    @property
    def _align(self) -> Any:
        return ir.Constant(ir.IntType(32), self.bits // 8)

    def _vector(self, address: Any) -> Any:
        return self.builder.bitcast(address, self.type.as_pointer())

    def all(self, number: Any) -> Any:
        """Return a vector of one number."""
        if isinstance(number, (int, float)):
            return ir.Constant(self.type, [number] * self.lanes)
        kind = ir.VectorType(number.type, self.lanes)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(first, first, zeros)

    def variable(self, start: Any) -> Any:
        """Return a place that loops change; it becomes a register."""
        place = cgutils.alloca_once(self.builder, self.type)
        self.builder.store(start, place)
        return place

    def variables(self, start: float) -> list[Any]:
        """Return a variable for each vector."""
        return [self.variable(self.all(start)) for _ in range(self.number)]

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=("contract",))

    def sub(self, a: Any, b: Any) -> Any:
        return self.builder.fsub(a, b, flags=("contract",))

    def mul(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=("contract",))

    def max(self, a: Any, b: Any) -> Any:
        # Of NaN and a number, the second.
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def zero_for(self, special: float, numbers: Any, where: Any) -> Any:
        """Return zero where other numbers are something special, and ``where`` elsewhere."""
        found = self.builder.fcmp_ordered("==", numbers, self.all(special))
        return self.builder.select(found, self.all(0.0), where)

    def exp2(self, power: Any) -> Any:
        """Return two to the power of something: a power of two, times a series. What is not normal is zero."""
        builder = self.builder
        # Numbers of this size have no fraction. Their last bits are the nearest whole number and the exponents' bias.
        large = self.all(1.5 * 2.0 ** _MANTISSA[self.bits] + 1 - _LOWEST[self.bits])
        near = self.add(power, large)
        rest = self.sub(power, self.sub(near, large))
        *terms, last = _SERIES[self.bits]
        series = self.all(last)
        for term in reversed(terms):
            series = self.add(self.mul(series, rest), self.all(term))
        # The exponent of a number is in the bits above its mantissa.
        mantissa = ir.Constant(self.whole, [_MANTISSA[self.bits]] * self.lanes)
        scale = builder.bitcast(builder.shl(builder.bitcast(near, self.whole), mantissa), self.type)
        gone = builder.fcmp_ordered("<", power, self.all(_LOWEST[self.bits]))
        return builder.select(gone, self.all(0.0), self.mul(series, scale))


class Matrix:
    """Some columns of a matrix, or of a row that counts for each row of others.

    Parameters
    ----------
    v
        Instructions.
    kind, value
        Type and struct of the array.
    begin
        First column.
    """

    def __init__(self, v: Vectors, kind: types.Array, value: Any, begin: Any) -> None:
        array = v.context.make_array(kind)(v.context, v.builder, value)
        self._v, self._begin = v, begin
        self._start = v.builder.bitcast(array.data, ir.IntType(8).as_pointer())
        shape, strides = (cgutils.unpack_tuple(v.builder, x) for x in (array.shape, array.strides))
        self.n_rows, self.n_columns = [v.integer(1)] * (2 - len(shape)) + shape
        self._strides = [v.integer(0)] * (2 - len(strides)) + strides

    def number(self, row: Any, column: Any) -> Any:
        """Return a vector of one number, anywhere in the matrix."""
        address = self._behind(self._behind(self._start, row, self._strides[0]), column, self._strides[1])
        return self._v.all(self._v.builder.load(self._v.builder.bitcast(address, self._v.element.as_pointer())))

    def load(self, row: Any, c: int) -> Any:
        """Return one of the vectors of these columns, whose numbers lie next to each other."""
        return self._v.load(self._at(row, c))

    def store(self, vector: Any, row: Any, c: int) -> None:
        self._v.store(vector, self._at(row, c))

    def _at(self, row: Any, c: int) -> Any:
        v = self._v
        first = self._behind(self._behind(self._start, row, self._strides[0]), self._begin, v.integer(v.bits // 8))
        return self._behind(first, v.integer(c), v.integer(_BYTES))

    def _behind(self, start: Any, number: Any, size: Any) -> Any:
        return self._v.builder.gep(start, [self._v.builder.mul(number, size)])


@intrinsic
def strided(_: Any, array: Any) -> Any:
    """Return an array as one of any layout, so that what takes arrays is compiled for one kind of them."""

    def lowered(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[Any]) -> Any:
        context.nrt.incref(builder, signature.return_type, arguments[0])
        return arguments[0]

    return array.copy(layout="A")(array), lowered


def in_strips(lower: Callable[..., None]) -> Callable[..., Any]:
    """Return what does for all columns of matrices what ``lower`` does for a few.

    Parameters
    ----------
    lower
        Called with :class:`Vectors` and with a :class:`Matrix` for each array.

    Returns
    -------
    A compiled function of the number of columns and of a tuple of arrays, all of one dtype.
    """
    several, rest = _strip(lower, _VECTORS), _strip(lower, 0)

    def all_columns(n: int, arrays: tuple[Any, ...]) -> None:
        lanes = _BYTES // arrays[0].itemsize
        c = 0
        while n - c >= _VECTORS * lanes:
            several(c, n, arrays)
            c += _VECTORS * lanes
        while c < n:
            rest(c, n, arrays)
            c += lanes

    return numba.njit(nogil=True)(all_columns)


def _strip(lower: Callable[..., None], number: int) -> Any:
    @intrinsic
    def columns(_: Any, begin: Any, n: Any, arrays: Any) -> Any:
        def lowered(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[Any]) -> Any:
            first, end, values = arguments
            live = None if number else builder.sub(end, first)
            v = Vectors(context, builder, arrays[0].dtype, max(number, 1), live)
            found = (builder.extract_value(values, i) for i in range(len(arrays)))
            lower(v, *(Matrix(v, kind, value, first) for kind, value in zip(arrays, found, strict=True)))
            return context.get_dummy_value()

        return types.void(begin, n, arrays), lowered

    return columns
