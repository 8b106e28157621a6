"""Graphs of any kind of node: from an adjacency, from nearest points, on the globe; row = destination."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from fimp_sc.data.storage._elements import shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

EARTH_RADIUS_KM = 6371.0088
"""Mean radius of the Earth (IUGG)."""


def check_adjacency(
    matrix: Any, n: int, *, where: str, what: str = "node", self_loops: bool = True, signed: bool = False
) -> sparse.csr_matrix:
    """Return an adjacency as CSR, with its weights as they are and zeros dropped; the caller's matrix stays as it is.

    Parameters
    ----------
    matrix
        ``(n, n)`` array or scipy sparse matrix; entry ``[i, j]`` is the weight of the edge from ``j`` to ``i``.
    where
        Where it was found, for messages.
    what
        What a node is called, for messages.
    self_loops
        Whether entries on the diagonal are kept.
    signed
        Whether negative weights may stay.

    Raises
    ------
    TypeError
        Not a matrix of real numbers.
    ValueError
        Another shape, or NaN, infinite or (without ``signed``) negative weights.
    """
    if not sparse.issparse(matrix):
        matrix = np.asarray(matrix)
    if matrix.dtype.kind not in "buif":
        raise TypeError(f"{where} must hold real weights, found {type(matrix).__name__} with dtype {matrix.dtype}.")
    if matrix.shape != (n, n):
        raise ValueError(f"{where} has the shape {matrix.shape}, but {n:,} {what}s need {(n, n)}: one row each.")
    graph = sparse.csr_matrix(matrix, copy=True)
    graph.sum_duplicates()
    if graph.dtype.kind != "f":
        graph = graph.astype(np.float32)
    for name, bad in (("NaN or infinite", ~np.isfinite(graph.data)), ("negative", (graph.data < 0) & (not signed))):
        if bad.any():
            first = int(bad.argmax())
            destination = int(np.searchsorted(graph.indptr, first, side="right")) - 1
            raise ValueError(
                f"{where} has {int(bad.sum()):,} {name} weights, first from {what} {graph.indices[first]} to {what} "
                f"{destination} (positions counted from 0), and edges need positive ones: remove these edges, for "
                "instance by setting them to 0."
            )
    if not self_loops:
        row = np.repeat(np.arange(n), np.diff(graph.indptr))
        graph.data[graph.indices == row] = 0
    graph.eliminate_zeros()
    graph.sort_indices()
    return graph


def strongest_edges(
    graph: sparse.csr_matrix, *, top_fraction: float | None = None, threshold: float | None = None
) -> sparse.csr_matrix:
    """Return the edges with the largest weights.

    Parameters
    ----------
    top_fraction
        Fraction of all ordered pairs of different nodes to keep. Edges as strong as the weakest one kept are kept too,
        so that a symmetric graph stays symmetric.
    threshold
        Smallest weight to keep.

    Returns
    -------
    CSR with positive weights only.
    """
    if top_fraction is not None:
        n_kept = round(top_fraction * graph.shape[0] * (graph.shape[0] - 1))
        positive = np.sort(graph.data[graph.data > 0])[::-1]
        if n_kept < len(positive):
            threshold = float(positive[n_kept - 1]) if n_kept else np.inf
    smallest = -np.inf if threshold is None else threshold
    kept = graph.copy()
    kept.data[(kept.data < smallest) | (kept.data <= 0)] = 0
    kept.eliminate_zeros()
    return kept


def neighbor_lists(
    indices: Sequence[NDArray[np.integer]], distances: Sequence[NDArray[np.floating]]
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Return the graph (float32 ones) and the lengths of its edges from the neighbors of every node."""
    n = len(indices)
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in indices])]).astype(np.int64)
    columns = np.concatenate([np.asarray(row, dtype=np.int64) for row in indices])
    lengths = np.concatenate([np.asarray(row, dtype=np.float64) for row in distances])
    graph = sparse.csr_matrix((np.ones(len(columns), np.float32), columns, indptr), shape=(n, n))
    spread = sparse.csr_matrix((lengths, columns.copy(), indptr.copy()), shape=(n, n))
    graph.sort_indices()
    spread.sort_indices()
    return graph, spread


