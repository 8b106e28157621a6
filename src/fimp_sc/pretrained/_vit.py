"""Vision transformers: tokens of image patches, and layers read from a checkpoint of transformers or timm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fimp_sc.nn import TransformerStack
from fimp_sc.pretrained._foundation import Foundation, load_module
from fimp_sc.pretrained._vit_weights import TIMM, check_all_read, find_dialect, load_stack, read_patch, read_sizes
from fimp_sc.pretrained.files._files import CheckpointError
from fimp_sc.pretrained.files._settings import Config, open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fimp_sc.pretrained._vit_weights import Dialect
    from fimp_sc.pretrained.files._files import Weights


class PatchTokens(nn.Module):
    """Tokens of images: the class token, then one for each patch, row by row, with learned positions.

    Parameters
    ----------
    d_model
        Width of a token.
    image_size, patch_size
        Height and width in pixels.
    n_channels
        Channels of an image.
    """

    def __init__(
        self, d_model: int, image_size: Sequence[int], patch_size: Sequence[int], *, n_channels: int = 3
    ) -> None:
        super().__init__()
        self.shape = (n_channels, image_size[0], image_size[1])
        patch = (patch_size[0], patch_size[1])
        n_patches = (image_size[0] // patch[0]) * (image_size[1] // patch[1])
        self.patch = nn.Conv2d(n_channels, d_model, patch, stride=patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, d_model))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + n_patches, d_model))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return ``(n, 1 + n_patches, d_model)``.

        Parameters
        ----------
        pixels
            ``(n, n_channels, height, width)``, scaled as in pretraining.

        Raises
        ------
        ValueError
            The images have another size than those of pretraining.
        """
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != self.shape:
            raise ValueError(
                f"pixels must have the shape (n, {', '.join(map(str, self.shape))}), found {tuple(pixels.shape)}: "
                "resize the images, or read a checkpoint for their size."
            )
        patches = self.patch(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1) + self.positions


def build_vit(config: Mapping[str, Any], **stack_options: Any) -> Foundation:
    """Make a vision transformer with random weights.

    Parameters
    ----------
    config
        ``d_model``, ``n_heads``, ``n_layers``, ``d_feedforward``, ``eps``, ``image_size``, ``patch_size``,
        ``n_channels``, as in :attr:`Foundation.config`.
    stack_options
        ``source``, ``aggregate``, ``self_loops``, ``dropout`` of :class:`fimp_sc.nn.TransformerStack`.
    """
    embedding = PatchTokens(
        config["d_model"], config["image_size"], config["patch_size"], n_channels=config["n_channels"]
    )
    return Foundation("vit", dict(config), embedding, build_stack(config, norm_first=True, **stack_options))


def build_stack(config: Mapping[str, Any], **options: Any) -> TransformerStack:
    """Make the layers of a model with a final norm and GELU."""
    return TransformerStack(
        config["d_model"],
        config["n_heads"],
        config["n_layers"],
        d_feedforward=config["d_feedforward"],
        eps=config["eps"],
        activation="gelu",
        final_norm=True,
        **options,
    )


def read_vit(checkpoint: str | Path, *, n_heads: int | None = None, **stack_options: Any) -> Foundation:
    """Read a vision transformer: class token, learned positions, pre-norm layers with GELU, final norm.

    Weights may be named as in transformers up to version 4, as in transformers 5, or as in timm; neither package is
    needed. Pooler and classifier are not read. Distillation and register tokens, layer scale, norms of queries and
    keys, gated feed-forward parts and a norm before the first layer, as in DINOv2 or CLIP, are not supported.

    Parameters
    ----------
    checkpoint
        Folder with ``model.safetensors`` or ``pytorch_model.bin``, or one such file under any name, beside
        ``config.json``; or the name of a hub repository.
    n_heads
        Attention heads, where no configuration says so: shapes do not tell. timm's are known by the name of the
        architecture.
    stack_options
        ``source``, ``aggregate``, ``self_loops``, ``dropout`` of :class:`fimp_sc.nn.TransformerStack`.

    Raises
    ------
    CheckpointError
        Files are missing or damaged, weights are missing, misshapen or not supported, or the configuration
        contradicts them.
    """
    weights, config = open_checkpoint(checkpoint)
    config.must("model_type", ["vit"])
    root, dialect = find_dialect(weights)
    d_model, n_channels, patch = read_patch(weights, config, root, dialect)
    sizes = read_sizes(weights, config, root, dialect, d_model, n_heads)
    sizes |= {"n_channels": n_channels, "patch_size": patch}
    sizes["image_size"] = _image_size(weights, config, root, dialect, sizes)
    foundation = build_vit(sizes, **stack_options)
    embedding: Any = foundation.embedding
    load_module(embedding.patch, weights, root + dialect.patch)
    for name in ("class_token", "positions"):
        parameter = getattr(embedding, name)
        parameter.data.copy_(weights.take(root + getattr(dialect, name), tuple(parameter.shape)))
    load_stack(foundation.stack, weights, root, dialect)
    check_all_read(weights, [name for part in dialect.ignored for name in (part, root + part)])
    return foundation


def _image_size(weights: Weights, config: Config, root: str, dialect: Dialect, sizes: Mapping[str, Any]) -> list[int]:
    """Return the size of images that the configuration tells, or else the square that has so many patches."""
    key = f"{root}{dialect.positions}"
    n_patches = weights.take(key, (1, None, sizes["d_model"])).shape[1] - 1
    height, width = sizes["patch_size"]
    side = math.isqrt(max(n_patches, 0))
    square = (side * height, side * width)
    if dialect is TIMM:
        pretrained = config.values.get("pretrained_cfg")
        given = pretrained.get("input_size") if isinstance(pretrained, dict) else None
        given = given[1:] if isinstance(given, list) else given  # channels come first
        image = Config(config.path, {} if given is None else {"input_size": given}).pair("input_size", square)
    else:
        image = config.pair("image_size", square)
    fitting = (image[0] // height) * (image[1] // width)
    if fitting != n_patches:
        raise CheckpointError(
            f"{key!r} in {str(weights.path)!r} has {n_patches} positions after the class token's, but images of "
            f"{image[0]} x {image[1]} pixels have {fitting} patches of {height} x {width}: config.json belongs to "
            "another model, or this one has no class token, which is not supported."
        )
    return list(image)
