"""Maps of cells, drawn by squidpy."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from fimp_sc._compat import import_squidpy
from fimp_sc.data.storage._elements import in_memory
from fimp_sc.pl._figure._coloring import MISSING_COLOR, Categories

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from fimp_sc.pl._figure._coloring import Numbers

# Cells of which a vector graphic would be too large.
_MANY = 10_000
_SCALE_BAR = {"location": "lower right", "box_alpha": 0.7, "font_properties": {"size": "small"}}


def draw_map(
    ax: Axes,
    xy: NDArray[np.float64],
    colors: Categories | Numbers,
    rows: NDArray[np.intp],
    *,
    title: str,
    size: float | None,
    image: Mapping[str, Any] | None = None,
    unit: float | None = None,
    rasterized: bool | None = None,
    **kwargs: Any,
) -> None:
    """Draw cells of one sample by :func:`squidpy.pl.spatial_scatter`, without legend, the second axis downwards.

    Parameters
    ----------
    xy, colors
        Coordinates ``(n, 2)`` and colors of all cells.
    rows
        Cells of this sample.
    size
        Marker area in square points; on an image, a factor of the diameter of a spot.
    image
        Entry of ``uns["spatial"]`` as :func:`image_of` returns it.
    unit
        Length of one unit of the coordinates for a scale bar, in micrometers unless ``scalebar_units`` is given.
    rasterized
        Whether cells are pixels in vector graphics; by default many are.
    **kwargs
        Passed on.
    """
    # An object of its own, as squidpy writes colors and categories to the one that it draws.
    cells = AnnData(obs=pd.DataFrame(index=pd.RangeIndex(len(rows)).astype(str)), obsm={"spatial": xy[rows]})
    if isinstance(colors, Categories):
        names = [str(i) for i in range(len(colors.names))]
        cells.obs["value"] = pd.Categorical.from_codes(colors.codes[rows], names)
        cells.uns["value_colors"] = colors.colors
        scale = {}
    else:
        cells.obs["value"] = colors.values[rows]
        scale = {"cmap": colors.cmap, "norm": colors.norm}
    given: dict[str, Any] = {"shape": None, "img": False, "size": size, "marker": "o"}
    if image is not None:
        cells.uns["spatial"] = {"sample": dict(image)}
        given = {"img_res_key": next(iter(image["images"])), "size": size}
    given |= {"linewidths": 0, "na_color": MISSING_COLOR, "axis_label": ["", ""], **scale}
    if unit is not None:
        pixel = 1.0 if image is None else image["scalefactors"][f"tissue_{given['img_res_key']}_scalef"]
        given |= {"scalebar_dx": unit / pixel, "scalebar_kwargs": _SCALE_BAR}
    draw = import_squidpy().pl.spatial_scatter
    with warnings.catch_warnings(), _added_once(ax):
        # Of matplotlib, for squidpy's developers.
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        warnings.filterwarnings("ignore", "No data for colormapping", UserWarning)
        # Of anndata 0.13, for squidpy's developers as well.
        warnings.filterwarnings("ignore", "The method obs_vector is deprecated", FutureWarning)
        draw(
            cells, color="value", ax=ax, title=title, library_id=["sample"], legend_loc=None, colorbar=False,
            **given | kwargs,
        )  # fmt: skip
    for collection in ax.collections:
        collection.set_rasterized(len(rows) > _MANY if rasterized is None else rasterized)
    ax.title.set_fontsize("medium")


@contextmanager
def _added_once(ax: Axes) -> Iterator[None]:
    """Let axes take each collection once: squidpy adds them twice, and translucent cells would cover themselves."""
    own: Any = ax
    add = ax.add_collection
    own.add_collection = lambda collection, *args, **kwargs: (
        collection if collection in ax.collections else add(collection, *args, **kwargs)
    )
    try:
        yield
    finally:
        del own.add_collection


def micrometers_of(adata: AnnData, library: str | None) -> float | None:
    """Return the micrometers of one unit of the coordinates of a sample, if Space Ranger wrote them."""
    factors = _entry_of(adata, library).get("scalefactors", {})
    size = factors.get("microns_per_pixel") if hasattr(factors, "keys") else None
    return None if size is None else float(size)


def image_of(adata: AnnData, library: str | None, resolution: str | None = None) -> dict[str, Any] | None:
    """Return the image of a sample in ``uns["spatial"]`` with its scale factors, if there is one.

    Parameters
    ----------
    library
        Name of the sample; None for the only one.
    resolution
        Name of the image; by default ``"hires"``, or else the first.
    """
    entry = _entry_of(adata, library)
    images, factors = (dict(entry.get(key, {})) for key in ("images", "scalefactors"))
    usable = [key for key in images if f"tissue_{key}_scalef" in factors and "spot_diameter_fullres" in factors]
    if not usable:
        return None
    chosen = resolution or ("hires" if "hires" in usable else usable[0])
    if chosen not in usable:
        raise KeyError(f"uns['spatial'] has no image {chosen!r} with its scale factor; it has {usable}.")
    picture = np.asarray(in_memory(images[chosen], "adata.uns['spatial']"))
    return {"images": {chosen: picture}, "scalefactors": {key: float(value) for key, value in factors.items()}}


def _entry_of(adata: AnnData, library: str | None) -> Mapping[str, Any]:
    """Return the entry of a sample in ``uns["spatial"]``, or the only one if no sample is named; empty if none is."""
    entries = adata.uns.get("spatial")
    if not hasattr(entries, "keys"):
        return {}
    name = next(iter(entries), None) if library is None and len(entries) == 1 else library
    entry = entries.get(name, {})
    return entry if hasattr(entry, "keys") else {}
