"""BrainLM: tokens of the time segments of brain regions, and layers read from a checkpoint of either format."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimp_sc.data import SequenceStatistics
from fimp_sc.pretrained._backbone import Backbone, SequenceTokens, copy_weights
from fimp_sc.pretrained._registry import FoundationReader, register
from fimp_sc.pretrained._vit import (
    Dialect,
    build_stack,
    check_all_read,
    find_dialect,
    load_stack,
    read_patch,
    read_sizes,
)
from fimp_sc.pretrained.files._files import CheckpointError
from fimp_sc.pretrained.files._settings import WEIGHT_FILES, open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from fimp_sc.data import SequenceBatch
    from fimp_sc.pretrained.files._files import Weights
    from fimp_sc.pretrained.files._settings import Config

_IGNORED = ("decoder.", "vit.embeddings.cls_token", "embeddings.cls_token")
_SIGNAL = "embeddings.signal_embedding_projection"
_XYZ = "embeddings.xyz_embedding_projection"
_TABLE = "embeddings.pos_embedding.pe"
_PATCH = "embeddings.patch_embeddings.projection"
_NYSTROM = "encoder.layer"
_PARTS = {f"attention.{name}": f"attention.self.{name}" for name in ("query", "key", "value")} | {
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "expand": "intermediate.dense",
    "contract": "output.dense",
    "feedforward_norm": "output.LayerNorm",
}
_CONVOLUTION = "attention.self.conv"
# By this the recordings that the second format was trained on were divided, after they had been normalized.
_PICTURE_SCALE = 5.6430855


class BrainLM(FoundationReader):
    """Reads the encoder of a BrainLM; a node is a region of the brain, its tokens are segments of its time course.

    Two formats exist. In the first (13M), a token is a segment of one region, plus the region's coordinates, plus the
    time (:class:`SegmentTokens`); layers are Nyströmformers with norms after the residuals. Their landmarks, which
    approximate attention over all regions at once, are not needed among the few tokens of one region: attention is
    exact. Their convolution over values is kept where the checkpoint has one. The class token, which in pretraining
    went with all regions at once, is not used.

    In the second (111M and 650M), regions are the rows of a picture, whose square patches are tokens, and the layers
    are those of a vision transformer. Such a patch covers several regions, which nodes of a graph cannot share:
    :class:`PictureTokens` says how a region alone is shown to the model. What cannot be had is the original's output
    for the whole picture.

    Decoders are not read: they are transformers over all regions themselves.

    A folder holds ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``. The released ones are subfolders
    of a hub repository, vandijklab/brainlm: download one of them.

    Notes
    -----
    Source: Ortega Caro et al. (2024), "BrainLM: A foundation model for brain activity recordings".
    """

    name = "brainlm"
    reads = "signal"
    nodes = "signals of brain regions"
    files = "config.json and model.safetensors of one of the models in the hub repository vandijklab/brainlm"
    needed = (("config.json",), WEIGHT_FILES)

    def build(self, config: Mapping[str, Any], **stack: Any) -> Backbone:
        """Build the modules with random weights.

        ``config`` has ``layout`` (``"segments"`` or ``"picture"``), ``d_model``, ``n_heads``, ``n_layers``,
        ``d_feedforward``, ``eps``; for segments ``n_points`` and ``value_kernel``; for a picture ``image_size``,
        ``patch_size``, ``n_regions``.
        """
        tokens: SegmentTokens | PictureTokens
        if config["layout"] == "segments":
            tokens = SegmentTokens(config["d_model"], config["n_points"])
            layers = build_stack(config, norm_first=False, value_kernel=config["value_kernel"], **stack)
        else:
            tokens = PictureTokens(
                config["d_model"], config["image_size"], config["patch_size"], n_regions=config["n_regions"]
            )
            layers = build_stack(config, norm_first=True, **stack)
        return Backbone(dict(config), SignalTokens(tokens), layers)

    def read(self, folder: Path, rows: Any = None, **stack: Any) -> Backbone:
        """Read a checkpoint.

        Raises
        ------
        CheckpointError
            Files are missing or damaged, weights are missing, misshapen or not supported, or the configuration
            contradicts them.
        """
        weights, config = open_checkpoint(folder)
        config.must("model_type", ["brainlm_mae", "brainlm", "vit_mae"])
        config.count("num_attention_heads")  # no shape tells it
        root = "vit." if any(key.startswith("vit.") for key in weights) else ""
        if any(key.startswith(f"{root}{_PATCH}.") for key in weights):
            return _read_picture(self, weights, config, stack)
        return _read_segments(self, weights, config, root, stack)


class SignalTokens(SequenceTokens):
    """Tokens of the signals of regions; hidden segments are at the region's mean.

    Parameters
    ----------
    tokens
        Makes tokens of signals and places.
    """

    def __init__(self, tokens: SegmentTokens | PictureTokens) -> None:
        super().__init__()
        self.tokens = tokens
        if isinstance(tokens, PictureTokens):
            self.token_size, self.n_class = tokens.patch_width, 1
            # Patches of a picture start where its padding does.
            self.misaligned = (
                "The patches of this BrainLM do not agree with segments of time: it embeds signals and does not "
                "reconstruct them. Leave foundation= out, or use the first format (13M)."
            )
        else:
            self.token_size, self.n_class = tokens.signal.in_features, 0

    def forward(self, nodes: SequenceBatch) -> Tensor:
        """Return ``(n, f, d_model)``, of a picture ``(n, 1 + patches, d_model)``."""
        if isinstance(self.tokens, PictureTokens):
            return self.tokens(nodes["value"] / _PICTURE_SCALE, nodes["coordinates"][:, 0].long())
        return self.tokens(nodes["value"], nodes["coordinates"])

    def check(self, size: Sequence[int], n_coordinates: int) -> None:
        """Check that regions have places, and that the picture has room for the signals."""
        if n_coordinates != 3:
            raise ValueError(
                f"BrainLM reads where regions are, in millimeters of MNI space: obsm['spatial'] must hold 3 "
                f"coordinates, found {n_coordinates}."
            )
        if isinstance(self.tokens, PictureTokens) and size[0] > self.tokens.width:
            raise ValueError(
                f"This BrainLM reads up to {self.tokens.width} time points, found {size[0]:,}: cut the recordings."
            )

    def statistics(self) -> SequenceStatistics:
        """Return how values are scaled: region by region, and coordinates not at all."""
        n = 1 if isinstance(self.tokens, PictureTokens) else 3
        return SequenceStatistics(0.0, 1.0, np.zeros(n, np.float32), np.ones(n, np.float32))

    def places(self, coordinates: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return coordinates ``(n_obs, 3)`` as they are, or rows of the picture ``(n_obs, 1)``."""
        if not isinstance(self.tokens, PictureTokens):
            return coordinates
        regions, row = np.unique(coordinates, axis=0, return_inverse=True)
        places = self.tokens.places(torch.from_numpy(regions)).numpy()
        return places[row.ravel()].astype(np.float64)[:, None]


