"""Arrows from each neighbor to one cell, scaled by influence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fimp_sc._options import checked
from fimp_sc.data.storage._elements import get_graph, get_obs, missing_key
from fimp_sc.pl._attention import attention_result
from fimp_sc.pl._figure._canvas import Canvas
from fimp_sc.pl._figure._coloring import Categories, categories
from fimp_sc.pl._figure._common import node_positions, results_of
from fimp_sc.pl._figure._values import coordinates

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from mudata import MuData
    from numpy.typing import NDArray

_NO_GROUP = "#8c8c8c"
_THINNEST, _THICKEST = 1.0, 5.0  # points


@checked
def attention_arrows(
    adata: AnnData | MuData,
    cell: str | int,
    *,
    modality: str | Sequence[str] | None = None,
    key: str = "fimp_attention",
    groupby: str | None = None,
    library_key: str | None = None,
    spatial_key: str | None = None,
    size: float | None = None,
    cmap: str = "viridis_r",
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Draw an arrow from each neighbor to one cell, scaled by its influence.

    Parameters
    ----------
    adata
        Object with coordinates and the results of :func:`fimp_sc.tl.attention`; or a MuData object.
    cell
        The destination: a name of `.obs_names`, or a position.
    modality
        Of a MuData object, the one that the results are of, or the several; by default where they are found.
    key
        Where the results are in `.obsp` and `.uns`.
    groupby
        Column of `.obs` to color cells by, in `.uns[f"{groupby}_colors"]` if that fits; by default the one of the
        results. Cells without group are gray.
    library_key
        Column of `.obs` with the sample of each cell: cells of other samples are not drawn. By default the one of the
        results.
    spatial_key
        Key of `.obsm` with the coordinates; the first two columns are drawn. By default the one of the results.
    size
        Marker area in square points; by default it follows from the number of cells in view.
    cmap
        Color map of the arrows, from 0 to the largest influence on this cell.
    title
        Title of the axes; by default it names the cell.
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
    None if the figure is shown; else the figure if `return_fig`, else the axes, whose patches are the arrows, strongest
    last.

    Raises
    ------
    KeyError
        If the results, the cell, a column or the coordinates are not found.
    ValueError
        If the cell has no neighbors.
    """
    canvas = Canvas(ax, show, save, return_fig, title)
    adata, _ = results_of(adata, modality, lambda held, _: key in held.uns)
    params = dict(attention_result(adata, key).get("params", {}))
    if key not in adata.obsp:
        raise missing_key(key, "adata.obsp", adata.obsp, "Run fimp_sc.tl.attention(adata, groupby) first.")
    groupby = params.get("groupby") if groupby is None else groupby
    library_key = params.get("library_key") if library_key is None else library_key
    xy = coordinates(adata, params.get("spatial_key", "spatial") if spatial_key is None else spatial_key)
    for name in (groupby, library_key):
        if name is not None and name not in adata.obs:
            raise missing_key(name, "adata.obs", adata.obs, "Set groupby= or library_key=.")
    center = int(node_positions(adata, [cell], argument="cell")[0])
    row = get_graph(adata, key)[[center]].tocoo()
    if not row.nnz:
        raise ValueError(f"Cell {adata.obs_names[center]!r} has no neighbors in adata.obsp[{key!r}]: choose another.")
    order = np.argsort(row.data, kind="stable")
    neighbors, influence = row.col[order], np.asarray(row.data[order], dtype=np.float64)

    # Neighbors may all be in the very place of the cell.
    half = 1.35 * np.abs(xy[neighbors] - xy[center]).max() or 1.0
    seen = (np.abs(xy - xy[center]) <= 1.05 * half).all(1)
    if library_key is not None:
        library = get_obs(adata, [library_key])[library_key].to_numpy()
        seen &= library == library[center]
    rows = np.flatnonzero(seen)
    if size is None:
        size = float(np.clip(25_000 / len(rows), 12, 260))

    ax = canvas.axes((6.4, 4.6))
    ax.set_aspect("equal")
    ax.set_xlim(xy[center, 0] - half, xy[center, 0] + half)
    ax.set_ylim(xy[center, 1] + half, xy[center, 1] - half)  # downwards, as maps of whole tissue
    _draw_cells(ax, adata, groupby, xy, rows, np.append(neighbors, center), size)
    _draw_arrows(ax, xy[neighbors], xy[center], influence, size, cmap)
    ax.set_xticks([])
    ax.set_yticks([])
    canvas.entitle(f"Influence on {adata.obs_names[center]}")
    return canvas.finish(legend_room=1.2)


def _draw_cells(
    ax: Axes,
    adata: AnnData,
    groupby: str | None,
    xy: NDArray[np.float64],
    rows: NDArray[np.int64],
    joined: NDArray[np.int64],
    size: float,
) -> None:
    """Draw cells in view; those of the drawn edges solid, the last of them, the destination, with a thick rim."""
    if groupby is None:
        groups = Categories(np.zeros(adata.n_obs, dtype=np.int64), ["cell"], [_NO_GROUP])
    else:
        groups = categories(adata, groupby, pd.Categorical(get_obs(adata, [groupby])[groupby]))
        groups.explain(ax, title=groupby, among=rows)
    colors = groups.rgba()
    others = np.setdiff1d(rows, joined)
    faint = colors[others]
    faint[:, 3] = 0.35
    if len(others):
        ax.scatter(xy[others, 0], xy[others, 1], s=0.6 * size, c=faint, linewidths=0, zorder=1)
    widths = [0.8] * (len(joined) - 1) + [2.2]
    ax.scatter(xy[joined, 0], xy[joined, 1], s=size, c=colors[joined], edgecolors="black", linewidths=widths, zorder=3)


def _draw_arrows(
    ax: Axes,
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    influence: NDArray[np.float64],
    size: float,
    cmap: str,
) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import FancyArrowPatch

    largest = float(influence.max())
    norm = Normalize(0, largest if largest > 0 else 1.0)
    radius = np.sqrt(size / np.pi)  # points
    for (x, y), strength in zip(start.tolist(), norm(influence), strict=True):
        width = _THINNEST + (_THICKEST - _THINNEST) * float(strength)
        style = f"simple,tail_width={width},head_width={2.2 * width + 4},head_length={width + 6}"
        arrow: Any = FancyArrowPatch(
            (x, y), (float(end[0]), float(end[1])), arrowstyle=style, shrinkA=radius + 1, shrinkB=radius + 3,
            facecolor=colormaps[cmap](strength), edgecolor="#404040", linewidth=0.5, zorder=2 + 0.5 * float(strength),
        )  # fmt: skip
        ax.add_patch(arrow)
    bar = ax.figure.colorbar(ScalarMappable(norm, cmap), ax=ax, location="left", shrink=0.6, pad=0.03)
    bar.set_label("Influence")
