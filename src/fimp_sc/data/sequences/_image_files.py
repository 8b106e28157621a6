"""Image files: headers checked without decoding, pixels decoded one by one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
