"""Several tables of the same nodes as one: expression and proteins, each on its own scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from fimp_sc.data.expression._reader import ExpressionSource, GeneStatistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor


class JoinedExpression:
    """Rows of several tables side by side, with the interface of :class:`~fimp_sc.data.ExpressionSource`.

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
        ``(n_genes,)``, see :class:`ExpressionSource`; ``None`` where a table has none.
    """

    def __init__(self, sources: Sequence[ExpressionSource]) -> None:
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
        """See :meth:`ExpressionSource.rows`."""
        return np.concatenate([source.rows(nodes) for source in self.sources], axis=1)

    def sparse_rows(self, nodes: NDArray[np.int64]) -> sparse.csr_matrix:
        """See :meth:`ExpressionSource.sparse_rows`."""
        return _side_by_side([source.sparse_rows(nodes) for source in self.sources])

    def complete_rows(self, nodes: NDArray[np.int64], mean: NDArray[np.float32]) -> sparse.csr_matrix:
        """See :meth:`ExpressionSource.complete_rows`; nodes that lack a table have its mean."""
        tables = []
        for source, own in zip(self.sources, self._split(mean), strict=True):
            rows, lacking = source.complete_rows(nodes, own), _absent(source)[nodes]
            if lacking.any():
                rows = rows + sparse.csr_matrix(lacking[:, None].astype(np.float32)) @ sparse.csr_matrix(own[None])
            tables.append(rows)
        return _side_by_side(tables)

    def as_seen(self, rows: sparse.csr_matrix, visible: Tensor, pattern: Tensor) -> sparse.csr_matrix:
        """See :meth:`ExpressionSource.as_seen`."""
        bounds = zip(self.sources, self._bounds[:-1], self._bounds[1:], strict=True)
        return _side_by_side([s.as_seen(rows[:, a:b], visible[:, a:b], pattern) for s, a, b in bounds])

    def observed(self, nodes: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """See :meth:`ExpressionSource.observed`."""
        found = [source.observed(nodes) for source in self.sources]
        codes, pattern = np.unique(np.stack([code for _, code in found], axis=1), axis=0, return_inverse=True)
        patterns = [own[codes[:, i]] for i, (own, _) in enumerate(found)]
        return np.concatenate(patterns, axis=1), pattern.ravel().astype(np.int64)

    def gene_statistics(self, nodes: NDArray[np.int64]) -> GeneStatistics:
        """See :meth:`ExpressionSource.gene_statistics`; of each table over the nodes that have it.

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
            np.concatenate([part.mean for part in found]),
            np.concatenate([part.fraction for part in found]),
            self.target_sum,
        )

    def present(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of ``nodes`` that any table has."""
        return nodes if self.absent is None else nodes[~self.absent[nodes]]

    def factors(self, nodes: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :meth:`ExpressionSource.factors`."""
        factor = np.stack([source.factor[nodes] for source in self.sources], axis=1)
        return factor[:, np.searchsorted(self._bounds, columns, side="right") - 1]

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


def _absent(source: ExpressionSource) -> NDArray[np.bool_]:
    return np.zeros(len(source.batch), dtype=bool) if source.absent is None else source.absent


def _side_by_side(tables: Sequence[sparse.csr_matrix]) -> sparse.csr_matrix:
    return sparse.csr_matrix(sparse.hstack(tables, format="csr"))
