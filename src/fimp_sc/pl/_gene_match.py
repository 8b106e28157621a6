"""Bars of genes by the step that matched them with a vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fimp_sc._options import checked
from fimp_sc.pl._figure._canvas import Canvas

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fimp_sc.pp import GeneMatch

# Okabe and Ito's colors, which stay apart for color-blind readers; unused genes are gray. Labels are black or
# white, whichever is easier to read on them.
_STYLES = {
    "exact": ("#0072b2", "white"),
    "case": ("#56b4e9", "black"),
    "alias": ("#009e73", "white"),
    "ortholog": ("#e69f00", "black"),
    "uppercase": ("#f0e442", "black"),
    "ambiguous, chosen": ("#cc79a7", "black"),
    "ambiguous, not used": ("#666666", "white"),
    "lost": ("#d9d9d9", "black"),
}
_LABELED = 0.045


@checked
def gene_match(
    match: GeneMatch,
    *,
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Draw the fractions of genes and counts that each step of matching found, and of those lost.

    Parameters
    ----------
    match
        Result of :func:`fimp_sc.pp.match_genes`.
    title
        Title of the axes; none by default.
    ax
        Axes to draw into; by default a new figure.
    show
        Show the figure and return nothing; by default if none of `ax`, `save` and `return_fig` is given.
    save
        File to write the figure to.
    return_fig
        Return the figure instead of the axes.

    Returns
    -------
    None if the figure is shown; else the figure if `return_fig`, else the axes.

    Raises
    ------
    TypeError
        If `match` is no result of :func:`fimp_sc.pp.match_genes`.
    ValueError
        If both `show` and `return_fig` are True.
    """
    from fimp_sc.pp import GeneMatch as Result

    canvas = Canvas(ax, show, save, return_fig, title)
    if not isinstance(match, Result):
        raise TypeError(f"match must be a result of fimp_sc.pp.match_genes, found {type(match).__name__}.")
    numbers, fractions = _parts(match)
    # A bar without a length says nothing: the object may hold no counts at all.
    bars = {"genes": fractions[0]} | ({"counts": fractions[1]} if np.isfinite(fractions[1]).all() else {})
    ax = canvas.axes((6.5, 2.4))
    rows = np.arange(len(bars))
    left = np.zeros(len(bars))
    for i, (name, (color, ink)) in enumerate(_STYLES.items()):
        width = np.array([fractions[i] for fractions in bars.values()])
        if not numbers[i]:
            continue
        label = f"{name} ({numbers[i]:,})"
        ax.barh(rows, width, 0.7, left=left, color=color, edgecolor="white", linewidth=0.8, label=label)
        for row, start, fraction in zip(rows, left, width, strict=True):
            if fraction >= _LABELED:
                middle = start + fraction / 2
                ax.text(middle, float(row), f"{fraction:.0%}", color=ink, ha="center", va="center", fontsize="small")
        left += width
    ax.set_xlim(0, 1)
    ax.set_yticks(rows, list(bars))
    ax.set_ylim(len(bars) - 0.5, -0.5)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_xlabel(f"Fraction of {len(match.table):,} genes" + (" and of their counts" if len(bars) > 1 else ""))
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize="small")
    canvas.entitle()
    return canvas.finish()


def _parts(match: GeneMatch) -> tuple[list[int], np.ndarray]:
    """Return the number of genes in each part, and their fractions ``(2, n_parts)`` of genes and of counts."""
    table = match.table
    unused = np.where(table["id"] >= 0, "ambiguous, chosen", "ambiguous, not used")
    part = np.where(
        table["status"] == "ambiguous", unused, np.where(table["status"] == "lost", "lost", table["method"])
    )
    members = [part == name for name in _STYLES]
    counts = table["fraction_of_counts"].to_numpy()
    return [int(m.sum()) for m in members], np.array([[m.mean() for m in members], [counts[m].sum() for m in members]])
