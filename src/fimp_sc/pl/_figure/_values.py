"""Values that nodes are colored by, their coordinates, and the panels that they are drawn in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._errors import MissingKeyError
from fimp_sc.data._study import feature_names, is_mudata
from fimp_sc.data.storage._elements import get_matrix, get_obs, in_memory
from fimp_sc.data.validate._checks import check_places
from fimp_sc.pl._figure._common import gene_columns, read_columns

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from fimp_sc.data._study import Modality


def coordinates(adata: AnnData, spatial_key: str) -> NDArray[np.float64]:
    """Return the first two columns of ``obsm[spatial_key]``."""
    if spatial_key not in adata.obsm:
        message = f"adata.obsm has no {spatial_key!r}; it has {_names(adata.obsm)}. Set spatial_key=."
        raise MissingKeyError(message)
    xy = dense_entry(adata, spatial_key)
    if xy.ndim != 2 or xy.shape[1] < 2:
        message = f"adata.obsm[{spatial_key!r}] has shape {xy.shape}; two columns are needed to draw."
        raise ValueError(message)
    check_places(xy[:, :2], f"adata.obsm[{spatial_key!r}]", adata.obs_names)
    return xy[:, :2]


def dense_entry(adata: AnnData, key: str) -> NDArray[np.float64]:
    """Return an entry of `.obsm`, wherever it is, dense."""
    values = in_memory(adata.obsm[key], f"adata.obsm[{key!r}]")
    try:
        return np.asarray(values.toarray() if sparse.issparse(values) else values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"adata.obsm[{key!r}] must hold numbers, which columns of text are not.") from None


def tables(adata: Any, parts: Sequence[Modality]) -> list[tuple[AnnData, NDArray[np.int64] | None, pd.Index]]:
    """Return the tables with genes, the row of each node there, and the names of the genes."""
    if parts:
        having = [part for part in parts if not part.is_sequence]
        return [(part.adata, part.rows, names) for part, names in zip(having, feature_names(having), strict=True)]
    return [] if is_mudata(adata) else [(adata, None, adata.var_names)]


def values_of(
    adata: AnnData, key: str | tuple[str, int], layer: str | None, parts: Sequence[Modality] = ()
) -> pd.Categorical | NDArray[np.float64]:
    """Return a column of ``obs`` or ``obsm``, or a gene: categories, or numbers."""
    if isinstance(key, tuple):
        name, column = key
        if name not in adata.obsm:
            message = f"adata.obsm has no {name!r}; it has {_names(adata.obsm)}."
            raise MissingKeyError(message)
        array = dense_entry(adata, name)
        if array.ndim != 2 or not -array.shape[1] <= column < array.shape[1]:
            message = f"adata.obsm[{name!r}] has shape {array.shape}; there is no column {column}."
            raise MissingKeyError(message)
        return array[:, column]
    if key in adata.obs:
        series = get_obs(adata, [key])[key]
        if pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series):
            return series.to_numpy(dtype=np.float64, na_value=np.nan)
        return pd.Categorical(series)
    for table, row, names in tables(adata, parts):
        if key in names:
            where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
            gene = gene_columns(names, [key], "adata.var_names")
            values = read_columns(get_matrix(table, layer), where, gene).ravel()
            return values if row is None else np.where(row < 0, np.nan, values[row])
    message = (
        f"{key!r} is neither a column of adata.obs {list(adata.obs.columns)} nor a gene of adata.var_names. "
        "For a column of adata.obsm give a pair such as ('X_fimp', 0)."
    )
    raise MissingKeyError(message)


def panels(adata: AnnData, library_key: str | None) -> list[tuple[str | None, NDArray[np.intp]]]:
    """Return name and cells of each sample; all cells under None if there is no ``library_key``."""
    if library_key is None:
        return [(None, np.arange(adata.n_obs))]
    if library_key not in adata.obs:
        message = f"library_key={library_key!r} is not a column of adata.obs, which has {list(adata.obs.columns)}."
        raise MissingKeyError(message)
    library = pd.Categorical(get_obs(adata, [library_key])[library_key])
    return [(str(name), np.flatnonzero(library == name)) for name in library.remove_unused_categories().categories]


def _names(mapping: Iterable[str | None]) -> list[str]:
    """List keys; since anndata 0.13 the layers also hold `.X`, under None."""
    return sorted(key for key in mapping if key is not None)
