"""Pixels of a modality of images: from memory, or decoded from files when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from fimp_sc.data.sequences._image_files import decode_files
from fimp_sc.data.storage._elements import missing_key
from fimp_sc.data.storage._rows import open_rows

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import ArrayLike, NDArray

    from fimp_sc.data.sequences._image_files import Shape

PIXELS_KEY = "pixels"
PATH_KEY = "path"


def image_shape(adata: AnnData, where: str = "adata") -> Shape:
    """Return height, width and channels of the images of a modality.

    Raises
    ------
    MissingKeyError
        They are not written in ``adata.uns["fimp_modality"]["image_shape"]``.
    ValueError
        They are not three positive whole numbers.
    """
    info = adata.uns.get("fimp_modality", {})
    place = f"{where}.uns['fimp_modality']"
    if "image_shape" not in info:
        raise missing_key("image_shape", place, info, "Store there [height, width, channels] of one image.")
    shape = np.asarray(info["image_shape"])
    if shape.shape != (3,) or shape.dtype.kind not in "ui" or (shape < 1).any():
        raise ValueError(f"{place}['image_shape'] must be [height, width, channels], found {shape.tolist()}.")
    height, width, channels = (int(size) for size in shape)
    return height, width, channels


def check_images(adata: AnnData, where: str = "adata") -> Literal["pixels", "files"]:
    """Check where the images of a modality are, and return it.

    Raises
    ------
    MissingKeyError
        There are neither pixels in ``obsm["pixels"]`` nor files in ``obs["path"]``, or the shape is not known.
    TypeError
        The pixels are not uint8.
    ValueError
        The pixels do not match the shape of an image.
    """
    shape = image_shape(adata, where)
    if PIXELS_KEY in adata.obsm:
        pixels, size = adata.obsm[PIXELS_KEY], int(np.prod(shape))
        if getattr(pixels, "dtype", None) != np.uint8:
            raise TypeError(f"{where}.obsm['pixels'] must be uint8, found {getattr(pixels, 'dtype', type(pixels))}.")
        if tuple(pixels.shape) != (adata.n_obs, size):
            raise ValueError(
                f"{where}.obsm['pixels'] has the shape {tuple(pixels.shape)}, but {adata.n_obs:,} images of "
                f"{shape[0]} × {shape[1]} pixels × {shape[2]} channels need {(adata.n_obs, size)}: flatten each image "
                "with channels last, or correct uns['fimp_modality']['image_shape']."
            )
        return "pixels"
    if PATH_KEY in adata.obs:
        return "files"
    raise missing_key(
        PIXELS_KEY,
        f"{where}.obsm",
        adata.obsm,
        "Store pixels there, or file names in obs['path']; see fimp_sc.pp.images.",
    )


def read_pixels(adata: AnnData, nodes: ArrayLike) -> NDArray[np.uint8]:
    """Return the pixels of some images, from memory or decoded from their files.

    Parameters
    ----------
    adata
        A modality of images, as :func:`fimp_sc.pp.images` makes it.
    nodes
        ``(k,)`` positions in ``adata``, in any order; a position may be repeated.

    Returns
    -------
    uint8 array ``(k, height, width, channels)``.

    Raises
    ------
    MissingKeyError
        The modality holds no images.
    ValueError
        A file is missing, cannot be decoded, or has another size than it had before.
    IndexError
        A position is out of range.
    """
    stored = check_images(adata)
    shape = image_shape(adata)
    wanted = np.atleast_1d(np.asarray(nodes))
    if wanted.size and wanted.dtype.kind not in "ui":
        raise TypeError(f"nodes must be positions (whole numbers), found dtype {wanted.dtype}.")
    wanted = wanted.astype(np.int64)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= adata.n_obs):
        raise IndexError(f"nodes must be between 0 and {adata.n_obs - 1}, found {wanted.min()} to {wanted.max()}.")
    if stored == "pixels":
        flat = open_rows(adata.obsm[PIXELS_KEY], "adata.obsm['pixels']").read(wanted)
        return np.asarray(flat, dtype=np.uint8).reshape(-1, *shape)
    resize = bool(adata.uns["fimp_modality"].get("resize", False))
    paths = adata.obs[PATH_KEY].astype(str).to_numpy()[wanted]
    return decode_files(paths.tolist(), shape, resize=resize)
