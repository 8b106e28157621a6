"""Nodes with features of any kind and a graph as one modality of a MuData."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._options import checked
from fimp_sc.data._modality import CONNECTIVITIES_KEY, SPATIAL_KEY, check_modality_name, make_mudata
from fimp_sc.data._nodes import by_name, node_names, one_label_each, square_by_name
from fimp_sc.data.graph._adjacency import check_adjacency, euclidean_lengths, report_isolated
from fimp_sc.data.storage._elements import in_memory, missing_key, shorten
from fimp_sc.data.storage._rows import storage
from fimp_sc.data.validate._checks import check_anndata, check_coordinates

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import ArrayLike

logger = logging.getLogger(__name__)


@checked
def features(
    features: Any,
    adjacency: Any = None,
    *,
    coordinates: ArrayLike | None = None,
    labels: Any = None,
    node_names: Sequence[Any] | None = None,
    feature_names: Sequence[Any] | None = None,
    connectivities_key: str = CONNECTIVITIES_KEY,
    modality: str = "feature",
) -> MuData:
    """Make a MuData of nodes with features, each of which becomes a token, and a graph.

    Parameters
    ----------
    features
        ``(n, f)`` array, scipy sparse matrix or data frame (whose index and columns name nodes and features), or an
        AnnData object, which is copied with everything in it.
    adjacency
        ``(n, n)`` array or sparse matrix; entry ``[i, j]`` is the weight of the edge from ``j`` to ``i``. Of an AnnData
        object its own ``obsp[connectivities_key]`` is used if this is left out.
    coordinates
        ``(n, 2)`` or ``(n, 3)`` positions of the nodes.
    labels
        Data frame or dictionary of columns, or one array (column ``"label"``), with one label for each node. An index
        with the names of nodes, here and of ``adjacency`` and ``coordinates``, says what is whose, whatever the order.
    node_names, feature_names
        Names; not for AnnData objects and data frames, which have them.
    connectivities_key
        Key of the graph in ``obsp``.
    modality
        Name of the modality.

    Returns
    -------
    MuData with the modality ``modality``, whose

    - ``X`` has the features, float32 unless they are of another floating type; sparse ones become CSR;
    - ``obsp[connectivities_key]`` is a CSR matrix with the weights as they are (self-loops too, although a node is
      nobody's neighbor through them);
    - ``obsm["spatial"]`` and ``obsp["spatial_distances"]`` are there if ``coordinates`` are given;
    - ``uns["fimp_modality"]`` has ``kind="feature"`` and ``graph="adjacency"``.

    Raises
    ------
    MissingKeyError
        No ``adjacency``, and no graph in the AnnData object.
    TypeError
        Features or weights that are not real numbers.
    ValueError
        NaN or infinite features; a graph, names, labels or coordinates of another number of nodes, or with an index of
        other names; negative weights; a graph without edges.

    Examples
    --------
    >>> import numpy as np
    >>> import fimp_sc as fimp
    >>> ring = np.roll(np.eye(8), 1, axis=1)
    >>> mdata = fimp.pp.features(np.random.default_rng(0).normal(size=(8, 3)), ring + ring.T)
    >>> fimp.data.describe_modality(mdata)["n_edges"]
    16
    """
    from anndata import AnnData

    check_modality_name(modality)
    if isinstance(features, AnnData):
        check_anndata(features)
        if node_names is not None or feature_names is not None:
            raise ValueError("node_names= and feature_names= do not apply to AnnData, which has its own names.")
        if adjacency is None and connectivities_key not in features.obsp:
            raise missing_key(
                connectivities_key,
                "adata.obsp",
                features.obsp,
                "Pass adjacency=, name the graph with connectivities_key=, or build one with fimp_sc.pp.spatial_graph.",
            )
        where = "adjacency" if adjacency is not None else f"adata.obsp[{connectivities_key!r}]"
        stored = in_memory(features.obsp[connectivities_key], where) if adjacency is None else adjacency
        adata = features.to_memory() if features.isbacked else features.copy()
        if storage(adata.X) == "memory":
            adata.X = _real_values(adata.X)
    else:
        adata, where, stored = _from_values(features, node_names, feature_names), "adjacency", adjacency
        if adjacency is None:
            raise ValueError("A graph is needed: pass adjacency=, (n, n) weights of the edges.")
    nodes = list(adata.obs_names)
    named = node_names is not None or isinstance(features, AnnData | pd.DataFrame)
    graph = check_adjacency(square_by_name(stored, nodes, where, given=named), adata.n_obs, where=where)
    if not (graph.indices != np.repeat(np.arange(adata.n_obs), np.diff(graph.indptr))).any():
        raise ValueError(f"{where} has no edges between different nodes.")
    taken = list(adata.obs.columns)
    for name, values in one_label_each(labels, nodes, "node", taken, given=named).items():
        adata.obs[name] = values
    distances = None
    if coordinates is not None:
        points = np.array(by_name(coordinates, nodes, "coordinates", given=named))
        if not points.ndim or len(points) != adata.n_obs:
            raise ValueError(f"coordinates have the shape {points.shape}, but there are {adata.n_obs:,} nodes.")
        adata.obsm[SPATIAL_KEY] = points
        distances = euclidean_lengths(graph, check_coordinates(adata, SPATIAL_KEY))
    info = {"kind": "feature", "connectivities_key": connectivities_key, "graph": "adjacency"}
    mdata = make_mudata(adata, modality, info, graph, distances=distances)
    report_isolated(graph, list(adata.obs_names), "node")
    logger.info("%d nodes × %d features, %d edges, in mdata[%r].", adata.n_obs, adata.n_vars, graph.nnz, modality)
    return mdata


def _from_values(features: Any, names: Sequence[Any] | None, feature_names: Sequence[Any] | None) -> AnnData:
    from anndata import AnnData

    if isinstance(features, pd.DataFrame):
        if names is not None or feature_names is not None:
            raise ValueError("node_names= and feature_names= do not apply to a data frame, which has its own names.")
        names, feature_names, features = list(features.index), list(features.columns), _numbers(features)
    values = _real_values(features)
    return AnnData(
        X=values,
        obs=pd.DataFrame(index=pd.Index(_names(names, values.shape[0], "node"))),
        var=pd.DataFrame(index=pd.Index(_names(feature_names, values.shape[1], "feature"))),
    )


def _numbers(table: pd.DataFrame) -> np.ndarray:
    """Return the values of a data frame, whose columns may be of several types."""
    other = [
        f"{name!r} ({dtype})"
        for name, dtype in table.dtypes.items()
        if not (pd.api.types.is_any_real_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype))
    ]
    if other:
        raise TypeError(f"features must be real numbers, found the columns {shorten(other)}: leave them out.")
    values = table.to_numpy()
    # Numbers beside booleans, and pandas' own types.
    return table.to_numpy(float, na_value=np.nan) if values.dtype == object else values


def _real_values(features: Any) -> Any:
    """Return a copy of features as an array or CSR of real numbers, so that later changes do not reach it."""
    values = sparse.csr_matrix(features) if sparse.issparse(features) else np.asarray(features)
    if values.dtype.kind not in "buif":
        raise TypeError(f"features must be real numbers, found dtype {values.dtype}.")
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"features must have the shape (n, f), found {values.shape}.")
    bad = ~np.isfinite(values.data if sparse.issparse(values) else values)
    if bad.any():
        raise ValueError(f"features has {int(bad.sum()):,} NaN or infinite values: fill them in before.")
    return values.astype(values.dtype if values.dtype.kind == "f" else np.float32)


def _names(names: Sequence[Any] | None, n: int, what: str) -> list[str]:
    return node_names(names, n, what, f"{what}_names")
