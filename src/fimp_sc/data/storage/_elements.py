"""Read obs, obsm, obsp and layers; small elements are loaded, the expression matrix stays where it is."""

from __future__ import annotations

import re
from collections.abc import Hashable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._errors import MissingKeyError
from fimp_sc.data.storage._rows import open_rows, storage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData

_SIGN, _NUMBER = re.compile(r"[\W_]"), re.compile(r"[-.]\d+$")


def shorten(items: Sequence[str], limit: int = 5) -> str:
    """Join ``items`` for a message, the first ``limit`` of them."""
    return ", ".join(items[:limit]) + (f" and {len(items) - limit:,} more" if len(items) > limit else "")


def missing_key(key: Any, where: str, found: Iterable[Any], advice: str) -> MissingKeyError:
    """Return the exception for ``key`` absent from ``where``, naming the keys ``found`` there and the nearest one."""
    keys = [str(k) for k in found if k is not None]  # anndata 0.13 lists X among the layers, as None
    there = f"found there: {shorten([repr(k) for k in keys], 10)}" if keys else "it holds no keys"
    return MissingKeyError(f"{key!r} is not in {where} ({there}).{nearest(key, keys)} {advice}")


def nearest(key: Any, names: Iterable[str]) -> str:
    """Return a sentence for the middle of a message that names the most similar of ``names``, if one is.

    Names that differ in case, signs (``HLA.A``) or the number of a duplicate (``A-1``) come first.
    """
    names, (own, short) = list(names), _plain(str(key))
    alike = [name for name in names if own in _plain(name) or short == _plain(name)[0]] if own else []
    close = get_close_matches(str(key), alike, n=1, cutoff=0) or get_close_matches(str(key), names, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _plain(name: str) -> tuple[str, str]:
    """Return letters and digits of a name in lower case, with and without a number at its end."""
    return _SIGN.sub("", name.casefold()), _SIGN.sub("", _NUMBER.sub("", name.casefold()))


def get_matrix(adata: AnnData, layer: str | None) -> Any:
    """Return ``adata.X``, or ``adata.layers[layer]``, as it is stored.

    Raises
    ------
    MissingKeyError
        There is no such layer.
    ValueError
        ``layer`` is ``None`` and ``adata.X`` is empty, or a single value.
    """
    if layer is None:
        if adata.X is None:
            layers = shorten([repr(k) for k in adata.layers if k is not None]) or "none"
            raise ValueError(f"adata.X is None: pass layer= with expression (layers found: {layers}).")
        if tuple(adata.X.shape) != tuple(adata.shape):
            raise ValueError(f"adata.X has the shape {tuple(adata.X.shape)}, and {tuple(adata.shape)} is needed.")
        return adata.X
    if layer not in adata.layers:
        raise missing_key(layer, "adata.layers", adata.layers, "Pass layer=None to use adata.X.")
    return adata.layers[layer]


def get_obs(adata: AnnData, columns: Sequence[str]) -> pd.DataFrame:
    """Return columns of ``adata.obs`` in memory; of a lazy object they are read now, and no others.

    Raises
    ------
    KeyError
        A column is absent.
    TypeError
        A column holds lists or the like.
    """
    columns = list(columns)
    if isinstance(adata.obs, pd.DataFrame):
        for name in columns:
            _check_hashable(adata.obs[name], name)
        return adata.obs[columns]
    if not columns:
        return pd.DataFrame(index=adata.obs_names)
    return adata.obs[columns].to_memory()[columns].set_axis(adata.obs_names, axis=0)


def _check_hashable(column: pd.Series, name: str) -> None:
    if column.dtype != object:
        return
    other = next((value for value in column if not isinstance(value, Hashable)), None)
    if other is not None:
        raise TypeError(
            f"adata.obs[{name!r}] holds values of the type {type(other).__name__}, not texts or numbers: name another "
            f"column, or turn it into text with adata.obs[{name!r}] = adata.obs[{name!r}].astype(str)."
        )


def label_text(column: pd.Series) -> pd.Series:
    """Return labels as text, NaN where they are missing.

    Whole numbers have no decimals: beside missing labels pandas keeps them as real numbers.
    """
    return pd.Series(column.astype(object).map(_text, na_action="ignore"), dtype=object)


def _text(label: Any) -> str:
    whole = isinstance(label, float | np.floating) and float(label).is_integer()
    return str(int(label)) if whole else str(label)


def get_graph(adata: AnnData, key: str) -> sparse.csr_matrix:
    """Return the graph ``adata.obsp[key]`` in memory."""
    return sparse.csr_matrix(in_memory(adata.obsp[key], f"adata.obsp[{key!r}]"))


def in_memory(element: Any, where: str) -> Any:
    """Return an entry of ``obsm`` or ``obsp`` as scipy, numpy or pandas hold it; as it is if it is in memory.

    Parameters
    ----------
    where
        Where it was found, for messages.
    """
    kind = storage(element)
    if kind == "dask" and element.ndim == 2 and element.dtype.kind in "buif":
        return open_rows(element, where).read(np.arange(element.shape[0]))
    if kind == "dask":
        return element.compute(scheduler="synchronous")
    if kind == "dense":
        return np.asarray(element[...])
    return element.to_memory() if kind in {"sparse", "table"} else element
