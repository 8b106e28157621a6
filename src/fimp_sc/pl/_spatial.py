"""Maps of cells, colored by annotation, gene expression or embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc._options import checked
from fimp_sc.pl._figure._canvas import Canvas
from fimp_sc.pl._figure._coloring import coloring
from fimp_sc.pl._figure._common import results_of
from fimp_sc.pl._figure._map import draw_map, image_of
from fimp_sc.pl._figure._values import coordinates, panels, tables, values_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from mudata import MuData
    from numpy.typing import NDArray

    from fimp_sc.data._study import Modality

# Inches beside the panels for a legend; the figure grows where one needs more.
_LEGEND_WIDTH = 2.4


@checked
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
    ax: Axes | Sequence[Axes] | NDArray[np.object_] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
    **kwargs: Any,
) -> NDArray[np.object_] | Figure | None:
    """Draw maps of a tissue by :func:`squidpy.pl.spatial_scatter`, a row per color and a panel per sample.

    Parameters
    ----------
    adata
        Annotated data with coordinates in `.obsm[spatial_key]`, whose first two columns are drawn; or a MuData object.
    color
        One or several of: a column of `.obs`; a gene of `.var_names` (values of `.X` or of `layer`); a pair such as
        `("X_fimp", 0)`, a column of that `.obsm` array.
        Categories take their colors from `.uns[f"{color}_colors"]` if that fits, else colors that stay apart for
        color-blind readers; cells that are "Unknown" or missing are gray.
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
    ax
        Axes to draw into, one for each panel; by default a new figure.
    show
        Show the figure and return nothing; by default if none of `ax`, `save` and `return_fig` is given.
    save
        File to write the figure to.
    return_fig
        Return the figure instead of the axes.
    **kwargs
        Passed to :func:`squidpy.pl.spatial_scatter`, and by it to :meth:`matplotlib.axes.Axes.scatter`.

    Returns
    -------
    None if the figure is shown; else the figure if `return_fig`, else the axes, an array `(n_colors, n_samples)`.

    Raises
    ------
    KeyError
        If a color, `library_key`, `layer` or `spatial_key` is not found.
    ValueError
        If no color is given, the coordinates have fewer than two columns or are missing for some cells, a gene is
        there more than once, `.X` is to be read and is empty, or `ax` does not have one axes per panel.
    """
    canvas = Canvas(ax, show, save, return_fig)
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
    limits = {name: kwargs.pop(name) for name in ("norm", "vmin", "vmax") if name in kwargs}
    colors = [coloring(adata, name, value, cmap, **limits) for name, value in zip(names, values, strict=True)]
    samples = panels(adata, library_key)
    images = [image_of(adata, library, kwargs.get("img_res_key")) if img else None for library, _ in samples]
    spot = float(np.clip(20_000 / max(len(rows) for _, rows in samples), 1, 60))

    # As high as the tissue is for its width, so that wide tissue leaves no gaps.
    extent = np.ptp(xy, axis=0)
    height = 0.4 + float(np.clip(3.0 * extent[1] / max(extent[0], 1e-12), 2.0, 4.5))
    axes = canvas.axes((3.0 * len(samples) + _LEGEND_WIDTH, height * len(keys)), (len(keys), len(samples)))
    for row, name, colored in zip(axes, names, colors, strict=True):
        for panel, (library, rows), image in zip(row, samples, images, strict=True):
            title = name if library is None else f"{name}, {library}"
            marker = size if size is not None or image is not None else spot
            draw_map(panel, xy, colored, rows, title=title, size=marker, image=image, **kwargs)
        colored.explain(row[-1])
    return canvas.finish(legend_room=_LEGEND_WIDTH)
