"""Cell-type composition of niches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from fimp_sc._options import checked
from fimp_sc.data.storage._elements import get_obs, missing_key
from fimp_sc.pl._figure._canvas import Canvas
from fimp_sc.pl._figure._coloring import legend_beside, palette_of
from fimp_sc.pl._figure._common import results_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from mudata import MuData

_TOO_MANY = 20  # kinds whose colors can be told apart in bars


@checked
def niche_composition(
    adata: AnnData | MuData,
    key: str = "fimp_niche",
    groupby: str = "cell_type",
    *,
    modality: str | Sequence[str] | None = None,
    kind: Literal["auto", "bars", "heatmap"] = "auto",
    cmap: str = "viridis",
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Draw the cell-type composition of every niche.

    Parameters
    ----------
    adata
        Object with niches, as :func:`fimp_sc.tl.niches` writes them; or a MuData object.
    key
        Column of `.obs` with niches; their colors, `.uns[f"{key}_colors"]`, mark them at the left.
    groupby
        Column of `.obs` with the kinds, for instance cell types, in the colors of `.uns[f"{groupby}_colors"]` if that
        fits. Cells that miss either are left out.
    modality
        Of a MuData object, the one that the results are of, or the several; by default where they are found.
    kind
        `"bars"`, stacked to 100 %; `"heatmap"`, easier to read with many kinds; `"auto"`, bars for up to 20 kinds.
    cmap
        Color map of the heat map.
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
        If `key` or `groupby` is not found.
    ValueError
        If no cell has both, or `kind` is none of these.
    """
    from matplotlib.transforms import ScaledTranslation

    canvas = Canvas(ax, show, save, return_fig, title)
    adata, _ = results_of(adata, modality, lambda held, _: key in held.obs)
    columns = {}
    for name, advice in ((key, "Run fimp_sc.tl.niches(adata) first, or set key=."), (groupby, "Set groupby=.")):
        if name not in adata.obs:
            raise missing_key(name, "adata.obs", adata.obs, advice)
        columns[name] = pd.Categorical(get_obs(adata, [name])[name])
    niches, kinds = columns[key], columns[groupby]
    counts = np.zeros((len(niches.categories), len(kinds.categories)), dtype=np.int64)
    both = (niches.codes >= 0) & (kinds.codes >= 0)
    np.add.at(counts, (niches.codes[both], kinds.codes[both]), 1)
    rows, parts = np.flatnonzero(counts.sum(axis=1)), np.flatnonzero(counts.sum(axis=0))
    if not rows.size:
        raise ValueError(f"No cell has both a niche (obs[{key!r}]) and a kind (obs[{groupby!r}]).")
    fractions = counts[rows] / counts[rows].sum(axis=1, keepdims=True)

    heatmap = kind == "heatmap" or (kind == "auto" and len(parts) > _TOO_MANY)
    width = max(2.2 + 0.32 * len(parts), 4) if heatmap else 6.5
    ax = canvas.axes((width, 1.3 + 0.32 * len(rows)))
    names = [str(kinds.categories[part]) for part in parts]
    if heatmap:
        _draw_heatmap(ax, fractions[:, parts], names, groupby, cmap)
    else:
        _draw_bars(ax, fractions, parts, names, palette_of(adata, groupby, kinds), groupby)
    colors = palette_of(adata, key, niches)
    # Nine points left of the axes, whatever these show.
    place = ax.get_yaxis_transform() + ScaledTranslation(-9 / 72, 0, ax.figure.dpi_scale_trans)
    ax.scatter(
        np.zeros(len(rows)),
        np.arange(len(rows)),
        s=70,
        marker="s",
        c=[colors[row] for row in rows],
        clip_on=False,
        transform=place,
    )
    sizes = counts[rows].sum(axis=1)
    ax.set_yticks(
        np.arange(len(rows)), [f"{niches.categories[row]}  ({n:,})" for row, n in zip(rows, sizes, strict=True)]
    )
    ax.tick_params(axis="y", length=0, pad=16)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_ylabel(f"{key} (cells)")
    canvas.entitle()
    return canvas.finish(legend_room=2.0)


def _draw_bars(ax: Axes, fractions: Any, parts: Any, names: list[str], colors: list[Any], title: str) -> None:
    left = np.zeros(len(fractions))
    for part, name in zip(parts, names, strict=True):
        ax.barh(
            np.arange(len(fractions)), fractions[:, part], 0.78, left=left, color=colors[part], edgecolor="white",
            linewidth=0.6, label=name,
        )  # fmt: skip
        left += fractions[:, part]
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_xlabel("Fraction of cells")
    ax.spines[["top", "right", "left"]].set_visible(False)
    legend_beside(ax, ax.get_legend_handles_labels()[0], title)


def _draw_heatmap(ax: Axes, fractions: Any, names: list[str], title: str, cmap: str) -> None:
    image = ax.imshow(fractions, aspect="auto", cmap=cmap, vmin=0, interpolation="nearest")
    ax.set_xticks(np.arange(len(names)), names, rotation=90, fontsize="small")
    ax.set_xlabel(title)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bar.set_label("Fraction of niche")
    bar.outline.set_visible(False)
