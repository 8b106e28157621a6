"""Checks of what a user hands in. All raise before anything is changed, and say what to do next."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._errors import MissingKeyError
from fimp_sc._logging import warn
from fimp_sc.data.graph._adjacency import check_adjacency
from fimp_sc.data.storage._elements import get_graph, get_matrix, get_obs, in_memory, label_text, missing_key, shorten
from fimp_sc.data.storage._rows import open_rows
from fimp_sc.data.validate._labels import check_labels, warn_labels
from fimp_sc.data.validate._values import InputScale, check_values

if TYPE_CHECKING:
    from anndata import AnnData


_FEW_CELLS = 64

__all__ = [
    "InputScale",
    "MissingKeyError",
    "check_anndata",
    "check_connectivities",
    "check_coordinates",
    "check_graph",
    "check_labels",
    "check_object",
    "check_obs_key",
    "check_scaled",
    "check_values",
    "get_graph",
    "get_matrix",
    "get_obs",
    "in_memory",
    "label_text",
    "shorten",
    "warn_labels",
]


# Squares of larger differences overflow float32.
_LARGEST_COORDINATE = 1e18


def check_object(adata: Any) -> None:
    """Check that ``adata`` is an AnnData object with at least one cell, in memory or not.

    Raises
    ------
    TypeError
        It is of another type.
    ValueError
        It has no cells, or is a view of an object backed by a file.
    """
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        raise TypeError(f"Expected an AnnData object, found {type(adata).__name__}{_object_hint(adata)}.")
    if adata.isbacked and adata.is_view:
        raise ValueError(
            f"adata is a view of an object backed by {str(adata.filename)!r}, which can take no results: load it with "
            "adata = adata.to_memory(), or write it to a file of its own with adata = adata.copy(filename)."
        )
    if adata.n_obs == 0:
        raise ValueError("adata has no cells (n_obs = 0): check the filters applied before.")


def _object_hint(found: Any) -> str:
    """Return how an AnnData object is had from something else."""
    name = type(found).__name__
    if name.startswith("AnnCollection"):
        call = "[:].to_adata()" if name == "AnnCollection" else ".to_adata()"
        return f": bring its objects into one, for instance with collection{call}"
    if isinstance(found, str | Path):
        return f": read the file first, for instance with anndata.read_h5ad({str(found)!r})"
    if isinstance(found, pd.DataFrame | np.ndarray) or sparse.issparse(found):
        return (
            ": make one of cells × genes with adata = anndata.AnnData(values), and give the cells coordinates with "
            'adata.obsm["spatial"] = an array of shape (n_obs, 2)'
        )
    if hasattr(found, "mod"):
        return ": pass one modality, for instance mdata['rna']"
    if hasattr(found, "tables"):
        names = list(found.tables)
        return f": pass one of its tables, {names}, for instance sdata[{names[0]!r}]" if names else " without tables"
    return ""


def check_anndata(adata: Any) -> None:
    """Check that ``adata`` is an AnnData object with cells, and with genes whose names are unique.

    Raises
    ------
    TypeError
        It is of another type.
    ValueError
        It has no cells or no genes, is a view of an object backed by a file, or has duplicate gene names.
    """
    check_object(adata)
    if adata.n_vars == 0:
        raise ValueError("adata has no genes (n_vars = 0): check the filters applied before.")
    if not adata.var_names.is_unique:
        duplicates = adata.var_names[adata.var_names.duplicated()].unique()
        raise ValueError(
            f"adata.var_names has {len(duplicates):,} duplicate gene names: {shorten([repr(g) for g in duplicates])}. "
            "Merge these genes, or call adata.var_names_make_unique()."
        )


def check_coordinates(adata: AnnData, spatial_key: str, *, advice: str = "") -> np.ndarray:
    """Return ``adata.obsm[spatial_key]`` as float64 of shape ``(n_obs, 2)`` or ``(n_obs, 3)``.

    Parameters
    ----------
    advice
        What else to do where there are none.

    Raises
    ------
    MissingKeyError
        ``spatial_key`` is absent.
    TypeError
        The coordinates are not numbers.
    ValueError
        They have another shape, are NaN or infinite for some cells, or too large for distances.
    """
    where = f"adata.obsm[{spatial_key!r}]"
    if spatial_key not in adata.obsm:
        hint = f"{coordinates_hint(adata, spatial_key)} {advice}".rstrip()
        raise missing_key(spatial_key, "adata.obsm", adata.obsm, hint)
    stored = adata.obsm[spatial_key]
    try:
        values = in_memory(stored, where)
        if sparse.issparse(values):
            raise TypeError
        coordinates = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{where} must be an array of numbers, found {type(stored).__name__}.") from None
    if coordinates.ndim != 2 or coordinates.shape[1] not in {2, 3}:
        raise ValueError(f"{where} must have the shape (n_obs, 2) or (n_obs, 3), found {coordinates.shape}.")
    check_places(coordinates, where, adata.obs_names)
    return coordinates


def check_places(coordinates: np.ndarray, where: str, names: pd.Index) -> None:
    """Check that every cell has a place, and that distances between places can be computed.

    Parameters
    ----------
    coordinates
        ``(n, d)`` float64.
    where
        Where they were found, for messages.
    names
        ``(n,)`` of the cells.

    Raises
    ------
    ValueError
        Some are NaN, infinite, or too large.
    """
    bad = np.flatnonzero(~np.isfinite(coordinates).all(axis=1))
    if bad.size:
        raise ValueError(
            f"{where} is NaN or infinite for {bad.size:,} of {len(names):,} cells, first {names[bad[0]]!r}: "
            "remove these cells or give them coordinates."
        )
    largest = float(np.abs(coordinates).max(initial=0.0))
    if largest > _LARGEST_COORDINATE:
        raise ValueError(
            f"{where} has values up to {largest:.4g}, between which distances cannot be computed: divide them, or "
            "check where they come from."
        )


def check_obs_key(adata: AnnData, key: str, role: str) -> pd.Categorical:
    """Return the column ``adata.obs[key]`` as a categorical without unused categories; ``adata.obs`` stays as it is.

    Parameters
    ----------
    role
        What the column is for, as in the name of the argument: ``"library"`` for ``library_key``.

    Raises
    ------
    MissingKeyError
        ``key`` is absent.
    ValueError
        The column is missing (NaN) for some cells.
    """
    if key not in adata.obs:
        raise missing_key(key, "adata.obs", adata.obs, f"Name the {role} of each cell with {role}_key=.")
    column = get_obs(adata, [key])[key]
    missing = int(column.isna().sum())
    if missing:
        raise ValueError(
            f"adata.obs[{key!r}] ({role}_key) is missing (NaN) for {missing:,} of {adata.n_obs:,} cells, first "
            f"{adata.obs_names[int(column.isna().to_numpy().argmax())]!r}: fill it in or remove these cells."
        )
    return pd.Categorical(column).remove_unused_categories()


def check_key_added(key: str) -> None:
    """Check the name under which results are written.

    Raises
    ------
    ValueError
        It has a slash, with which an h5ad file could be written but not read again.
    """
    if "/" in key:
        raise ValueError(f"key_added={key!r} has a slash, which files take for a folder: choose another name.")


def check_graph(adata: AnnData, connectivities_key: str, library_key: str | None = None) -> None:
    """Check the graph ``adata.obsp[connectivities_key]``; see :func:`check_connectivities`.

    It may be empty where the object says that its cells have no neighbors, see :func:`is_dissociated`.

    Raises
    ------
    MissingKeyError
        The graph, or ``library_key``, is absent.
    """
    if connectivities_key not in adata.obsp:
        built = _maker(adata) or "fimp_sc.pp.spatial_graph(adata)"
        advice = f"Build the graph with {built}, or name another with connectivities_key=."
        advice += "" if _maker(adata) else f" {dissociated_hint(adata)}".rstrip()
        raise missing_key(connectivities_key, "adata.obsp", adata.obsp, advice)
    library = None if library_key is None else check_obs_key(adata, library_key, "library")
    where = f"adata.obsp[{connectivities_key!r}]"
    advice = "Where their neighbors were left out after the graph was built, build it again"
    if _maker(adata):
        advice += f" with {_maker(adata)}"
    elif connectivities_key.endswith("_connectivities"):
        arguments = "" if library_key is None else f", library_key={library_key!r}"
        if connectivities_key != "spatial_connectivities":
            arguments += f", key_added={connectivities_key.removesuffix('_connectivities')!r}"
        advice += f": fimp_sc.pp.spatial_graph(adata{arguments}, overwrite=True)"
    graph = in_memory(adata.obsp[connectivities_key], where)
    empty = is_dissociated(adata, connectivities_key)
    check_connectivities(
        graph, adata.n_obs, where=where, library=library, advice=f"{advice}.", empty=empty, maker=_maker(adata)
    )


# What makes graphs of nodes that are no cells, by their kind.
_MAKERS = {
    "signal": "fimp_sc.pp.fmri",
    "patch": "fimp_sc.pp.images or fimp_sc.pp.spot_images",
    "text": "fimp_sc.pp.text",
    "feature": "fimp_sc.pp.features",
}


def _maker(adata: AnnData) -> str:
    """Return the function that makes modalities of this kind with their graph; empty text for cells."""
    described = adata.uns.get("fimp_modality")
    kind = described.get("kind") if isinstance(described, Mapping) else None
    return _MAKERS.get(str(kind), "" if kind is None else "the function that made this modality")


def neighbors_key(connectivities_key: str) -> str:
    """Return the key of ``uns`` that describes a graph, as squidpy names it."""
    return f"{connectivities_key.removesuffix('_connectivities')}_neighbors"


def is_dissociated(adata: AnnData, connectivities_key: str) -> bool:
    """Tell whether an object says that its cells have no neighbors: its graph was made with ``n_neighbors=0``."""
    found = adata.uns.get(neighbors_key(connectivities_key))
    params = found.get("params") if isinstance(found, Mapping) else None
    return isinstance(params, Mapping) and params.get("n_neighbors") == 0


def dissociated_hint(adata: AnnData) -> str:
    """Return how cells without places are used; empty text for an object that seems to have places somewhere."""
    places = any(_PLACES.search(str(key)) for slot in (adata.obsm, adata.uns) for key in slot)
    if places or _columns(adata) is not None:
        return ""
    return "Cells of dissociated tissue have no neighbors: fimp_sc.pp.spatial_graph(adata, n_neighbors=0) says so."


def check_scaled(adata: AnnData, layer: str | None, input_scale: str) -> None:
    """Refuse scaled expression in ``adata.X`` where ``adata.raw`` holds other values, by a look at a few cells.

    Raises
    ------
    ValueError
        The message says how to take the values in ``adata.raw``.
    """
    if layer is not None or input_scale == "real" or getattr(adata, "raw", None) is None or adata.X is None:
        return
    cells = np.unique(np.linspace(0, adata.n_obs - 1, min(adata.n_obs, _FEW_CELLS)).astype(int))
    values = open_rows(adata.X, "adata.X").read(cells)
    if values.min() < 0:
        layers = [repr(key) for key in adata.layers if key is not None]
        other = f", or pass layer= (layers found: {shorten(layers)})" if layers else ""
        raise ValueError(
            "adata.X contains values below zero, as scaled expression does, which cannot be used. adata.raw holds "
            f"{adata.raw.n_vars:,} genes as they were before: pass adata.raw.to_adata(){other}."
        )


def check_connectivities(
    graph: Any,
    n_obs: int,
    *,
    where: str = "The graph",
    library: pd.Categorical | None = None,
    advice: str = "",
    empty: bool = False,
    maker: str = "",
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
    empty
        Whether there may be no edges at all.
    maker
        What makes such graphs, if it is not :func:`fimp_sc.pp.spatial_graph`.

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
        if empty:
            return
        raise ValueError(
            f"{where} has no edges between nodes: build it with "
            f"{maker or 'fimp_sc.pp.spatial_graph(adata, overwrite=True)'}."
        )
    if library is not None:
        joined = np.flatnonzero(library.codes[row] != library.codes[col])
        if joined.size:
            r, c = int(row[joined[0]]), int(col[joined[0]])
            raise ValueError(
                f"{where} has {joined.size:,} edges that join samples, for instance node {c} of {library[c]!r} with "
                f"node {r} of {library[r]!r} (positions counted from 0): build it sample by sample with "
                f"{maker or 'fimp_sc.pp.spatial_graph(adata, library_key=..., overwrite=True)'}."
            )
    isolated = int((np.diff(checked.indptr) == 0).sum())
    if isolated:
        warn(
            f"{where}: {isolated:,} of {n_obs:,} nodes have no neighbors and are described by their own tokens alone. "
            f"{advice}".rstrip()
        )


# Words in columns of coordinates in a whole slide, the best first, and of those in an array or a field.
_FIRST, _LAST = ("global", "fullres", "slide", "centroid", "center", "spatial"), ("array", "local")
_EMBEDDING = re.compile(r"umap|tsne|pca|latent|phate", re.IGNORECASE)
_PLACES = re.compile(r"spatial|coord|centroid|position", re.IGNORECASE)
_SWAPS = (("x", "y"), ("X", "Y"), ("col(?:umn)?", "row"), ("Col(?:umn)?", "Row"), ("COL(?:UMN)?", "ROW"))


def coordinates_hint(adata: AnnData, spatial_key: str) -> str:
    """Return the line that makes coordinates, from columns or from SpatialData, or else the argument that names them.

    Parameters
    ----------
    adata
        Object without ``obsm[spatial_key]``.
    spatial_key
        Key that is missing.
    """
    target = f"adata.obsm[{spatial_key!r}]"
    pair = _columns(adata)
    if pair is not None:
        return f"adata.obs has columns of coordinates: {target} = adata.obs[{list(pair)!r}].to_numpy()"
    attrs = adata.uns.get("spatialdata_attrs")
    if isinstance(attrs, Mapping) and {"instance_key", "region"} <= set(attrs):
        regions = [str(name) for name in np.ravel(np.asarray(attrs["region"]))]
        one = "" if len(regions) == 1 else f" for the first of the regions {regions}, and likewise for the others"
        return (
            f"SpatialData keeps them with the shapes: {target} = spatialdata.get_centroids(sdata[{regions[0]!r}])"
            f'.compute().loc[adata.obs[{attrs["instance_key"]!r}], ["x", "y"]].to_numpy(){one}.'
        )
    return "Name the cell coordinates with spatial_key=."


def _columns(adata: AnnData) -> tuple[str, str] | None:
    """Return the names of two columns of ``adata.obs`` with coordinates, that of x first."""
    there = {str(column) for column in adata.obs.columns}
    pairs = [
        (x, f"{x[: found.start()]}{second}{x[found.end() :]}")
        for x in map(str, adata.obs.columns)
        for first, second in _SWAPS
        for found in re.finditer(first, x)
        if not _EMBEDDING.search(x)
    ]
    pairs = [pair for pair in pairs if pair[1] in there and _are_numbers(adata, pair)]

    def rank(pair: tuple[str, str]) -> int:
        name = pair[0].lower()
        last = next((len(_LAST) + i for i, word in enumerate(_LAST) if word in name), 0)
        return last or next((i - len(_FIRST) for i, word in enumerate(_FIRST) if word in name), 0)

    return min(pairs, key=rank) if pairs else None


def _are_numbers(adata: AnnData, columns: tuple[str, str]) -> bool:
    table = get_obs(adata, columns)
    return all(pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype) for dtype in table.dtypes)
