"""Images: tokens are square patches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc.data.sequences._kinds import SequenceKind, patches, picture
from fimp_sc.data.sequences._pixels import PATH_KEY, PIXELS_KEY, check_images, image_shape, read_pixels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

# As in ViT.
_LARGEST_PATCH = 16


class PatchKind(SequenceKind):
    """Images in ``obsm["pixels"]`` or in files that ``obs["path"]`` names, see :func:`fimp_sc.pp.images`."""

    name, size_names = "patch", ("height", "width", "channels")
    results = "obsm"

    def size(self, adata: AnnData, where: str = "adata") -> list[int]:
        """See :class:`SequenceKind`."""
        check_images(adata, where)
        return list(image_shape(adata, where))

    def default_token_size(self, size: Sequence[int]) -> int:
        """See :class:`SequenceKind`."""
        return max(min(_LARGEST_PATCH, min(size[0], size[1]) // 4), 1)

    def tokens(self, size: Sequence[int], token_size: int) -> tuple[int, int]:
        """See :class:`SequenceKind`."""
        largest = min(size[0], size[1])
        if not 1 <= token_size <= largest:
            raise ValueError(
                f"token_size must be between 1 and {largest}, the pixels of the shorter side of the images: found "
                f"{token_size}."
            )
        return (size[0] // token_size) * (size[1] // token_size), token_size**2 * size[2]

    def left_over(self, size: Sequence[int], token_size: int) -> str | None:
        """See :class:`SequenceKind`."""
        sides = [(size[0] % token_size, "lowest rows"), (size[1] % token_size, "rightmost columns")]
        parts = " and ".join(f"the {n} {where}" for n, where in sides if n)
        if not parts:
            return None
        return (
            f"{parts} of images of {size[0]} × {size[1]} pixels, which do not fill patches of {token_size} × "
            f"{token_size}"
        )

    def read(self, adata: AnnData, nodes: NDArray[np.int64], token_size: int, start: int = 0) -> NDArray[np.float32]:
        """See :class:`SequenceKind`."""
        return patches(read_pixels(adata, nodes), token_size)

    def restore(self, tokens: NDArray[np.floating], size: Sequence[int], token_size: int) -> NDArray[np.float32]:
        """See :class:`SequenceKind`; ``(n, height, width, channels)``, from 0 to 255."""
        return picture(tokens, (size[0], size[1], size[2]), token_size)

    def mask(self, hidden: NDArray[np.bool_], size: Sequence[int], token_size: int) -> NDArray[np.bool_] | None:
        """See :class:`SequenceKind`; ``hidden`` is ``(n, height, width)``, with or without channels, or flat."""
        height, width, channels = size
        if hidden.ndim == 2 and hidden.shape[1] in (height * width, height * width * channels):
            hidden = hidden.reshape(len(hidden), height, width, -1)
        if hidden.shape[1:] in ((height, width, channels), (height, width, 1)):
            hidden = np.asarray(hidden.any(3))
        if hidden.shape[1:] != (height, width):
            return None
        rows, columns = height // token_size, width // token_size
        cut = hidden[:, : rows * token_size, : columns * token_size]
        cut = cut.reshape(len(hidden), rows, token_size, columns, token_size)
        return np.asarray(cut.any((2, 4)).reshape(len(hidden), -1))

    def parts(self, adata: AnnData) -> dict[str, dict[str, Any]]:
        """See :class:`SequenceKind`."""
        if PIXELS_KEY in adata.obsm:
            return {"obsm": {PIXELS_KEY: adata.obsm[PIXELS_KEY]}}
        return {"obs": {PATH_KEY: adata.obs[PATH_KEY]}}

    def fits(self, size: Sequence[int], known: Sequence[int]) -> str | None:
        """See :class:`SequenceKind`."""
        if list(size) == list(known):
            return None
        return (
            f"it reads images of {list(known)} (height, width, channels), found {list(size)}: make them that size with "
            "fimp_sc.pp.images(image_size=...)"
        )


KIND = PatchKind()
