"""Expression as bins of a cell's own distribution, the values that scGPT reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from fimp_sc._draws import combined

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, NDArray
    from scipy import sparse
    from torch import Tensor

# Entries worked on at once: temporary arrays stay in the tens of megabytes however many cells there are.
_ENTRIES = 2**20


def bin_edges(value: ArrayLike, indptr: ArrayLike, n_bins: int) -> NDArray[np.float64]:
    """Return the edges of each cell's bins: quantiles of its values that are not zero.

    Parameters
    ----------
    value, indptr
        Values of all cells in compressed sparse rows, not negative. Zeros that are stored count as absent. Genes that
        the vocabulary lacks must have been left out.
    n_bins
        Number of bins, the one of zeros included; 3 or more.

    Returns
    -------
    ``(n_cells, n_bins - 1)`` float64, ascending; zeros for a cell without values. Equal to
    ``np.quantile(values, np.linspace(0, 1, n_bins - 1))`` of every cell.

    Raises
    ------
    ValueError
        ``n_bins`` is less than 3.
    """
    if n_bins < 3:
        raise ValueError(f"n_bins must be 3 or more (zeros have a bin of their own), found {n_bins}")
    values, starts = np.asarray(value), np.asarray(indptr, dtype=np.int64)
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    if not values.all():
        kept = np.concatenate([[0], np.cumsum(values != 0)])
        values, starts = values[values != 0], kept[starts]
    edges = np.zeros((len(starts) - 1, n_bins - 1))
    for cells in _slices(starts, padded=True):
        edges[cells] = _quantiles(values, starts[cells.start : cells.stop + 1], n_bins - 1)
    return edges


def bin_values(
    value: ArrayLike,
    indptr: ArrayLike,
    n_bins: int,
    *,
    gene: ArrayLike | None = None,
    cell: ArrayLike | None = None,
    ties: Literal["spread", "middle"] = "spread",
    random_state: int = 0,
    edges: NDArray[np.float64] | None = None,
) -> NDArray[np.float32]:
    r"""Return the bin of every value among those of its cell.

    A value between two edges has one bin. One that coincides with several edges, as the ones and twos of counts do,
    may have any bin from :math:`r + 1` to :math:`l`, where :math:`r` edges are smaller and :math:`l` not larger; it
    has :math:`\lceil l - u (l - r) \rceil`.

    Parameters
    ----------
    value, indptr, n_bins
        See :func:`bin_edges`.
    gene, cell
        ``(n_values,)`` and ``(n_cells,)`` integer keys, needed with ``ties="spread"``.
    ties
        ``"spread"`` draws :math:`u` from ``[0, 1)``, so that equal values fill their bins evenly, as scGPT was trained.
        It depends on nothing but the seed, the cell and the gene, hence not on what else is in a batch. ``"middle"``
        takes one half.
    random_state
        Seed of the draws.
    edges
        Those of :func:`bin_edges`, where they are known already.

    Returns
    -------
    ``(n_values,)`` float32 whole numbers: 1 to ``n_bins - 1``, and 0 for values that are zero.

    Raises
    ------
    ValueError
        ``ties`` is unknown, keys are missing, or ``n_bins`` is less than 3.

    Notes
    -----
    Source: the binning of scGPT, Nature Methods 2024 (doi 10.1038/s41592-024-02201-0), whose draws come from NumPy's
    global random state.
    """
    if ties not in ("spread", "middle"):
        raise ValueError(f"ties must be 'spread' or 'middle', found {ties!r}")
    if ties == "spread" and (gene is None or cell is None):
        raise ValueError("ties='spread' draws by cell and gene: pass cell= and gene=, or ties='middle'")
    values, starts = np.asarray(value), np.asarray(indptr, dtype=np.int64)
    if edges is None:
        edges = bin_edges(values, starts, n_bins)
    bins = np.empty(len(values), dtype=np.float32)
    u: NDArray[Any] | float = 0.5
    for cells in _slices(starts):
        entries = slice(starts[cells.start], starts[cells.stop])
        length = np.diff(starts[cells.start : cells.stop + 1])
        row = np.repeat(np.arange(len(length)), length)
        low, high = _ranks(values[entries].astype(np.float64), row, edges[cells])
        if ties == "spread":
            key = combined(combined(random_state, np.asarray(cell)[cells])[row], np.asarray(gene)[entries])
            u = (key >> np.uint64(11)) * 2.0**-53
        bins[entries] = np.ceil(u * (low - high) + high) * (values[entries] != 0)
    return bins


def content_key(cells: sparse.csr_matrix, gene_key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a key for each cell that depends only on which genes, by their ``(n_genes,)`` keys, have entries."""
    key = np.zeros(cells.shape[0], dtype=np.uint64)
    filled = np.flatnonzero(np.diff(cells.indptr))
    if len(filled):
        key[filled] = np.add.reduceat(combined(0, gene_key)[cells.indices], cells.indptr[filled])
    return key


