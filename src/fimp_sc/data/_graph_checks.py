"""Checks of neighbourhood graphs."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    import pandas as pd


def check_connectivities(
    graph: Any, n_obs: int, *, where: str = "The graph", library: pd.Categorical | None = None
) -> None:
    """Check a neighbourhood graph: a row holds the weights of the neighbours of its cell.

    Stored zeros are no edges. Graphs need not be symmetric. Self-loops are allowed and make nobody a neighbour.

    Parameters
    ----------
    graph
        Sparse matrix in any format, ``(n_obs, n_obs)``.
    where
        Where it was found, for messages.
    library
        Sample of each cell, length ``n_obs``, without missing values.

    Raises
    ------
    TypeError
        The graph is not sparse, or does not hold real numbers.
    ValueError
        Another shape; NaN, infinite or negative weights; no edges; edges that join samples.

    Warns
    -----
    UserWarning
        Cells without neighbours.
    """
    if not sparse.issparse(graph):
        raise TypeError(
            f"{where} must be a sparse matrix, found {type(graph).__name__}: convert it with scipy.sparse.csr_matrix()."
        )
    if graph.dtype.kind not in "buif":
        raise TypeError(f"{where} must hold real weights, found dtype {graph.dtype}.")
    if graph.shape != (n_obs, n_obs):
        raise ValueError(f"{where} has the shape {graph.shape}, but {n_obs:,} cells need {(n_obs, n_obs)}.")
    edges = graph.tocoo()
    for name, bad in (("NaN or infinite", ~np.isfinite(edges.data)), ("negative", edges.data < 0)):
        if bad.any():
            first = int(bad.argmax())
            raise ValueError(
                f"{where} has {int(bad.sum()):,} {name} weights, first from cell {edges.col[first]} to cell "
                f"{edges.row[first]} (positions counted from 0)."
            )
    real = (edges.data != 0) & (edges.row != edges.col)
    row, col = edges.row[real], edges.col[real]
    if not row.size:
        raise ValueError(
            f"{where} has no edges between cells: build it with fimp_sc.pp.spatial_graph(adata, overwrite=True)."
        )
    if library is not None:
        joined = np.flatnonzero(library.codes[row] != library.codes[col])
        if joined.size:
            r, c = int(row[joined[0]]), int(col[joined[0]])
            raise ValueError(
                f"{where} has {joined.size:,} edges that join samples, for instance cell {c} of {library[c]!r} with "
                f"cell {r} of {library[r]!r} (positions counted from 0): build it sample by sample with "
                "fimp_sc.pp.spatial_graph(adata, library_key=..., overwrite=True)."
            )
    isolated = n_obs - np.unique(row).size
    if isolated:
        warnings.warn(
            f"{where}: {isolated:,} of {n_obs:,} cells have no neighbours and are described by their own genes alone.",
            UserWarning,
            stacklevel=2,
        )
