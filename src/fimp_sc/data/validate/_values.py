"""Checks of expression values, in pieces small enough that no second copy of the matrix is ever made in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np
from scipy import sparse

from fimp_sc._logging import warn
from fimp_sc.data.storage._elements import shorten
from fimp_sc.data.storage._rows import PIECE_VALUES, MatrixRows, open_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

InputScale = Literal["counts", "normalized", "log", "real"]

CHUNK_VALUES = PIECE_VALUES
LOG_MAXIMUM = 20.0
# Of larger logarithms float32 cannot hold the number.
_LARGEST_LOG = 88.0
_SAMPLED_CELLS = 256
_CONSTANT_TOTAL = 0.01
_ROUNDING = 1e-6
# Of cells whose values are whole multiples of the smallest; of multiples up to this one, to this precision.
_MOST, _MULTIPLES, _PRECISION = 0.5, 8.5, 1e-3
# A gene that others express is not measured in a sample if that sample would show it this often, and shows none: chance
# alone does so once in a million. Single genes may have reasons; a panel lacks this fraction of the genes at least.
_EXPECTED, _FRACTION_OF_PANEL = 14.0, 0.01


# Cells among which genes that no cell shows carry little of the counts, whichever these cells are.
LARGE_SAMPLE = 100


class Values(NamedTuple):
    """Properties of a matrix that has been looked at.

    Attributes
    ----------
    scale
        Resolved.
    lacking
        ``(n_samples, n_vars)`` bool, genes that were not measured in a sample; ``None`` where all were in all.
    silent
        ``(n_samples, n_vars)`` bool, genes that no cell of a large sample shows, of those that may have been measured.
    """

    scale: InputScale
    lacking: NDArray[np.bool_] | None
    silent: NDArray[np.bool_]


class Samples(NamedTuple):
    """Sample of each cell.

    Attributes
    ----------
    code
        ``(n_obs,)`` int64 position in ``names``; -1 for cells that do not matter.
    names
        Of the samples.
    key
        Column of ``obs`` that holds them.
    lacking
        ``(n_samples, n_vars)`` bool, genes of which it is known that a sample did not measure them.
    """

    code: NDArray[np.int64]
    names: Sequence[str]
    key: str
    lacking: NDArray[np.bool_] | None = None


# Sums of squares of larger values overflow float32, those of smaller ones are zero there.
_SMALLEST, _LARGEST = 1e-12, 1e15


def check_values(matrix: Any, *, where: str, input_scale: str = "auto") -> InputScale:
    """Return the scale that :func:`inspect_values` resolves, of a matrix whose genes were all measured."""
    return inspect_values(matrix, where=where, input_scale=input_scale).scale


def inspect_values(
    matrix: Any,
    *,
    where: str,
    input_scale: str = "auto",
    samples: Samples | None = None,
    learned: bool = True,
    joint: bool = False,
) -> Values:
    """Check that a cells × genes matrix can be used as expression; resolve its scale and which genes were measured.

    Parameters
    ----------
    matrix
        ``(n_obs, n_vars)`` real numbers in any form that
        :func:`~fimp_sc.data.storage._rows.open_rows` reads. Not changed, not copied; what is not in memory is read
        once, piece by piece.
    where
        Where the matrix was found, for messages, for instance ``"adata.X"`` or ``"adata.layers['counts']"``.
    input_scale
        ``"counts"`` (non-negative whole numbers), ``"normalized"`` (non-negative numbers), ``"log"`` (already
        log-normalized, non-negative), ``"real"`` (any numbers, used as they are), or ``"auto"``, which resolves to

        1. ``"counts"`` if all values are whole numbers, otherwise
        2. ``"normalized"`` if the largest value exceeds 20 (``log1p`` of 485 million), otherwise by 256 evenly spaced
           cells
           (logarithms of base 2 and 10 are undone, too, to see what fits)
        3. ``"normalized"`` if the values of most of them are whole multiples of the cell's smallest, as of counts that
           were divided by something; ``"log"`` if they are so when a logarithm is undone,
        4. ``"normalized"`` if they have the same total (within 1 %) as they are, and differ less than when a logarithm
           is undone (which hardly changes fractions); ``"log"`` if they have the same total when a logarithm is undone,
        5. with a warning, as this is a guess, ``"normalized"`` if most values above zero are between 0.5 and 1, as of
           counts that were corrected for ambient molecules, and ``"log"`` if not; also of square roots.
    samples
        Samples that may have been measured with other genes, as after ``ad.concat(join="outer")``. Genes that are NaN
        throughout a sample were not measured in it. So were genes that are zero throughout a sample (unless
        ``input_scale="real"``) if at least 14 of its cells would express them, had they the rate of the other samples
        (given by how many cells express a gene, for each that expresses one of the genes of this sample; the
        probability of none by chance is 1e-6), provided that these are at least 1 % of all genes so expected: single
        genes may be silent in one sample for other reasons.

    learned
        Whether a model is to learn from the values, rather than to be applied to them.
    joint
        Whether cells have other modalities that are read together with these values.

    Returns
    -------
    The resolved scale, one of the others, and which genes were not measured.

    Raises
    ------
    TypeError
        The matrix is of another kind, or does not hold real numbers.
    ValueError
        A CSC matrix in a file; unknown ``input_scale``; infinite values; NaN that do not fill a gene throughout a
        sample; negative ones, unless ``input_scale="real"``; values that are not whole numbers although
        ``input_scale="counts"``, or too large for logarithms although ``input_scale="log"``; zeros everywhere; values
        too large or too small for float32.

    Warns
    -----
    UserWarning
        Cells, or genes, that are zero throughout, unless ``input_scale="real"``; genes that were not measured in some
        samples; a scale that is a guess.
    """
    if input_scale != "auto" and input_scale not in get_args(InputScale):
        choices = ", ".join(map(repr, ("auto", *get_args(InputScale))))
        raise ValueError(f"input_scale={input_scale!r} is unknown: choose one of {choices}.")
    rows = open_rows(matrix, where)
    # CSC in memory is looked at column by column: as the rows of its transpose, which shares its values.
    turned = sparse.issparse(matrix) and matrix.format == "csc"
    found = _scan(open_rows(matrix.T) if turned else rows, samples, turned=turned)

    lacking = None
    if found.nan:
        lacking = found.missing == found.n_cells[:, None]
        scattered = (found.missing > 0) & ~lacking
        if scattered.any():
            found.nan = int(found.missing[scattered].sum())
            found.first["nan"] = _first_nan(rows, scattered, found.code)
            raise ValueError(
                f"{where} contains {found.count('nan')} NaN, first at {found.position('nan')}. Genes that a sample did "
                "not measure may be NaN in all of its cells: "
                + (
                    "name the samples with library_key=. "
                    if samples is None
                    else f"these are not, by {samples.key!r}. "
                )
                + "Keep the genes that all cells have (ad.concat(..., join='inner'), or adata[:, genes]), or remove "
                "these cells; filled in, they would count as measured."
            )
    if found.infinite:
        raise ValueError(f"{where} contains {found.count('infinite')} infinite, first at {found.position('infinite')}.")
    if found.negative and input_scale != "real":
        raise ValueError(
            f"{where} contains {found.count('negative')} below zero (lowest {found.minimum:.4g}), first at "
            f"{found.position('negative')}. Centered or scaled expression cannot be used: pass layer= with counts or "
            'log-normalized values. For numbers that are no expression pass input_scale="real".'
        )
    if not found.expressed_in.any() and not found.negative:
        what = "NaN or zero" if found.nan else "zero"
        raise ValueError(f"{where} is {what} everywhere: pass layer= with the measured expression.")
    largest = max(found.maximum, -found.minimum)
    if not _SMALLEST <= largest <= _LARGEST:
        raise ValueError(
            f"{where} has {largest:.4g} as its largest value, with which float32 cannot compute: check it, or bring "
            f"the values into a unit in which the largest is between {_SMALLEST:g} and {_LARGEST:g}."
        )
    if input_scale == "log" and found.maximum > _LARGEST_LOG:
        raise ValueError(
            f'{where} has {largest:.4g} as its largest value, which no logarithm is, but input_scale="log": leave '
            'input_scale out, or pass "counts", "normalized" or, for numbers that are no expression, "real".'
        )
    if input_scale == "counts" and found.fractional:
        raise ValueError(
            f"{where} contains {found.count('fractional')} not whole numbers, first at {found.position('fractional')}, "
            'but input_scale="counts" needs raw counts: pass layer= with the counts, or input_scale="normalized" or '
            '"log".'
        )
    known = None if samples is None else samples.lacking
    if known is not None:
        lacking = known if lacking is None else lacking | known
    if input_scale != "real":
        silent = _silent(found)
        if silent is not None:
            lacking = silent if lacking is None else lacking | silent
        _warn_empty(found, where, lacking, learned=learned, joint=joint)
    guessed = lacking if lacking is None or known is None else lacking & ~known
    if guessed is not None and guessed.any():
        _warn_lacking(guessed, samples, where)
    shown = found.detected > 0 if found.detected.size else found.expressed[None]
    silent = ~shown & (found.n_cells >= LARGE_SAMPLE)[:, None] & (True if lacking is None else ~lacking)
    if input_scale != "auto":
        return Values(cast("InputScale", input_scale), lacking, silent)
    scale = _resolve_fractional(matrix if turned else rows, found, where) if found.fractional else "counts"
    return Values(scale, lacking, silent)


@dataclass
class _Findings:
    """Findings of one pass over a matrix: numbers of values, and the first of each kind as (cell, gene)."""

    expressed_in: np.ndarray  # per cell, whether any gene is above zero
    expressed: np.ndarray  # per gene, whether above zero in any cell
    code: np.ndarray  # per cell, its sample
    n_cells: np.ndarray  # per sample
    detected: np.ndarray  # per sample and gene, cells in which it is above zero; only of several samples
    missing: np.ndarray  # per sample and gene, cells in which it is NaN
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


def _scan(rows: MatrixRows, samples: Samples | None, *, turned: bool) -> _Findings:
    """Look at all values once; ``turned`` tells that rows are genes."""
    major, minor = np.zeros(rows.shape[0], dtype=bool), np.zeros(rows.shape[1], dtype=bool)
    cells, genes = (minor, major) if turned else (major, minor)
    code = np.zeros(len(cells), dtype=np.int64) if samples is None else samples.code
    n_samples = 1 if samples is None else len(samples.names)
    n_cells = np.bincount(code[code >= 0], minlength=n_samples)
    shape = (n_samples, len(genes))
    detected = np.zeros(shape if n_samples > 1 else (0, 0), dtype=np.int64)
    found = _Findings(cells, genes, code, n_cells, detected, np.zeros((0, 0), dtype=np.int64))

    def add(table: np.ndarray, piece: Any, first: int, mask: np.ndarray) -> None:
        """Count entries by sample and gene."""
        row, column = _entries(piece, mask)
        of, gene = (code[column], first + row) if turned else (code[first + row], column)
        here, of = np.unique(of, return_inverse=True)
        number = np.bincount(of * len(genes) + gene, minlength=len(here) * len(genes)).reshape(len(here), -1)
        table[here[here >= 0]] += number[here >= 0]

    for first, piece in _canonical(rows):
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
                if nan.any():
                    found.missing = found.missing if found.missing.size else np.zeros(shape, dtype=np.int64)
                    add(found.missing, piece, first, nan)
                values = np.where(finite, values, 0)
            note("fractional", values != np.rint(values))
        found.minimum = min(found.minimum, float(values.min()))
        found.maximum = max(found.maximum, float(values.max()))
        if found.minimum < 0:
            note("negative", values < 0)
        above = values > 0
        if detected.size:
            add(detected, piece, first, above)
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


def _canonical(rows: MatrixRows) -> Iterator[tuple[int, Any]]:
    """Yield pieces in which an entry that is stored in parts is their sum."""
    for first, piece in rows.stream(CHUNK_VALUES):
        yield first, _summed(piece)


def _summed(rows: Any) -> Any:
    if not sparse.issparse(rows) or rows.has_canonical_format:
        return rows
    rows = rows.copy()
    rows.sum_duplicates()
    return rows


def _entries(piece: Any, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and columns of the stored values that a mask names."""
    places = np.flatnonzero(mask)
    if isinstance(piece, np.ndarray):
        return np.divmod(places, piece.shape[1])
    return np.searchsorted(piece.indptr, places, side="right") - 1, piece.indices[places].astype(np.int64)


