"""Cells in space, colored by what is known about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._errors import MissingKeyError
from fimp_sc._options import checked
from fimp_sc._palette import palette
from fimp_sc.data._study import feature_names, is_mudata
from fimp_sc.data.storage._elements import get_matrix, get_obs, in_memory
from fimp_sc.data.validate._checks import check_places
from fimp_sc.pl._figure._common import fit_legends, gene_columns, read_columns, results_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray

    from fimp_sc.data._study import Modality

_MISSING_COLOR = "#d3d3d3"
_MAX_LEGEND_ROWS = 15
# Inches beside the panels for a legend; the figure grows where one needs more.
_LEGEND_WIDTH = 2.4
# What cells without label are called by default.
_UNKNOWN = "Unknown"


@checked
def spatial(
    adata: AnnData | MuData,
    color: str | tuple[str, int] | Sequence[str | tuple[str, int]],
    *,
    modality: str | Sequence[str] | None = None,
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = "spatial",
    size: float | None = None,
    cmap: str = "viridis",
    show: bool = True,
    **kwargs: Any,
) -> NDArray[np.object_] | None:
    """Scatter the cells of a tissue, one row of panels per color and one panel per sample.

    Parameters
    ----------
    adata
        Annotated data with coordinates in `.obsm[spatial_key]`, whose first two columns are drawn; or a MuData object.
    color
        What to color by, one or several of: a column of `.obs`; a gene of `.var_names` (values of `.X` or of
        `layer`); a pair such as `("X_fimp", 0)`, a column of that `.obsm` array.
        Categories take their colors from `.uns[f"{color}_colors"]` if that fits, else colors that stay apart for
        color-blind readers; cells that are "Unknown" are gray.
    modality
        Name of the modality of a MuData object to draw; of several read together, columns and coordinates are those of
        the MuData object or of a modality with all nodes, and genes those of any. By default the MuData object where it
        holds what to draw, or else the modality that does.
    library_key
        Column of `.obs` that tells the samples apart; None draws all cells in one panel.
    layer
        Layer to read genes from; None for `.X`.
    spatial_key
        Key of `.obsm` with the coordinates.
    size
        Marker area in square points; by default it follows from the number of cells.
    cmap
        Color map of numeric values.
    show
        Show the figure and return nothing; if False, return the axes.
    **kwargs
        Passed to :meth:`matplotlib.axes.Axes.scatter`.

    Returns
    -------
    Array of axes `(n_colors, n_samples)` if `show` is False, else None.

    Raises
    ------
    KeyError
        If a color, `library_key`, `layer` or `spatial_key` is not found.
    ValueError
        If no color is given, the coordinates have fewer than two columns or are missing for some cells, a gene is
        there more than once, or `.X` is to be read and is empty.
    """
    from matplotlib import pyplot as plt

    colors = [color] if isinstance(color, str | tuple) else list(color)

    def holds(held: Any, parts: list[Modality]) -> bool:
        genes = [name for _, _, names in _tables(held, parts) for name in names]
        return spatial_key in held.obsm and all(
            key[0] in held.obsm if isinstance(key, tuple) else key in held.obs or key in genes for key in colors
        )

    adata, parts = results_of(adata, modality, holds)
    xy = _coordinates(adata, spatial_key)
    values = [_values(adata, key, layer, parts) for key in colors]
    panels = _panels(adata, library_key)
    if size is None:
        size = float(np.clip(20_000 / max(len(rows) for _, rows in panels), 1, 60))

    # As high as the tissue is for its width, so that wide tissue leaves no gaps.
    extent = np.ptp(xy, axis=0)
    height = 0.4 + float(np.clip(3.0 * extent[1] / max(extent[0], 1e-12), 2.0, 4.5))
    figure, axes = plt.subplots(
        len(colors),
        len(panels),
        figsize=(3.0 * len(panels) + _LEGEND_WIDTH, height * len(colors)),
        squeeze=False,
        layout="constrained",
    )
    for row, (key, value) in enumerate(zip(colors, values, strict=True)):
        name = key if isinstance(key, str) else f"{key[0]}[{key[1]}]"
        style = {"s": size, "linewidths": 0, **kwargs}
        cells = [rows for _, rows in panels]
        if isinstance(value, pd.Categorical):
            _draw_categories(axes[row], xy, value, cells, _palette(adata, name, value), style)
        else:
            _draw_numbers(axes[row], xy, value, cells, cmap, style)
        for ax, (library, _) in zip(axes[row], panels, strict=True):
            ax.set_title(name if library is None else f"{name}, {library}", fontsize="medium")
    for ax in axes.flat:
        ax.set_aspect("equal")
        ax.set_xticks([])
        ax.set_yticks([])
    fit_legends(figure, _LEGEND_WIDTH, len(colors))
    if show:
        plt.show()
        return None
    return np.asarray(axes, dtype=object)


def _names(mapping: Iterable[str | None]) -> list[str]:
    """List keys; since anndata 0.13 the layers also hold `.X`, under None."""
    return sorted(key for key in mapping if key is not None)


def _coordinates(adata: AnnData, spatial_key: str) -> NDArray[np.float64]:
    if spatial_key not in adata.obsm:
        message = f"adata.obsm has no {spatial_key!r}; it has {_names(adata.obsm)}. Set spatial_key=."
        raise MissingKeyError(message)
    xy = _array(adata, spatial_key)
    if xy.ndim != 2 or xy.shape[1] < 2:
        message = f"adata.obsm[{spatial_key!r}] has shape {xy.shape}; two columns are needed to draw."
        raise ValueError(message)
    check_places(xy[:, :2], f"adata.obsm[{spatial_key!r}]", adata.obs_names)
    return xy[:, :2]


def _array(adata: AnnData, key: str) -> NDArray[np.float64]:
    """Return an entry of `.obsm`, wherever it is, dense."""
    values = in_memory(adata.obsm[key], f"adata.obsm[{key!r}]")
    try:
        return np.asarray(values.toarray() if sparse.issparse(values) else values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"adata.obsm[{key!r}] must hold numbers, which columns of text are not.") from None


def _tables(adata: Any, parts: Sequence[Modality]) -> list[tuple[AnnData, NDArray[np.int64] | None, pd.Index]]:
    """Return what has genes, the row of each node there, and the names of the genes."""
    if parts:
        tables = [part for part in parts if not part.is_sequence]
        return [(t.adata, t.rows, names) for t, names in zip(tables, feature_names(tables), strict=True)]
    return [] if is_mudata(adata) else [(adata, None, adata.var_names)]


def _values(
    adata: AnnData, key: str | tuple[str, int], layer: str | None, parts: Sequence[Modality] = ()
) -> pd.Categorical | NDArray[np.float64]:
    if isinstance(key, tuple):
        name, column = key
        if name not in adata.obsm:
            message = f"adata.obsm has no {name!r}; it has {_names(adata.obsm)}."
            raise MissingKeyError(message)
        array = _array(adata, name)
        if array.ndim != 2 or not -array.shape[1] <= column < array.shape[1]:
            message = f"adata.obsm[{name!r}] has shape {array.shape}; there is no column {column}."
            raise MissingKeyError(message)
        return array[:, column]
    if key in adata.obs:
        series = get_obs(adata, [key])[key]
        if pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series):
            return series.to_numpy(dtype=np.float64, na_value=np.nan)
        return pd.Categorical(series)
    for table, row, names in _tables(adata, parts):
        if key in names:
            where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
            gene = gene_columns(names, [key], "adata.var_names")
            values = read_columns(get_matrix(table, layer), where, gene).ravel()
            return values if row is None else np.where(row < 0, np.nan, values[row])
    message = (
        f"{key!r} is neither a column of adata.obs {list(adata.obs.columns)} nor a gene of adata.var_names. "
        "For a column of adata.obsm give a pair such as ('X_fimp', 0)."
    )
    raise MissingKeyError(message)


def _panels(adata: AnnData, library_key: str | None) -> list[tuple[str | None, NDArray[np.intp]]]:
    if library_key is None:
        return [(None, np.arange(adata.n_obs))]
    if library_key not in adata.obs:
        message = f"library_key={library_key!r} is not a column of adata.obs, which has {list(adata.obs.columns)}."
        raise MissingKeyError(message)
    library = pd.Categorical(get_obs(adata, [library_key])[library_key])
    return [(str(name), np.flatnonzero(library == name)) for name in library.remove_unused_categories().categories]


def _palette(adata: AnnData, key: str, value: pd.Categorical) -> list[Any]:
    stored = _stored_colors(adata, f"{key}_colors", len(value.categories))
    if stored is not None:
        return stored
    # Cells without label take no color from the others, so that these look alike before and after annotation.
    known = value.categories != _UNKNOWN
    colors = np.full(len(known), _MISSING_COLOR, dtype=object)
    colors[known] = palette(int(known.sum()))
    return colors.tolist()


def _stored_colors(adata: AnnData, key: str, n: int) -> list[str] | None:
    """Return the first colors of `.uns[key]`, in any form that matplotlib knows, or None where these do not fit."""
    from matplotlib.colors import is_color_like, to_hex

    stored = in_memory(adata.uns.get(key), f"adata.uns[{key!r}]")
    # Names, or numbers as tuples or as rows of an array.
    if isinstance(stored, str | Mapping) or not np.iterable(stored):
        return None
    colors = list(stored)[:n]
    if len(colors) < n or not all(is_color_like(color) for color in colors):
        return None
    return [to_hex(color, keep_alpha=True) for color in colors]


def _draw_categories(
    axes: NDArray[np.object_],
    xy: NDArray[np.float64],
    value: pd.Categorical,
    panels: list[NDArray[np.intp]],
    palette: list[Any],
    style: dict[str, Any],
) -> None:
    from matplotlib.colors import to_rgba_array
    from matplotlib.lines import Line2D

    codes = np.asarray(value.codes)
    # The code of a missing value is -1 and picks the last color.
    colors = to_rgba_array([*palette, _MISSING_COLOR])[codes]
    for ax, rows in zip(axes, panels, strict=True):
        ax.scatter(xy[rows, 0], xy[rows, 1], c=colors[rows], **style)
    names = [(str(name), palette[code]) for code, name in enumerate(value.categories) if (codes == code).any()]
    if (codes < 0).any():
        names.append(("missing", _MISSING_COLOR))
    handles = [Line2D([], [], marker="o", linestyle="", color=color, label=name) for name, color in names]
    axes[-1].legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        frameon=False,
        fontsize="small",
        ncols=-(-max(len(handles), 1) // _MAX_LEGEND_ROWS),
    )


def _draw_numbers(
    axes: NDArray[np.object_],
    xy: NDArray[np.float64],
    value: NDArray[np.float64],
    panels: list[NDArray[np.intp]],
    cmap: str,
    style: dict[str, Any],
) -> None:
    from matplotlib import colormaps

    finite = value[np.isfinite(value)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low == high:  # the color bar would widen this range for the last panel only
        low, high = low - 0.5, high + 0.5
    style = {"cmap": colormaps[cmap].with_extremes(bad=_MISSING_COLOR), "vmin": low, "vmax": high, **style}
    for ax, rows in zip(axes, panels, strict=True):
        points = ax.scatter(xy[rows, 0], xy[rows, 1], c=value[rows], plotnonfinite=True, **style)
    axes[-1].figure.colorbar(points, cax=axes[-1].inset_axes((1.04, 0.1, 0.05, 0.8)))
