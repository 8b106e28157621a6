"""Vision transformers: tokens of image patches, and layers read from a checkpoint of transformers or timm."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fimp_sc.data import SequenceStatistics
from fimp_sc.data.storage._elements import shorten
from fimp_sc.nn import TransformerStack
from fimp_sc.pretrained._backbone import Backbone, SequenceTokens, copy_layer, copy_weights
from fimp_sc.pretrained._registry import FoundationReader, register
from fimp_sc.pretrained.files._files import CheckpointError
from fimp_sc.pretrained.files._settings import WEIGHT_FILES, Config, open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fimp_sc.data import SequenceBatch
    from fimp_sc.nn import TransformerLayer
    from fimp_sc.pretrained.files._files import Weights

# Pixels from 0 to 255 to numbers from -1 to 1, as ViT was trained on them.
_GRAY = 127.5


class ViT(FoundationReader):
    """Reads vision transformers: class token, learned positions, pre-norm layers with GELU, final norm.

    Weights may be named as in transformers up to version 4, as in transformers 5, or as in timm; neither package is
    needed. Pooler and classifier are not read. Distillation and register tokens, layer scale, norms of queries and
    keys, gated feed-forward parts and a norm before the first layer, as in DINOv2 or CLIP, are not supported.

    A folder holds ``model.safetensors`` or ``pytorch_model.bin`` beside ``config.json``; one such file under any name
    may be named instead.
    """

    name = "vit"
    reads = "patch"
    nodes = "images"
    files = "config.json and model.safetensors, or the name of a repository on the Hugging Face hub"
    needed = (WEIGHT_FILES,)

    def build(self, config: Mapping[str, Any], **stack: Any) -> Backbone:
        """Build the modules with random weights."""
        tokens = PatchTokens(
            config["d_model"], config["image_size"], config["patch_size"], n_channels=config["n_channels"]
        )
        return Backbone(dict(config), ImageTokens(tokens), build_stack(config, norm_first=True, **stack))

    def read(self, folder: Path, rows: Any = None, *, n_heads: int | None = None, **stack: Any) -> Backbone:
        """Read a checkpoint.

        ``n_heads`` are attention heads, where no configuration says so: shapes do not tell. timm's are known by the
        name of the architecture.

        Raises
        ------
        CheckpointError
            Files are missing or damaged, weights are missing, misshapen or not supported, or the configuration
            contradicts them.
        """
        weights, config = open_checkpoint(folder)
        config.must("model_type", ["vit"])
        root, dialect = find_dialect(weights)
        d_model, n_channels, patch = read_patch(weights, config, root, dialect)
        sizes = read_sizes(weights, config, root, dialect, d_model, n_heads)
        sizes |= {"n_channels": n_channels, "patch_size": patch}
        sizes["image_size"] = _image_size(weights, config, root, dialect, sizes)
        backbone = self.build(sizes, **stack)
        tokens: Any = backbone.embedding.tokens
        copy_weights(tokens.patch, weights, root + dialect.patch)
        for name in ("class_token", "positions"):
            parameter = getattr(tokens, name)
            parameter.data.copy_(weights.take(root + getattr(dialect, name), tuple(parameter.shape)))
        load_stack(backbone.stack, weights, root, dialect)
        check_all_read(weights, [name for part in dialect.ignored for name in (part, root + part)])
        return backbone


class ImageTokens(SequenceTokens):
    """Tokens of images that come as patches: these are put together again; hidden ones are of the mean color.

    Parameters
    ----------
    tokens
        Makes tokens of pixels.
    """

    def __init__(self, tokens: PatchTokens) -> None:
        super().__init__()
        self.tokens = tokens
        self.token_size = tokens.patch.kernel_size[0]

    def forward(self, nodes: SequenceBatch) -> Tensor:
        """Return ``(n, 1 + f, d_model)``."""
        channels, height, width = self.tokens.shape
        side = self.token_size
        cut = nodes["value"].unflatten(2, (side, side, channels))
        cut = cut.unflatten(1, (height // side, width // side))
        pixels = cut.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)
        return self.tokens(pixels)

    def check(self, size: Sequence[int], n_coordinates: int) -> None:
        """Check the size of images, and that patches are square."""
        side, other = self.tokens.patch.kernel_size
        if side != other:
            raise ValueError(
                f"This ViT has patches of {side} × {other} pixels, and only square ones are supported: choose another "
                "checkpoint."
            )
        channels, height, width = self.tokens.shape
        if list(size) != [height, width, channels]:
            raise ValueError(
                f"This ViT reads images of {height} × {width} pixels with {channels} channels, found "
                f"{size[0]} × {size[1]} with {size[2]}: resize them with pp.images(image_size=...), or choose another "
                "checkpoint."
            )

    def statistics(self) -> SequenceStatistics:
        """Return how values are scaled, whatever the data."""
        return SequenceStatistics(_GRAY, _GRAY, np.zeros(0, np.float32), np.ones(0, np.float32))


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


@dataclass(frozen=True)
class Dialect:
    """Names of the parts of a vision transformer in a file.

    Attributes
    ----------
    patch, class_token, positions, layers, norm
        Names of these parts; ``layers`` is followed by a number.
    parts
        Name within a layer of each part of :class:`fimp_sc.nn.TransformerLayer`.
    ignored
        Parts that are not read: heads, and tokens that only pretraining uses.
    eps
        Of norms, unless the configuration says otherwise.
    """

    patch: str
    class_token: str
    positions: str
    layers: str
    norm: str
    parts: dict[str, str]
    eps: float
    ignored: tuple[str, ...] = ()


_NORMS = {"attention_norm": "layernorm_before", "feedforward_norm": "layernorm_after"}
_MLP = {"expand": "mlp.fc1", "contract": "mlp.fc2"}
_TRANSFORMERS_5 = Dialect(
    patch="embeddings.patch_embeddings.projection",
    class_token="embeddings.cls_token",
    positions="embeddings.position_embeddings",
    layers="layers",
    norm="layernorm",
    parts={f"attention.{ours}": f"attention.{ours[0]}_proj" for ours in ("query", "key", "value", "output")}
    | _NORMS
    | _MLP,
    ignored=("pooler.", "classifier.", "embeddings.mask_token"),
    eps=1e-12,
)
_TRANSFORMERS_4 = Dialect(
    **vars(_TRANSFORMERS_5)
    | {
        "layers": "encoder.layer",
        "parts": {f"attention.{name}": f"attention.attention.{name}" for name in ("query", "key", "value")}
        | {"attention.output": "attention.output.dense", "expand": "intermediate.dense", "contract": "output.dense"}
        | _NORMS,
    }
)
_TIMM = Dialect(
    patch="patch_embed.proj",
    class_token="cls_token",
    positions="pos_embed",
    layers="blocks",
    norm="norm",
    parts={"attention.qkv": "attn.qkv", "attention.output": "attn.proj"}
    | {"attention_norm": "norm1", "feedforward_norm": "norm2"}
    | _MLP,
    ignored=("head.",),
    eps=1e-6,
)
# Width and heads by timm's name for a size: heads cannot be seen in shapes, and are not always width / 64.
_TIMM_HEADS = {
    "tiny": (192, 3),
    "small": (384, 6),
    "medium": (512, 8),
    "base": (768, 12),
    "large": (1024, 16),
    "huge": (1280, 16),
    "giant": (1408, 16),
    "gigantic": (1664, 16),
}
_UNSUPPORTED = {
    r"dist(illation)?_token|head_dist|distillation_classifier": "a distillation token",
    r"reg(ister)?_tokens?": "register tokens",
    r"lambda1|\bls[12]\.|gamma_[12]|layer_scale": "layer scale",
    r"[qk]_norm": "norms of queries and keys",
    r"\.w12\.|weights_in|fc1_[gx]": "a gated feed-forward part",
    r"norm_pre|pre_layr?norm": "a norm before the first layer",
}


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


def find_dialect(weights: Weights) -> tuple[str, Dialect]:
    """Return what all names of a vision transformer's parts start with, and how its parts are named.

    Raises
    ------
    CheckpointError
        There are parts that are not supported.
    """
    root = "vit." if any(key.startswith("vit.") for key in weights) else ""
    for key in weights:
        for pattern, what in _UNSUPPORTED.items():
            if re.search(pattern, key):
                raise CheckpointError(
                    f"{str(weights.path)!r} has {key!r}: vision transformers with {what} are not supported."
                )
    if any(key.startswith(f"{_TIMM.layers}.") for key in weights):
        return "", _TIMM
    new = any(key.startswith(f"{root}{_TRANSFORMERS_5.layers}.") for key in weights)
    return root, _TRANSFORMERS_5 if new else _TRANSFORMERS_4


def read_sizes(
    weights: Weights, config: Config, root: str, dialect: Dialect, d_model: int, n_heads: int | None = None
) -> dict[str, Any]:
    """Return the sizes of the layers from the shapes of their weights, after checking that the configuration agrees.

    Raises
    ------
    CheckpointError
        It does not, the number of heads is not known, or layers compute something else.
    """
    hidden = weights.take(f"{root}{dialect.layers}.0.{dialect.parts['expand']}.weight", (None, d_model)).shape[0]
    numbers = [re.match(rf"{re.escape(root + dialect.layers)}\.(\d+)\.", key) for key in weights]
    n_layers = len({number[1] for number in numbers if number})
    if dialect is not _TIMM:
        config.agree("hidden_size", d_model)
        config.agree("intermediate_size", hidden)
        config.agree("num_hidden_layers", n_layers)
        config.must("hidden_act", ["gelu"])
        config.must("qkv_bias", [True])
    return {
        "d_model": d_model,
        "n_heads": _heads(config, dialect, d_model, n_heads),
        "n_layers": n_layers,
        "d_feedforward": hidden,
        "eps": dialect.eps if dialect is _TIMM else config.eps(dialect.eps),
    }


def read_patch(weights: Weights, config: Config, root: str, dialect: Dialect) -> tuple[int, int, list[int]]:
    """Return the width of tokens, the number of channels and the size of patches, checked like :func:`read_sizes`."""
    d_model, n_channels, *patch = weights.take(f"{root}{dialect.patch}.weight", (None,) * 4).shape
    if dialect is not _TIMM:
        config.agree("num_channels", n_channels)
        if "patch_size" in config.values and list(config.pair("patch_size")) != patch:
            config.agree("patch_size", patch)
    return d_model, n_channels, patch


def load_stack(stack: TransformerStack, weights: Weights, root: str, dialect: Dialect) -> None:
    """Copy the weights of all layers and of the final norm."""
    for i, layer in enumerate(stack.layers):
        copy_layer(cast("TransformerLayer", layer), weights, f"{root}{dialect.layers}.{i}.", dialect.parts)
    copy_weights(stack.norm, weights, root + dialect.norm)


def check_all_read(weights: Weights, ignored: Sequence[str]) -> None:
    """Check that all weights were read but for those whose names start with one of ``ignored``.

    Raises
    ------
    CheckpointError
        Others are left: the model has parts that would be missing.
    """
    left = [key for key in weights.unused() if not key.startswith(tuple(ignored))]
    if left:
        raise CheckpointError(
            f"{str(weights.path)!r} has {len(left):,} tensors that the model has no place for: "
            f"{shorten([repr(key) for key in left])}. It is a model of another kind, which is not supported."
        )


def _heads(config: Config, dialect: Dialect, d_model: int, n_heads: int | None) -> int:
    key = "num_attention_heads"
    if dialect is _TIMM:
        key = "num_heads"
        config = Config(config.path, _timm_arguments(config, d_model))
        config.must("act_layer", ["gelu"])
    if n_heads is None and key not in config.values:
        raise CheckpointError(
            f"The number of attention heads is not known: {str(config.path)!r} does not tell it. Pass n_heads=, or put "
            "there the config.json that belongs to the weights."
        )
    if n_heads is not None and config.values.get(key, n_heads) != n_heads:
        raise config.error(key, f"but n_heads={n_heads!r} was passed")
    heads = config.count(key) if n_heads is None else n_heads
    if heads < 1 or d_model % heads:
        problem = f"{heads} attention heads do not divide the width {d_model}"
        raise CheckpointError(
            f"{problem}: check {key!r} in {str(config.path)!r}." if n_heads is None else f"{problem}."
        )
    return heads


def _timm_arguments(config: Config, d_model: int) -> dict[str, Any]:
    """Return what a model of timm was made with, heads looked up where only the name of its size tells them."""
    given = config.values.get("model_args")
    arguments = dict(given) if isinstance(given, dict) else {}
    size = re.match(r"(?:vit|deit)_([a-z]+)_patch", str(config.values.get("architecture", "")))
    width, heads = _TIMM_HEADS.get(size[1], (0, 0)) if size else (0, 0)
    return {"num_heads": heads} | arguments if width == d_model else arguments


def _image_size(weights: Weights, config: Config, root: str, dialect: Dialect, sizes: Mapping[str, Any]) -> list[int]:
    """Return the size of images that the configuration tells, or else the square that has so many patches."""
    key = f"{root}{dialect.positions}"
    n_patches = weights.take(key, (1, None, sizes["d_model"])).shape[1] - 1
    height, width = sizes["patch_size"]
    side = math.isqrt(max(n_patches, 0))
    square = (side * height, side * width)
    if dialect is _TIMM:
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


register(ViT())
