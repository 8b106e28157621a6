"""Map of images and the graph that joins them."""

from __future__ import annotations

import logging
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc._options import checked
from fimp_sc.data._modality import CONNECTIVITIES_KEY, SPATIAL_KEY, place_of
from fimp_sc.data.graph._adjacency import check_adjacency
from fimp_sc.data.sequences._pixels import image_shape
from fimp_sc.data.storage._elements import in_memory, missing_key, shorten
from fimp_sc.data.validate._checks import check_coordinates
from fimp_sc.pl._figure._canvas import Canvas
from fimp_sc.pl._figure._coloring import coloring
from fimp_sc.pl._figure._common import modality_of_kind, node_positions
from fimp_sc.pl._figure._thumbnails import far_apart, read_thumbnails
from fimp_sc.pl._figure._values import values_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from mudata import MuData
    from numpy.typing import ArrayLike, NDArray

logger = logging.getLogger(__name__)

_EDGE = "#9a9a9a"
_FRAME = "#444444"


@checked
def image_graph(
    mdata: MuData | AnnData,
    *,
    modality: str | None = None,
    color: str | tuple[str, int] | None = None,
    images: bool | str = True,
    nodes: Sequence[str | int] | ArrayLike | None = None,
    spatial_key: str = SPATIAL_KEY,
    connectivities_key: str | None = None,
    edges: bool = True,
    max_images: int = 100,
    image_size: float | None = None,
    size: float = 16,
    cmap: str = "viridis",
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
    **kwargs: Any,
) -> Axes | Figure | None:
    """Draw images at their coordinates, framed in the color of a column, over their graph.

    Images that would cover others, and those beyond `max_images`, are points (beneath images, where they are near); a
    line below the axes says how many are drawn and names the first of the others.

    Parameters
    ----------
    mdata
        Object with images and coordinates, as :func:`fimp_sc.pp.images` makes it.
    modality
        Name of the modality; not needed if only one holds images.
    color
        Values that color frames and points: a column of `.obs`, or a pair such as `("X_fimp", 0)`, a column of that
        `.obsm` array. Categories take their colors from `.uns[f"{color}_colors"]` if that fits.
    images
        True draws the images, False points alone. A name such as `"fimp"` draws reconstructions from that `.obsm` array
        `(n_obs, height × width × channels)` instead: integers from 0 to 255, or real numbers from 0 to 1 or (if any is
        above 2) from 0 to 255; NaN is gray.
    nodes
        Images to draw: names, positions counted from 0, or one bool for each image; all by default. Edges to others
        are left out.
    spatial_key
        Key of `.obsm` with the coordinates. Those that :func:`fimp_sc.pp.images` wrote are latitude and longitude: they
        are drawn with north above, and a degree of longitude as long as it is at this latitude. Of others the first two
        columns are drawn, the second downwards as in :func:`fimp_sc.pl.spatial`.
    connectivities_key
        Key of `.obsp` with the graph; by default the one that the modality names.
    edges
        Draw the edges, in whichever direction they lead.
    max_images
        Largest number of images drawn.
    image_size
        Longer side of an image as a fraction of the longer side of the map; by default it follows from the number of
        images.
    size
        Marker area of points in square points.
    cmap
        Color map of numeric values.
    title
        Title of the axes; by default what colors the points.
    ax
        Axes to draw into; by default a new figure.
    show
        Show the figure and return nothing; by default if none of `ax`, `save` and `return_fig` is given.
    save
        File to write the figure to.
    return_fig
        Return the figure instead of the axes.
    **kwargs
        Passed to :meth:`matplotlib.axes.Axes.scatter` for the points.

    Returns
    -------
    None if the figure is shown; else the figure if `return_fig`, else the axes.

    Raises
    ------
    KeyError
        If the coordinates, the graph, a color, an image or the modality is not found.
    IndexError
        If a position is out of range.
    ValueError
        If the modality holds no images, reconstructions have another shape than images, or sizes are not positive.
    """
    from matplotlib.collections import LineCollection

    canvas = Canvas(ax, show, save, return_fig, title)
    name, adata, info = modality_of_kind(mdata, modality, "patch")
    rows = np.arange(adata.n_obs) if nodes is None else np.unique(node_positions(adata, nodes))
    xy, aspect, downwards = _places(adata, info, spatial_key, rows)
    graph = _edges(adata, place_of(mdata, name), info, connectivities_key, rows) if edges else None
    value = None if color is None else values_of(adata, color, None)[rows]
    room = _room(adata, xy, aspect, image_size, min(len(rows), max_images))
    chosen = far_apart(xy, room, max_images) if images else np.zeros(0, dtype=np.int64)
    thumbnails = read_thumbnails(adata, rows[chosen], images if isinstance(images, str) else None)

    ax = canvas.axes((8, 6.5))
    if graph is not None:
        lines = np.stack([xy[graph[0]], xy[graph[1]]], axis=1)
        ax.add_collection(LineCollection(list(lines), colors=_EDGE, linewidths=0.7, zorder=1))
    key = color if isinstance(color, str) else None if color is None else f"{color[0]}[{color[1]}]"
    colors = _draw_points(ax, adata, xy, value, key, cmap, {"s": size, "linewidths": 0, "zorder": 2, **kwargs})
    for place, thumbnail, color in zip(xy[chosen], thumbnails, colors[chosen], strict=True):
        _draw_image(ax, thumbnail, place, room, downwards, color if color is not None else _FRAME)
    margin = room * (0.6 if images else 0.2)
    low, high = xy.min(axis=0) - margin, xy.max(axis=0) + margin
    ax.set_xlim(low[0], high[0])
    ax.set_ylim(*((high[1], low[1]) if downwards else (low[1], high[1])))
    ax.set_aspect(aspect)
    ax.set_xticks([])
    ax.set_yticks([])
    canvas.entitle(key or "")
    if images and len(chosen) < len(rows):
        note = f"{len(chosen):,} of {len(rows):,} images are drawn, the others are points or beneath: "
        left_out = [str(name) for name in np.delete(adata.obs_names[rows], chosen)]
        ax.set_xlabel(fill(note + shorten(left_out), 90), fontsize="small")
        logger.info(
            "%s%s. They would cover others, or are more than max_images=%d. Draw fewer with nodes=, or smaller ones "
            "with image_size=.",
            note,
            shorten(left_out, 50),
            max_images,
        )
    return canvas.finish(legend_room=1.5)