class SegmentTokens(nn.Module):
    r"""Tokens of the first BrainLM format (13M): one for each segment of a region's time course.

    .. math:: h_{it} = W_s s_{it} + b_s + W_x x_i + b_x + p_t

    with the segment :math:`s_{it}` of region :math:`i`, its coordinates :math:`x_i`, and sines and cosines
    :math:`p_t` of the segment's number.

    Parameters
    ----------
    d_model
        Width of a token.
    n_points
        Time points of a segment.
    """

    def __init__(self, d_model: int, n_points: int) -> None:
        super().__init__()
        self.signal = nn.Linear(n_points, d_model)
        self.xyz = nn.Linear(3, d_model)

    def forward(self, signal: Tensor, xyz: Tensor) -> Tensor:
        """Return ``(n, segments, d_model)``.

        Parameters
        ----------
        signal
            ``(n, segments, n_points)``, normalized as in pretraining.
        xyz
            ``(n, 3)`` coordinates of the regions.

        Raises
        ------
        ValueError
            Signal or coordinates have another shape.
        """
        n_points = self.signal.in_features
        if signal.ndim != 3 or signal.shape[2] != n_points:
            raise ValueError(f"signal must have the shape (n, segments, {n_points}), found {tuple(signal.shape)}")
        if tuple(xyz.shape) != (len(signal), 3):
            raise ValueError(f"xyz must have the shape ({len(signal)}, 3), found {tuple(xyz.shape)}")
        tokens = self.signal(signal) + self.xyz(xyz)[:, None]
        return tokens + _sinusoids(signal.shape[1], tokens.shape[2], device=tokens.device).to(tokens.dtype)


