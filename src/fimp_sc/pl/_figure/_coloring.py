"""Colors of nodes by category or by number, and the legend or color bar that explains them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fimp_sc._keys import records
from fimp_sc._palette import palette as new_palette
from fimp_sc.data.storage._elements import get_obs, in_memory
from fimp_sc.data.validate._labels import reads_unlabeled

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from numpy.typing import NDArray

MISSING_COLOR = "#d3d3d3"
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
        legend_beside(ax, self._handles(among), title)

    def explain_all(self, axes: NDArray[np.object_], *, title: str | None = None) -> None:
        """Draw one legend beside all axes of a figure, or of a part of it."""
        handles = self._handles(slice(None))
        axes[0].figure.legend(handles=handles, title=title, loc="outside right center", **_legend_style(handles))

    def _handles(self, among: NDArray[Any] | slice) -> list[Any]:
        from matplotlib.lines import Line2D

        return [
            Line2D([], [], marker="o", linestyle="", color=self.colors[code], label=self.names[code] or "(empty)")
            for code in np.unique(self.codes[among])
        ]


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
        self._draw_bar(ax.figure, cax=ax.inset_axes((1.04, 0.1, 0.05, 0.8)))

    def explain_all(self, axes: NDArray[np.object_], *, title: str | None = None) -> None:
        """Draw one color bar beside all axes of a figure, or of a part of it."""
        self._draw_bar(axes[0].figure, ax=list(axes), shrink=0.8, aspect=30, pad=0.02, label=title or "")

    def _draw_bar(self, figure: Any, **how: Any) -> None:
        from matplotlib.cm import ScalarMappable

        finite = self.values[np.isfinite(self.values)]
        below, above = (bool(finite.size and beyond) for beyond in self._beyond(finite))
        extend = "both" if below and above else "min" if below else "max" if above else "neither"
        figure.colorbar(ScalarMappable(self.norm, self.cmap), extend=extend, **how)

    def _beyond(self, finite: NDArray[np.float64]) -> tuple[bool, bool]:
        """Tell whether values lie below and above the range of colors."""
        low, high = self.norm.vmin, self.norm.vmax
        return (
            low is not None and bool((finite < low).any()),
            high is not None and bool((finite > high).any()),
        )


def coloring(
    adata: AnnData,
    key: str,
    value: pd.Categorical | NDArray[np.float64],
    cmap: str | Colormap,
    *,
    palette: Any = None,
    vmin: float | str | None = None,
    vmax: float | str | None = None,
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
    palette
        Colors of categories that the user asks for, see :func:`palette_of`.
    vmin, vmax
        Range of numbers, each a number or a percentile (``"p99"``); by default that of all nodes.
    norm
        Scale of numbers, instead of a range.
    """
    from matplotlib.colors import Normalize

    if isinstance(value, pd.Categorical):
        return categories(adata, key, value, palette)
    finite = value[np.isfinite(value)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low, high = _limit(vmin, finite, low), _limit(vmax, finite, high)
    if low == high:  # the color bar would widen this range for the last panel only
        low, high = low - 0.5, high + 0.5
    return Numbers(value, colormap(cmap), Normalize(low, high) if norm is None else norm)


def _limit(given: float | str | None, finite: NDArray[np.float64], default: float) -> float:
    if isinstance(given, str):
        return float(np.percentile(finite, float(given[1:]))) if finite.size else default
    return default if given is None else given


def categories(adata: AnnData, key: str, value: pd.Categorical, palette: Any = None) -> Categories:
    """Return colors of categories; those that mean no label, and missing values, come last."""
    colors, names = np.array(palette_of(adata, key, value, palette), dtype=object), [*map(str, value.categories)]
    reads, recorded = _unlabeled(adata, key, names)
    order = np.argsort(reads | recorded, kind="stable")
    place = np.append(np.argsort(order), len(names))  # of a category, and of code -1
    return Categories(
        place[np.asarray(value.codes)], [*(names[i] for i in order), "missing"], [*colors[order], MISSING_COLOR]
    )


def _unlabeled(adata: AnnData, key: str, names: list[str]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Tell which categories read as if a cell had no label, and which a call was told to be so."""
    recorded = set()
    for name, found in records(adata):
        params = found["params"]
        if key in (name, params.get("labels_key"), params.get("groupby")):
            recorded.add(str(params.get("unlabeled_category")))
    return np.array([*map(reads_unlabeled, names)], dtype=bool), np.array([n in recorded for n in names], dtype=bool)


def colormap(cmap: str | Colormap) -> Colormap:
    """Return a color map that draws missing numbers gray."""
    from matplotlib import colormaps

    return colormaps.get_cmap(cmap).with_extremes(bad=MISSING_COLOR)


def palette_of(adata: AnnData, key: str, value: pd.Categorical, palette: Any = None) -> list[str]:
    """Return the colors of categories.

    Those of ``palette``; or those of ``uns[f"{key}_colors"]`` if they fit; or, if the categories are predicted labels,
    the colors of the same labels in the column that was learned; or else new ones. What means no label is gray, unless
    the user has given it a color.

    Parameters
    ----------
    palette
        Of the user: colors of the labeled categories in their order, a dictionary with colors of some categories, or a
        color map.

    Raises
    ------
    ValueError
        There are fewer colors than categories.
    """
    names = [*map(str, value.categories)]
    reads, recorded = _unlabeled(adata, key, names)
    stored = _stored_colors(adata, f"{key}_colors", len(names)) if palette is None else None
    if stored is not None:
        return [MISSING_COLOR if gray else color for gray, color in zip(recorded, stored, strict=True)]
    # Cells without label take no color from the others, so that these look alike before and after annotation.
    known = ~(reads | recorded)
    colors = np.full(len(names), MISSING_COLOR, dtype=object)
    colors[known] = new_palette(int(known.sum()))
    if isinstance(palette, Mapping):
        return _by_name(names, colors, palette)
    if palette is not None:
        colors[known] = _given_colors(palette, int(known.sum()), key)
        return colors.tolist()
    return _by_name(names, colors, _colors_of_truth(adata, key))


def _by_name(names: list[str], colors: NDArray[Any], given: Mapping[str, Any]) -> list[str]:
    from matplotlib.colors import to_hex

    return [to_hex(given[name]) if name in given else color for name, color in zip(names, colors, strict=True)]


def _given_colors(palette: Any, n: int, key: str) -> list[str]:
    """Return ``n`` colors of a list or of a color map, of which one with few colors gives the first."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if not isinstance(palette, list):
        colors = colormaps.get_cmap(palette)
        return [to_hex(colors(i if n <= colors.N < 256 else i / max(n - 1, 1))) for i in range(n)]
    if len(palette) < n:
        raise ValueError(f"palette has {len(palette)} colors, but {key!r} has {n} categories: pass one for each.")
    return [to_hex(color) for color in palette[:n]]


def _colors_of_truth(adata: AnnData, key: str) -> dict[str, str]:
    """Return colors by name of the labels that ``key`` predicts; none if it holds no predictions."""
    record = dict(records(adata)).get(key, {})
    truth = record.get("params", {}).get("labels_key") if "classes" in record else None
    if truth is None or truth == key or truth not in adata.obs:
        return {}
    value = pd.Categorical(get_obs(adata, [truth])[truth])
    return dict(zip(map(str, value.categories), palette_of(adata, truth, value), strict=True))


def legend_beside(ax: Axes, handles: list[Any], title: str | None = None) -> None:
    """Draw a legend at the right of the axes."""
    ax.legend(
        handles=handles, title=title, loc="center left", bbox_to_anchor=(1.02, 0.5), **_legend_style(handles)
    )  # fmt: skip


def _legend_style(handles: list[Any]) -> dict[str, Any]:
    return {"frameon": False, "fontsize": "small", "ncols": -(-max(len(handles), 1) // _MAX_LEGEND_ROWS)}


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
