"""Inputs of scores: two arrays, or an object and the names of two of its entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fimp_sc.data._study import is_mudata
from fimp_sc.data.storage._elements import get_matrix, get_obs, in_memory, label_text, missing_key

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray


def split(given: tuple[Any, ...]) -> tuple[AnnData | None, Any, Any]:
    """Return object (or ``None``), truth and result of a call with two arrays, or with an object and two names.

    Raises
    ------
    TypeError
        Another number of arguments, or no object before two names.
    """
    from anndata import AnnData

    if len(given) == 3 and (isinstance(given[0], AnnData) or is_mudata(given[0])):
        return given[0], given[1], given[2]
    if len(given) == 2 and not any(isinstance(value, str | AnnData) for value in given):
        return None, given[0], given[1]
    found = ", ".join(type(value).__name__ for value in given)
    raise TypeError(f"Pass two arrays (truth, result), or an object and two names (adata, truth, result): got {found}.")


def labels(given: tuple[Any, ...], missing: str | None) -> tuple[AnnData | None, NDArray[Any], NDArray[Any]]:
    """Return object and two arrays ``(n_obs,)`` of labels as text, ``None`` where missing or equal to ``missing``.

    Raises
    ------
    MissingKeyError
        A column is absent.
    ValueError
        Not one label for each cell.
    """
    adata, *values = split(given)
    out: list[NDArray[Any]] = []
    for value in values:
        if adata is not None:
            if value not in adata.obs:
                raise missing_key(value, "adata.obs", adata.obs, "Name two columns of adata.obs.")
            value = get_obs(adata, [value])[value]
        column = pd.Series(np.asarray(value, dtype=object).copy())
        text = label_text(column)
        out.append(text.where(text.notna() & (text != missing), None).to_numpy(dtype=object))
    if len(out[0]) != len(out[1]):
        raise ValueError(f"There are {len(out[0]):,} true labels and {len(out[1]):,} others: one of each for a cell.")
    return adata, out[0], out[1]


def expression(adata: AnnData, name: str | None) -> tuple[Any, pd.Index]:
    """Return expression as it is stored and the names of its genes: of ``X`` (``None``), a layer, or predictions.

    :func:`fimp_sc.tl.impute` writes those of all genes to ``layers``, and of some to ``obsm``.
    """
    if name is not None and name not in adata.layers and name in adata.obsm:
        genes = dict(adata.uns.get(name, {})).get("genes")
        if genes is not None and len(genes) == adata.obsm[name].shape[1]:
            return in_memory(adata.obsm[name], f"adata.obsm[{name!r}]"), as_index(genes)
    return get_matrix(adata, name), adata.var_names


def as_index(names: Any) -> pd.Index:
    """Return names that ``uns`` holds as an index; read from a file they may be strings of numpy's own, or in dask."""
    return pd.Index([str(name) for name in in_memory(names, "adata.uns")], dtype=object)
