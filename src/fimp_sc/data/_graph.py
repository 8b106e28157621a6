"""The graph of nodes as compressed sparse rows, and the part of it that a block of destinations needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import sparse

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
    """

    nodes: NDArray[np.int64]
    n_nodes: list[int]
    indptr: list[NDArray[np.int64]]
    indices: list[NDArray[np.int64]]


class NodeGraph:
    """Neighbours of every node; row = destination, entries of a row = its sources.

    Parameters
    ----------
    connectivities
        Square sparse matrix. Non-zero entries are edges; their weights are not used.
    self_loops
        Whether every node is also a source of itself. Stored self-loops are dropped otherwise.
    """

    def __init__(self, connectivities: ArrayLike, *, self_loops: bool) -> None:
        graph = sparse.csr_matrix(connectivities)
        row = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
        real = (graph.data != 0) & (graph.indices != row)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row[real], minlength=graph.shape[0]))])
        edges = (np.ones(indptr[-1], np.float32), graph.indices[real], indptr)
        graph = sparse.csr_matrix(edges, shape=graph.shape)
        graph.sum_duplicates()
        self.degree = np.diff(graph.indptr)
        if self_loops:
            graph = sparse.csr_matrix(graph + sparse.identity(graph.shape[0], dtype=np.float32, format="csr"))
        graph.sort_indices()
        graph.data[:] = 1.0
        self.csr = graph

    def block(self, destinations: ArrayLike, n_layers: int) -> Block:
        """Return the destinations with their ``n_layers``-hop halo; each layer only updates what later ones read."""
        nodes = np.asarray(destinations, dtype=np.int64)
        counts = [len(nodes)]
        indptr, indices = [], []
        for _ in range(n_layers):
            rows = self.csr[nodes]
            sources, inverse = np.unique(rows.indices.astype(np.int64), return_inverse=True)
            # Looked up among the nodes of the block: an array over all nodes would cost the more the larger the
            # graph.
            order = np.argsort(nodes)
            place = np.minimum(np.searchsorted(nodes, sources, sorter=order), len(nodes) - 1)
            position = order[place]
            new = nodes[position] != sources
            position[new] = np.arange(len(nodes), len(nodes) + new.sum())
            indptr.append(rows.indptr.astype(np.int64))
            indices.append(position[inverse])
            nodes = np.concatenate([nodes, sources[new]])
            counts.append(len(nodes))
        return Block(nodes, counts[::-1], indptr[::-1], indices[::-1])

    def averaging(self, destinations: ArrayLike, hops: int) -> sparse.csr_matrix:
        """Return ``(n_destinations, n_nodes)`` CSR that averages over neighbours ``hops`` times in a row.

        The node itself is left out at the end, and the weights of a row sum to 1. A node without neighbours is its
        own mean.
        """
        nodes = np.asarray(destinations, dtype=np.int64)
        degree = np.maximum(np.diff(self.csr.indptr), 1)
        step = sparse.csr_matrix(sparse.diags((1.0 / degree).astype(np.float32)) @ self.csr)
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
        """Return ``(n, n)`` CSR that averages over those neighbours of each node that are among the ``n`` nodes.

        The node itself is left out; a node without such neighbours has an empty row.
        """
        chosen = np.asarray(nodes, dtype=np.int64)
        edges = self.csr[chosen][:, chosen].tocoo()
        apart = edges.row != edges.col
        row, column = edges.row[apart], edges.col[apart]
        degree = np.bincount(row, minlength=len(chosen))
        return sparse.csr_matrix(((1.0 / degree[row]).astype(np.float32), (row, column)), shape=edges.shape)

    def surroundings(self, destinations: ArrayLike) -> tuple[NDArray[np.int64], sparse.csr_matrix]:
        """Return the destinations and their neighbours, ascending, and ``(n_destinations, n)`` CSR that averages them.

        Every row is the mean over a destination and its neighbours.
        """
        nodes = np.asarray(destinations, dtype=np.int64)
        picks = (np.arange(len(nodes)), nodes)
        rows = self.csr[nodes] + sparse.csr_matrix(
            (np.ones(len(nodes), np.float32), picks), (len(nodes), self.csr.shape[0])
        )
        rows.data[:] = 1.0
        around = np.unique(rows.indices).astype(np.int64)
        mean = sparse.diags((1.0 / np.diff(rows.indptr)).astype(np.float32)) @ rows[:, around]
        return around, sparse.csr_matrix(mean)

    def order(self) -> NDArray[np.int64]:
        """Return the rank of each node in reverse Cuthill-McKee order: near in the graph is near in rank."""
        permutation = sparse.csgraph.reverse_cuthill_mckee(self.csr, symmetric_mode=False)
        rank = np.empty(len(permutation), dtype=np.int64)
        rank[permutation] = np.arange(len(permutation))
        return rank
