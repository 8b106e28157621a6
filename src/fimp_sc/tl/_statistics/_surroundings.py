"""Surroundings of cells, and the cells of the same group that have alike ones."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from fimp_sc.tl._statistics._strata import centered, rows_of

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from fimp_sc.data import NodeGraph

logger = logging.getLogger(__name__)

# Genes that describe surroundings, and principal components of these.
N_GENES, _COMPONENTS = 500, 10
# A cell is compared with the most alike ones of the nearest ones.
_NEAREST, _ALIKE = 30, 12
_CELLS = 4096


def surroundings(value: NDArray[np.float32], graph: NodeGraph, strata: NDArray[np.int64]) -> NDArray[np.float32]:
    """Describe the surroundings of each cell: expression, averaged twice over a cell and its neighbors.

    Expression is centered within strata before, so that the mixture of groups is no part of it: genes that follow a
    domain or a gradient in cells of a group show it, and nothing else is to be described.

    Parameters
    ----------
    value
        ``(n, g)`` log-normalized expression.
    graph
        Of all nodes.
    strata
        ``(n,)`` int64 group of cells to center, -1 for none.

    Returns
    -------
    ``(n, at most 10)`` principal components of all cells.
    """
    value = centered(value, strata)
    deviation = value.std(0)
    value /= np.where(deviation > 0, deviation, 1)
    average = sparse.csr_array(graph.csr, dtype=np.float32) + sparse.eye_array(len(value), dtype=np.float32)
    average = average.tocsr()
    average.data[:] = 1
    average = sparse.diags_array(1 / average.sum(1).astype(np.float32)) @ average
    value = average @ (average @ value)
    value -= value.mean(0)
    blocks = (value[i : i + _CELLS].astype(np.float64) for i in range(0, len(value), _CELLS))
    _, vectors = np.linalg.eigh(sum(block.T @ block for block in blocks))
    return value @ vectors[:, : -_COMPONENTS - 1 : -1].astype(np.float32)


def coordinates(nodes: AnnData, spatial_key: str, description: NDArray[np.float32]) -> NDArray[np.floating]:
    """Return where cells are; where that is not known, their surroundings."""
    if spatial_key in nodes.obsm:
        places = np.asarray(nodes.obsm[spatial_key], dtype=np.float64)
        if np.isfinite(places).all():
            return places
    logger.info("Not all cells have coordinates in obsm[%r]: near are those with alike surroundings.", spatial_key)
    return description


def alike(
    places: NDArray[np.floating], description: NDArray[np.float32], strata: NDArray[np.int64]
) -> sparse.csr_array:
    """Return for each cell weights that average the cells of its stratum with the most similar surroundings.

    Parameters
    ----------
    places
        ``(n, d)`` coordinates, or the description itself where there are none.
    description
        ``(n, c)`` surroundings.
    strata
        ``(n,)`` int64, -1 for none.

    Returns
    -------
    ``(n, n)`` float32: 1 / 12 for the 12 cells most alike among the 30 nearest ones of the stratum, fewer in strata of
    fewer cells. Rows of cells without stratum, or alone in it, are empty.
    """
    from sklearn.neighbors import NearestNeighbors

    entries: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = [(np.zeros(0, np.int64),) * 2]
    for rows in rows_of(strata):
        n_near = min(_NEAREST, len(rows) - 1)
        if not n_near:
            continue
        n_alike = min(_ALIKE, -(-n_near * _ALIKE // _NEAREST))
        search = NearestNeighbors(n_neighbors=n_near).fit(places[rows])
        for start in range(0, len(rows), _CELLS):
            some = np.arange(start, min(start + _CELLS, len(rows)))
            near = _others(search, places[rows[some]], some)
            apart = np.square(description[rows[some], None] - description[rows[near]]).sum(-1)
            kept = np.take_along_axis(near, np.argsort(apart, axis=1, kind="stable")[:, :n_alike], axis=1)
            entries.append((np.repeat(rows[some], n_alike), rows[kept].ravel()))
    to, of = map(np.concatenate, zip(*entries, strict=True))
    weight = np.float32(1) / np.bincount(to, minlength=len(strata))[to].astype(np.float32)
    return sparse.csr_array((weight, (to, of)), shape=(len(strata),) * 2)


def _others(search: Any, places: NDArray[np.floating], own: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the nearest other cells, ``(n, n_near)``, also where several are at one place."""
    n_near = search.n_neighbors
    near = search.kneighbors(places, min(n_near + 1, search.n_samples_fit_), return_distance=False)
    # The cell itself goes last, and where others at its place have pushed it out, the last one does.
    order = np.argsort(near == own[:, None], axis=1, kind="stable")
    return np.asarray(np.take_along_axis(near, order, axis=1)[:, :n_near], dtype=np.int64)
