"""BrainLM: tokens of the time segments of brain regions, and layers read from a checkpoint of either format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fimp_sc.pretrained._brainlm_tokens import PictureTokens, SegmentTokens, sinusoids
from fimp_sc.pretrained._foundation import Foundation, load_module
from fimp_sc.pretrained._vit import build_stack
from fimp_sc.pretrained._vit_weights import Dialect, check_all_read, find_dialect, load_stack, read_patch, read_sizes
from fimp_sc.pretrained.files._files import CheckpointError
from fimp_sc.pretrained.files._settings import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

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


def build_brainlm(config: Mapping[str, Any], **stack_options: Any) -> Foundation:
    """Make a BrainLM with random weights.

    Parameters
    ----------
    config
        As in :attr:`Foundation.config`: ``layout`` (``"segments"`` or ``"picture"``), ``d_model``, ``n_heads``,
        ``n_layers``, ``d_feedforward``, ``eps``; for segments ``n_points`` and ``value_kernel``; for a picture
        ``image_size``, ``patch_size``, ``n_regions``.
    stack_options
        ``source``, ``aggregate``, ``self_loops``, ``dropout`` of :class:`fimp_sc.nn.TransformerStack`.
    """
    embedding: nn.Module
    if config["layout"] == "segments":
        embedding = SegmentTokens(config["d_model"], config["n_points"])
        stack = build_stack(config, norm_first=False, value_kernel=config["value_kernel"], **stack_options)
    else:
        embedding = PictureTokens(
            config["d_model"], config["image_size"], config["patch_size"], n_regions=config["n_regions"]
        )
        stack = build_stack(config, norm_first=True, **stack_options)
    return Foundation("brainlm", dict(config), embedding, stack)


def read_brainlm(checkpoint: str | Path, **stack_options: Any) -> Foundation:
    """Read the encoder of a BrainLM; a node is a region of the brain, its tokens are segments of its time course.

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

    Parameters
    ----------
    checkpoint
        Folder with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``, or one such file under any name
        beside ``config.json``. The released ones are subfolders of a hub repository, vandijklab/brainlm: download
        one of them and pass its folder.
    stack_options
        ``source``, ``aggregate``, ``self_loops``, ``dropout`` of :class:`fimp_sc.nn.TransformerStack`.

    Raises
    ------
    CheckpointError
        Files are missing or damaged, weights are missing, misshapen or not supported, or the configuration
        contradicts them.

    Notes
    -----
    Source: Ortega Caro et al. (2024), "BrainLM: A foundation model for brain activity recordings".
    """
    weights, config = open_checkpoint(checkpoint)
    config.must("model_type", ["brainlm_mae", "brainlm", "vit_mae"])
    config.count("num_attention_heads")  # no shape tells it
    root = "vit." if any(key.startswith("vit.") for key in weights) else ""
    if any(key.startswith(f"{root}{_PATCH}.") for key in weights):
        return _read_picture(weights, config, stack_options)
    return _read_segments(weights, config, root, stack_options)


def _read_segments(weights: Weights, config: Config, root: str, options: dict[str, Any]) -> Foundation:
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
    foundation = build_brainlm(sizes, **options)
    embedding: Any = foundation.embedding
    load_module(embedding.signal, weights, root + _SIGNAL)
    load_module(embedding.xyz, weights, root + _XYZ)
    if f"{root}{_TABLE}" in weights:
        table = weights.take(f"{root}{_TABLE}", (None, d_model))
        # Angles run to thousands, where float32 resolves a few parts in ten thousand.
        if not torch.allclose(table, sinusoids(len(table), d_model), atol=5e-3, rtol=0.0):
            raise CheckpointError(
                f"{root + _TABLE!r} in {str(weights.path)!r} is not the table of sines and cosines that BrainLM adds "
                "for the time: models with other positions are not supported."
            )
    load_stack(foundation.stack, weights, root, dialect)
    check_all_read(weights, _IGNORED)
    return foundation


def _read_picture(weights: Weights, config: Config, options: dict[str, Any]) -> Foundation:
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
    foundation = build_brainlm(sizes, **options)
    embedding: Any = foundation.embedding
    with torch.no_grad():
        # All channels, and all rows of a patch, show the same signal.
        kernel = weights.take(f"{root}{_PATCH}.weight", (d_model, n_channels, height, width))
        embedding.signal.weight.copy_(kernel.sum((1, 2)))
        embedding.signal.bias.copy_(weights.take(f"{root}{_PATCH}.bias", (d_model,)))
        for name in ("class_token", "positions"):
            parameter = getattr(embedding, name)
            parameter.copy_(weights.take(root + getattr(dialect, name), tuple(parameter.shape)))
    load_stack(foundation.stack, weights, root, dialect)
    check_all_read(weights, [*_IGNORED, *(root + name for name in dialect.ignored)])
    return foundation