def _first_nan(rows: MatrixRows, scattered: np.ndarray, code: np.ndarray) -> tuple[int, int]:
    """Return the first cell and gene with a NaN of those that do not fill a sample."""
    for first, piece in _canonical(rows):
        cell, gene = _entries(piece, np.isnan(piece.ravel() if isinstance(piece, np.ndarray) else piece.data))
        stray = (code[first + cell] >= 0) & scattered[code[first + cell], gene]
        if stray.any():
            at = int(stray.argmax())
            return int(first + cell[at]), int(gene[at])
    raise AssertionError("a value that was NaN is not any more")


def _place(piece: Any, index: int) -> tuple[int, int]:
    """Return row and column of the stored value at ``index``."""
    if isinstance(piece, np.ndarray):
        return divmod(index, piece.shape[1])
    return int(np.searchsorted(piece.indptr, index, side="right")) - 1, int(piece.indices[index])


def _silent(found: _Findings) -> np.ndarray | None:
    """Return which genes a sample shows nowhere although it should by what the others show, ``(n_samples, n_vars)``."""
    lacking = np.zeros(found.detected.shape, dtype=bool)
    everywhere = found.detected.sum(0)
    for own, silent in zip(found.detected, lacking, strict=True):
        others, here = everywhere - own, own > 0
        if not others[here].any():
            continue
        expected = others * (own.sum() / others[here].sum()) >= _EXPECTED
        silent[:] = expected & ~here
        if silent.sum() < _FRACTION_OF_PANEL * expected.sum():
            silent[:] = False
    return lacking if lacking.any() else None


