"""Representations of cells in ``obsm``, and the models that made them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fimp_sc.data.storage._elements import in_memory, missing_key, shorten

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read_representation(adata: Any, key: str) -> NDArray[np.float64]:
    """Return a representation in memory, ``(n_obs, n_features)``.

    Raises
    ------
    KeyError
        There is none of this name.
    TypeError
        It holds something else than numbers.
    ValueError
        It has no columns, or values that are not finite.
    """
    if key not in adata.obsm:
        advice = "Run fimp_sc.tl.embed(adata) first, or name another representation with use_rep=."
        raise missing_key(key, "adata.obsm", adata.obsm, advice)
    where = f"adata.obsm[{key!r}]"
    held = in_memory(adata.obsm[key], where)
    try:
        values = np.array(held.toarray() if hasattr(held, "toarray") else held, dtype=np.float64)
    except (TypeError, ValueError) as error:
        columns = "" if not isinstance(held, pd.DataFrame) else _not_numbers(held)
        raise TypeError(f"{where} must hold numbers{columns or f' ({error})'}: leave out what is none.") from None
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"{where} has the shape {values.shape}, and one row of numbers for each cell is needed.")
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{where} is NaN or infinite for {int(bad.sum()):,} of {len(values):,} cells, first "
            f"{adata.obs_names[int(bad.argmax())]!r}: remove these cells, for instance with "
            f"adata[np.isfinite(adata.obsm[{key!r}]).all(axis=1)], or embed them."
        )
    return values


def made_by(adata: Any, key: str) -> dict[str, Any]:
    """Return the checksum of the weights of the model that made a representation, if it is known."""
    record = adata.uns.get(key)
    made = record.get("weights_checksum") if isinstance(record, Mapping) else None
    return {} if made is None else {"weights_checksum": str(made)}


def _not_numbers(table: pd.DataFrame) -> str:
    columns = [repr(str(name)) for name, kind in table.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
    return f", and these columns do not: {shorten(columns)}" if columns else ""
