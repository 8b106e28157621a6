"""Pairs of genes that go together in neighbors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from fimp_sc._options import checked
from fimp_sc.data.storage._elements import missing_key
from fimp_sc.pl._figure._canvas import Canvas
from fimp_sc.pl._figure._common import results_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from mudata import MuData
    from numpy.typing import NDArray

_LABELS = {"z": "z", "correlation": "Correlation over edges", "score": "Score"}
_SMALLEST, _LARGEST = 25.0, 190.0  # square points


@checked
def gene_pairs(
    adata: AnnData | MuData,
    key: str = "fimp_gene_pairs",
    *,
    modality: str | Sequence[str] | None = None,
    n_top: int = 20,
    x: Literal["z", "correlation", "score"] = "z",
    source_group: str | None = None,
    destination_group: str | None = None,
    fdr: float = 0.05,
    cmap: str = "viridis",
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Draw the most significant pairs of genes, a dot for each: larger with more edges, brighter with a smaller FDR.

    An arrow points from source to destination where pairs were tested with a direction.

    Parameters
    ----------
    adata
        Object with the results of :func:`fimp_sc.tl.gene_pairs`; or a MuData object.
    key
        Their name in `.uns`.
    modality
        Of a MuData object, the one that the results are of, or the several; by default where they are found.
    n_top
        How many to draw at most, in the order of the table, most significant first.
    x
        Column of the table for the horizontal axis.
    source_group, destination_group
        Only pairs of this group; all by default.
    fdr
        Dots of at most this false discovery rate have a black rim.
    cmap
        Color map of −log10 FDR.
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
    KeyError
        If there are no such results, or no such group.
    ValueError
        If there is no pair to draw, or `x` is none of these.
    """
    canvas = Canvas(ax, show, save, return_fig, title)
    adata, _ = results_of(adata, modality, lambda held, _: key in held.uns)
    table, directed = _pairs(adata, key)
    chosen = table["fdr"].notna().to_numpy()
    for side, name in (("source_group", source_group), ("destination_group", destination_group)):
        groups = table[side].astype(str)
        if name is not None and name not in set(groups):
            raise missing_key(name, f"{side} of the tested pairs", dict.fromkeys(groups), f"Set {side}=.")
        chosen = chosen if name is None else chosen & (groups == name).to_numpy()
    table = table[chosen].head(n_top)
    if table.empty:
        raise ValueError(f"adata.uns[{key!r}]['pairs'] has no tested pair of these groups.")

    names = _titles(table, "→" if directed else "–")
    # Long names leave the panel its width.
    width = 8.2 + 0.08 * max(max(map(len, names)) - 50, 0)
    ax = canvas.axes((width, 1.2 + 0.26 * max(len(table), 6)))
    place, n_edges = np.arange(len(table)), table["n_edges"].to_numpy(dtype=np.float64)
    most = float(n_edges.max())
    surprise = -np.log10(table["fdr"].to_numpy(dtype=np.float64))
    # Colors reach beyond what counts as found: a table without finds has no bright dots.
    top = max(float(surprise.max()), -1.5 * float(np.log10(max(fdr, 1e-300))))
    dots = ax.scatter(
        table[x], place, s=_area(n_edges, most), c=surprise, cmap=cmap,
        vmin=0, vmax=top, edgecolors=np.where(table["fdr"] <= fdr, "black", "#bfbfbf"), linewidths=0.9, zorder=2,
    )  # fmt: skip
    ax.set_yticks(place, names, fontsize="small")
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.margins(x=0.08)
    ax.set_xlabel(_LABELS[x])
    canvas.entitle()
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.8, zorder=0)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    sizes = [round(most / 4), round(most / 2), round(most)]
    handles = [ax.scatter([], [], s=_area(size, most), color="#8c8c8c", label=f"{size:,}") for size in sizes]
    edge = ax.scatter([], [], s=_area(most, most), facecolor="white", edgecolor="black", label=f"FDR ≤ {fdr:g}")
    ax.legend(
        handles=[*handles, edge], title="Edges", loc="upper left", bbox_to_anchor=(1.22, 1.0), frameon=False,
        fontsize="small", labelspacing=0.9,
    )  # fmt: skip
    bar = ax.figure.colorbar(dots, cax=ax.inset_axes((1.04, 0.1, 0.035, 0.8)))
    bar.set_label("−log10 FDR")
    return canvas.finish()


def _pairs(adata: AnnData | MuData, key: str) -> tuple[pd.DataFrame, bool]:
    """Return the table that :func:`fimp_sc.tl.gene_pairs` wrote, and whether pairs have a direction.

    Raises
    ------
    MissingKeyError
        There is none.
    """
    advice = "Run fimp_sc.tl.gene_pairs(adata, groupby) first, or set key=."
    if key not in adata.uns:
        raise missing_key(key, "adata.uns", adata.uns, advice)
    found = dict(adata.uns[key]) if hasattr(adata.uns[key], "keys") else {}
    if "pairs" not in found:
        advice = f"These are no results of gene_pairs. {advice}"
        raise missing_key("pairs", f"adata.uns[{key!r}]", found, advice)
    return pd.DataFrame(found["pairs"]), bool(found.get("directed", True))


def _area(n_edges: float | NDArray[np.float64], most: float) -> NDArray[np.float64]:
    return _SMALLEST + (_LARGEST - _SMALLEST) * np.asarray(n_edges, dtype=np.float64) / most


def _titles(table: pd.DataFrame, joint: str) -> list[str]:
    columns = (table[name].astype(str) for name in ("source_gene", "source_group", "destination_gene"))
    rows = zip(*columns, table["destination_group"].astype(str), strict=True)
    return [f"{source} ({sender}) {joint} {gene} ({receiver})" for source, sender, gene, receiver in rows]