def unbin(bins: Tensor, edges: Tensor) -> Tensor:
    """Return values on the scale of the cell's expression for bins, also for fractions of bins.

    Bin ``b`` stands for the edge at which it begins, and what lies between bins is interpolated: 0 is zero, 1 the
    cell's smallest value, the last bin its largest. So a value comes back as the edge below it, and one that coincides
    with an edge as itself, whichever of its bins it was given.

    Parameters
    ----------
    bins
        ``(n_cells, n_values)`` real numbers; those outside of the bins are taken to the nearest.
    edges
        ``(n_cells, n_bins - 1)`` of :func:`bin_edges`.

    Returns
    -------
    ``(n_cells, n_values)`` of the type of ``edges``, not negative; zeros for a cell without values.
    """
    points = torch.cat([edges.new_zeros(len(edges), 1), edges], dim=1)
    bins = bins.to(points.dtype).clamp(0, edges.shape[1])
    below = bins.detach().floor().clamp(max=edges.shape[1] - 1)
    at = below.long()
    return torch.lerp(points.gather(1, at), points.gather(1, at + 1), bins - below)


def _slices(indptr: NDArray[np.int64], *, padded: bool = False) -> Iterator[slice]:
    """Yield consecutive cells with a bounded number of entries, counted as a rectangle where ``padded``."""
    start, n_cells = 0, len(indptr) - 1
    while start < n_cells:
        stop = max(int(np.searchsorted(indptr, indptr[start] + _ENTRIES, side="right")) - 1, start + 1)
        if padded:
            widest = np.maximum.accumulate(np.diff(indptr[start : stop + 1]))
            fit = widest * np.arange(1, len(widest) + 1) <= 2 * _ENTRIES
            stop = start + max(int(fit.sum()), 1)
        yield slice(start, stop)
        start = stop


def _quantiles(value: NDArray[Any], indptr: NDArray[np.int64], n_edges: int) -> NDArray[np.float64]:
    """Return ``(n_cells, n_edges)`` quantiles, in NumPy's order of operations so that rounding is the same too."""
    length = np.diff(indptr)
    rows = np.full((len(length), max(int(length.max()), 1)), np.inf, dtype=value.dtype)
    rows[np.arange(rows.shape[1]) < length[:, None]] = value[indptr[0] : indptr[-1]]
    rows.sort(axis=1)
    rows[length == 0] = 0.0
    last = np.maximum(length - 1, 0)[:, None]
    position = last * np.linspace(0, 1, n_edges)
    below = np.floor(position).astype(np.int64)
    a, b = (np.take_along_axis(rows, at, axis=1) for at in (below, np.minimum(below + 1, last)))
    # The step keeps the precision of the values, as it does there.
    t, step = position - below, b - a
    return np.where(t >= 0.5, b - step * (1 - t), a + step * t)


def _ranks(
    value: NDArray[np.float64], row: NDArray[np.int64], edges: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many edges of its row are smaller than each value, and how many are not larger."""
    # Binary search of all values at once; edges are filled up to one less than a power of two.
    n_steps = edges.shape[1].bit_length()
    width = 2**n_steps - 1
    filled = np.full((len(edges), width), np.inf)
    filled[:, : edges.shape[1]] = edges
    flat, base = filled.ravel(), row * width - 1
    counts = []
    for passed in (np.less, np.less_equal):
        at = base.copy()
        for step in (2**i for i in reversed(range(n_steps))):
            at += step * passed(flat.take(at + step), value)
        counts.append(at - base)
    return counts[0], counts[1]