def _warn_lacking(lacking: np.ndarray, samples: Samples | None, where: str) -> None:
    n_vars = lacking.shape[1]
    if samples is None:
        warn(f"{int(lacking.sum()):,} of {n_vars:,} genes are NaN in {where} throughout: they count as not measured.")
        return
    number = lacking.sum(1)
    each = [f"{number[i]:,} in {samples.names[i]!r}" for i in np.flatnonzero(number).tolist()]
    warn(
        f"Some of the {n_vars:,} genes are zero or NaN in {where} throughout a sample of obs[{samples.key!r}], as in "
        f"an outer join of panels: {shorten(each)}. They count as not measured there: no tokens, no part in totals and "
        "losses, and values that can be imputed."
    )


def _warn_empty(found: _Findings, where: str, lacking: np.ndarray | None, *, learned: bool, joint: bool) -> None:
    never = ~found.expressed if lacking is None else ~found.expressed & ~lacking.all(0)
    cells, genes = int((~found.expressed_in).sum()), int(never.sum())
    if cells:
        others = "their other modalities and their neighbors" if joint else "their neighbors alone"
        warn(
            f"{cells:,} of {found.expressed_in.size:,} cells are empty (zero for every gene in {where}), first at "
            f"position {int(found.expressed_in.argmin())}. They are described by {others}; "
            "scanpy.pp.filter_cells(adata, min_counts=1) removes them."
        )
    # A crop need not show every gene, and what it does not show is measured all the same.
    if genes and learned:
        warn(
            f"{genes:,} of {found.expressed.size:,} genes are zero for every cell in {where}, first at position "
            f"{int(never.argmax())}. Nothing can be learned about them; "
            "scanpy.pp.filter_genes(adata, min_cells=1) removes them."
        )


