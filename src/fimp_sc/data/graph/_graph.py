"""The graph of nodes as compressed sparse rows, and the part of it that a block of destinations needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import sparse

from fimp_sc._draws import name_key

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class Block(NamedTuple):
    """Destinations with the halo that makes their result exact.

    Attributes
    ----------
    nodes
        ``(n_nodes,)`` node ids: the destinations, then the nodes one hop further, and so on.
    n_nodes
        ``n_layers + 1`` counts, outermost first: layer ``l`` reads the first ``n_nodes[l]`` nodes and updates the
        first ``n_nodes[l + 1]``. The last count is the number of destinations.
    indptr, indices
        One compressed sparse row graph per layer, in positions within ``nodes``.
    edge_weight
        One array per layer, in the order of ``indices``; ``None`` where weights are not used.
    """

    nodes: NDArray[np.int64]
    n_nodes: list[int]
    indptr: list[NDArray[np.int64]]
    indices: list[NDArray[np.int64]]
    edge_weight: list[NDArray[np.float32]] | None


class NodeGraph:
    """Neighbors of every node; row = destination, entries of a row = its sources.

    Parameters
    ----------
    connectivities
        Square sparse matrix. Non-zero entries are edges.
    self_loops
        Whether every node is also a source of itself. Stored self-loops are dropped otherwise.
    weighted
        Whether the entries, which must be positive, count: those of a row are divided by their mean, so that weights
        say how much more one neighbor counts than another, and a self-loop (1) counts as much as the mean neighbor.
        All edges are 1 otherwise.
    """

    def __init__(self, connectivities: ArrayLike, *, self_loops: bool, weighted: bool = False) -> None:
        graph = sparse.csr_matrix(connectivities)
        row = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
        real = (graph.data != 0) & (graph.indices != row)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row[real], minlength=graph.shape[0]))])
        weight = graph.data[real].astype(np.float64) if weighted else np.ones(indptr[-1], np.float32)
        graph = sparse.csr_matrix((weight, graph.indices[real], indptr), shape=graph.shape)
        graph.sum_duplicates()
        self.degree, self.weighted, self.self_loops = np.diff(graph.indptr), weighted, self_loops
        if weighted:
            # By the largest one first, so that sums of huge or tiny weights are numbers.
            graph.data /= np.repeat(graph.max(axis=1).toarray().ravel(), self.degree)
            graph.data *= np.repeat(self.degree / np.where(self.degree, self._totals(graph), 1.0), self.degree)
            # A weight too small for single precision is still an edge.
            graph.data = np.maximum(graph.data, np.finfo(np.float32).tiny).astype(np.float32)
        else:
            graph.data[:] = 1.0
        if self_loops:
            graph = sparse.csr_matrix(graph + sparse.identity(graph.shape[0], dtype=np.float32, format="csr"))
        graph.sort_indices()
        self.csr = graph

    def block(self, destinations: ArrayLike, n_layers: int, rank: NDArray[np.int64] | None = None) -> Block:
        """Return the destinations with their ``n_layers``-hop halo; each layer only updates what later ones read.

        The nodes of a hop are in the order of their ``rank``, ``(n_nodes,)`` different numbers, or of their ids.
        """
        nodes = np.asarray(destinations, dtype=np.int64)
        counts = [len(nodes)]
        indptr, indices, weight = [], [], []
        for _ in range(n_layers):
            rows = self.csr[nodes]
            read = rows.indices.astype(np.int64)
            if rank is None:
                sources, inverse = np.unique(read, return_inverse=True)
            else:
                _, first, inverse = np.unique(rank[read], return_index=True, return_inverse=True)
                sources = read[first]
            # Looked up among the nodes of the block: an array over all nodes would cost the more the larger the
            # graph.
            order = np.argsort(nodes)
            place = np.minimum(np.searchsorted(nodes, sources, sorter=order), len(nodes) - 1)
            position = order[place]
            new = nodes[position] != sources
            position[new] = np.arange(len(nodes), len(nodes) + new.sum())
            indptr.append(rows.indptr.astype(np.int64))
            indices.append(position[inverse])
            weight.append(rows.data)
            nodes = np.concatenate([nodes, sources[new]])
            counts.append(len(nodes))
        return Block(nodes, counts[::-1], indptr[::-1], indices[::-1], weight[::-1] if self.weighted else None)

    def averaging(self, destinations: ArrayLike, hops: int) -> sparse.csr_matrix:
        """Return ``(n_destinations, n_nodes)`` CSR that averages over neighbors ``hops`` times in a row.

        The node itself is left out at the end, and the weights of a row sum to 1. A node without neighbors is its
        own mean.
        """
        nodes = np.asarray(destinations, dtype=np.int64)
        total = self._totals(self.csr)
        step = sparse.csr_matrix(sparse.diags((1.0 / np.where(total, total, 1.0)).astype(np.float32)) @ self.csr)
        rows = step[nodes]
        for _ in range(hops - 1):
            rows = rows @ step
        picks = (np.arange(len(nodes)), nodes)
        own = sparse.csr_matrix((np.ones(len(nodes), np.float32), picks), shape=rows.shape)
        rows = sparse.csr_matrix(rows - rows.multiply(own))
        rows.eliminate_zeros()
        total = np.asarray(rows.sum(1)).ravel()
        rows = rows + sparse.diags((total == 0).astype(np.float32)) @ own
        return sparse.csr_matrix(sparse.diags(1.0 / np.where(total > 0, total, 1.0)) @ rows, dtype=np.float32)

    def among(self, nodes: ArrayLike) -> sparse.csr_matrix:
        """Return ``(n, n)`` CSR that averages over those neighbors of each node that are among the ``n`` nodes.

        The node itself is left out; a node without such neighbors has an empty row.
        """
        chosen = np.asarray(nodes, dtype=np.int64)
        edges = self.csr[chosen][:, chosen].tocoo()
        apart = edges.row != edges.col
        row, column = edges.row[apart], edges.col[apart]
        weight = edges.data[apart].astype(np.float64)
        total = np.bincount(row, weight, minlength=len(chosen))
        return sparse.csr_matrix(((weight / total[row]).astype(np.float32), (row, column)), shape=edges.shape)

    def surroundings(self, destinations: ArrayLike) -> tuple[NDArray[np.int64], sparse.csr_matrix]:
        """Return the destinations and their neighbors, ascending, and ``(n_destinations, n)`` CSR that averages them.

        Every row is the mean over a destination and its neighbors.
        """
        nodes = np.asarray(destinations, dtype=np.int64)
        rows = self.csr[nodes]
        if not self.self_loops:
            picks = (np.ones(len(nodes), np.float32), (np.arange(len(nodes)), nodes))
            rows = sparse.csr_matrix(rows + sparse.csr_matrix(picks, shape=rows.shape))
        around = np.unique(rows.indices).astype(np.int64)
        mean = sparse.diags((1.0 / self._totals(rows)).astype(np.float32)) @ rows[:, around]
        return around, sparse.csr_matrix(mean)

    @staticmethod
    def _totals(rows: sparse.csr_matrix) -> NDArray[np.float64]:
        """Return the sum of each row."""
        return np.asarray(rows.sum(1, dtype=np.float64)).ravel()

    def order(self, names: ArrayLike | None = None) -> NDArray[np.int64]:
        """Return the rank of each node in reverse Cuthill-McKee order: near in the graph is near in rank.

        Where the graph leaves a choice ``names``, ``(n_nodes,)``, decide; by default the order of the nodes does.
        """
        first = np.arange(len(self.degree)) if names is None else np.argsort(name_key(names), kind="stable")
        graph = self.csr[first][:, first].sorted_indices()
        permutation = first[sparse.csgraph.reverse_cuthill_mckee(graph, symmetric_mode=False)]
        rank = np.empty(len(permutation), dtype=np.int64)
        rank[permutation] = np.arange(len(permutation))
        return rank
