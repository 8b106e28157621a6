"""Colors of nodes by category or by number, and the legend or color bar that explains them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fimp_sc._palette import palette
from fimp_sc.data.storage._elements import in_memory

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from numpy.typing import NDArray

MISSING_COLOR = "#d3d3d3"
# The default name of cells without label.
_UNKNOWN = "Unknown"
_MAX_LEGEND_ROWS = 15


@dataclass(frozen=True)
class Categories:
    """Nodes colored by category.

    Attributes
    ----------
    codes
        ``(n,)`` position of the category of each node.
    names, colors
        Names and colors of the categories; the last are those of nodes without one.
    """

    codes: NDArray[np.int64]
    names: list[str]
    colors: list[str]

    def rgba(self) -> NDArray[np.float64]:
        """Return the colors of the nodes ``(n, 4)``."""
        from matplotlib.colors import to_rgba_array

        colors: NDArray[np.float64] = to_rgba_array(self.colors)[self.codes]
        return colors

    def explain(self, ax: Axes, *, title: str | None = None, among: NDArray[Any] | slice = slice(None)) -> None:
        """Draw a legend beside the axes, of the categories that some nodes (``among``) have."""
        from matplotlib.lines import Line2D

        legend_beside(
            ax,
            [
                Line2D([], [], marker="o", linestyle="", color=self.colors[code], label=self.names[code])
                for code in np.unique(self.codes[among])
            ],
            title,
        )


@dataclass(frozen=True)
class Numbers:
    """Nodes colored by number.

    Attributes
    ----------
    values
        ``(n,)``; NaN is drawn gray.
    cmap, norm
        Color map and range of all nodes.
    """

    values: NDArray[np.float64]
    cmap: Colormap
    norm: Normalize

    def rgba(self) -> NDArray[np.float64]:
        """Return the colors of the nodes ``(n, 4)``."""
        colors: NDArray[np.float64] = self.cmap(self.norm(np.ma.masked_invalid(self.values)))
        return colors

    def explain(self, ax: Axes) -> None:
        """Draw a color bar beside the axes."""
        from matplotlib.cm import ScalarMappable

        ax.figure.colorbar(ScalarMappable(self.norm, self.cmap), cax=ax.inset_axes((1.04, 0.1, 0.05, 0.8)))


def coloring(
    adata: AnnData,
    key: str,
    value: pd.Categorical | NDArray[np.float64],
    cmap: str | Colormap,
    *,
    vmin: float | None = None,
    vmax: float | None = None,
    norm: Normalize | None = None,
) -> Categories | Numbers:
    """Return colors of nodes.

    Parameters
    ----------
    adata
        Object that may hold colors of the categories.
    key
        Name of the values.
    value
        ``(n,)`` values, as :func:`~fimp_sc.pl._figure._values.values_of` returns them.
    cmap
        Color map of numbers.
    vmin, vmax, norm
        Range of numbers, as in :meth:`matplotlib.axes.Axes.scatter`; by default that of all nodes.
    """
    from matplotlib.colors import Normalize

    if isinstance(value, pd.Categorical):
        return categories(adata, key, value)
    finite = value[np.isfinite(value)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low == high:  # the color bar would widen this range for the last panel only
        low, high = low - 0.5, high + 0.5
    low, high = low if vmin is None else vmin, high if vmax is None else vmax
    return Numbers(value, colormap(cmap), Normalize(low, high) if norm is None else norm)


def categories(adata: AnnData, key: str, value: pd.Categorical, unlabeled: str | None = None) -> Categories:
    """Return colors of categories; missing values, and the category ``unlabeled``, are gray."""
    codes = np.asarray(value.codes, dtype=np.int64)
    missing = (codes < 0) | np.asarray(value.astype(object) == unlabeled)
    names = [*map(str, value.categories), "missing"]
    return Categories(np.where(missing, len(names) - 1, codes), names, [*palette_of(adata, key, value), MISSING_COLOR])


def colormap(cmap: str | Colormap) -> Colormap:
    """Return a color map that draws missing numbers gray."""
    from matplotlib import colormaps

    return colormaps.get_cmap(cmap).with_extremes(bad=MISSING_COLOR)


def palette_of(adata: AnnData, key: str, value: pd.Categorical) -> list[str]:
    """Return the colors of categories: those of ``uns[f"{key}_colors"]`` if they fit, else new ones."""
    stored = _stored_colors(adata, f"{key}_colors", len(value.categories))
    if stored is not None:
        return stored
    # Cells without label take no color from the others, so that these look alike before and after annotation.
    known = value.categories != _UNKNOWN
    colors = np.full(len(known), MISSING_COLOR, dtype=object)
    colors[known] = palette(int(known.sum()))
    return colors.tolist()


def legend_beside(ax: Axes, handles: list[Any], title: str | None = None) -> None:
    """Draw a legend at the right of the axes."""
    ax.legend(
        handles=handles, title=title, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize="small",
        ncols=-(-max(len(handles), 1) // _MAX_LEGEND_ROWS),
    )  # fmt: skip


def _stored_colors(adata: AnnData, key: str, n: int) -> list[str] | None:
    """Return the first colors of ``uns[key]``, opaque, or None if these are no colors of matplotlib or too few."""
    from matplotlib.colors import is_color_like, to_hex

    stored = in_memory(adata.uns.get(key), f"adata.uns[{key!r}]")
    # Names, or numbers as tuples or as rows of an array.
    if isinstance(stored, str | Mapping) or not np.iterable(stored):
        return None
    colors = list(stored)[:n]
    if len(colors) < n or not all(is_color_like(color) for color in colors):
        return None
    return [to_hex(color) for color in colors]
