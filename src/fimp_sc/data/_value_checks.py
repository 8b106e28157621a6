"""Checks of expression values, in pieces small enough that no second copy of the matrix is ever made."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Iterator

InputScale = Literal["counts", "normalized", "log"]

CHUNK_VALUES = 1 << 20
LOG_MAXIMUM = 20.0
_SAMPLED_CELLS = 256
_CONSTANT_TOTAL = 0.01


def check_values(matrix: Any, *, where: str, input_scale: str = "auto") -> InputScale:
    """Check that a cells × genes matrix can be used as expression, and resolve its scale.

    Parameters
    ----------
    matrix
        CSR, CSC or dense array, ``(n_obs, n_vars)``, real numbers. Not changed, not copied.
    where
        Where the matrix was found, for messages, for instance ``"adata.X"`` or ``"adata.layers['counts']"``.
    input_scale
        ``"counts"`` (non-negative whole numbers), ``"normalized"`` (non-negative numbers), ``"log"`` (already
        log-normalised, non-negative), or ``"auto"``, which resolves to

        1. ``"counts"`` if all values are whole numbers, otherwise
        2. ``"normalized"`` if the largest value exceeds 20 (``log1p`` of 485 million), otherwise
        3. ``"log"`` if undoing ``log1p`` gives all of 256 evenly spaced cells the same total (within 1 %), otherwise
        4. ``"normalized"`` if these cells have the same total as they are, otherwise
        5. ``"log"``.

    Returns
    -------
    The resolved scale, ``"counts"``, ``"normalized"`` or ``"log"``.

    Raises
    ------
    TypeError
        The matrix is of another kind, or does not hold real numbers.
    ValueError
        Unknown ``input_scale``; NaN, infinite or negative values; values that are not whole numbers although
        ``input_scale="counts"``; no value above zero.

    Warns
    -----
    UserWarning
        Cells, or genes, that are zero throughout.
    """
    if input_scale != "auto" and input_scale not in get_args(InputScale):
        choices = ", ".join(map(repr, ("auto", *get_args(InputScale))))
        raise ValueError(f"input_scale={input_scale!r} is unknown: choose one of {choices}.")
    _check_kind(matrix, where)
    found = _scan(matrix)

    if found.nan:
        raise ValueError(
            f"{where} contains {found.count('nan')} NaN, first at {found.position('nan')}: fill or remove the missing "
            "values before."
        )
    if found.infinite:
        raise ValueError(f"{where} contains {found.count('infinite')} infinite, first at {found.position('infinite')}.")
    if found.negative:
        raise ValueError(
            f"{where} contains {found.count('negative')} below zero (lowest {found.minimum:.4g}), first at "
            f"{found.position('negative')}. Centred or scaled data cannot be used: pass layer= with counts or "
            "log-normalised values."
        )
    if not found.expressed_in.any():
        raise ValueError(f"{where} is zero everywhere: pass layer= with the measured expression.")
    if input_scale == "counts" and found.fractional:
        raise ValueError(
            f"{where} contains {found.count('fractional')} not whole numbers, first at {found.position('fractional')}, "
            'but input_scale="counts" needs raw counts: pass layer= with the counts, or input_scale="normalized" or '
            '"log".'
        )
    _warn_empty(found, where)
    if input_scale != "auto":
        return cast("InputScale", input_scale)
    return "counts" if not found.fractional else _resolve_fractional(matrix, found)


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


def _check_kind(matrix: Any, where: str) -> None:
    if isinstance(matrix, np.ndarray):
        if matrix.ndim != 2:
            raise TypeError(f"{where} must have two dimensions, cells × genes, found {matrix.ndim}.")
    elif not (sparse.issparse(matrix) and matrix.format in {"csr", "csc"}):
        kind = f"a sparse {matrix.format.upper()} matrix" if sparse.issparse(matrix) else f"{type(matrix).__name__}"
        advice = "convert it with .tocsr()" if sparse.issparse(matrix) else "bring it into memory in one of these forms"
        raise TypeError(f"{where} must be a CSR or CSC matrix or a numpy array, found {kind}: {advice}.")
    if matrix.dtype.kind not in "buif":
        raise TypeError(f"{where} must hold real numbers, found dtype {matrix.dtype}.")


def _chunks(matrix: Any) -> Iterator[tuple[np.ndarray, Any, Any]]:
    """Yield stored values in pieces, with the cell and the gene of each."""
    if isinstance(matrix, np.ndarray):
        array = np.asarray(matrix)
        step = max(1, CHUNK_VALUES // max(1, array.shape[1]))
        genes = np.arange(array.shape[1])
        for start in range(0, array.shape[0], step):
            block = array[start : start + step]
            yield block.ravel(), np.repeat(np.arange(start, start + len(block)), len(genes)), np.tile(genes, len(block))
        return
    n_stored = int(matrix.indptr[-1])
    for start in range(0, n_stored, CHUNK_VALUES):
        stop = min(start + CHUNK_VALUES, n_stored)
        # Chunks cut through rows (columns for CSC), so that one very long row costs no more than a short one.
        low = int(np.searchsorted(matrix.indptr, start, side="right")) - 1
        high = int(np.searchsorted(matrix.indptr, stop, side="left"))
        edges = np.clip(matrix.indptr[low : high + 1], start, stop)
        major = np.repeat(np.arange(low, high), np.diff(edges))
        minor = matrix.indices[start:stop]
        yield (matrix.data[start:stop], *((major, minor) if matrix.format == "csr" else (minor, major)))


def _scan(matrix: Any) -> _Findings:
    n_obs, n_vars = matrix.shape
    found = _Findings(np.zeros(n_obs, dtype=bool), np.zeros(n_vars, dtype=bool))

    def note(kind: str, mask: np.ndarray, cells: np.ndarray, genes: np.ndarray) -> None:
        number = int(np.count_nonzero(mask))
        if number:
            setattr(found, kind, getattr(found, kind) + number)
            index = int(mask.argmax())
            found.first.setdefault(kind, (int(cells[index]), int(genes[index])))

    for values, cells, genes in _chunks(matrix):
        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            if not finite.all():
                nan = np.isnan(values)
                note("nan", nan, cells, genes)
                note("infinite", ~finite & ~nan, cells, genes)
                values, cells, genes = values[finite], cells[finite], genes[finite]
            note("fractional", values != np.rint(values), cells, genes)
        if not values.size:
            continue
        found.minimum = min(found.minimum, float(values.min()))
        found.maximum = max(found.maximum, float(values.max()))
        if found.minimum < 0:
            note("negative", values < 0, cells, genes)
        above = values > 0
        found.expressed_in[cells[above]] = True
        found.expressed[genes[above]] = True
    return found


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
    values = matrix[cells].astype(np.float64)

    def constant(totals: Any) -> bool:
        totals = np.asarray(totals).ravel()
        return totals.size > 1 and float(np.ptp(totals)) <= _CONSTANT_TOTAL * float(totals.mean())

    undone = values.expm1() if sparse.issparse(values) else np.expm1(values)
    if not constant(undone.sum(axis=1)) and constant(values.sum(axis=1)):
        return "normalized"
    return "log"
