"""How signals and images of a block reach the token embeddings of BrainLM and ViT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fimp_sc.data import SequenceStatistics
from fimp_sc.pretrained._brainlm_tokens import PictureTokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fimp_sc.data import SequenceBatch
    from fimp_sc.pretrained._foundation import Foundation

# Pixels from 0 to 255 to numbers from -1 to 1, as ViT was trained on them.
_GRAY = 127.5
# By this the recordings that BrainLM's second format was trained on were divided, after they had been normalized.
_PICTURE_SCALE = 5.6430855


class PatchInput(nn.Module):
    """Images for ViT: patches are put together again; hidden ones are of the mean color.

    Parameters
    ----------
    embedding
        :class:`~fimp_sc.pretrained._vit.PatchTokens`.
    patch
        Side of a patch.
    """

    n_class, aligned = 1, True

    def __init__(self, embedding: Any, patch: int) -> None:
        super().__init__()
        self.tokens, self.patch = embedding, patch

    def forward(self, nodes: SequenceBatch) -> Tensor:
        """Return ``(n, 1 + f, d_model)``."""
        channels, height, width = self.tokens.shape
        cut = nodes["value"].unflatten(2, (self.patch, self.patch, channels))
        cut = cut.unflatten(1, (height // self.patch, width // self.patch))
        pixels = cut.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)
        return self.tokens(pixels)

    def statistics(self) -> SequenceStatistics:
        """Return how values are scaled, whatever the data."""
        return SequenceStatistics(_GRAY, _GRAY, np.zeros(0, np.float32), np.ones(0, np.float32))

    def places(self, coordinates: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return what tokens know of where nodes are: nothing."""
        return coordinates[:, :0]


class SignalInput(nn.Module):
    """Signals of regions for BrainLM; hidden segments are at the region's mean.

    Parameters
    ----------
    embedding
        :class:`SegmentTokens` or :class:`PictureTokens`.
    """

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.tokens = embedding
        self.picture = isinstance(embedding, PictureTokens)
        # Patches of a picture start where its padding does, and so do not agree with segments.
        self.n_class, self.aligned = (1, False) if self.picture else (0, True)

    def forward(self, nodes: SequenceBatch) -> Tensor:
        """Return ``(n, f, d_model)``, of a picture ``(n, 1 + patches, d_model)``."""
        if self.picture:
            return self.tokens(nodes["value"] / _PICTURE_SCALE, nodes["coordinates"][:, 0].long())
        return self.tokens(nodes["value"], nodes["coordinates"])

    def statistics(self) -> SequenceStatistics:
        """Return how values are scaled: region by region, and coordinates not at all."""
        n = 1 if self.picture else 3
        return SequenceStatistics(0.0, 1.0, np.zeros(n, np.float32), np.ones(n, np.float32))

    def places(self, coordinates: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return coordinates ``(n_obs, 3)`` as they are, or rows of the picture ``(n_obs, 1)``."""
        if not self.picture:
            return coordinates
        regions, row = np.unique(coordinates, axis=0, return_inverse=True)
        places = self.tokens.places(torch.from_numpy(regions)).numpy()
        return places[row.ravel()].astype(np.float64)[:, None]


def sequence_input(foundation: Foundation, kind: str, size: Sequence[int], n_coordinates: int) -> nn.Module:
    """Return what makes the tokens of a modality with a foundation model.

    Parameters
    ----------
    foundation
        ViT or BrainLM.
    kind, size, n_coordinates
        What the modality holds: ``"signal"`` (time points) or ``"patch"`` (height, width, channels), and the
        coordinates of its nodes.

    Raises
    ------
    ValueError
        When the foundation model cannot read it.
    """
    wanted = "patch" if foundation.name == "vit" else "signal"
    if kind != wanted:
        what = {"patch": "images", "signal": "signals of brain regions"}[wanted]
        raise ValueError(f"foundation={foundation.name!r} reads {what}, and the modality is of kind {kind!r}.")
    config = foundation.config
    if kind == "patch":
        side, other = config["patch_size"]
        expected = [*config["image_size"], config["n_channels"]]
        if side != other:
            raise ValueError(
                f"This ViT has patches of {side} × {other} pixels, and only square ones are supported: choose another "
                "checkpoint."
            )
        if list(size) != expected:
            raise ValueError(
                f"This ViT reads images of {expected[0]} × {expected[1]} pixels with {expected[2]} channels, found "
                f"{size[0]} × {size[1]} with {size[2]}: resize them with pp.images(image_size=...), or choose another "
                "checkpoint."
            )
        return PatchInput(foundation.embedding, side)
    if n_coordinates != 3:
        raise ValueError(
            f"BrainLM reads where regions are, in millimeters of MNI space: obsm['spatial'] must hold 3 coordinates, "
            f"found {n_coordinates}."
        )
    if config["layout"] != "segments" and size[0] > config["image_size"][1]:
        raise ValueError(
            f"This BrainLM reads up to {config['image_size'][1]} time points, found {size[0]:,}: cut the recordings."
        )
    return SignalInput(foundation.embedding)


def own_token_size(foundation: Foundation) -> int:
    """Return the pixels or time points that a foundation model makes a token of."""
    config = foundation.config
    if foundation.name == "vit":
        return int(config["patch_size"][0])
    return int(config["n_points"] if config["layout"] == "segments" else config["patch_size"][1])
