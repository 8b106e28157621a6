"""Expression as FIMP sees it: log-normalised, mapped onto the genes of the model, centred per technical batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from fimp_sc._logging import warn
from fimp_sc.data._rows import open_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from fimp_sc.data._checks import InputScale

# The mean of a batch is shrunk towards the training mean as if that many training cells were added to it.
_PRIOR_CELLS = 20.0
# A total that differs by this factor is not that of the same normalisation.
_OTHER_TOTAL = 2.0
# Rows read at once where rows are picked rather than streamed.
_ROWS = 4096


@dataclass
class GeneStatistics:
    """What the training cells tell about each gene of the model.

    Attributes
    ----------
    mean
        ``(n_genes,)`` float32, mean log-normalised expression.
    fraction
        ``(n_genes,)`` float32, share of all counts; sums to 1.
    target_sum
        Total to which the counts of each cell are scaled: the median total of all cells of the training object.
    """

    mean: NDArray[np.float32]
    fraction: NDArray[np.float32]
    target_sum: float


def used_as_is(input_scale: InputScale, trained_scale: InputScale | None) -> bool:
    """Tell whether values are taken as they are, rather than scaled to the total of training."""
    return input_scale == "real" or (input_scale == "log" and trained_scale in (None, "log", "real"))


class ExpressionSource:
    """Rows of expression in the genes of the model.

    Counts and normalised values are divided by the cell's total over the genes that the model knows, multiplied by
    ``target_sum`` (times the share that these genes have in the training data, when some are not measured) and
    ``log1p`` transformed; values on the log scale, and real numbers, are used as they are. Where training saw counts or
    normalised values, logarithms are undone first, as they may be those of another total. The user's matrix is never
    changed and stays where it is, in memory or on disk: one pass over it finds totals and means, after which only the
    rows of a block are read, and only they become dense.

    Parameters
    ----------
    matrix
        ``(n_obs, n_vars)`` in any form that :func:`~fimp_sc.data._rows.open_rows` reads.
    columns
        ``(n_genes,)`` int64, column of each gene of the model in ``matrix``, -1 where it is not measured.
    input_scale
        ``"counts"``, ``"normalized"``, ``"log"`` or ``"real"``.
    statistics
        Of the training cells; ``None`` while these are computed.
    batch
        ``(n_obs,)`` int64 code of the technical batch. Values are centred by the mean of the batch, shrunk towards
        the training mean.
    hidden
        ``(n_obs, n_vars)`` boolean CSR or array, True where a value is to be treated as not seen. Size factors are
        computed from all entries.
    absent
        ``(n_obs,)`` bool, nodes that were not measured at all; their rows are empty.
    trained_scale
        ``input_scale`` of the training cells; by default the same.

    Warns
    -----
    UserWarning
        Values on the log scale have another total than those of training, which were used as they are, too.
    """

    def __init__(
        self,
        matrix: Any,
        columns: NDArray[np.int64],
        input_scale: InputScale,
        statistics: GeneStatistics | None,
        batch: NDArray[np.int64] | None = None,
        hidden: sparse.spmatrix | NDArray[np.bool_] | None = None,
        absent: NDArray[np.bool_] | None = None,
        trained_scale: InputScale | None = None,
    ) -> None:
        self._rows = open_rows(matrix)
        self.absent = absent
        self._scale = input_scale
        self._as_is = used_as_is(input_scale, trained_scale)
        self.measured = columns >= 0
        n_obs, n_vars = self._rows.shape
        self._columns = columns
        # Gene of the model in each column of the matrix; None where they agree and nothing needs to move.
        self._gene: NDArray[np.int64] | None = None
        if len(columns) != n_vars or (columns != np.arange(n_vars)).any():
            self._gene = np.full(n_vars, -1, dtype=np.int64)
            self._gene[columns[self.measured]] = np.flatnonzero(self.measured)
        self._hidden = sparse.csr_matrix(hidden) if hidden is not None else None
        if self._hidden is not None:
            if self._hidden.shape != self._rows.shape:
                raise ValueError(
                    f"hidden must have the shape of the expression, {self._rows.shape}: found {self._hidden.shape}"
                )
            self._hidden = self._in_genes(self._hidden.astype(bool))
        self.batch = np.zeros(n_obs, dtype=np.int64) if batch is None else batch
        self.factor = np.ones(n_obs, dtype=np.float32)
        if statistics is None:
            total = self._totals()
            self.target_sum = float(np.median(total[total > 0])) if input_scale != "real" else 1.0
            if input_scale not in ("log", "real"):
                self.factor = _factor(total, self.target_sum)
            self.center = np.zeros((int(self.batch.max(initial=0)) + 1, len(columns)), np.float32)
        else:
            self.target_sum = statistics.target_sum
            self.center = self._factors_and_centers(statistics)

    @property
    def n_genes(self) -> int:
        """Number of genes of the model."""
        return len(self._columns)

    def rows(self, nodes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return ``(len(nodes), n_genes)`` float32 log-normalised values, 0 for genes that are not measured."""
        values = self._normalised(self._in_genes(self._rows.read(nodes)), nodes)
        return values.toarray() if sparse.issparse(values) else values

    def sparse_rows(self, nodes: NDArray[np.int64]) -> sparse.csr_matrix:
        """Return the same values as :meth:`rows` as CSR; for statistics that must not become dense."""
        parts = [
            sparse.csr_matrix(self._normalised(self._in_genes(self._rows.read(part)), part))
            for part in (nodes[i : i + _ROWS] for i in range(0, len(nodes), _ROWS))
        ]
        empty = sparse.csr_matrix((0, self.n_genes), dtype=np.float32)
        return sparse.csr_matrix(sparse.vstack([empty, *parts], format="csr"))

    def complete_rows(self, nodes: NDArray[np.int64], mean: NDArray[np.float32]) -> sparse.csr_matrix:
        """Return the same with the ``(n_genes,)`` mean in place of what is hidden."""
        rows = self.sparse_rows(nodes)
        if self._hidden is None:
            return rows
        hidden = self._hidden[nodes]
        return sparse.csr_matrix(self._visible(rows, nodes) + hidden.multiply(mean[None]), dtype=np.float32)

    def observed(self, nodes: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Return which genes are measured and not hidden, as the distinct patterns and the pattern of each node.

        Returns
        -------
        ``(n_patterns, n_genes)`` bool and ``(len(nodes),)`` int64. Without hidden entries there is one pattern.
        """
        absent = np.zeros(len(nodes), dtype=bool) if self.absent is None else self.absent[nodes]
        if self._hidden is not None:
            return self.measured & ~self._hidden[nodes].toarray() & ~absent[:, None], np.arange(len(nodes))
        if not absent.any():
            return self.measured[None], np.zeros(len(nodes), dtype=np.int64)
        return np.stack([self.measured, np.zeros_like(self.measured)]), absent.astype(np.int64)

    def gene_statistics(self, nodes: NDArray[np.int64]) -> GeneStatistics:
        """Compute mean and share of counts of each gene over those of ``nodes`` where it is not hidden."""
        total = np.zeros(self.n_genes, dtype=np.float64)
        counts = np.zeros(self.n_genes, dtype=np.float64)
        for part in (nodes[i : i + _ROWS] for i in range(0, len(nodes), _ROWS)):
            raw = self._in_genes(self._rows.read(part))
            if self._scale != "real":
                counts += _gene_sums(self._visible(self._linear(raw), part))
            total += _gene_sums(self._visible(self._normalised(raw, part), part))
        seen = np.full(self.n_genes, len(nodes))
        if self._hidden is not None:
            seen = np.maximum(seen - np.asarray(self._hidden[nodes].sum(0)).ravel(), 1)
            counts *= len(nodes) / seen
        return GeneStatistics(
            mean=(total / seen).astype(np.float32),
            fraction=(counts / max(float(counts.sum()), 1e-12)).astype(np.float32),
            target_sum=self.target_sum,
        )

    def present(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of ``nodes`` that were measured."""
        return nodes if self.absent is None else nodes[~self.absent[nodes]]

    def _in_genes(self, block: Any) -> Any:
        """Return a block of rows with the genes of the model as columns; sparse stays sparse."""
        if sparse.issparse(block) and not block.has_canonical_format:
            # An entry may be stored in parts, whose logarithms do not add up to that of their sum.
            block = block.copy()
            block.sum_duplicates()
        if self._gene is None:
            return block
        if not sparse.issparse(block):
            out = np.zeros((len(block), self.n_genes), dtype=block.dtype)
            out[:, self.measured] = block[:, self._columns[self.measured]]
            return out
        gene = self._gene[block.indices]
        known = gene >= 0
        indptr = np.concatenate([[0], np.cumsum(known)])[block.indptr]
        return sparse.csr_matrix((block.data[known], gene[known], indptr), shape=(block.shape[0], self.n_genes))

    def _linear(self, raw: Any) -> Any:
        """Return values of which the total of a cell is the sum."""
        return _apply(raw, np.expm1) if self._scale == "log" else raw

    def _normalised(self, raw: Any, nodes: NDArray[np.int64]) -> Any:
        if self._as_is:
            return raw.astype(np.float32)
        raw = self._linear(raw)
        if sparse.issparse(raw):
            data = raw.data.astype(np.float32)
            data *= np.repeat(self.factor[nodes], np.diff(raw.indptr))
            return sparse.csr_matrix((np.log1p(data, out=data), raw.indices, raw.indptr), shape=raw.shape)
        values = raw.astype(np.float32)
        values *= self.factor[nodes, None]
        return np.log1p(values, out=values)

    def _visible(self, values: Any, nodes: NDArray[np.int64]) -> Any:
        """Return values of ``nodes`` with zeros where they are hidden."""
        if self._hidden is None:
            return values
        hidden = self._hidden[nodes]
        if sparse.issparse(values):
            return values - values.multiply(hidden)
        values = values.copy()
        values[hidden.nonzero()] = 0.0
        return values

    def _stream(self) -> Iterator[tuple[NDArray[np.int64], Any]]:
        for first, block in self._rows.stream():
            yield np.arange(first, first + block.shape[0]), self._in_genes(block)

    def _totals(self) -> NDArray[np.float64]:
        return np.concatenate([_cell_sums(self._linear(raw)) for _, raw in self._stream()])

    def _factors_and_centers(self, statistics: GeneStatistics) -> NDArray[np.float32]:
        known = float(statistics.fraction[self.measured].sum())
        n_batches = int(self.batch.max()) + 1
        total = np.zeros((n_batches, self.n_genes))
        seen = np.zeros((n_batches, self.n_genes))
        seen_total = np.zeros(len(self.batch))
        for nodes, raw in self._stream():
            if not self._as_is:
                self.factor[nodes] = _factor(_cell_sums(self._linear(raw)), self.target_sum * known)
            elif self._scale == "log":
                seen_total[nodes] = _cell_sums(self._linear(self._visible(raw, nodes)))
            values = self._visible(self._normalised(raw, nodes), nodes)
            hidden = None if self._hidden is None else self._hidden[nodes]
            for code in np.unique(self.batch[nodes]):
                mine = self.batch[nodes] == code
                if self.absent is not None:
                    mine &= ~self.absent[nodes]
                total[code] += _gene_sums(values if mine.all() else values[mine])
                seen[code] += self.measured * float(mine.sum())
                if hidden is not None:
                    seen[code] -= np.asarray(hidden[mine].sum(0)).ravel() * self.measured
        if (seen_total > 0).any():
            shown = 1.0 if self._hidden is None else 1.0 - self._hidden.nnz / np.prod(self._hidden.shape)
            _check_total(float(np.median(seen_total[seen_total > 0])), self.target_sum * known * shown)
        mean = (total + _PRIOR_CELLS * statistics.mean) / (seen + _PRIOR_CELLS)
        return mean.astype(np.float32)


def _factor(total: NDArray[np.float64], target_sum: float) -> NDArray[np.float32]:
    return (target_sum / np.where(total > 0, total, 1.0)).astype(np.float32)


def _check_total(found: float, expected: float) -> None:
    if not expected / _OTHER_TOTAL <= found <= expected * _OTHER_TOTAL:
        warn(
            f"These log-normalised values have a median total of {found:,.4g} over the genes of the model, and those "
            f"it was trained on {expected:,.4g}: normalise both to the same total, or pass counts.",
        )


def _apply(block: Any, function: np.ufunc) -> Any:
    """Apply a function that keeps zeros."""
    if not sparse.issparse(block):
        return function(block)
    return sparse.csr_matrix((function(block.data), block.indices, block.indptr), shape=block.shape)


def _cell_sums(block: Any) -> NDArray[np.float64]:
    return np.asarray(block.sum(1, dtype=np.float64)).ravel()


def _gene_sums(block: Any) -> NDArray[np.float64]:
    if not sparse.issparse(block):
        return block.sum(0, dtype=np.float64)
    return np.asarray(np.bincount(block.indices, block.data, minlength=block.shape[1]), dtype=np.float64)