def drop_self(indices: NDArray[np.integer], *others: NDArray[Any]) -> list[NDArray[Any]]:
    """Drop every node from its own ``(n, k + 1)`` nearest ones, so that ``k`` are left.

    Of nodes at one place the node itself need not be among them; the farthest is dropped then.
    """
    own = indices == np.arange(len(indices))[:, None]
    own[~own.any(axis=1), -1] = True
    return [values[~own].reshape(len(indices), -1) for values in (indices, *others)]


def euclidean_lengths(graph: sparse.csr_matrix, points: NDArray[np.float64]) -> sparse.csr_matrix:
    """Return the lengths of the edges of ``graph``; edges of length 0 are stored too."""
    row = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    lengths = np.linalg.norm(points[row] - points[graph.indices], axis=1)
    return sparse.csr_matrix((lengths, graph.indices.copy(), graph.indptr.copy()), shape=graph.shape)


def haversine_km(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return great-circle distances between places ``(..., 2)`` of latitude and longitude in degrees."""
    a, b = np.radians(a), np.radians(b)
    half = np.sin((b - a) / 2) ** 2
    chord = half[..., 0] + np.cos(a[..., 0]) * np.cos(b[..., 0]) * half[..., 1]
    distances: NDArray[np.float64] = 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.clip(chord, 0, 1)))
    return distances


def haversine_lengths(graph: sparse.csr_matrix, places: NDArray[np.float64]) -> sparse.csr_matrix:
    """Return the lengths of the edges of ``graph`` in km; edges of length 0 are stored too."""
    row = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    lengths = haversine_km(places[row], places[graph.indices])
    return sparse.csr_matrix((lengths, graph.indices.copy(), graph.indptr.copy()), shape=graph.shape)


def nearest_places(
    places: NDArray[np.float64], n_neighbors: int | None, radius_km: float | None
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Return the graph of places near on the globe, and distances in km.

    Parameters
    ----------
    places
        ``(n, 2)`` latitude and longitude in degrees.
    n_neighbors
        Nearest places to join; ``None`` joins all within ``radius_km``.
    radius_km
        Largest distance; ``None`` sets no limit.
    """
    from sklearn.neighbors import BallTree

    radians = np.radians(places)
    tree = BallTree(radians, metric="haversine")
    if n_neighbors is None:
        near = tree.query_radius(radians, r=float(radius_km or 0) / EARTH_RADIUS_KM)
        lists = [row[row != node] for node, row in enumerate(near)]
    else:
        (indices,) = drop_self(tree.query(radians, k=n_neighbors + 1, return_distance=False))
        lists = list(indices)
    distances = [haversine_km(places[[node]], places[row]) for node, row in enumerate(lists)]
    if n_neighbors is not None and radius_km is not None:
        within = [row <= radius_km for row in distances]
        lists = [row[keep] for row, keep in zip(lists, within, strict=True)]
        distances = [row[keep] for row, keep in zip(distances, within, strict=True)]
    return neighbor_lists(lists, distances)


def report_isolated(graph: sparse.csr_matrix, names: Sequence[str], what: str) -> None:
    """Log the nodes that no edge leads to."""
    row = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    degree = np.bincount(row[(graph.data != 0) & (graph.indices != row)], minlength=graph.shape[0])
    alone = np.flatnonzero(degree == 0)
    if alone.size:
        logger.warning(
            "%d of %d %ss have no neighbors and are described by their own tokens alone: %s.",
            alone.size,
            graph.shape[0],
            what,
            shorten([repr(names[int(i)]) for i in alone]),
        )
