"""Checks of neighborhood graphs: those of any graph, and samples and nodes without neighbors beside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from fimp_sc._logging import warn
from fimp_sc.data.graph._adjacency import check_adjacency

if TYPE_CHECKING:
    import pandas as pd


def check_connectivities(
    graph: Any,
    n_obs: int,
    *,
    where: str = "The graph",
    library: pd.Categorical | None = None,
    advice: str = "",
) -> None:
    """Check a neighborhood graph: a row holds the weights of the neighbors of its node.

    Stored zeros are no edges. Graphs need not be symmetric. Self-loops are allowed and make nobody a neighbor.

    Parameters
    ----------
    graph
        Sparse matrix in any format, ``(n_obs, n_obs)``.
    where
        Where it was found, for messages.
    library
        Sample of each node, length ``n_obs``, without missing values.
    advice
        What to do about nodes without neighbors.

    Raises
    ------
    TypeError
        The graph is not sparse, or does not hold real numbers.
    ValueError
        Another shape; NaN, infinite or negative weights; no edges; edges that join samples.

    Warns
    -----
    UserWarning
        Nodes without neighbors.
    """
    if not sparse.issparse(graph):
        raise TypeError(
            f"{where} must be a sparse matrix, found {type(graph).__name__}: convert it with scipy.sparse.csr_matrix()."
        )
    checked = check_adjacency(graph, n_obs, where=where, what="node", self_loops=False)
    row, col = np.repeat(np.arange(n_obs), np.diff(checked.indptr)), checked.indices
    if not row.size:
        raise ValueError(
            f"{where} has no edges between nodes: build it with fimp_sc.pp.spatial_graph(adata, overwrite=True)."
        )
    if library is not None:
        joined = np.flatnonzero(library.codes[row] != library.codes[col])
        if joined.size:
            r, c = int(row[joined[0]]), int(col[joined[0]])
            raise ValueError(
                f"{where} has {joined.size:,} edges that join samples, for instance node {c} of {library[c]!r} with "
                f"node {r} of {library[r]!r} (positions counted from 0): build it sample by sample with "
                "fimp_sc.pp.spatial_graph(adata, library_key=..., overwrite=True)."
            )
    isolated = int((np.diff(checked.indptr) == 0).sum())
    if isolated:
        warn(
            f"{where}: {isolated:,} of {n_obs:,} nodes have no neighbors and are described by their own tokens alone. "
            f"{advice}".rstrip()
        )
