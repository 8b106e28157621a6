"""Maps of cells, colored by annotation, gene expression or embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc._option_rules import Integer
from fimp_sc._options import checked
from fimp_sc.pl._figure._canvas import Canvas
from fimp_sc.pl._figure._coloring import Categories, coloring
from fimp_sc.pl._figure._common import results_of
from fimp_sc.pl._figure._map import draw_map, image_of, micrometers_of
from fimp_sc.pl._figure._rules import Limit, Palette
from fimp_sc.pl._figure._values import coordinates, panels, tables, values_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from mudata import MuData
    from numpy.typing import NDArray

    from fimp_sc.data._study import Modality

# Inches beside a column of panels for a legend or a color bar; the figure grows where one needs more.
_LEGEND_WIDTH, _BAR_WIDTH = 2.4, 1.0
# Inches of panels: of one, and of all that are side by side.
_WIDEST, _WIDTH = 3.0, 10.0


@checked(palette=Palette(), vmin=Limit(), vmax=Limit(), ncols=Integer(1))
def spatial(
    adata: AnnData | MuData,
    color: str | tuple[str, int] | Sequence[str | tuple[str, int]],
    *,
    modality: str | Sequence[str] | None = None,
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = "spatial",
    img: bool = True,
    size: float | None = None,
    cmap: str = "viridis",
    palette: Sequence[Any] | Mapping[str, Any] | str | None = None,
    vmin: float | str | None = None,
    vmax: float | str | None = None,
    ncols: int | None = None,
    title: str | Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | NDArray[np.object_] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
    **kwargs: Any,
) -> NDArray[np.object_] | Figure | None:
    """Draw maps of a tissue by :func:`squidpy.pl.spatial_scatter`, a panel per color and sample.

    As in squidpy, the second coordinate points downwards, with an image and without. Panels of several samples lie side
    by side, in as many lines as they need, and share a legend; those of several colors lie in rows.

    Parameters
    ----------
    adata
        Annotated data with coordinates in `.obsm[spatial_key]`, whose first two columns are drawn; or a MuData object.
    color
        One or several of: a column of `.obs`; a gene of `.var_names` (values of `.X` or of `layer`); a pair such as
        `("X_fimp", 0)`, a column of that `.obsm` array.
        Categories take their colors from `.uns[f"{color}_colors"]` if that fits. Labels that
        :func:`fimp_sc.tl.annotate` predicted else take those of the column that it learned, and others colors that stay
        apart for color-blind readers. Cells without label are gray: missing ones, those whose category reads so (as
        "Unknown", "Unlabelled" or "nan"), or is the `unlabeled_category` of an earlier call.
    modality
        Name of the modality of a MuData object to draw; of several read together, columns and coordinates are those of
        the MuData object or of a modality with all nodes, and genes those of any. By default the MuData object if it
        holds the colors, or else the modality that does.
    library_key
        Column of `.obs` with the sample of each cell; None draws all cells in one panel.
    layer
        Layer to read genes from; None for `.X`.
    spatial_key
        Key of `.obsm` with the coordinates.
    img
        Draw the tissue image of a sample beneath its cells if `.uns["spatial"]` has one under the name of the sample
        (or a single one, without `library_key`), as :func:`squidpy.read.visium` stores it.
    size
        Marker area in square points; by default it follows from the number of cells. On an image, a factor of the
        diameter of a spot, by default 1.
    cmap
        Color map of numeric values.
    palette
        Colors of categories: a list, in the order of the categories and without those that mean no label; a dictionary,
        of some of them; or the name of a color map.
    vmin, vmax
        Range of numeric values: numbers, or percentiles such as `"p99"`; by default from the smallest to the largest.
    ncols
        Panels side by side, at most; by default two for one sample, four for up to twelve, and six for more.
    title
        Titles of the panels, in the order of the axes; by default color and sample.
    ax
        Axes to draw into, one for each panel; by default a new figure.
    show
        Show the figure and return nothing; by default if none of `ax`, `save` and `return_fig` is given.
    save
        File to write the figure to.
    return_fig
        Return the figure instead of the axes.
    **kwargs
        Passed to :func:`squidpy.pl.spatial_scatter`, and by it to :meth:`matplotlib.axes.Axes.scatter`. Among them
        `scalebar_dx`, the length of one unit of the coordinates in `scalebar_units` (micrometers by default), draws a
        scale bar, as is done without it where `.uns["spatial"]` tells (`microns_per_pixel`); `norm` replaces the range;
        and `rasterized` says whether cells are pixels in vector graphics, by default if a sample has more than 10,000.

    Returns
    -------
    None if the figure is shown; else the figure if `return_fig`, else the axes, an array `(n_colors, n_samples)`.

    Raises
    ------
    KeyError
        If a color, `library_key`, `layer` or `spatial_key` is not found.
    ValueError
        If no color is given, the coordinates have fewer than two columns or are missing for some cells, a gene is
        there more than once, `.X` is to be read and is empty, `ax` or `title` does not have one entry per panel, or
        `palette` has too few colors.
    """
    canvas = Canvas(ax, show, save, return_fig, title)
    keys = [color] if isinstance(color, str | tuple) else list(color)

    def holds(held: Any, parts: list[Modality]) -> bool:
        genes = [name for _, _, names in tables(held, parts) for name in names]
        return spatial_key in held.obsm and all(
            key[0] in held.obsm if isinstance(key, tuple) else key in held.obs or key in genes for key in keys
        )

    adata, parts = results_of(adata, modality, holds)
    xy = coordinates(adata, spatial_key)
    names = [key if isinstance(key, str) else f"{key[0]}[{key[1]}]" for key in keys]
    values = [values_of(adata, key, layer, parts) for key in keys]
    limits = {"vmin": vmin, "vmax": vmax, "norm": kwargs.pop("norm", None)}
    colors = [
        coloring(adata, name, value, cmap, palette=palette, **limits) for name, value in zip(names, values, strict=True)
    ]
    samples = panels(adata, library_key)
    images = [image_of(adata, library, kwargs.get("img_res_key")) if img else None for library, _ in samples]
    unit = kwargs.pop("scalebar_dx", None)
    units = [micrometers_of(adata, library) if unit is None else unit for library, _ in samples]

    shape = (len(keys), len(samples))
    wrap = (2 if len(samples) == 1 else 4 if len(samples) <= 12 else 6) if ncols is None else ncols
    n_lines = len(keys) * -(-len(samples) // wrap) if len(samples) > 1 else -(-len(keys) // wrap)
    columns = min(wrap, max(shape)) if 1 in shape else min(wrap, len(samples))
    width = min(_WIDTH / columns, _WIDEST)
    # As high as the tissue is for its width, so that wide tissue leaves no gaps.
    extent = np.array([np.ptp(xy[rows], axis=0) for _, rows in samples])
    height = 0.4 + width * float(np.clip(np.median(extent[:, 1] / np.maximum(extent[:, 0], 1e-12)), 0.67, 1.5))
    spot = float(np.clip(20_000 / max(len(rows) for _, rows in samples), 0.3, 60)) * (width / _WIDEST) ** 2
    beside = _LEGEND_WIDTH if any(isinstance(colored, Categories) for colored in colors) else _BAR_WIDTH
    legends = columns if len(samples) == 1 else 1
    titles = [name if library is None else f"{name}, {library}" for name in names for library, _ in samples]
    titles = canvas.titles(titles, width)
    axes = canvas.axes((width * columns + beside * legends, height * n_lines), shape, wrap=wrap)
    for i, (row, name, colored) in enumerate(zip(axes, names, colors, strict=True)):
        for j, (panel, (_, rows), image) in enumerate(zip(row, samples, images, strict=True)):
            marker = size if size is not None or image is not None else spot
            draw_map(
                panel, xy, colored, rows, title=titles[i * len(samples) + j], size=marker, image=image, unit=units[j],
                **kwargs,
            )  # fmt: skip
        if ax is None and len(samples) > wrap:
            colored.explain_all(row, title=name)
        else:
            colored.explain(row[-1])
    return canvas.finish(legend_room=beside)
