"""Graphs of PyTorch Geometric, in and out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._options import checked
from fimp_sc.data._modality import (
    CONNECTIVITIES_KEY,
    SPATIAL_KEY,
    check_modality_name,
    described,
    get_modality,
    make_mudata,
    place_of,
)
from fimp_sc.data._nodes import node_names
from fimp_sc.data.graph._adjacency import report_isolated
from fimp_sc.data.sequences._pixels import PIXELS_KEY, read_pixels
from fimp_sc.data.storage._elements import get_obs, in_memory, missing_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix
    from torch import Tensor
    from torch_geometric.data import Data

logger = logging.getLogger(__name__)


@checked
def from_pyg(
    data: Data,
    *,
    node_names: Sequence[Any] | None = None,
    feature_names: Sequence[Any] | None = None,
    modality: str = "feature",
) -> MuData:
    """Make a MuData of a graph of PyTorch Geometric; :func:`to_pyg` makes the same graph of it again.

    Parameters
    ----------
    data
        Graph with ``x`` ``(n, f)`` and ``edge_index`` ``(2, e)``, first row source and second row destination.
        ``edge_weight`` ``(e,)`` becomes the weights of the edges, which are 1 otherwise.
    node_names, feature_names
        Names; numbered otherwise.
    modality
        Name of the modality.

    Returns
    -------
    MuData with the modality ``modality``, whose

    - ``X`` is ``x`` in its own type;
    - ``obsp["spatial_connectivities"]`` is a CSR matrix whose rows are destinations and columns sources, self-loops and
      edges of weight 0 included;
    - ``obsm["spatial"]`` is ``pos`` if that has two or three columns;
    - ``obs`` and ``obsm`` have ``y``, ``train_mask`` and all else that there is for each node, under its own name;
    - ``uns["fimp_modality"]`` has ``kind="feature"``, ``graph="pyg"``, ``weighted`` (whether there was an
      ``edge_weight``), and ``pyg_obs`` and ``pyg_obsm``, the names of what came for each node.

    Other attributes, as ``edge_attr``, are not carried over, which is logged.

    Raises
    ------
    TypeError
        No homogeneous graph, or no numbers.
    ValueError
        No ``x`` or ``edge_index``, edges that repeat or lead to nodes that do not exist, NaN or infinite features or
        weights, negative weights, or names of another number.

    Examples
    --------
    >>> import torch
    >>> from torch_geometric.data import Data
    >>> import fimp_sc as fimp
    >>> data = Data(x=torch.eye(3), edge_index=torch.tensor([[0, 1, 2], [1, 2, 0]]))
    >>> mdata = fimp.pp.from_pyg(data)
    >>> fimp.pp.to_pyg(mdata)
    Data(x=[3, 3], edge_index=[2, 3])
    """
    from anndata import AnnData
    from torch_geometric.data import Data

    check_modality_name(modality)
    if not isinstance(data, Data):
        raise TypeError(f"data must be a torch_geometric.data.Data (one kind of node), found {type(data).__name__}.")
    if data.x is None or data.x.ndim != 2:
        found = "None" if data.x is None else f"of the shape {tuple(data.x.shape)}"
        raise ValueError(f"data.x is {found}: it must hold the features of the nodes, (n, f).")
    x = _array(data.x)
    if not np.isfinite(x).all():
        raise ValueError(f"data.x has {int((~np.isfinite(x)).sum()):,} NaN or infinite values: fill them in before.")
    graph = _graph(data, len(x))
    adata = AnnData(
        X=x,
        obs=pd.DataFrame(index=pd.Index(_names(node_names, len(x), "node"))),
        var=pd.DataFrame(index=pd.Index(_names(feature_names, x.shape[1], "feature"))),
    )
    columns, arrays, left_out = [], [], []
    for key in sorted(set(data.keys()) - {"x", "edge_index", "edge_weight", "num_nodes"}):
        value = data[key]
        if not data.is_node_attr(key) or not hasattr(value, "numpy"):
            left_out.append(key)
        elif key == "pos" and value.ndim == 2 and value.shape[1] in {2, 3}:
            adata.obsm[SPATIAL_KEY] = _array(value)
        elif value.ndim == 1:
            adata.obs[key] = _array(value)
            columns.append(key)
        else:
            adata.obsm[key] = _array(value)
            arrays.append(key)
    if left_out:
        logger.warning("Not carried over, since they do not belong to single nodes: %s.", ", ".join(left_out))
    info = {"kind": "feature", "graph": "pyg", "weighted": data.edge_weight is not None}
    info |= {"pyg_obs": columns or None, "pyg_obsm": arrays or None}
    mdata = make_mudata(adata, modality, info, graph)
    report_isolated(graph, list(adata.obs_names), "node")
    return mdata


@checked
def to_pyg(
    mdata: MuData | AnnData,
    modality: str | None = None,
    *,
    labels_key: str | None = None,
    connectivities_key: str | None = None,
) -> Data:
    """Make a graph of PyTorch Geometric of a modality, for instance to compare with its networks.

    Parameters
    ----------
    mdata
        MuData, or AnnData, with a graph.
    modality
        Name of the modality; not needed if there is only one.
    labels_key
        Column of ``obs`` for ``y``: categories become their codes (-1 where missing), numbers stay as they are.
    connectivities_key
        Key of the graph in ``obsp``; by default the one that ``uns["fimp_modality"]`` names, else
        ``"spatial_connectivities"``.

    Returns
    -------
    Graph with

    - ``x``: features or signals as they are (sparse ones dense); of images all pixels, decoded, as float32 between 0
      and 1;
    - ``edge_index``: from source to destination (columns and rows of the matrix in ``obsp``), sorted by destination;
    - ``edge_weight``, unless all weights are 1;
    - ``pos`` from ``obsm["spatial"]``, and ``y`` as asked for;
    - what :func:`from_pyg` found for each node, under its own name.

    Nothing shares memory with ``mdata``.

    Raises
    ------
    MissingKeyError
        There is no such modality, graph or column.
    TypeError
        Features, graph, coordinates or labels are no numbers.
    ValueError
        The modality has neither values nor pixels.
    """
    import torch
    from torch_geometric.data import Data

    name, adata = get_modality(mdata, modality)
    where = place_of(mdata, name)
    info = described(adata) or {}
    key = connectivities_key or str(info.get("connectivities_key", CONNECTIVITIES_KEY))
    if key not in adata.obsp:
        raise missing_key(key, f"{where}.obsp", adata.obsp, "Name the graph with connectivities_key=.")
    try:
        graph = sparse.csr_matrix(in_memory(adata.obsp[key], f"{where}.obsp[{key!r}]"))
    except (TypeError, ValueError):
        raise TypeError(f"{where}.obsp[{key!r}] must be a matrix of numbers, the graph.") from None
    row = np.repeat(np.arange(adata.n_obs), np.diff(graph.indptr))
    data = Data(x=_tensor(_values(adata, info, where), f"{where}.X"))
    data.edge_index = torch.from_numpy(np.stack([graph.indices, row]).astype(np.int64))
    made_of = info.get("connectivities_key") == key
    if bool(info["weighted"]) if made_of and "weighted" in info else bool((graph.data != 1).any()):
        data.edge_weight = _tensor(graph.data, f"{where}.obsp[{key!r}]")
    for column in info.get("pyg_obs", ()):
        data[str(column)] = _tensor(get_obs(adata, [column])[column].to_numpy(), f"{where}.obs[{column!r}]")
    names = {"pos": SPATIAL_KEY} if SPATIAL_KEY in adata.obsm else {}
    for attribute, array in (names | {str(array): array for array in info.get("pyg_obsm", ())}).items():
        place = f"{where}.obsm[{array!r}]"
        data[attribute] = _tensor(in_memory(adata.obsm[array], place), place)
    if labels_key is not None:
        if labels_key not in adata.obs:
            raise missing_key(labels_key, f"{where}.obs", adata.obs, "Name the column of labels with labels_key=.")
        labels = get_obs(adata, [labels_key])[labels_key]
        numeric = pd.api.types.is_numeric_dtype(labels.dtype)
        values = labels.to_numpy() if numeric else pd.Categorical(labels).codes.astype(np.int64)
        data.y = _tensor(values, f"{where}.obs[{labels_key!r}]")
    return data


def _graph(data: Data, n: int) -> csr_matrix:
    """Return the edges as CSR, row = destination; edges of weight 0 stay stored."""
    if data.edge_index is None:
        advice = " (found adj_t: leave out the transform ToSparseTensor)" if "adj_t" in data else ""
        raise ValueError(f"data.edge_index is None{advice}: it must hold the edges, (2, e), source and destination.")
    source, destination = _array(data.edge_index).astype(np.int64)
    weight = np.ones(len(source), np.float32) if data.edge_weight is None else _array(data.edge_weight)
    if len(source) and not 0 <= min(source.min(), destination.min()) <= max(source.max(), destination.max()) < n:
        raise ValueError(f"data.edge_index leads to nodes that do not exist: data.x has {n:,} nodes, counted from 0.")
    if weight.shape != source.shape:
        raise ValueError(f"data.edge_weight has the shape {weight.shape}, but there are {len(source):,} edges.")
    if not np.isfinite(weight).all() or (weight < 0).any():
        raise ValueError("data.edge_weight must be finite and not negative: leave out other edges.")
    order = np.lexsort((source, destination))
    source, destination, weight = source[order], destination[order], weight[order]
    twice = (np.diff(source) == 0) & (np.diff(destination) == 0)
    if twice.any():
        raise ValueError(f"data.edge_index repeats {int(twice.sum()):,} edges: merge them with data.coalesce().")
    if not (source != destination).any():
        raise ValueError("data.edge_index has no edges between different nodes.")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(destination, minlength=n))])
    return sparse.csr_matrix((weight, source, indptr), shape=(n, n))


def _values(adata: AnnData, info: Any, where: str) -> NDArray[Any]:
    if info.get("kind") == "patch" and (adata.X is None or PIXELS_KEY in adata.obsm):
        pixels = read_pixels(adata, np.arange(adata.n_obs))
        return pixels.reshape(adata.n_obs, -1).astype(np.float32) / np.float32(255)
    if adata.X is None:
        raise ValueError(f"{where}.X is None: store the features of the nodes there.")
    values = in_memory(adata.X, f"{where}.X")
    return values.toarray() if sparse.issparse(values) else np.asarray(values)


def _array(tensor: Tensor) -> NDArray[Any]:
    import torch

    dense = tensor.detach().cpu()
    dense = dense if dense.layout == torch.strided else dense.to_dense()
    dense = dense.float() if dense.dtype == torch.bfloat16 else dense  # numpy has no such type
    array: NDArray[Any] = dense.numpy().copy()
    return array


def _tensor(values: Any, where: str) -> Tensor:
    import torch

    array = np.array(values)
    if array.dtype.kind not in "buifc":
        raise TypeError(f"{where} must hold numbers, found dtype {array.dtype}: convert or remove it.")
    return torch.from_numpy(array)


def _names(names: Sequence[Any] | None, n: int, what: str) -> list[str]:
    return node_names(names, n, what, f"{what}_names")
