"""How coordinates come to ``obsm`` where they are elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fimp_sc.data.storage._elements import get_obs

if TYPE_CHECKING:
    from anndata import AnnData

# Words in columns of coordinates in a whole slide, the best first, and of those in an array or a field.
_FIRST, _LAST = ("global", "fullres", "slide", "centroid", "center", "spatial"), ("array", "local")
_EMBEDDING = re.compile(r"umap|tsne|pca|latent|phate", re.IGNORECASE)
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
