"""Images in arrays: one layout, eight bits, one size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fimp_sc.data.sequences._image_files import Shape

Channels = Literal["last", "first"]
_USUAL_CHANNELS = {1, 3, 4}
_IMAGES_AT_ONCE = 64


def flatten_images(images: Any, channels: str, image_size: tuple[int, int] | None) -> tuple[NDArray[np.uint8], Shape]:
    """Return images as uint8 ``(n, height × width × channels)``, channels last, and the shape of one.

    Parameters
    ----------
    images
        ``(n, H, W)``, or four dimensions with the channels ``"last"`` or ``"first"``; whole numbers from 0 to 255,
        real numbers from 0 to 1, or booleans.

    Raises
    ------
    TypeError
        No real numbers.
    ValueError
        Another number of dimensions, values out of range, or channels that seem to be on the other side.
    """
    try:
        array = np.asarray(images)
    except ValueError:
        raise ValueError("images must all have one shape: resize them, or pass file names with image_size=.") from None
    if array.dtype.kind not in "buif":
        raise TypeError(f"images must be an array of numbers or a list of file names, found dtype {array.dtype}.")
    if array.ndim not in {3, 4} or 0 in array.shape:
        raise ValueError(
            f"images has the shape {array.shape}: it must be (n, height, width) or (n, height, width, channels), "
            'or with channels="first" (n, channels, height, width).'
        )
    if array.ndim == 3:
        array = array[..., None]
    else:
        here, there = (array.shape[3], array.shape[1]) if channels == "last" else (array.shape[1], array.shape[3])
        if here not in _USUAL_CHANNELS and there in _USUAL_CHANNELS:
            other = "first" if channels == "last" else "last"
            raise ValueError(
                f'images has the shape {array.shape}, which would mean {here} channels with channels="{channels}": '
                f'they seem to come {other}, so pass channels="{other}".'
            )
        if channels == "first":
            array = np.moveaxis(array, 1, 3)
    height, width = image_size if image_size is not None else array.shape[1:3]
    shape = (int(height), int(width), int(array.shape[3]))
    flat = np.empty((len(array), *shape), dtype=np.uint8)
    for start in range(0, len(array), _IMAGES_AT_ONCE):  # the copy that converting makes stays small
        flat[start : start + _IMAGES_AT_ONCE] = _resize(_as_uint8(array[start : start + _IMAGES_AT_ONCE]), shape)
    return flat.reshape(len(array), -1), shape


def _as_uint8(images: NDArray[Any]) -> NDArray[np.uint8]:
    if images.dtype == np.uint8:
        return images
    low, high = images.min(), images.max()
    limit = 1 if images.dtype.kind in "fb" else 255
    if not (low >= 0 and high <= limit):  # NaN is neither
        raise ValueError(
            f"images of dtype {images.dtype} must lie between 0 and {limit}, found {low:g} to {high:g}: rescale them, "
            "or pass uint8."
        )
    scaled = images.astype(np.float32) * 255 if limit == 1 else images
    return np.rint(scaled).astype(np.uint8) if limit == 1 else scaled.astype(np.uint8)


def _resize(images: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    from PIL import Image

    if images.shape[1:3] == shape[:2]:
        return images
    resized = np.empty((len(images), *shape), dtype=np.uint8)
    for i, image in enumerate(images):
        for channel in range(shape[2]):
            plane = Image.fromarray(np.ascontiguousarray(image[..., channel]))
            resized[i, ..., channel] = np.asarray(plane.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))
    return resized
