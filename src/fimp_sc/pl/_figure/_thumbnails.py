"""Small images: which ones find room on a map, and what they look like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fimp_sc.data.sequences._pixels import image_shape, read_pixels
from fimp_sc.data.storage._elements import missing_key
from fimp_sc.pl._figure._common import read_rows

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

_MISSING = 211
_LONGEST_SIDE = 160


def far_apart(xy: NDArray[np.float64], room: NDArray[np.float64], limit: int) -> NDArray[np.int64]:
    """Choose points for boxes of the size ``room`` that do not cover each other, spread over the map.

    The first is the one nearest the middle, every other the one farthest from all before; none that has room is left
    out unless there are more than ``limit``.

    Parameters
    ----------
    xy
        ``(n, 2)``, the centers of the boxes.
    room
        ``(2,)``, width and height.
    limit
        Largest number.

    Returns
    -------
    Positions in ``xy``, sorted.
    """
    scaled = xy / room
    middle = (scaled.max(axis=0) + scaled.min(axis=0)) / 2
    chosen = [int(np.abs(scaled - middle).max(axis=1).argmin())]
    distance = np.full(len(xy), np.inf)
    while len(chosen) < limit:
        distance = np.minimum(distance, np.abs(scaled - scaled[chosen[-1]]).max(axis=1))
        farthest = int(distance.argmax())
        if distance[farthest] < 1:
            break
        chosen.append(farthest)
    return np.sort(np.array(chosen, dtype=np.int64))


def read_thumbnails(adata: AnnData, nodes: NDArray[np.int64], key: str | None) -> list[NDArray[np.uint8]]:
    """Return small RGB images: of the pixels, or of the reconstructions in ``obsm[key]``.

    Raises
    ------
    MissingKeyError
        There are no images, or no reconstructions.
    ValueError
        Reconstructions of another shape than images have, or files that cannot be read.
    """
    if key is None:  # one by one, since files may be large
        return [_small(read_pixels(adata, [node])[0]) for node in nodes]
    if key not in adata.obsm:
        advice = "Run fimp_sc.tl.impute on this modality, or draw the images themselves with images=True."
        raise missing_key(key, "adata.obsm", adata.obsm, advice)
    shape = image_shape(adata)
    where, made = f"adata.obsm[{key!r}]", adata.obsm[key]
    if tuple(made.shape) != (adata.n_obs, int(np.prod(shape))):
        raise ValueError(
            f"{where} has the shape {tuple(made.shape)}, but images of {shape[0]} × {shape[1]} pixels × {shape[2]} "
            f"channels need {(adata.n_obs, int(np.prod(shape)))}."
        )
    values = read_rows(made, where, nodes).reshape(-1, *shape)
    if values.dtype.kind == "f":
        # Predictions overshoot, so that 1 is no sharp border between the two scales.
        scale = 255.0 if np.nanmax(values, initial=0.0) <= 2 else 1.0
        values = np.where(np.isnan(values), _MISSING, values * scale)
    eight_bits = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return [_small(image) for image in eight_bits]


def _small(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return ``(height, width, 3)``, reduced by a whole factor; what is no RGB becomes gray."""
    height, width, channels = image.shape
    factor = -(-max(height, width) // _LONGEST_SIDE)
    rows, columns = max(height // factor, 1), max(width // factor, 1)
    across, down = min(factor, width), min(factor, height)
    cut = image[: rows * down, : columns * across].reshape(rows, down, columns, across, channels)
    small = cut.mean(axis=(1, 3))
    color = small[..., :3] if channels in {3, 4} else np.repeat(small.mean(axis=-1, keepdims=True), 3, axis=-1)
    return np.rint(color).astype(np.uint8)
