"""Patches of a tissue image, one around each spot or cell, as a modality beside expression."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc._errors import MissingKeyError
from fimp_sc._logging import warn
from fimp_sc._options import checked
from fimp_sc.data._modality import CONNECTIVITIES_KEY, SPATIAL_KEY, check_modality_name, make_mudata, quiet_mudata
from fimp_sc.data.sequences._image_files import flatten_images
from fimp_sc.data.sequences._pixels import PIXELS_KEY
from fimp_sc.data.storage._elements import in_memory, missing_key
from fimp_sc.data.validate._checks import check_anndata, check_coordinates, check_graph, check_obs_key, shorten

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray

    # From rows and columns, as slices inside of the image, to pixels (height, width, channels).
    Region = Callable[[slice, slice], NDArray[Any]]

logger = logging.getLogger(__name__)

# What spot_diameter_fullres spans: Space Ranger takes spots for 65 micrometers wide, more than the 55 that they cover.
_SPOT_UM = 65.0
_LEAST_EXTENT = 0.02
_RESOLUTIONS = ("hires", "lowres")
_TIFF = (".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif", ".btf", ".qptiff")


@checked
def spot_images(
    adata: AnnData,
    image: Any = None,
    *,
    width_um: float | None = None,
    width_px: float | None = None,
    microns_per_pixel: float | None = None,
    scale: float | None = None,
    image_size: int = 224,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    connectivities_key: str = CONNECTIVITIES_KEY,
    modality: str = "he",
) -> MuData:
    """Cut a patch of the tissue image around each spot or cell, for foundation models of images.

    Spots keep their graph, so that ``tl.embed(mdata, modality="he", foundation=...)`` passes messages between the
    patches of spots that are neighbors for expression, too.

    Parameters
    ----------
    adata
        Spots or cells with a graph (:func:`fimp_sc.pp.spatial_graph`) and coordinates in ``obsm[spatial_key]``, x and
        y. It is not changed and becomes the modality ``"rna"``.
    image
        The image, by default that of ``uns["spatial"]`` (``"hires"``, or else ``"lowres"``) with its scale factors; an
        array ``(height, width)`` or ``(height, width, channels)``, of numpy, dask or zarr, uint8 or real numbers from 0
        to 1; a file: TIFF and formats of slide scanners that tifffile reads, region by region, or PNG and JPEG; or an
        image of a SpatialData object, of whose scales the finest is taken. A dictionary of these by sample, with
        ``library_key``.
    width_um, width_px
        Width of a patch, in micrometers or in pixels of the image; one of both.
    microns_per_pixel
        Micrometers per pixel of the image, for ``width_um``. By default what ``uns["spatial"]`` says: of Visium HD
        directly, of Visium by ``spot_diameter_fullres``, which Space Ranger gives for spots of 65 micrometers; also for
        an image that is passed.
    scale
        Pixels of the image per unit of the coordinates. By default that of ``uns["spatial"]`` for its own images, and
        1 for others: coordinates are pixels of the image. Coordinates of Xenium are micrometers: pass
        ``1 / microns_per_pixel``.
    image_size
        Height and width to which patches are resized; what the foundation model reads, often 224.
    library_key
        Column of ``obs`` with the sample, which has an image of its own.
    spatial_key, connectivities_key
        Coordinates in ``obsm``, and graph in ``obsp``.
    modality
        Name of the modality of patches.

    Returns
    -------
    MuData with ``"rna"``, which is ``adata``, and ``modality``, whose nodes have the same names and order, the columns
    of ``adata.obs``, and

    - ``obsm["pixels"]``: uint8 ``(n_obs, image_size × image_size × channels)``, channels last; transparency is left
      out. Beyond its border the image is continued by its last pixels;
    - ``obsm["spatial"]``, ``obsp["spatial_connectivities"]``: coordinates and graph of ``adata``;
    - ``uns["fimp_modality"]``: ``kind="patch"``, ``image_shape=[image_size, image_size, channels]``,
      ``patch_width_px`` (by sample where they differ) and, where it is known, ``microns_per_pixel``.

    Raises
    ------
    ImportError
        A TIFF is named, and tifffile or zarr is not installed.
    MissingKeyError
        Coordinates, graph, the column of samples or an image are absent.
    TypeError
        The image is none of these.
    ValueError
        No width or two, or one that is no part of the image; micrometers without ``microns_per_pixel``; scale factors
        that are none; places outside of the image; values out of range; or a file that cannot be read.

    Warns
    -----
    UserWarning
        Patches have far fewer pixels in the image than ``image_size``: a finer image should be passed. All places are
        in one spot of the image: coordinates may be of another unit.

    Examples
    --------
    >>> import numpy as np
    >>> import fimp_sc as fimp
    >>> adata = fimp.datasets.toy_tissue(n_obs=100)
    >>> adata = adata[adata.obs["section"] == adata.obs["section"].iloc[0]].copy()
    >>> adata.obsm["spatial"] -= adata.obsm["spatial"].min(0)  # pixels of the image below
    >>> fimp.pp.spatial_graph(adata)
    >>> side = int(adata.obsm["spatial"].max()) + 1
    >>> slide = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    >>> mdata = fimp.pp.spot_images(adata, slide, width_px=28, image_size=28)
    >>> fimp.data.read_pixels(mdata["he"], [0, 1]).shape
    (2, 28, 28, 3)
    """
    from anndata import AnnData
    from mudata import MuData

    check_anndata(adata)
    if check_modality_name(modality) == "rna":
        raise ValueError("modality='rna' is that of expression: choose another name.")
    if (width_um is None) == (width_px is None):
        raise ValueError(
            "Pass the width of a patch, either width_um= in micrometers or width_px= in pixels of the image."
        )
    check_graph(adata, connectivities_key, library_key)
    places = check_coordinates(adata, spatial_key)[:, :2]
    samples: list[str | None]
    if library_key is None:
        samples, code = [None], np.zeros(adata.n_obs, dtype=np.int64)
    else:
        column = check_obs_key(adata, library_key, "library")
        samples, code = [str(name) for name in column.categories], column.codes.astype(np.int64)
        if len(samples) > 1 and image is not None and not _is_dictionary(image):
            raise ValueError("image is one image for several samples: pass a dictionary of images by sample.")
    with ExitStack() as files:
        slides = [_slide(adata, image, sample, microns_per_pixel, scale, files) for sample in samples]
        widths = [_width(slide, width_um, width_px) for slide in slides]
        for i, slide in enumerate(slides):
            slide.check(places[code == i] * slide.scale, adata.obs_names[code == i], spatial_key)
        n_channels = {slide.shape[2] for slide in slides}
        if len(n_channels) > 1:
            raise ValueError(
                f"Images of samples have different numbers of channels, {sorted(n_channels)}: bring them to one."
            )
        shape = [image_size, image_size, n_channels.pop()]
        pixels = np.empty((adata.n_obs, int(np.prod(shape))), dtype=np.uint8)
        for i, (slide, width) in enumerate(zip(slides, widths, strict=True)):
            if 2 * width < image_size:
                warn(
                    f"A patch covers {width:.3g} pixels of the image{slide.of} and is enlarged to {image_size}: pass "
                    "the image in full resolution, a larger width, or a smaller image_size=."
                )
            for row in np.flatnonzero(code == i):
                pixels[row] = slide.patch(places[row] * slide.scale, width, image_size)
    patches = AnnData(obs=adata.obs.copy(), obsm={PIXELS_KEY: pixels, SPATIAL_KEY: places})
    known = [slide.microns_per_pixel for slide in slides]
    info = {
        "kind": "patch",
        "image_shape": shape,
        "resize": False,
        "graph": "adjacency",
        "library_key": library_key,
        "patch_width_px": widths[0] if len(set(widths)) == 1 else dict(zip(map(str, samples), widths, strict=True)),
        "microns_per_pixel": known[0] if len(set(known)) == 1 else None,
    }
    graph = in_memory(adata.obsp[connectivities_key], f"adata.obsp[{connectivities_key!r}]").tocsr()
    made = make_mudata(patches, modality, info, graph.copy())
    logger.info("%d patches of %d × %d pixels × %d channels, in mdata[%r].", adata.n_obs, *shape, modality)
    with quiet_mudata():
        return MuData({"rna": adata, modality: made[modality]})


class _Slide:
    """An image, of which regions are read.

    Parameters
    ----------
    region
        Reads one.
    shape
        Height, width and channels.
    scale, microns_per_pixel
        See :func:`spot_images`.
    of
        Which sample it is of, for messages.
    """

    def __init__(
        self, region: Region, shape: tuple[int, int, int], scale: float, microns_per_pixel: float | None, of: str
    ) -> None:
        self.region, self.scale, self.microns_per_pixel, self.of = region, scale, microns_per_pixel, of
        # Transparency is no color.
        self.shape = (shape[0], shape[1], 3 if shape[2] == 4 else shape[2])

    def check(self, centers: NDArray[np.float64], names: Any, spatial_key: str) -> None:
        """Raise a ValueError where places are outside of the image, and warn where they fill hardly any of it."""
        height, width = self.shape[:2]
        outside = np.flatnonzero(((centers < 0) | (centers > [width, height])).any(1))
        if len(outside):
            x, y = centers[outside[0]]
            raise ValueError(
                f"{len(outside):,} of {len(centers):,} nodes{self.of} are outside of the image of {height:,} × "
                f"{width:,} pixels (height × width), first {names[outside[0]]!r} at x = {x:.4g}, y = {y:.4g}. "
                f"Coordinates in adata.obsm[{spatial_key!r}] times scale={self.scale:.4g} must be pixels of the image, "
                "x before y: pass scale=, the image in the resolution of the coordinates, or leave these nodes out."
            )
        extent = np.ptp(centers, axis=0)
        if len(centers) > 1 and (extent < _LEAST_EXTENT * np.array([width, height])).all():
            warn(
                f"All {len(centers):,} nodes{self.of} lie within {extent[0]:.3g} × {extent[1]:.3g} pixels (width × "
                f"height) of an image of {width:,} × {height:,}: are coordinates in adata.obsm[{spatial_key!r}] pixels "
                "of the image, rather than rows and columns of an array? Pass scale= where they are in another unit."
            )

    def patch(self, center: NDArray[np.float64], width: float, size: int) -> NDArray[np.uint8]:
        """Return the flat pixels of ``size`` rows and columns around x and y."""
        from PIL import Image

        first, last = center - width / 2, center + width / 2
        low, high = np.floor(first).astype(int), np.maximum(np.ceil(last).astype(int), np.floor(first).astype(int) + 1)
        limits = np.array([self.shape[1], self.shape[0]])
        inner_low, inner_high = np.clip(low, 0, limits - 1), np.clip(high, 1, limits)
        cut = self.region(slice(inner_low[1], inner_high[1]), slice(inner_low[0], inner_high[0]))[..., : self.shape[2]]
        beyond = [(int(inner_low[axis] - low[axis]), int(high[axis] - inner_high[axis])) for axis in (1, 0)]
        cut = np.pad(cut, [*beyond, (0, 0)], mode="edge")
        flat, shape = flatten_images(cut[None], "last", None)
        out = np.empty((size, size, shape[2]), dtype=np.uint8)
        box = (*(first - low), *(last - low))
        for channel in range(shape[2]):
            plane = Image.fromarray(np.ascontiguousarray(flat.reshape(shape)[..., channel]))
            out[..., channel] = np.asarray(plane.resize((size, size), Image.Resampling.BILINEAR, box=box))
        return out.reshape(-1)


def _width(slide: _Slide, width_um: float | None, width_px: float | None) -> float:
    """Return the width of a patch in pixels of the image, which must be that of a part of it."""
    if width_px is None and slide.microns_per_pixel is None:
        raise ValueError(
            f"width_um= needs microns_per_pixel=, micrometers per pixel of the image{slide.of}: nothing in "
            "adata.uns['spatial'] tells them. Pass it, or width_px=."
        )
    asked, width = f"width_px={width_px}", float(width_px or 0)
    if width_px is None:
        width = float(width_um or 0) / float(slide.microns_per_pixel or 1)
        asked = f"width_um={width_um} at {slide.microns_per_pixel:.4g} micrometers per pixel"
    height, across = slide.shape[:2]
    if not 1 <= width <= max(height, across):
        raise ValueError(
            f"{asked} makes patches of {width:.4g} pixels, and the image{slide.of} has {height:,} × {across:,} (height "
            "× width): pass another width, or the right microns_per_pixel=."
        )
    return width


def _slide(
    adata: AnnData,
    image: Any,
    sample: str | None,
    microns_per_pixel: float | None,
    scale: float | None,
    files: ExitStack,
) -> _Slide:
    """Return the image of a sample; files that it is read from are open as long as ``files``."""
    of = "" if sample is None else f" of sample {sample!r}"
    entry = _entry(adata, sample, needed=image is None)
    factors = entry.get("scalefactors") if isinstance(entry, Mapping) else None
    factors = factors if isinstance(factors, Mapping) else {}
    known = None  # micrometers per pixel in full resolution
    if microns_per_pixel is None and "microns_per_pixel" in factors:
        known = _factor(factors, "microns_per_pixel", of)
    elif microns_per_pixel is None and "spot_diameter_fullres" in factors:
        known = _SPOT_UM / _factor(factors, "spot_diameter_fullres", of)
    own_scale = 1.0
    if image is None:
        images = entry.get("images") if isinstance(entry, Mapping) else None
        images = images if isinstance(images, Mapping) else {}
        usable = [name for name in _RESOLUTIONS if name in images and f"tissue_{name}_scalef" in factors]
        if not usable:
            held = [shorten([repr(name) for name in entries]) or "none" for entries in (images, factors)]
            raise MissingKeyError(
                f"adata.uns['spatial']{of} has no image 'hires' or 'lowres' with its factor in 'scalefactors' (such as "
                f"'tissue_hires_scalef'); images: {held[0]}; factors: {held[1]}. Pass image= and scale=."
            )
        image, own_scale = images[usable[0]], 1.0
        if scale is None:
            own_scale = _factor(factors, f"tissue_{usable[0]}_scalef", of)
    elif _is_dictionary(image):
        if sample is None:
            raise ValueError("image is a dictionary by sample: name the column of samples with library_key=.")
        if sample not in image:
            raise missing_key(sample, "image", image, "Each sample needs its image.")
        image = image[sample]
    scale = own_scale if scale is None else scale
    if microns_per_pixel is None and known is not None:
        microns_per_pixel = known / scale
    return _Slide(*_open(image, of, files), scale, microns_per_pixel, of)


def _factor(factors: Mapping[str, Any], name: str, of: str) -> float:
    """Return a scale factor of Space Ranger, a finite number above 0."""
    try:
        value = float(factors[name])
    except (TypeError, ValueError):
        value = float("nan")
    if not (np.isfinite(value) and value > 0):
        raise ValueError(
            f"{name!r} in the scale factors of adata.uns['spatial']{of} is {factors[name]!r}, and must be a number "
            "above 0: read the file of scale factors again, or pass scale= and microns_per_pixel=."
        )
    return value


def _is_dictionary(image: Any) -> bool:
    return isinstance(image, Mapping) and not hasattr(image, "children")  # as the scales of SpatialData have


def _entry(adata: AnnData, sample: str | None, *, needed: bool) -> Any:
    """Return what ``uns["spatial"]`` has of a sample."""
    entries = adata.uns.get("spatial")
    entries = entries if isinstance(entries, Mapping) else {}
    if sample is None and len(entries) == 1:
        return next(iter(entries.values()))
    if sample in entries:
        return entries[sample]
    if not needed:
        return {}
    if sample is None and entries:
        raise ValueError(
            f"adata.uns['spatial'] has images of {len(entries)} samples, {shorten([repr(name) for name in entries])}: "
            "name the column of obs that tells which spot is of which with library_key=."
        )
    key, where, found = ("spatial", "adata.uns", adata.uns) if sample is None else (sample, "uns['spatial']", entries)
    if key in found:  # and holds nothing
        raise MissingKeyError("adata.uns['spatial'] has no images: pass image=.")
    raise missing_key(key, where, found, "There is no image: pass image=.")


def _open(image: Any, of: str, files: ExitStack) -> tuple[Region, tuple[int, int, int]]:
    """Return a reader of regions, and height, width and channels."""
    if isinstance(image, str | Path):
        path = Path(image).expanduser()
        if not path.is_file():
            raise ValueError(f"There is no image file {str(path)!r}.")
        image, axes = _tiff(path, files) if path.suffix.lower() in _TIFF else (_picture(path), "YXS")
    elif hasattr(image, "children") and hasattr(image, "ds"):  # scales of SpatialData
        return _open(next(iter(image["scale0"].ds.data_vars.values())), of, files)
    elif hasattr(image, "dims"):  # of xarray
        axes = "".join(str(name).upper() for name in image.dims).replace("C", "S")
        image = image.data
    else:
        axes = "YXS" if getattr(image, "ndim", 0) == 3 else "YX"
    if not hasattr(image, "shape") or not hasattr(image, "dtype") or np.dtype(image.dtype).kind not in "buif":
        raise TypeError(
            f"image{of} must be an array of numbers, a file or an image of SpatialData, found {type(image).__name__}."
        )
    if sorted(axes) not in (sorted("YXS"), sorted("YX")) or len(axes) != len(image.shape):
        raise ValueError(
            f"image{of} has the axes {axes!r} and the shape {tuple(image.shape)}: height, width and channels are "
            "needed."
        )
    sizes = dict(zip(axes, image.shape, strict=True))
    n_channels = int(sizes.get("S", 1))
    if n_channels not in (1, 3, 4):
        raise ValueError(
            f"image{of} has the shape {tuple(image.shape)}, in which {n_channels} are channels: gray (1) or RGB (3) is "
            "read. Channels come last; of stains choose one or three."
        )
    order = [axes.index(name) for name in "YXS" if name in axes]

    def region(rows: slice, columns: slice) -> NDArray[Any]:
        where = {"Y": rows, "X": columns, "S": slice(None)}
        try:
            cut = np.asarray(image[tuple(where[name] for name in axes)]).transpose(order)
        except Exception as error:  # whatever the reader of a format raises
            raise ValueError(
                f"The image{of} cannot be read at rows {rows.start:,} to {rows.stop:,} ({error}): the file may be "
                "damaged or incomplete."
            ) from error
        return cut if cut.ndim == 3 else cut[..., None]

    return region, (int(sizes["Y"]), int(sizes["X"]), n_channels)


def _tiff(path: Path, files: ExitStack) -> tuple[Any, str]:
    """Open the finest level of a TIFF, which is read by region."""
    try:
        import tifffile
        import zarr
    except ImportError as error:
        raise ImportError(
            f"{str(path)!r} is read with tifffile and zarr, and {error.name!r} is not installed: "
            f"pip install {error.name}."
        ) from None
    try:
        series = files.enter_context(tifffile.TiffFile(path)).series[0]
        return zarr.open(series.aszarr(level=0), mode="r"), series.levels[0].axes.replace("C", "S")
    except Exception as error:
        raise ValueError(f"The image {str(path)!r} cannot be read ({error}): pass it as an array.") from error


def _picture(path: Path) -> NDArray[np.uint8]:
    from fimp_sc.data.sequences._image_files import decode_files, inspect_files

    files, shape = inspect_files([path], None)
    return decode_files(files, shape, resize=False)[0]
