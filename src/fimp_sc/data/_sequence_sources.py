"""Token sources of signals and images: how the values of a modality become sequences of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc.data._pixels import image_shape, read_pixels
from fimp_sc.data._rows import open_rows
from fimp_sc.data._sequences import SequenceShape, SequenceSource, patches, picture, segments, series

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fimp_sc.data._parts import Part
    from fimp_sc.data._sequences import SequenceStatistics

_SEGMENT = 20
_LARGEST_PATCH = 16


def default_token_size(kind: str, size: Sequence[int]) -> int:
    """Return the usual size of a token: 20 time points as in BrainLM, or patches of up to 16 pixels as in ViT.

    Parameters
    ----------
    kind
        ``"signal"`` or ``"patch"``.
    size
        Time points, or height, width and channels.
    """
    if kind == "signal":
        return min(_SEGMENT, size[0])
    return max(min(_LARGEST_PATCH, min(size[0], size[1]) // 4), 1)


def token_shape(kind: str, size: Sequence[int], token_size: int, n_coordinates: int = 0) -> SequenceShape:
    """Return the tokens of a node.

    Parameters
    ----------
    kind, size
        See :func:`default_token_size`.
    token_size
        Time points of a segment, or side of a patch in pixels.
    n_coordinates
        Coordinates that tokens know of.

    Raises
    ------
    ValueError
        When ``token_size`` is not at least 1, or larger than what there is.
    """
    largest = size[0] if kind == "signal" else min(size[0], size[1])
    what = "time points of the signals" if kind == "signal" else "pixels of the shorter side of the images"
    if not 1 <= token_size <= largest:
        raise ValueError(f"token_size must be between 1 and {largest}, the {what}: found {token_size}.")
    if kind == "signal":
        return SequenceShape(size[0] // token_size, token_size, n_coordinates)
    n_patches = (size[0] // token_size) * (size[1] // token_size)
    return SequenceShape(n_patches, token_size**2 * size[2], n_coordinates)


def left_over(kind: str, size: Sequence[int], token_size: int) -> str | None:
    """Say what does not fill a token and is left out, if anything."""
    if kind == "signal":
        rest = size[0] % token_size
        return (
            f"the last {rest} of {size[0]:,} time points, which do not fill a segment of {token_size}" if rest else None
        )
    rows, columns = size[0] % token_size, size[1] % token_size
    if not rows and not columns:
        return None
    return (
        f"the lowest {rows} rows and rightmost {columns} columns of images of {size[0]} × {size[1]} pixels, which do "
        f"not fill patches of {token_size} × {token_size}"
    )


def sequence_source(
    part: Part,
    n_obs: int,
    shape: SequenceShape,
    token_size: int,
    *,
    coordinates: NDArray[np.floating] | None = None,
    statistics: SequenceStatistics | None = None,
    hidden: NDArray[np.bool_] | None = None,
) -> SequenceSource:
    """Return the tokens of a modality of signals or images; values are read when a block asks for them.

    Parameters
    ----------
    part
        The modality.
    n_obs
        Number of nodes.
    shape, token_size
        Of tokens, see :func:`token_shape`; of the object at hand.
    coordinates, statistics, hidden
        See :class:`~fimp_sc.data.SequenceSource`.
    """
    adata, rows = part.adata, part.rows
    if part.kind == "signal":
        signals = open_rows(adata.X, "adata.X")

        def read(nodes: NDArray[np.int64]) -> NDArray[np.float32]:
            values: Any = signals.read(nodes if rows is None else rows[nodes])
            return segments(values if isinstance(values, np.ndarray) else values.toarray(), token_size)
    else:

        def read(nodes: NDArray[np.int64]) -> NDArray[np.float32]:
            return patches(read_pixels(adata, nodes if rows is None else rows[nodes]), token_size)

    return SequenceSource(
        read, shape, n_obs, by_node=part.kind == "signal", coordinates=coordinates, statistics=statistics,
        absent=part.absent, hidden=hidden,
    )  # fmt: skip


def untoken(part: Part, tokens: NDArray[np.floating], token_size: int) -> NDArray[np.float32]:
    """Turn ``(n, f, p)`` tokens into signals ``(n, n_times)`` or images ``(n, height, width, channels)`` again."""
    if part.kind == "signal":
        return series(tokens, part.adata.n_vars)
    return picture(tokens, image_shape(part.adata), token_size)
