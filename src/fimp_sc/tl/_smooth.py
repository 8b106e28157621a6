"""Means over the spatial graph."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc.data import NodeGraph
from fimp_sc.data.graph._adjacency import check_adjacency
from fimp_sc.data.storage._elements import get_graph, missing_key
from fimp_sc.data.validate._checks import check_graph

if TYPE_CHECKING:
    from numpy.typing import NDArray


def smoothed(
    adata: Any,
    values: NDArray[np.float64],
    order: NDArray[np.integer],
    times: int,
    connectivities_key: str,
    library_key: str | None,
) -> NDArray[np.float64]:
    """Return ``values[order]``, replaced ``times`` times by the mean over each cell and its neighbors.

    Parameters
    ----------
    adata
        Object with the graph; without ``times`` none is needed.
    values
        ``(n_obs, n_features)``.
    order
        ``(n_obs,)`` positions. Sums are made in this order, so that results do not depend on how cells are stored.

    Raises
    ------
    MissingKeyError
        The graph, or ``library_key``, is absent.
    ValueError
        The graph cannot be used, or joins samples.
    """
    out = values[order]
    if library_key is not None and library_key not in adata.obs:
        raise missing_key(library_key, "adata.obs", adata.obs, "Name the column with samples with library_key=.")
    if not times:
        return out
    if connectivities_key not in adata.obsp:
        advice = (
            "Build the graph with fimp_sc.pp.spatial_graph(adata), name another with connectivities_key=, or cluster "
            "without it: smooth=0."
        )
        raise missing_key(connectivities_key, "adata.obsp", adata.obsp, advice)
    with warnings.catch_warnings():
        # A cell without neighbors keeps its own values; whoever embedded the cells knows of it.
        warnings.filterwarnings("ignore", message=".*have no neighbors", category=UserWarning)
        check_graph(adata, connectivities_key, library_key)
    where = f"adata.obsp[{connectivities_key!r}]"
    edges = check_adjacency(get_graph(adata, connectivities_key), len(values), where=where)
    joined = NodeGraph(edges, self_loops=True).csr.astype(np.float64)[order][:, order]
    joined.sort_indices()
    n_cells = np.asarray(joined.sum(axis=1)).ravel()[:, None]
    for _ in range(times):
        out = joined @ out / n_cells
    return out
