"""Images in arrays and files: one layout, eight bits, one size; headers are checked without decoding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fimp_sc.data.storage._elements import shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

    Shape = tuple[int, int, int]


_ORIENTATION_TAG, _WIDTH_TAG, _HEIGHT_TAG = 0x0112, 0x0100, 0x0101
_TURNED = {5, 6, 7, 8}  # orientations that swap height and width
_MORE_THAN_8_BIT = ("I", "F")
# Others that Pillow knows are drawn by other programs (PostScript by Ghostscript), or are rare and little tested.
_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")


def decode_files(paths: Sequence[str], shape: Shape, *, resize: bool) -> NDArray[np.uint8]:
    """Return the pixels of files as uint8 ``(n, height, width, channels)``; one that repeats is decoded once.

    Raises
    ------
    ValueError
        A file is missing or cannot be decoded, or has another size although ``resize`` is false.
    """
    pixels = np.empty((len(paths), *shape), dtype=np.uint8)
    first: dict[str, int] = {}
    for i, path in enumerate(paths):
        known = first.setdefault(path, i)
        pixels[i] = pixels[known] if known < i else _decode(path, shape, resize)
    return pixels


def _decode(path: str, shape: Shape, resize: bool) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=_FORMATS) as file:
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise ValueError(f"The image {path!r} is no longer there: restore it, or correct obs['path'].") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    image = _as_channels(image, shape[2], path)
    size = (shape[1], shape[0])
    if image.size != size:
        if not resize:
            raise ValueError(
                f"The image {path!r} is {image.size[1]} × {image.size[0]} pixels (height × width), but "
                f"{shape[0]} × {shape[1]} were expected: it has changed; make the object again."
            )
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8).reshape(shape)


def _unreadable(path: str, error: Exception) -> ValueError:
    from PIL import Image

    advice = f"Replace it or leave it out; {', '.join(_FORMATS[:-1])} and {_FORMATS[-1]} are read"
    if isinstance(error, Image.DecompressionBombError):
        advice = "Shrink it or leave it out; if it is what it says, raise PIL.Image.MAX_IMAGE_PIXELS"
    return ValueError(f"The image {path!r} cannot be read ({error}). {advice}.")


def _as_channels(image: Image, channels: int, path: str) -> Image:
    if image.mode.startswith(_MORE_THAN_8_BIT):
        raise ValueError(
            f"The image {path!r} has more than 8 bits per value (mode {image.mode}), which would be cut off: pass the "
            "images as an array with values between 0 and 1."
        )
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def inspect_files(paths: Sequence[Any], image_size: tuple[int, int] | None) -> tuple[list[str], Shape]:
    """Check the headers of image files without decoding any.

    Returns
    -------
    Absolute paths, and the height, width and channels of all images (1 channel if all are gray, 3 otherwise).

    Raises
    ------
    ValueError
        A file is missing or is no image, or sizes differ and ``image_size`` is not given.
    """
    from PIL import Image

    files = [Path(path).expanduser().absolute() for path in paths]
    missing = [repr(str(path)) for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"{len(missing):,} of {len(files):,} image files do not exist: {shorten(missing)}.")
    sizes, gray = [], True
    for path in files:
        try:
            with Image.open(path, formats=_FORMATS) as image:
                sizes.append(_upright_size(image))
                gray &= image.mode in {"1", "L", "LA"}
                mode = image.mode
                image.verify()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _unreadable(str(path), error) from error
        if mode.startswith(_MORE_THAN_8_BIT):
            raise ValueError(
                f"The image {str(path)!r} has more than 8 bits per value (mode {mode}), which would be cut off: pass "
                "the images as an array with values between 0 and 1."
            )
    found, count = np.unique(np.array(sizes), axis=0, return_counts=True)
    if len(found) > 1 and image_size is None:
        usual = found[count.argmax()].tolist()
        other = next(i for i, size in enumerate(sizes) if list(size) != usual)
        raise ValueError(
            f"The images have {len(found)} sizes: most are {usual[0]} × {usual[1]} pixels (height × width), but "
            f"{str(files[other])!r} is {sizes[other][0]} × {sizes[other][1]}. Pass image_size=, for instance "
            f"image_size={tuple(usual)}, to resize all."
        )
    height, width = image_size if image_size is not None else sizes[0]
    return [str(path) for path in files], (height, width, 1 if gray else 3)


def _upright_size(image: Image) -> tuple[int, int]:
    """Return height and width as they are after the turn that a camera asks for in its tags."""
    width, height = image.size
    stored = getattr(image, "tag_v2", {})  # of TIFF files, for which `size` may or may not be the upright one
    if _WIDTH_TAG in stored and _HEIGHT_TAG in stored:
        width, height = int(stored[_WIDTH_TAG]), int(stored[_HEIGHT_TAG])
    tagged = "exif" in image.info or image.format == "TIFF"  # asking others for tags may decode them
    turned = tagged and image.getexif().get(_ORIENTATION_TAG) in _TURNED
    return (width, height) if turned else (height, width)


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
