"""Niches of a reference, by which other cells are divided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fimp_sc._keys import find_results
from fimp_sc._logging import warn
from fimp_sc._palette import palette
from fimp_sc._recipe import recipe
from fimp_sc.data.storage._elements import get_obs, missing_key
from fimp_sc.tl._statistics._mapping import among_niches
from fimp_sc.tl._statistics._representation import made_by

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray


class Reference:
    """Niches of another object.

    Parameters
    ----------
    reference
        Object that holds them.
    key
        Their name.
    n_niches, smooth
        What the user asked for beside the reference, which leaves nothing to ask.

    Raises
    ------
    KeyError
        There are none of this name, or a cell by which a niche is recognized is not there any more.
    ValueError
        They have no mixture, or more was asked for.
    """

    def __init__(self, reference: AnnData | MuData, key: str, n_niches: int | None, smooth: int | None) -> None:
        if n_niches is not None or smooth is not None:
            raise ValueError("n_niches and smooth are those of the reference: leave them out.")
        holder: Any = find_results(reference, None, lambda held, names: key in held.obs and key in held.uns)[0]
        self._holder, self._key = holder, key
        if key not in holder.obs or key not in holder.uns:
            advice = "Run fimp_sc.tl.niches(reference) first, or name its niches with key_added=."
            raise missing_key(key, "reference.uns", holder.uns, advice)
        record = holder.uns[key]
        mixture = record.get("mixture") if isinstance(record, Mapping) else None
        if mixture is None:
            raise ValueError(
                f"reference.uns[{key!r}] has no mixture, by which niches are found again: it was made with "
                'method="leiden", from a reference itself, or by an earlier version. Run fimp_sc.tl.niches(reference).'
            )
        self.mixture: Mapping[str, Any] = mixture
        self.use_rep, self.smooth = str(record["params"]["use_rep"]), int(record["params"]["smooth"])
        column = pd.Series(pd.Categorical(get_obs(holder, [key])[key]), index=holder.obs_names)
        self.names = [str(name) for name in column.cat.categories]
        # Niches may have been renamed since, or several given one name.
        self._code = self._recognized(column, key)
        held = np.atleast_1d(holder.uns.get(f"{key}_colors", []))
        self.colors = list(map(str, held)) if len(held) == len(self.names) else palette(len(self.names))

    def _recognized(self, column: pd.Series, key: str) -> NDArray[np.int64]:
        """Return the category of each niche of the mixture: that of its typical cell."""
        codes, typical = column.cat.codes.to_numpy(), np.array(self.mixture["typical"], dtype=str)
        found = np.full(len(typical), -1, dtype=np.int64)
        place = column.index.astype(str).get_indexer_for(typical[typical != ""])
        if len(place) == (typical != "").sum():
            found[typical != ""] = np.where(place < 0, -1, codes[place])
        # One of several objects has no cell of some niches, which are the categories that are left.
        left = np.setdiff1d(np.arange(len(self.names)), found)
        if len(self.names) == len(typical) and np.array_equal(left, np.flatnonzero(typical == "")):
            found[left] = left
        if found.min() < 0:
            raise KeyError(
                f"Cells by which the niches in reference.obs[{key!r}] are recognized have no niche there any more, or "
                "are gone: pass the object with all of its cells, or run fimp_sc.tl.niches(reference) again."
            )
        return found

    def check_other(self, adata: Any) -> None:
        """Raise a ValueError where results would replace the niches of the reference."""
        if adata is self._holder:
            raise ValueError(
                f"The reference is the object itself, and its niches in uns[{self._key!r}], which this call reads, "
                "would be replaced: pass copy=True to see how its cells fit."
            )

    def check(self, adata: Any, n_features: int, key: str) -> None:
        """Raise a ValueError where the representation of other cells is not that of the reference."""
        advice = "fimp_sc.tl.embed(adata, model=fimp_sc.tl.get_model(reference)) embeds these cells by its model."
        if n_features != len(self.mixture["center"]):
            raise ValueError(
                f"adata.obsm[{key!r}] has {n_features} columns, and that of the reference "
                f"{len(self.mixture['center'])}. {advice}"
            )
        own, its = made_by(adata, key).get("weights_checksum"), self.mixture.get("weights_checksum")
        if None not in (own, its) and own != its:
            raise ValueError(f"adata.obsm[{key!r}] was not made by the model of the reference. {advice}")

    def find(
        self, values: NDArray[np.float64], order: NDArray[np.integer]
    ) -> tuple[NDArray[np.integer], dict[str, Any]]:
        """Return the niche of each cell, and further results in the order of the object."""
        each, fit = among_niches(values, self.mixture)
        probabilities = np.zeros((len(values), len(self.names)), dtype=np.float32)
        ordered = np.zeros_like(probabilities)
        np.add.at(ordered.T, self._code, each.T)
        probabilities[order], fits = ordered, np.empty(len(values), dtype=np.float32)
        fits[order] = fit
        least = recipe().least_fit
        few = float((fit < least).mean())
        if few > recipe().many_unfit:
            warn(
                f"{100 * few:.0f} % of the cells fit none of the niches of the reference (fit below {least}, as "
                f"{100 * least:.0f} % of its own cells): they may be of other tissue, or measured otherwise."
            )
        return ordered.argmax(1), {"obs": fits, "obsm": probabilities}