def _places(
    adata: AnnData, info: dict[str, Any], spatial_key: str, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float64], float, bool]:
    """Return where to draw nodes, the length of a unit upwards for one to the right, and whether upwards is less."""
    if spatial_key not in adata.obsm:
        advice = "Pass coordinates= to fimp_sc.pp.images, or name other places with spatial_key=."
        raise missing_key(spatial_key, "adata.obsm", adata.obsm, advice)
    places = check_coordinates(adata, spatial_key)[rows, :2]
    if spatial_key != SPATIAL_KEY or not str(info.get("coordinate_unit", "")).startswith("degrees"):
        return places, 1.0, True
    latitude, longitude = places.T
    eastern = np.where(longitude < 0, longitude + 360, longitude)
    if np.ptp(eastern) < np.ptp(longitude):  # on both sides of the date line
        longitude = eastern
    middle = np.clip((latitude.max() + latitude.min()) / 2, -85, 85)
    return np.stack([longitude, latitude], axis=1), float(1 / np.cos(np.radians(middle))), False


def _edges(
    adata: AnnData, place: str, info: dict[str, Any], connectivities_key: str | None, rows: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the joined pairs ``(2, n_edges)``, once each, as positions in ``rows``."""
    key = connectivities_key or str(info.get("connectivities_key", CONNECTIVITIES_KEY))
    where = f"{place}.obsp[{key!r}]"
    if key not in adata.obsp:
        advice = "Name the graph with connectivities_key=, or pass edges=False."
        raise missing_key(key, f"{place}.obsp", adata.obsp, advice)
    graph = check_adjacency(in_memory(adata.obsp[key], where), adata.n_obs, where=where, what="image", self_loops=False)
    part = graph[rows][:, rows].tocoo()
    pairs = np.sort(np.stack([part.row, part.col]).astype(np.int64), axis=0)
    return np.unique(pairs, axis=1)


def _room(
    adata: AnnData, xy: NDArray[np.float64], aspect: float, image_size: float | None, n: int
) -> NDArray[np.float64]:
    """Return width and height of an image, in units of the axes."""
    fraction = float(np.clip(0.7 / np.sqrt(n), 0.05, 0.2)) if image_size is None else float(image_size)
    unit = np.array([1.0, 1 / aspect])  # drawn alike
    longest = float((np.ptp(xy, axis=0) / unit).max()) or 1.0
    height, width, _ = image_shape(adata)
    return np.array([width, height]) / max(width, height) * fraction * longest * unit


def _draw_points(
    ax: Axes,
    adata: AnnData,
    xy: NDArray[np.float64],
    value: pd.Categorical | NDArray[np.float64] | None,
    key: str | None,
    cmap: str,
    style: dict[str, Any],
) -> NDArray[np.float64]:
    """Draw all nodes as points, with legend or color bar, and return their colors ``(n, 4)``."""
    from matplotlib.colors import to_rgba_array

    if value is None or key is None:
        ax.scatter(xy[:, 0], xy[:, 1], **{"color": _FRAME, **style})
        return np.repeat(to_rgba_array(_FRAME), len(xy), axis=0)
    limits = {name: style.pop(name) for name in ("norm", "vmin", "vmax") if name in style}
    colored = coloring(adata, key, value, cmap, **limits)
    colors = colored.rgba()
    ax.scatter(xy[:, 0], xy[:, 1], **{"c": colors, **style})
    colored.explain(ax)
    return colors


def _draw_image(
    ax: Axes,
    image: NDArray[np.uint8],
    place: NDArray[np.float64],
    room: NDArray[np.float64],
    downwards: bool,
    frame: Any,
) -> None:
    from matplotlib.patches import Rectangle

    (left, low), (right, high) = place - room / 2, place + room / 2
    bottom, top = (high, low) if downwards else (low, high)
    ax.imshow(image, extent=(left, right, bottom, top), origin="upper", aspect="auto", zorder=3)
    ax.add_patch(Rectangle((left, low), *room, fill=False, edgecolor=frame, linewidth=1.8, zorder=4))
