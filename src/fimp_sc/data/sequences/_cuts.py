"""Signals to segments, images to patches, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def segments(signal: NDArray[np.number], length: int) -> NDArray[np.float32]:
    """Return ``(n, f, length)`` segments of ``(n, time)``; what does not fill a segment is left out."""
    n_segments = signal.shape[1] // length
    cut = np.ascontiguousarray(signal[:, : n_segments * length], dtype=np.float32)
    return cut.reshape(len(signal), n_segments, length)


def series(tokens: NDArray[np.floating], n_times: int) -> NDArray[np.float32]:
    """Undo :func:`segments`; time points outside of whole segments are NaN."""
    out = np.full((len(tokens), n_times), np.nan, dtype=np.float32)
    flat = tokens.reshape(len(tokens), tokens.shape[1] * tokens.shape[2])
    out[:, : flat.shape[1]] = flat
    return out


def patches(pixels: NDArray[np.number], side: int) -> NDArray[np.float32]:
    """Return ``(n, f, side * side * channels)`` patches of ``(n, height, width, channels)``, row by row.

    Pixels right of and below the last whole patch are left out.
    """
    n, height, width, channels = pixels.shape
    rows, columns = height // side, width // side
    cut = pixels[:, : rows * side, : columns * side].reshape(n, rows, side, columns, side, channels)
    return np.ascontiguousarray(cut.swapaxes(2, 3), dtype=np.float32).reshape(n, rows * columns, side**2 * channels)


def picture(tokens: NDArray[np.floating], shape: tuple[int, int, int], side: int) -> NDArray[np.float32]:
    """Undo :func:`patches`, to ``(n, height, width, channels)``; pixels outside of whole patches are NaN."""
    height, width, channels = shape
    rows, columns = height // side, width // side
    out = np.full((len(tokens), *shape), np.nan, dtype=np.float32)
    cut: Any = tokens.reshape(len(tokens), rows, columns, side, side, channels).swapaxes(2, 3)
    out[:, : rows * side, : columns * side] = cut.reshape(len(tokens), rows * side, columns * side, channels)
    return out