class PictureTokens(nn.Module):
    """Tokens of the second BrainLM format (111M, 650M), whose input is a picture: regions by time points.

    The original sorts regions by their y coordinate, one row each, pads 424 x 200 values on all sides with -1 to a
    square, repeats them in three channels, and cuts the square into patches of 16 x 16 or 14 x 14: a token there is a
    stretch of time of 14 to 16 regions. Here each region has its own tokens: those of a picture whose patches, where
    the region's row runs through them, show this region in all their rows. In time, patches lie as in the original:
    200 points touch 13 patches of 16 or 15 of 14, the first and the last partly padding. The class token comes
    first. Patches of padding alone are left out, as pretraining leaves out most patches of every picture.

    With patches one row high this is what the original makes of a region. Otherwise it is not: there a token also
    holds the region's neighbors in the order by y, and padding in the first and last rows.

    Parameters
    ----------
    d_model
        Width of a token.
    image_size, patch_size
        Rows and time points of the padded picture, and of a patch.
    n_regions
        Rows that are no padding.
    """

    def __init__(
        self, d_model: int, image_size: Sequence[int], patch_size: Sequence[int], *, n_regions: int = 424
    ) -> None:
        super().__init__()
        (self.height, self.width), (self.patch_height, self.patch_width) = image_size, patch_size
        self.n_regions = n_regions
        self.grid = (self.height // self.patch_height, self.width // self.patch_width)
        self.signal = nn.Linear(self.patch_width, d_model)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, d_model))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + self.grid[0] * self.grid[1], d_model))

    def forward(self, signal: Tensor, rows: Tensor) -> Tensor:
        """Return ``(n, 1 + patches, d_model)``.

        Parameters
        ----------
        signal
            ``(n, points)`` or ``(n, segments, points)``, 200 time points in all, scaled as in pretraining (the
            original divides its normalized recordings by 5.6430855). Other numbers of points, up to the width of the
            padded picture, are put into its middle as well.
        rows
            ``(n,)`` int, row of each region in the picture without padding, see :meth:`places`.

        Raises
        ------
        ValueError
            The signal is longer than the picture is wide, or rows are outside of it.
        """
        series = signal.flatten(1)
        n, n_points = series.shape
        if not 0 < n_points <= self.width:
            raise ValueError(f"signal must have between 1 and {self.width} time points, found {n_points}")
        if tuple(rows.shape) != (n,) or rows.is_floating_point():
            raise ValueError(f"rows must be ({n},) whole numbers, found {tuple(rows.shape)} {rows.dtype}")
        if n and not 0 <= int(rows.min()) <= int(rows.max()) < self.n_regions:
            raise ValueError(f"rows must lie between 0 and {self.n_regions - 1}")
        before = (self.width - n_points) // 2
        first, last = before // self.patch_width, -(-(before + n_points) // self.patch_width)
        margins = (before - first * self.patch_width, last * self.patch_width - before - n_points)
        patches = F.pad(series, margins, value=-1.0).unflatten(1, (last - first, self.patch_width))
        place = (rows.long() + (self.height - self.n_regions) // 2) // self.patch_height
        tokens = self.signal(patches) + self.positions[0, 1:].unflatten(0, self.grid)[place, first:last]
        return torch.cat([(self.class_token + self.positions[:, :1]).expand(n, -1, -1), tokens], dim=1)

    def places(self, xyz: Tensor) -> Tensor:
        """Return the row of each region in the picture, ``(n,)``, from the coordinates ``(n, 3)`` of all regions.

        Regions are sorted by y; of another atlas than the original's they are spread over its rows.
        """
        rank = torch.argsort(torch.argsort(xyz[:, 1], stable=True), stable=True)
        return rank * self.n_regions // max(len(rank), 1)


def _sinusoids(n: int, d_model: int, device: torch.device | None = None) -> Tensor:
    """Return sines (even columns) and cosines (odd columns) of the positions ``0 .. n - 1``, ``(n, d_model)`` float32.

    Notes
    -----
    Source: arXiv 1706.03762, section 3.5.
    """
    rate = torch.exp(torch.arange(0, d_model, 2, device=device) * (-math.log(10000.0) / d_model))
    angle = torch.arange(n, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


def _read_segments(reader: BrainLM, weights: Weights, config: Config, root: str, options: dict[str, Any]) -> Backbone:
    d_model, n_points = weights.take(f"{root}{_SIGNAL}.weight", (None, None)).shape
    first, n_heads = f"{root}{_NYSTROM}.0.", config.count("num_attention_heads")
    kernel: int | None = None
    parts = dict(_PARTS)
    if f"{first}{_CONVOLUTION}.weight" in weights:
        kernel = weights.take(f"{first}{_CONVOLUTION}.weight", (n_heads, 1, None, 1)).shape[2]
        parts["attention.value_convolution"] = _CONVOLUTION
    dialect = Dialect(
        patch=_SIGNAL, class_token="", positions=_TABLE, layers=_NYSTROM, norm="layernorm", parts=parts, eps=1e-12
    )
    sizes = read_sizes(weights, config, root, dialect, d_model)
    config.agree("timepoint_patching_size", n_points)
    config.agree("conv_kernel_size", kernel)
    if kernel is not None and kernel % 2 == 0:
        raise config.error("conv_kernel_size", "but only odd widths keep the number of tokens")
    if d_model % 2:
        raise config.error("hidden_size", "but sinusoidal positions take an even number")
    sizes |= {"layout": "segments", "n_points": n_points, "value_kernel": kernel}
    backbone = reader.build(sizes, **options)
    embedding: Any = backbone.embedding.tokens
    copy_weights(embedding.signal, weights, root + _SIGNAL)
    copy_weights(embedding.xyz, weights, root + _XYZ)
    if f"{root}{_TABLE}" in weights:
        table = weights.take(f"{root}{_TABLE}", (None, d_model))
        # Angles run to thousands, where float32 resolves a few parts in ten thousand.
        if not torch.allclose(table, _sinusoids(len(table), d_model), atol=5e-3, rtol=0.0):
            raise CheckpointError(
                f"{root + _TABLE!r} in {str(weights.path)!r} is not the table of sines and cosines that BrainLM adds "
                "for the time: models with other positions are not supported."
            )
    load_stack(backbone.stack, weights, root, dialect)
    check_all_read(weights, _IGNORED)
    return backbone


def _read_picture(reader: BrainLM, weights: Weights, config: Config, options: dict[str, Any]) -> Backbone:
    root, dialect = find_dialect(weights)
    d_model, n_channels, (height, width) = read_patch(weights, config, root, dialect)
    sizes = read_sizes(weights, config, root, dialect, d_model)
    image = config.pair("image_size")
    n_regions, n_points = config.count("num_brain_voxels", 424), config.count("num_timepoints_per_voxel", 200)
    if image[0] < n_regions or image[1] < n_points or image[0] % height or image[1] % width:
        raise config.error(
            "image_size",
            f"expected a picture in patches of {height} x {width} with room for {n_regions} regions x {n_points} "
            "time points",
        )
    sizes |= {"layout": "picture", "image_size": list(image), "patch_size": [height, width], "n_regions": n_regions}
    backbone = reader.build(sizes, **options)
    embedding: Any = backbone.embedding.tokens
    with torch.no_grad():
        # All channels, and all rows of a patch, show the same signal.
        kernel = weights.take(f"{root}{_PATCH}.weight", (d_model, n_channels, height, width))
        embedding.signal.weight.copy_(kernel.sum((1, 2)))
        embedding.signal.bias.copy_(weights.take(f"{root}{_PATCH}.bias", (d_model,)))
        for name in ("class_token", "positions"):
            parameter = getattr(embedding, name)
            parameter.copy_(weights.take(root + getattr(dialect, name), tuple(parameter.shape)))
    load_stack(backbone.stack, weights, root, dialect)
    check_all_read(weights, [*_IGNORED, *(root + name for name in dialect.ignored)])
    return backbone


register(BrainLM())
