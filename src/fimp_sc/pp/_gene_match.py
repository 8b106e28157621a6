"""Report of which genes a vocabulary knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fimp_sc.pretrained.genes._match import METHODS

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class GeneMatch:
    """Genes of an object that a vocabulary knows, how they were found, and those that are lost.

    Attributes
    ----------
    table
        A row per gene, indexed by ``adata.var_names``, with the columns ``name`` (looked up), ``symbol`` (in the
        vocabulary; missing where there is none), ``id`` (int64, -1 where there is none), ``method`` (``"exact"``,
        ``"case"``, ``"alias"``, ``"ortholog"``, ``"uppercase"`` or ``""``), ``status`` (``"matched"``,
        ``"ambiguous"`` or ``"lost"``), ``fraction_of_counts`` and ``note`` (why a gene is ambiguous or lost).
    fraction_of_counts
        Fraction of the total expression that falls on genes with an id; NaN if there is none at all.
    n_vocabulary
        Number of genes in the vocabulary.
    """

    table: pd.DataFrame
    fraction_of_counts: float
    n_vocabulary: int

    @property
    def n_matched(self) -> int:
        """Number of genes with an id that no other candidate or gene competes for on equal terms."""
        return int((self.table["status"] == "matched").sum())

    @property
    def n_ambiguous(self) -> int:
        """Number of genes with equal candidates, one of which was chosen, or whose id another gene has."""
        return int((self.table["status"] == "ambiguous").sum())

    @property
    def n_lost(self) -> int:
        """Number of genes that no step found in the vocabulary."""
        return int((self.table["status"] == "lost").sum())

    @property
    def n_used(self) -> int:
        """Number of genes with an id: the matched ones, and ambiguous ones for which a candidate was chosen."""
        return int((self.table["id"] >= 0).sum())

    def summary(self) -> str:
        """Return a report of a few lines."""
        table, known = self.table, self.table["id"] >= 0
        methods = [(method, int((table["method"][table["status"] == "matched"] == method).sum())) for method in METHODS]
        found = f"{self.n_used:,} of {len(table):,} genes, {percent(self.fraction_of_counts)} of counts"
        lines = [
            f"GeneMatch: {found}, in a vocabulary of {self.n_vocabulary:,}",
            f"  matched    {self.n_matched:>7,}  " + ", ".join(f"{method} {n:,}" for method, n in methods if n),
        ]
        if self.n_ambiguous:
            chosen = int((known & (table["status"] == "ambiguous")).sum())
            lines.append(
                f"  ambiguous  {self.n_ambiguous:>7,}  {chosen:,} by a choice among equals, "
                f"{self.n_ambiguous - chosen:,} without an id, which another gene has"
            )
        if self.n_lost:
            lost = table[table["status"] == "lost"].sort_values("fraction_of_counts", ascending=False, kind="stable")[
                :5
            ]
            fractions = zip(lost.index, lost["fraction_of_counts"], strict=True)
            largest = ", ".join(f"{name} ({percent(fraction)})" for name, fraction in fractions)
            lines.append(f"  lost       {self.n_lost:>7,}  most counts: {largest}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.summary()


def percent(fraction: float) -> str:
    """Write a fraction for people; ``"none"`` where there is nothing to have a fraction of."""
    if not np.isfinite(fraction):
        return "none"
    return f"{100 * fraction:.1f} %" if fraction == 0 or fraction >= 0.001 else "<0.1 %"
