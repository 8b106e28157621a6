"""Readers of expression: log-normalized, mapped onto the genes of the model, centered; one table or several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from scipy import sparse

from fimp_sc._logging import warn
from fimp_sc._recipe import recipe
from fimp_sc.data.storage._rows import open_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from fimp_sc.data.validate._checks import InputScale


# A total that differs by this factor is not that of the same normalization.
_OTHER_TOTAL = 2.0
# Rows read at once where rows are picked rather than streamed.
_ROWS = 4096
_ROUNDS = 100


@dataclass
class GeneStatistics:
    """Statistics of each gene of the model over the training cells.

    Attributes
    ----------
    mean
        ``(n_genes,)`` float32, mean log-normalized expression.
    fraction
        ``(n_genes,)`` float32, fraction of all counts; sums to 1.
    target_sum
        Total to which the counts of each cell are scaled: the median total of all cells of the training object. Of
        several tables ``(n_tables,)``; then ``fraction`` sums to 1 in each.
    """

    mean: NDArray[np.float32]
    fraction: NDArray[np.float32]
    target_sum: float | NDArray[np.float64]


class Panels(NamedTuple):
    """Genes that were not measured in every sample.

    Attributes
    ----------
    sample
        ``(n_obs,)`` int64 code of the sample of each cell.
    lacking
        ``(n_samples, n_vars)`` bool, columns that were not measured in a sample.
    """

    sample: NDArray[np.int64]
    lacking: NDArray[np.bool_]


class Gains(NamedTuple):
    """Factors by which log-normalized values of known batches are multiplied, which take out their technique.

    Attributes
    ----------
    batch
        ``(n_obs,)`` int64, row of ``factor`` of each cell, -1 where its batch is not known.
    factor
        ``(n_batches, n_genes)`` float32.
    """

    batch: NDArray[np.int64]
    factor: NDArray[np.float32]


def used_as_is(input_scale: InputScale, trained_scale: InputScale | None) -> bool:
    """Tell whether values are taken as they are, rather than scaled to the total of training."""
    return input_scale == "real" or (input_scale == "log" and trained_scale in (None, "log", "real"))


class ExpressionReader:
    """Rows of expression in the genes of the model.

    Counts and normalized values are divided by the cell's total over the genes that the model knows and that are
    visible in this cell, multiplied by ``target_sum`` times the fraction that these genes have in the training data,
    and ``log1p`` transformed; values on the log scale, and real numbers, are used as they are. Where training saw
    counts or normalized values, logarithms are undone first, as they may be those of another total. The user's matrix
    is never changed and stays where it is, in memory or on disk: one pass over it finds totals and means, after which
    only the rows of a block are read, and only they become dense.

    Parameters
    ----------
    matrix
        ``(n_obs, n_vars)`` in any form that :func:`~fimp_sc.data.open_rows` reads.
    columns
        ``(n_genes,)`` int64, column of each gene of the model in ``matrix``, -1 where it is not measured.
    input_scale
        ``"counts"``, ``"normalized"``, ``"log"`` or ``"real"``.
    statistics
        Of the training cells; ``None`` while these are computed.
    batch
        ``(n_obs,)`` int64 code of the technical batch: values are centered by the mean of their batch, shrunk toward
        the training mean. Without, by the training mean, so that what is read of a cell does not depend on which other
        cells there are.
    hidden
        ``(n_obs, n_vars)`` boolean CSR or array, True where a value is to be treated as not seen. What is hidden has no
        influence on anything, but for values on the log scale that are used as they are: these carry the total that
        they were normalized with.
    absent
        ``(n_obs,)`` bool, nodes that were not measured at all; their rows are empty.
    trained_scale
        ``input_scale`` of the training cells; by default the same.
    panels
        Genes that only some samples measured, if that is so.
    gains
        Factors of the values of batches, if there are any.

    Attributes
    ----------
    measured
        ``(n_panels, n_genes)`` bool, genes of the model that each panel measured.
    panel
        ``(n_obs,)`` int64, panel of each cell.
    factor
        ``(n_obs,)`` float32, by which values of each cell (logarithms undone) are multiplied before ``log1p``.
    gene_key
        ``(n_genes,)`` keys of the genes, on which what is drawn for them depends; ``None`` for their places.

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
        panels: Panels | None = None,
        gene_key: NDArray[np.uint64] | None = None,
        gains: Gains | None = None,
    ) -> None:
        self._rows = open_rows(matrix)
        self.gene_key = gene_key
        self._gains: Gains | None = None
        if gains is not None:
            # The last row is that of batches that are not known.
            self._gains = Gains(gains.batch, np.vstack([gains.factor, np.ones_like(gains.factor[:1])]))
        self.absent = absent
        self._scale = input_scale
        self._as_is = used_as_is(input_scale, trained_scale)
        n_obs, n_vars = self._rows.shape
        self._columns = columns
        self._known = columns >= 0
        self.panel = np.zeros(n_obs, dtype=np.int64)
        self.measured = self._known[None]
        self._may_lack = panels is not None
        if panels is not None:
            # Columns of -1 pick any gene, which is not known then.
            measured = ~panels.lacking[:, columns] & self._known
            self.measured, code = np.unique(measured, axis=0, return_inverse=True)
            self.panel = code.ravel()[panels.sample].astype(np.int64)
        # Gene of the model in each column of the matrix; None where they agree and nothing needs to move.
        self._gene: NDArray[np.int64] | None = None
        if len(columns) != n_vars or (columns != np.arange(n_vars)).any():
            self._gene = np.full(n_vars, -1, dtype=np.int64)
            self._gene[columns[self._known]] = np.flatnonzero(self._known)
        self._hidden = sparse.csr_matrix(hidden) if hidden is not None else None
        if self._hidden is not None:
            if self._hidden.shape != self._rows.shape:
                raise ValueError(
                    f"hidden must have the shape of the expression, {self._rows.shape}: found {self._hidden.shape}"
                )
            self._hidden = self._in_genes(self._hidden.astype(bool))
            row = np.repeat(np.arange(n_obs), np.diff(self._hidden.indptr))
            self._hidden.data = self._hidden.data & self.measured[self.panel[row], self._hidden.indices]
            self._hidden.eliminate_zeros()
        self._own_means = batch is not None
        self.batch = np.zeros(n_obs, dtype=np.int64) if batch is None else batch
        self.factor = np.ones(n_obs, dtype=np.float32)
        # Expected fraction of a cell's total that its visible genes have.
        self._seen_fraction = np.ones(n_obs)
        if statistics is None:
            self.target_sum = 1.0
            if input_scale != "real":
                total, self._fraction = self._totals()
                if len(self.measured) > 1 or self._hidden is not None:
                    self._seen_fraction = self._visible_fraction(self._fraction)
                whole = total / np.where(self._seen_fraction > 0, self._seen_fraction, 1.0)
                self.target_sum = float(np.median(whole[whole > 0]))
                if input_scale != "log":
                    self.factor = _factor(total, self.target_sum * self._seen_fraction)
            self.center = np.zeros((int(self.batch.max(initial=0)) + 1, len(columns)), np.float32)
        else:
            self.target_sum, self._fraction = float(statistics.target_sum), statistics.fraction
            self._seen_fraction = self._visible_fraction(statistics.fraction)
            self.center = self._factors_and_centers(statistics)

    @property
    def n_genes(self) -> int:
        """Number of genes of the model."""
        return len(self._columns)

    def rows(self, nodes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return ``(len(nodes), n_genes)`` float32 log-normalized values, 0 for genes that are not measured."""
        values = self._normalized(self._in_genes(self._rows.read(nodes)), nodes)
        return values.toarray() if sparse.issparse(values) else values

    def sparse_rows(self, nodes: NDArray[np.int64]) -> sparse.csr_matrix:
        """Return the same values as :meth:`rows` as CSR; for statistics that must not become dense."""
        pieces = [
            sparse.csr_matrix(self._normalized(self._in_genes(self._rows.read(some)), some))
            for some in (nodes[i : i + _ROWS] for i in range(0, len(nodes), _ROWS))
        ]
        empty = sparse.csr_matrix((0, self.n_genes), dtype=np.float32)
        return sparse.csr_matrix(sparse.vstack([empty, *pieces], format="csr"))

    def counts(self, rows: sparse.csr_matrix, nodes: NDArray[np.int64]) -> sparse.csr_matrix:
        """Return ``(len(nodes), n_genes)`` rows of :meth:`sparse_rows` as they are stored, logarithms undone."""
        data = np.expm1(self._without_gains(rows, nodes).astype(np.float64))
        data /= np.repeat(self.factor[nodes], np.diff(rows.indptr))
        if self._scale == "counts":
            data = np.rint(data)
        return sparse.csr_matrix((data, rows.indices, rows.indptr), shape=rows.shape)

    def complete_rows(self, nodes: NDArray[np.int64], mean: NDArray[np.float32]) -> sparse.csr_matrix:
        """Return the same with the ``(n_genes,)`` mean in place of what is hidden, or measured in other panels only."""
        rows = self.sparse_rows(nodes)
        if len(self.measured) > 1:
            lacking = sparse.csr_matrix(np.where(self.measured.any(0) & ~self.measured, mean, 0.0))
            rows = rows + lacking[self.panel[nodes]]
        if self._hidden is not None:
            hidden = self._hidden[nodes]
            rows = self._visible(rows, nodes) + hidden.multiply(mean[None])
        return sparse.csr_matrix(rows, dtype=np.float32)

    def as_seen(
        self, rows: sparse.csr_matrix, nodes: NDArray[np.int64], visible: Tensor, pattern: Tensor
    ) -> sparse.csr_matrix:
        """Return rows as they are where some genes are masked: their scale tells nothing of these.

        Parameters
        ----------
        rows, nodes
            ``(n, n_genes)`` CSR of :meth:`sparse_rows`, and of which nodes.
        visible, pattern
            ``(n_patterns, n_genes)`` bool and ``(n,)`` int64: which genes each row shows.

        Returns
        -------
        ``(n, n_genes)`` CSR, scaled by totals of the visible genes alone; the same rows where values are used as they
        are.
        """
        if self._as_is:
            return rows
        shown = visible.numpy()
        # Not a product of matrices: the threads of NumPy's BLAS wait busily after it, where those of torch work.
        fraction = 1.0 - np.einsum("pg,g->p", ~shown, self._fraction.astype(np.float64))
        row, mask = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr)), pattern.numpy()
        data = np.expm1(self._without_gains(rows, nodes))
        kept = shown.ravel().take(mask.take(row) * shown.shape[1] + rows.indices)
        total = np.bincount(row, data * kept, minlength=rows.shape[0]).astype(np.float64)
        data *= _factor(total, self.target_sum * fraction[mask]).take(row)
        seen = sparse.csr_matrix((np.log1p(data, out=data), rows.indices, rows.indptr), shape=rows.shape)
        return self._with_gains(seen, nodes)

    def observed(self, nodes: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Return which genes are measured and not hidden, as the distinct patterns and the pattern of each node.

        Returns
        -------
        ``(n_patterns, n_genes)`` bool and ``(len(nodes),)`` int64. Without hidden entries there is one pattern for each
        panel that these nodes have, and one for those that were not measured at all.
        """
        absent = np.zeros(len(nodes), dtype=bool) if self.absent is None else self.absent[nodes]
        if self._hidden is not None:
            measured = self.measured[self.panel[nodes]]
            return measured & ~self._hidden[nodes].toarray() & ~absent[:, None], np.arange(len(nodes))
        patterns = np.concatenate([self.measured, np.zeros((1, self.n_genes), dtype=bool)])
        here, pattern = np.unique(np.where(absent, len(self.measured), self.panel[nodes]), return_inverse=True)
        return patterns[here], pattern.ravel().astype(np.int64)

    def gene_statistics(self, nodes: NDArray[np.int64]) -> GeneStatistics:
        """Compute mean and fraction of counts of each gene over those of ``nodes`` where it is measured and seen."""
        total = np.zeros(self.n_genes, dtype=np.float64)
        counts, seen = np.zeros((2, *self.measured.shape))
        for some in (nodes[i : i + _ROWS] for i in range(0, len(nodes), _ROWS)):
            raw = self._in_genes(self._rows.read(some))
            if self._scale != "real":
                self._add_by_panel(counts, self._visible(self._linear(raw), some), some)
            total += _gene_sums(self._visible(self._normalized(raw, some), some))
            seen += self._seen(some)
        return GeneStatistics(
            mean=(total / np.maximum(seen.sum(0), 1)).astype(np.float32),
            fraction=_fractions(counts, seen).astype(np.float32),
            target_sum=self.target_sum,
        )

    def present(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of ``nodes`` that were measured."""
        return nodes if self.absent is None else nodes[~self.absent[nodes]]

    def factors(self, nodes: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return ``(len(nodes), len(columns))`` float32, by which values of genes were multiplied before ``log1p``."""
        return np.broadcast_to(self.factor[nodes, None], (len(nodes), len(columns)))

    def gains(self, nodes: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return ``(len(nodes), len(columns))`` float32, by which logarithms of genes were multiplied."""
        if self._gains is None:
            return np.ones((len(nodes), len(columns)), dtype=np.float32)
        return self._gains.factor[:, columns][self._gains.batch[nodes]]

    def _in_genes(self, block: Any) -> Any:
        """Return a block of rows with the genes of the model as columns; sparse stays sparse."""
        if self._may_lack and block.dtype.kind == "f":
            # Genes that were not measured may be NaN.
            block = _apply(block, np.nan_to_num)
        if sparse.issparse(block) and not block.has_canonical_format:
            # An entry may be stored in parts, whose logarithms do not add up to that of their sum.
            block = block.copy()
            block.sum_duplicates()
        if self._gene is None:
            return block
        if not sparse.issparse(block):
            out = np.zeros((len(block), self.n_genes), dtype=block.dtype)
            out[:, self._known] = block[:, self._columns[self._known]]
            return out
        gene = self._gene[block.indices]
        known = gene >= 0
        indptr = np.concatenate([[0], np.cumsum(known)])[block.indptr]
        return sparse.csr_matrix((block.data[known], gene[known], indptr), shape=(block.shape[0], self.n_genes))

    def _linear(self, raw: Any) -> Any:
        """Return values of which the total of a cell is the sum."""
        return _apply(raw, np.expm1) if self._scale == "log" else raw

    def _normalized(self, raw: Any, nodes: NDArray[np.int64]) -> Any:
        return self._with_gains(self._logarithms(raw, nodes), nodes)

    def _with_gains(self, values: Any, nodes: NDArray[np.int64]) -> Any:
        if self._gains is None:
            return values
        if not sparse.issparse(values):
            return values * self._gains.factor[self._gains.batch[nodes]]
        return sparse.csr_matrix(
            (values.data * self._gain_of(values, nodes), values.indices, values.indptr), shape=values.shape
        )

    def _without_gains(self, rows: sparse.csr_matrix, nodes: NDArray[np.int64]) -> NDArray[np.float32]:
        return rows.data if self._gains is None else rows.data / self._gain_of(rows, nodes)

    def _gain_of(self, rows: sparse.csr_matrix, nodes: NDArray[np.int64]) -> NDArray[np.float32]:
        batch, factor = cast("Gains", self._gains)
        return factor[np.repeat(batch[nodes], np.diff(rows.indptr)), rows.indices]

    def _logarithms(self, raw: Any, nodes: NDArray[np.int64]) -> Any:
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

    def _totals(self) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Return ``(n_obs,)`` totals of visible values, and the ``(n_genes,)`` fractions that genes have in totals."""
        total, (counts, seen) = np.zeros(len(self.panel)), np.zeros((2, *self.measured.shape))
        for nodes, raw in self._stream():
            values = self._visible(self._linear(raw), nodes)
            total[nodes] = _cell_sums(values)
            self._add_by_panel(counts, values, nodes)
            seen += self._seen(self.present(nodes))
        return total, _fractions(counts, seen).astype(np.float32)

    def _add_by_panel(self, sums: NDArray[np.float64], values: Any, nodes: NDArray[np.int64]) -> None:
        """Add sums over cells to ``(n_panels, n_genes)`` sums."""
        panel = self.panel[nodes]
        for code in np.unique(panel):
            mine = panel == code
            sums[code] += _gene_sums(values if mine.all() else values[mine])

    def _seen(self, nodes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return in how many of the nodes of each panel a gene is visible, ``(n_panels, n_genes)``."""
        number = np.bincount(self.panel[nodes], minlength=len(self.measured)).astype(np.float64)
        seen = number[:, None] * self.measured
        if self._hidden is not None:
            self._add_by_panel(seen, -self._hidden[nodes].astype(np.float64), nodes)
        return seen

    def _visible_fraction(self, fraction: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the ``(n_obs,)`` fraction of a total that the visible genes of each cell are expected to have."""
        # Less what is not seen: exactly 1 where all is.
        of_gene = fraction.astype(np.float64)
        seen = 1.0 - (~self.measured @ of_gene)[self.panel]
        return seen if self._hidden is None else np.maximum(seen - self._hidden.astype(np.float64) @ of_gene, 0.0)

    def _factors_and_centers(self, statistics: GeneStatistics) -> NDArray[np.float32]:
        n_batches = int(self.batch.max()) + 1
        total = np.zeros((n_batches, self.n_genes))
        seen = np.zeros((n_batches, self.n_genes))
        seen_total = np.zeros(len(self.batch))
        if self._as_is and self._scale != "log" and not self._own_means:
            return statistics.mean[None]
        for nodes, raw in self._stream():
            if not self._as_is:
                total_seen = _cell_sums(self._linear(self._visible(raw, nodes)))
                self.factor[nodes] = _factor(total_seen, self.target_sum * self._seen_fraction[nodes])
            elif self._scale == "log":
                seen_total[nodes] = _cell_sums(self._linear(self._visible(raw, nodes)))
            if not self._own_means:
                continue
            values = self._visible(self._normalized(raw, nodes), nodes)
            for code in np.unique(self.batch[nodes]):
                mine = self.batch[nodes] == code
                if self.absent is not None:
                    mine &= ~self.absent[nodes]
                total[code] += _gene_sums(values if mine.all() else values[mine])
                seen[code] += self._seen(nodes[mine]).sum(0)
        there = seen_total > 0
        if there.any():
            _check_total(
                float(np.median(seen_total[there])), self.target_sum * float(np.median(self._seen_fraction[there]))
            )
        if not self._own_means:
            return statistics.mean[None]
        prior = recipe().prior_cells
        mean = (total + prior * statistics.mean) / (seen + prior)
        return mean.astype(np.float32)


def _factor(total: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return what brings totals to those wanted; 1 where there is nothing to go by."""
    there = (total > 0) & (wanted > 0)
    return np.where(there, wanted / np.where(there, total, 1.0), 1.0).astype(np.float32)


def _fractions(sums: NDArray[np.float64], seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the fraction of a total that each gene has, where not every gene is seen in every cell.

    Parameters
    ----------
    sums, seen
        ``(n_panels, n_genes)``: of values that are seen, and number of cells in which they are.

    Returns
    -------
    ``(n_genes,)``, summing to 1: the fractions of highest likelihood where counts are Poisson with a rate of
    fraction times depth of the panel, found in turn with these depths. Zeros where there are no values.
    """
    weight = seen / np.maximum(seen.max(1, keepdims=True), 1)
    own = sums.sum(1)
    depth, fraction = own, np.zeros(sums.shape[1])
    for _ in range(_ROUNDS):
        fraction = sums.sum(0) / np.maximum(depth @ weight, 1e-300)
        fraction /= max(float(fraction.sum()), 1e-300)
        last, depth = depth, own / np.maximum(weight @ fraction, 1e-300)
        if np.allclose(depth, last, rtol=1e-6):
            break
    return fraction


def _check_total(found: float, expected: float) -> None:
    if not expected / _OTHER_TOTAL <= found <= expected * _OTHER_TOTAL:
        warn(
            f"These log-normalized values have a median total of {found:,.4g} over the genes of the model, and those "
            f"it was trained on {expected:,.4g}: normalize both to the same total, or pass counts.",
        )


def _apply(block: Any, function: Callable[[Any], Any]) -> Any:
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


class JoinedExpression:
    """Rows of several tables side by side, with the interface of :class:`~fimp_sc.data.ExpressionReader`.

    Each table keeps its own scale: values are scaled to totals of the same table.

    Parameters
    ----------
    sources
        One for each table, of the same nodes in the same batches.

    Attributes
    ----------
    batch
        ``(n_obs,)`` int64, of all of them.
    absent
        ``(n_obs,)`` bool, nodes that no table has; ``None`` if there are none.
    target_sum
        ``(n_tables,)`` float64.
    gene_key
        ``(n_genes,)``, see :class:`ExpressionReader`; ``None`` where a table has none.
    """

    def __init__(self, sources: Sequence[ExpressionReader]) -> None:
        self.sources = list(sources)
        self.batch = self.sources[0].batch
        absent = np.all([_absent(source) for source in self.sources], axis=0)
        self.absent: NDArray[np.bool_] | None = absent if absent.any() else None
        self.target_sum = np.array([source.target_sum for source in self.sources])
        keys = [source.gene_key for source in self.sources if source.gene_key is not None]
        whole = len(keys) == len(self.sources)
        self.gene_key: NDArray[np.uint64] | None = np.concatenate(keys) if whole else None
        self._bounds = np.cumsum([0, *(source.n_genes for source in self.sources)])
        self.center: NDArray[np.float32] = np.concatenate([source.center for source in self.sources], axis=1)

    @property
    def n_genes(self) -> int:
        """Number of columns of all tables."""
        return int(self._bounds[-1])

    @property
    def measured(self) -> NDArray[np.bool_]:
        """``(1, n_genes)`` bool, columns that any node has."""
        return np.concatenate([source.measured.any(0) for source in self.sources])[None]

    def rows(self, nodes: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :meth:`ExpressionReader.rows`."""
        return np.concatenate([source.rows(nodes) for source in self.sources], axis=1)

    def sparse_rows(self, nodes: NDArray[np.int64]) -> sparse.csr_matrix:
        """See :meth:`ExpressionReader.sparse_rows`."""
        return _side_by_side([source.sparse_rows(nodes) for source in self.sources])

    def complete_rows(self, nodes: NDArray[np.int64], mean: NDArray[np.float32]) -> sparse.csr_matrix:
        """See :meth:`ExpressionReader.complete_rows`; nodes that lack a table have its mean."""
        tables = []
        for source, own in zip(self.sources, self._split(mean), strict=True):
            rows, lacking = source.complete_rows(nodes, own), _absent(source)[nodes]
            if lacking.any():
                rows = rows + sparse.csr_matrix(lacking[:, None].astype(np.float32)) @ sparse.csr_matrix(own[None])
            tables.append(rows)
        return _side_by_side(tables)

    def as_seen(
        self, rows: sparse.csr_matrix, nodes: NDArray[np.int64], visible: Tensor, pattern: Tensor
    ) -> sparse.csr_matrix:
        """See :meth:`ExpressionReader.as_seen`."""
        bounds = zip(self.sources, self._bounds[:-1], self._bounds[1:], strict=True)
        return _side_by_side([s.as_seen(rows[:, a:b], nodes, visible[:, a:b], pattern) for s, a, b in bounds])

    def observed(self, nodes: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """See :meth:`ExpressionReader.observed`."""
        found = [source.observed(nodes) for source in self.sources]
        codes, pattern = np.unique(np.stack([code for _, code in found], axis=1), axis=0, return_inverse=True)
        patterns = [own[codes[:, i]] for i, (own, _) in enumerate(found)]
        return np.concatenate(patterns, axis=1), pattern.ravel().astype(np.int64)

    def gene_statistics(self, nodes: NDArray[np.int64]) -> GeneStatistics:
        """See :meth:`ExpressionReader.gene_statistics`; of each table over the nodes that have it.

        Raises
        ------
        ValueError
            None of the nodes has one of the tables.
        """
        found = []
        for source in self.sources:
            there = source.present(nodes)
            if not len(there):
                raise ValueError("No training node has values of one of the tables: check train_indices.")
            found.append(source.gene_statistics(there))
        return GeneStatistics(
            np.concatenate([one.mean for one in found]),
            np.concatenate([one.fraction for one in found]),
            self.target_sum,
        )

    def present(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of ``nodes`` that any table has."""
        return nodes if self.absent is None else nodes[~self.absent[nodes]]

    def factors(self, nodes: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :meth:`ExpressionReader.factors`."""
        factor = np.stack([source.factor[nodes] for source in self.sources], axis=1)
        return factor[:, np.searchsorted(self._bounds, columns, side="right") - 1]

    def gains(self, nodes: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :meth:`ExpressionReader.gains`."""
        tables = [source.gains(nodes, np.arange(source.n_genes)) for source in self.sources]
        return np.concatenate(tables, axis=1)[:, columns]

    def _split(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        return np.split(values, self._bounds[1:-1])


def split_statistics(statistics: GeneStatistics | None, sizes: Sequence[int]) -> list[GeneStatistics | None]:
    """Return statistics of each of several tables with these numbers of columns."""
    if statistics is None:
        return [None] * len(sizes)
    cuts = np.cumsum(sizes)[:-1]
    means, fractions = np.split(statistics.mean, cuts), np.split(statistics.fraction, cuts)
    totals = np.atleast_1d(statistics.target_sum)
    return [GeneStatistics(*own[:2], float(own[2])) for own in zip(means, fractions, totals, strict=True)]


def _absent(source: ExpressionReader) -> NDArray[np.bool_]:
    return np.zeros(len(source.batch), dtype=bool) if source.absent is None else source.absent


def _side_by_side(tables: Sequence[sparse.csr_matrix]) -> sparse.csr_matrix:
    return sparse.csr_matrix(sparse.hstack(tables, format="csr"))
