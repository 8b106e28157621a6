"""Checks of expression values, in pieces small enough that no second copy of the matrix is ever made in memory."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import numpy as np
from scipy import sparse

from fimp_sc.data._rows import PIECE_VALUES, MatrixRows, open_rows

InputScale = Literal["counts", "normalized", "log", "real"]

CHUNK_VALUES = PIECE_VALUES
LOG_MAXIMUM = 20.0
_SAMPLED_CELLS = 256
_CONSTANT_TOTAL = 0.01
_ROUNDING = 1e-6
# Sums of squares of larger values overflow float32, those of smaller ones are zero there.
_SMALLEST, _LARGEST = 1e-12, 1e15


def check_values(matrix: Any, *, where: str, input_scale: str = "auto") -> InputScale:
    """Check that a cells × genes matrix can be used as expression, and resolve its scale.

    Parameters
    ----------
    matrix
        ``(n_obs, n_vars)`` real numbers in any form that :func:`~fimp_sc.data._rows.open_rows` reads. Not changed, not
        copied; what is not in memory is read once, piece by piece.
    where
        Where the matrix was found, for messages, for instance ``"adata.X"`` or ``"adata.layers['counts']"``.
    input_scale
        ``"counts"`` (non-negative whole numbers), ``"normalized"`` (non-negative numbers), ``"log"`` (already
        log-normalised, non-negative), ``"real"`` (any numbers, used as they are), or ``"auto"``, which resolves to

        1. ``"counts"`` if all values are whole numbers, otherwise
        2. ``"normalized"`` if the largest value exceeds 20 (``log1p`` of 485 million), otherwise
        3. ``"normalized"`` if 256 evenly spaced cells have the same total as they are (within 1 %), and differ less
           than after ``log1p`` is undone (which hardly changes fractions), otherwise
        4. ``"log"``.

    Returns
    -------
    The resolved scale, one of the others.

    Raises
    ------
    TypeError
        The matrix is of another kind, or does not hold real numbers.
    ValueError
        A CSC matrix in a file; unknown ``input_scale``; NaN or infinite values; negative ones, unless
        ``input_scale="real"``; values that are not whole numbers although ``input_scale="counts"``; zeros everywhere;
        values too large or too small for float32.

    Warns
    -----
    UserWarning
        Cells, or genes, that are zero throughout, unless ``input_scale="real"``.
    """
    if input_scale != "auto" and input_scale not in get_args(InputScale):
        choices = ", ".join(map(repr, ("auto", *get_args(InputScale))))
        raise ValueError(f"input_scale={input_scale!r} is unknown: choose one of {choices}.")
    rows = open_rows(matrix, where)
    # CSC in memory is looked at column by column: as the rows of its transpose, which shares its values.
    turned = sparse.issparse(matrix) and matrix.format == "csc"
    found = _scan(open_rows(matrix.T) if turned else rows, turned=turned)

    if found.nan:
        raise ValueError(
            f"{where} contains {found.count('nan')} NaN, first at {found.position('nan')}: fill or remove the missing "
            "values before."
        )
    if found.infinite:
        raise ValueError(f"{where} contains {found.count('infinite')} infinite, first at {found.position('infinite')}.")
    if found.negative and input_scale != "real":
        raise ValueError(
            f"{where} contains {found.count('negative')} below zero (lowest {found.minimum:.4g}), first at "
            f"{found.position('negative')}. Centred or scaled expression cannot be used: pass layer= with counts or "
            'log-normalised values. For numbers that are no expression pass input_scale="real".'
        )
    if not found.expressed_in.any() and not found.negative:
        raise ValueError(f"{where} is zero everywhere: pass layer= with the measured expression.")
    largest = max(found.maximum, -found.minimum)
    if not _SMALLEST <= largest <= _LARGEST:
        raise ValueError(
            f"{where} has {largest:.4g} as its largest value, with which float32 cannot compute: check it, or bring "
            f"the values into a unit in which the largest is between {_SMALLEST:g} and {_LARGEST:g}."
        )
    if input_scale == "counts" and found.fractional:
        raise ValueError(
            f"{where} contains {found.count('fractional')} not whole numbers, first at {found.position('fractional')}, "
            'but input_scale="counts" needs raw counts: pass layer= with the counts, or input_scale="normalized" or '
            '"log".'
        )
    if input_scale != "real":
        _warn_empty(found, where)
    if input_scale != "auto":
        return cast("InputScale", input_scale)
    return "counts" if not found.fractional else _resolve_fractional(matrix if turned else rows, found)


@dataclass
class _Findings:
    """What one pass over a matrix found: numbers of values, and the first of each kind as (cell, gene)."""

    expressed_in: np.ndarray  # per cell, whether any gene is above zero
    expressed: np.ndarray  # per gene, whether above zero in any cell
    nan: int = 0
    infinite: int = 0
    negative: int = 0
    fractional: int = 0
    minimum: float = np.inf
    maximum: float = -np.inf
    first: dict[str, tuple[int, int]] = field(default_factory=dict)

    def count(self, kind: str) -> str:
        number = getattr(self, kind)
        return f"{number:,} value that is" if number == 1 else f"{number:,} values that are"

    def position(self, kind: str) -> str:
        cell, gene = self.first[kind]
        return f"cell {cell}, gene {gene} (positions counted from 0)"


def _scan(rows: MatrixRows, *, turned: bool) -> _Findings:
    """Look at all values once; ``turned`` tells that rows are genes."""
    major, minor = np.zeros(rows.shape[0], dtype=bool), np.zeros(rows.shape[1], dtype=bool)
    found = _Findings(*((minor, major) if turned else (major, minor)))
    for first, piece in rows.stream(CHUNK_VALUES):
        values = piece.ravel() if isinstance(piece, np.ndarray) else piece.data
        if not values.size:
            continue

        def note(kind: str, mask: np.ndarray, first: int = first, piece: Any = piece) -> None:
            number = int(np.count_nonzero(mask))
            if number:
                setattr(found, kind, getattr(found, kind) + number)
                row, column = _place(piece, int(mask.argmax()))
                found.first.setdefault(kind, (column, first + row) if turned else (first + row, column))

        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            if not finite.all():
                nan = np.isnan(values)
                note("nan", nan)
                note("infinite", ~finite & ~nan)
                values = np.where(finite, values, 0)
            note("fractional", values != np.rint(values))
        found.minimum = min(found.minimum, float(values.min()))
        found.maximum = max(found.maximum, float(values.max()))
        if found.minimum < 0:
            note("negative", values < 0)
        above = values > 0
        if isinstance(piece, np.ndarray):
            above = above.reshape(piece.shape)
            major[first : first + len(piece)] = above.any(axis=1)
            minor |= above.any(axis=0)
        else:
            stored = np.diff(piece.indptr)
            all_above = bool(above.all())
            places = np.flatnonzero(stored) if all_above else np.repeat(np.arange(len(stored)), stored)[above]
            major[first + places] = True
            minor[piece.indices if all_above else piece.indices[above]] = True
    return found


def _place(piece: Any, index: int) -> tuple[int, int]:
    """Return row and column of the stored value at ``index``."""
    if isinstance(piece, np.ndarray):
        return divmod(index, piece.shape[1])
    return int(np.searchsorted(piece.indptr, index, side="right")) - 1, int(piece.indices[index])


def _warn_empty(found: _Findings, where: str) -> None:
    cells, genes = int((~found.expressed_in).sum()), int((~found.expressed).sum())
    if cells:
        warnings.warn(
            f"{cells:,} of {found.expressed_in.size:,} cells are empty (zero for every gene in {where}), first at "
            f"position {int(found.expressed_in.argmin())}. They are described by their neighbours alone; "
            "scanpy.pp.filter_cells(adata, min_counts=1) removes them.",
            UserWarning,
            stacklevel=3,
        )
    if genes:
        warnings.warn(
            f"{genes:,} of {found.expressed.size:,} genes are zero for every cell in {where}, first at position "
            f"{int(found.expressed.argmin())}. Nothing can be learned about them; "
            "scanpy.pp.filter_genes(adata, min_cells=1) removes them.",
            UserWarning,
            stacklevel=3,
        )


def _resolve_fractional(matrix: Any, found: _Findings) -> InputScale:
    if found.maximum > LOG_MAXIMUM:
        return "normalized"
    cells = np.flatnonzero(found.expressed_in)
    cells = cells[np.linspace(0, len(cells) - 1, min(_SAMPLED_CELLS, len(cells))).astype(int)]
    # scipy finds a few rows of CSC without the conversion that reading many needs.
    rows: Any = matrix.read(cells) if isinstance(matrix, MatrixRows) else matrix[cells]
    values = rows.astype(np.float64)

    def spread(matrix: Any) -> float:
        totals = np.asarray(matrix.sum(axis=1)).ravel()
        return float(np.ptp(totals)) / float(totals.mean()) if totals.size > 1 else np.inf

    own, undone = spread(values), spread(values.expm1() if sparse.issparse(values) else np.expm1(values))
    # Fractions are so small that undoing a logarithm leaves their totals about equal, but not as equal as they are.
    return "normalized" if own <= _CONSTANT_TOTAL and own + _ROUNDING < undone else "log"