def _resolve_fractional(matrix: Any, found: _Findings, where: str) -> InputScale:
    cells = np.flatnonzero(found.expressed_in)
    cells = cells[np.linspace(0, len(cells) - 1, min(_SAMPLED_CELLS, len(cells))).astype(int)]
    # scipy finds a few rows of CSC without the conversion that reading many needs.
    rows = matrix.read(cells) if isinstance(matrix, MatrixRows) else matrix[cells]
    # scipy makes no sparse matrix of half precision.
    rows = sparse.csr_matrix(rows if sparse.issparse(rows) else np.asarray(rows, dtype=np.float64))
    rows = _summed(rows.astype(np.float64))
    rows.data = np.nan_to_num(rows.data)  # not measured
    rows.eliminate_zeros()

    def undone(function: Callable[[Any], Any]) -> Any:
        return sparse.csr_matrix((function(rows.data), rows.indices, rows.indptr), shape=rows.shape)

    high = found.maximum > LOG_MAXIMUM
    linear, roots = _multiples(rows), _multiples(undone(np.square))
    before = [] if high else [undone(partial(_unlogged, base=base)) for base in (np.e, 2.0, 10.0)]
    logarithms = max(map(_multiples, before), default=0.0)
    # A small logarithm hardly differs from what it was taken of: what fits better counts.
    if max(linear, logarithms) > _MOST and linear != logarithms:
        return "normalized" if linear > logarithms else "log"
    square_roots = roots > _MOST >= max(linear, logarithms)
    if high and not square_roots:
        return "normalized"
    own, spread = _spread(rows), min(map(_spread, before), default=np.inf)
    if own <= _CONSTANT_TOTAL and own + _ROUNDING < spread:
        return "normalized"
    if spread <= _CONSTANT_TOTAL and spread + _ROUNDING < own:
        return "log"
    below_one = float(((rows.data > 0.5) & (rows.data <= 1)).mean())
    scale: InputScale = "normalized" if below_one > _MOST and not square_roots else "log"
    taken, other = (
        ("corrected counts", "log") if scale == "normalized" else ("logarithms, used as they are", "normalized")
    )
    looks = "look like square roots" if square_roots else "do not tell whether logarithms were taken"
    warn(
        f"The values of {where} are fractions up to {found.maximum:.4g} that {looks}: they are taken for {taken}. Pass "
        f"raw counts if you can, or confirm with input_scale={scale!r}; otherwise say {other!r}, or 'real' for numbers "
        "that are no expression."
    )
    return scale


def _unlogged(values: Any, base: float) -> Any:
    return np.expm1(values * np.log(base))


def _multiples(rows: sparse.csr_matrix) -> float:
    """Return the fraction of cells whose values are whole multiples of the smallest, of those with any other value."""
    filled = np.flatnonzero(np.diff(rows.indptr))
    ratio = rows.data / np.repeat(np.minimum.reduceat(rows.data, rows.indptr[filled]), np.diff(rows.indptr)[filled])
    cell = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    told = (ratio > 1 + _PRECISION) & (ratio < _MULTIPLES)
    off = told & (np.abs(ratio - np.rint(ratio)) > _PRECISION * ratio)
    tells = np.bincount(cell, told, minlength=rows.shape[0]) > 0
    broken = np.bincount(cell, off, minlength=rows.shape[0]) > 0
    return float((tells & ~broken).sum() / max(tells.sum(), 1))


def _spread(rows: sparse.csr_matrix) -> float:
    """Return the range of totals of cells, relative to their mean."""
    totals = np.asarray(rows.sum(axis=1)).ravel()
    return float(np.ptp(totals)) / float(totals.mean()) if totals.size > 1 else np.inf
