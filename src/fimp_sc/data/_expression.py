"""Expression as FIMP sees it: log-normalised, mapped onto the genes of the model, centred per technical batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fimp_sc.data._checks import InputScale

# The mean of a batch is shrunk towards the training mean as if that many training cells were added to it.
_PRIOR_CELLS = 20.0
_ROWS = 1024


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
        Total to which the counts of each cell are scaled; the median total of the training cells.
    """

    mean: NDArray[np.float32]
    fraction: NDArray[np.float32]
    target_sum: float


class ExpressionSource:
    """Rows of expression in the genes of the model.

    Counts and normalised values are divided by the cell's total over the genes that the model knows, multiplied by
    ``target_sum`` (times the share that these genes have in the training data, when some are not measured) and
    ``log1p`` transformed; values on the log scale are used as they are. The user's matrix is never changed and
    stays sparse: only the rows of a block become dense.

    Parameters
    ----------
    matrix
        ``(n_obs, n_vars)`` CSR, CSC or dense.
    columns
        ``(n_genes,)`` int64, column of each gene of the model in ``matrix``, -1 where it is not measured.
    input_scale
        ``"counts"``, ``"normalized"`` or ``"log"``.
    statistics
        Of the training cells; ``None`` while these are computed.
    batch
        ``(n_obs,)`` int64 code of the technical batch. Values are centred by the mean of the batch, shrunk towards
        the training mean.
    hidden
        ``(n_obs, n_vars)`` boolean CSR or array, True where a value is to be treated as not seen. Size factors are
        computed from all entries.
    """

    def __init__(
        self,
        matrix: sparse.spmatrix | NDArray[np.floating],
        columns: NDArray[np.int64],
        input_scale: InputScale,
        statistics: GeneStatistics | None,
        batch: NDArray[np.int64] | None = None,
        hidden: sparse.spmatrix | NDArray[np.bool_] | None = None,
    ) -> None:
        self._matrix: Any = sparse.csr_matrix(matrix) if sparse.issparse(matrix) else np.asarray(matrix)
        self._columns = columns
        self._scale = input_scale
        self._hidden = sparse.csr_matrix(hidden) if hidden is not None else None
        self.measured = columns >= 0
        n_obs = self._matrix.shape[0]
        if self._hidden is not None and self._hidden.shape != self._matrix.shape:
            raise ValueError(
                f"hidden must have the shape of the expression, {self._matrix.shape}: found {self._hidden.shape}"
            )
        # Values on the log scale are used as they are: of their totals only the common one is ever needed.
        total = self._totals() if input_scale != "log" or statistics is None else np.ones(n_obs)
        self.target_sum = statistics.target_sum if statistics else float(np.median(total[total > 0]))
        if input_scale == "log":
            self.factor = np.ones(n_obs, dtype=np.float32)
        else:
            known = float(statistics.fraction[self.measured].sum()) if statistics else 1.0
            self.factor = (self.target_sum * known / np.where(total > 0, total, 1.0)).astype(np.float32)
        self.batch = np.zeros(n_obs, dtype=np.int64) if batch is None else batch
        self.center = self._centers(statistics) if statistics else np.zeros((1, len(columns)), np.float32)

    @property
    def n_genes(self) -> int:
        """Number of genes of the model."""
        return len(self._columns)

    def rows(self, nodes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return ``(len(nodes), n_genes)`` float32 log-normalised values, 0 for genes that are not measured."""
        block = self._raw(nodes)
        if self._scale != "log":
            block *= self.factor[nodes, None]
            np.log1p(block, out=block)
        return block

    def observed(self, nodes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return ``(len(nodes), n_genes)`` bool: the gene is measured and its value not hidden."""
        seen = np.broadcast_to(self.measured, (len(nodes), self.n_genes)).copy()
        if self._hidden is not None:
            seen[:, self.measured] &= ~self._hidden[nodes].toarray().astype(bool)[:, self._columns[self.measured]]
        return seen

    def sparse_rows(self, nodes: NDArray[np.int64]) -> sparse.csr_matrix:
        """Return the same values as :meth:`rows` as CSR; for statistics that must not become dense."""
        parts = [sparse.csr_matrix(self.rows(nodes[i : i + _ROWS])) for i in range(0, len(nodes), _ROWS)]
        empty = sparse.csr_matrix((0, self.n_genes), dtype=np.float32)
        return sparse.csr_matrix(sparse.vstack([empty, *parts], format="csr"))

    def gene_statistics(self, nodes: NDArray[np.int64]) -> GeneStatistics:
        """Compute mean and share of counts of each gene over ``nodes``."""
        mean = np.zeros(self.n_genes, dtype=np.float64)
        counts = np.zeros(self.n_genes, dtype=np.float64)
        for i in range(0, len(nodes), _ROWS):
            raw = self._raw(nodes[i : i + _ROWS])
            counts += (np.expm1(raw) if self._scale == "log" else raw).sum(0, dtype=np.float64)
            mean += self.rows(nodes[i : i + _ROWS]).sum(0, dtype=np.float64)
        return GeneStatistics(
            mean=(mean / len(nodes)).astype(np.float32),
            fraction=(counts / counts.sum()).astype(np.float32),
            target_sum=self.target_sum,
        )

    def _raw(self, nodes: NDArray[np.int64]) -> NDArray[np.float32]:
        part = self._matrix[nodes]
        part = part.toarray() if sparse.issparse(part) else part
        block = np.zeros((len(nodes), self.n_genes), dtype=np.float32)
        block[:, self.measured] = part[:, self._columns[self.measured]]
        return block

    def _totals(self) -> NDArray[np.float64]:
        if self._scale == "log":
            nodes = np.arange(self._matrix.shape[0])
            parts = [np.expm1(self._raw(nodes[i : i + _ROWS])).sum(1, dtype=np.float64) for i in nodes[::_ROWS]]
            return np.concatenate(parts)
        known = self._columns[self.measured]
        if sparse.issparse(self._matrix):
            indicator = np.zeros(self._matrix.shape[1])
            indicator[known] = 1.0
            return np.asarray(self._matrix @ indicator).ravel()
        return self._matrix[:, known].sum(1, dtype=np.float64)

    def _centers(self, statistics: GeneStatistics) -> NDArray[np.float32]:
        n_batches = int(self.batch.max()) + 1
        total = np.zeros((n_batches, self.n_genes))
        seen = np.zeros((n_batches, self.n_genes))
        for i in range(0, len(self.batch), _ROWS):
            nodes = np.arange(i, min(i + _ROWS, len(self.batch)))
            values, observed = self.rows(nodes), self.observed(nodes)
            for code in np.unique(self.batch[nodes]):
                mine = self.batch[nodes] == code
                total[code] += (values[mine] * observed[mine]).sum(0)
                seen[code] += observed[mine].sum(0)
        mean = (total + _PRIOR_CELLS * statistics.mean) / (seen + _PRIOR_CELLS)
        return mean.astype(np.float32)
