"""Vision transformers: tokens of image patches, and layers read from a checkpoint of transformers or timm."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimp_sc._logging import warn
from fimp_sc.data import SequenceStatistics
from fimp_sc.data.storage._elements import shorten
from fimp_sc.nn import TransformerStack
from fimp_sc.pretrained._backbone import Backbone, SequenceTokens, copy_layer, copy_weights
from fimp_sc.pretrained._registry import FoundationReader, register
from fimp_sc.pretrained.files._files import CheckpointError, read_json
from fimp_sc.pretrained.files._settings import WEIGHT_FILES, Config, open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fimp_sc.data import SequenceBatch
    from fimp_sc.nn import TransformerLayer
    from fimp_sc.pretrained.files._files import Weights

# Pixels from 0 to 255 to numbers from -1 to 1, as the first ViT was trained on them; other scales become part of the
# projection of patches.
_GRAY = 127.5
_HALVES = ((0.5,), (0.5,))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ViT(FoundationReader):
    """Reads vision transformers: class token, learned positions, pre-norm layers, final norm.

    So are ViT and the DINOv2 family, of which most foundation models of pathology are: layer scale (which becomes part
    of the weights), register tokens, and GELU or gated (SwiGLU) feed-forward parts. Weights may be named as in the
    files of transformers, of timm, or of the authors of DINOv2; none of these packages is needed. Pooler and classifier
    are not read. Distillation tokens, norms of queries and keys, rotary positions and a norm before the first layer, as
    in DeiT, DINOv3 or CLIP, are not supported.

    A folder holds ``model.safetensors`` or ``pytorch_model.bin`` beside ``config.json``; one such file under any name
    may be named instead.

    Images must have the size of pretraining. Models with layer scale, or trained for any size (timm's
    ``dynamic_img_size``), take any whole number of patches: positions are interpolated as transformers does it.

    Colors are normalized as in pretraining: by ``mean`` and ``std`` if they are given, else as
    ``preprocessor_config.json`` (transformers) or ``config.json`` (timm) beside the weights says. Without either, by
    one half, as for the first ViT; and of models with layer scale by the colors of ImageNet, with a warning.
    """

    name = "vit"
    reads = "patch"
    nodes = "images"
    files = "config.json and model.safetensors, or the name of a repository on the Hugging Face hub"
    needed = (WEIGHT_FILES,)

    def build(self, config: Mapping[str, Any], **stack: Any) -> Backbone:
        """Build the modules with random weights."""
        # A saved model of an earlier version has ViT's settings alone.
        tokens = PatchTokens(
            config["d_model"], config["image_size"], config["patch_size"], n_channels=config["n_channels"],
            n_registers=config.get("n_registers", 0), any_size=config.get("any_size", False),
        )  # fmt: skip
        embedding = ImageTokens(tokens, config.get("pooling", "cls"))
        return Backbone(dict(config), embedding, build_stack(config, norm_first=True, **stack))

    def read(
        self,
        folder: Path,
        rows: Any = None,
        *,
        n_heads: int | None = None,
        pooling: Literal["cls", "cls+mean"] = "cls",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **stack: Any,
    ) -> Backbone:
        """Read a checkpoint.

        ``n_heads`` are attention heads, where no configuration says so: shapes do not tell. timm's are known by the
        name of the architecture, those of DINOv2 by the width. ``pooling`` is the embedding of an image: its class
        token, or the class token followed by the mean of its patches. ``mean`` and ``std`` are colors of pretraining,
        one number from 0 to 1 for each channel.

        Raises
        ------
        CheckpointError
            Files are missing or damaged, weights are missing, misshapen or not supported, or the configuration
            contradicts them.
        ValueError
            ``pooling``, ``mean`` or ``std`` are none of these.
        """
        if pooling not in ("cls", "cls+mean"):
            raise ValueError(f"pooling must be 'cls' or 'cls+mean', found {pooling!r}.")
        weights, config = open_checkpoint(folder)
        root, dialect = find_dialect(weights)
        config.must("model_type", dialect.model_types)
        d_model, n_channels, patch = read_patch(weights, config, root, dialect)
        scaled = any(_scale_name(root, dialect, 0, i) in weights for i in range(2))
        colors = _colors(config, dialect, n_channels, mean, std, scaled=scaled)
        sizes = read_sizes(weights, config, root, dialect, d_model, n_heads)
        registers = root + dialect.registers
        n_registers = weights.take(registers, (1, None, d_model)).shape[1] if registers in weights else 0
        sizes |= {"n_channels": n_channels, "patch_size": patch, "n_registers": n_registers, "pooling": pooling}
        sizes["any_size"] = scaled or bool(_timm_arguments(config, d_model).get("dynamic_img_size"))
        sizes["image_size"], n_placed = _image_size(weights, config, root, dialect, sizes)
        if not dialect.is_timm:
            config.agree("num_register_tokens", n_registers)
        backbone = self.build(sizes, **stack)
        tokens: Any = backbone.embedding.tokens
        copy_weights(tokens.patch, weights, root + dialect.patch)
        _fold_colors(tokens.patch, *colors)
        for name in ("class_token", *(["registers"] if n_registers else [])):
            parameter = getattr(tokens, name)
            parameter.data.copy_(weights.take(root + getattr(dialect, name), tuple(parameter.shape)))
        places = weights.take(root + dialect.positions, (1, None, d_model))
        tokens.positions.data.zero_()
        tokens.positions.data[:, 1:] = places[:, n_placed:]
        if n_placed:
            tokens.positions.data[:, :1] = places[:, :1]
        if n_placed > 1:
            tokens.registers.data += places[:, 1:n_placed]
        load_stack(backbone.stack, weights, root, dialect)
        check_all_read(weights, [name for part in dialect.ignored for name in (part, root + part)])
        return backbone


class ImageTokens(SequenceTokens):
    """Tokens of images that come as patches: these are put together again; hidden ones are gray.

    Parameters
    ----------
    tokens
        Makes tokens of pixels.
    pooling
        See :class:`SequenceTokens`.
    """

    def __init__(self, tokens: PatchTokens, pooling: str = "cls") -> None:
        super().__init__()
        self.tokens = tokens
        self.token_size = tokens.patch.kernel_size[0]
        self.pooling = pooling
        self.n_class = 1 + (0 if tokens.registers is None else tokens.registers.shape[1])
        self.size = tokens.shape[1:]

    def forward(self, nodes: SequenceBatch) -> Tensor:
        """Return ``(n, n_class + f, d_model)``."""
        channels = self.tokens.shape[0]
        height, width = self.size
        side = self.token_size
        cut = nodes["value"].unflatten(2, (side, side, channels))
        cut = cut.unflatten(1, (height // side, width // side))
        pixels = cut.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)
        return self.tokens(pixels)

    def check(self, size: Sequence[int], n_coordinates: int) -> None:
        """Check the size of images, which is that of all from now on, and that patches are square."""
        side, other = self.tokens.patch.kernel_size
        if side != other:
            raise ValueError(
                f"This ViT has patches of {side} × {other} pixels, and only square ones are supported: choose another "
                "checkpoint."
            )
        channels, height, width = self.tokens.shape
        if self.tokens.any_size and size[2] == channels and not (size[0] % side or size[1] % side):
            self.size = (size[0], size[1])
            return
        if self.tokens.any_size:
            raise ValueError(
                f"This ViT reads images with {channels} channels whose sides are multiples of {side} pixels, found "
                f"{size[0]} × {size[1]} with {size[2]}: resize them, for instance to {_whole(size[0], side)} × "
                f"{_whole(size[1], side)} with image_size=, or choose another checkpoint."
            )
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
    """Tokens of images: the class token, registers, then one for each patch, row by row, with learned positions.

    Parameters
    ----------
    d_model
        Width of a token.
    image_size, patch_size
        Height and width in pixels, in pretraining.
    n_channels
        Channels of an image.
    n_registers
        Register tokens, which have no positions.
    any_size
        Whether images may have another size, for which positions are interpolated (bicubic, in single precision; with
        registers antialiased, as their authors do).
    """

    def __init__(
        self,
        d_model: int,
        image_size: Sequence[int],
        patch_size: Sequence[int],
        *,
        n_channels: int = 3,
        n_registers: int = 0,
        any_size: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.any_size = (n_channels, image_size[0], image_size[1]), any_size
        patch = (patch_size[0], patch_size[1])
        self.grid = (image_size[0] // patch[0], image_size[1] // patch[1])
        self.patch = nn.Conv2d(n_channels, d_model, patch, stride=patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, d_model))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + self.grid[0] * self.grid[1], d_model))
        self.registers = nn.Parameter(0.02 * torch.randn(1, n_registers, d_model)) if n_registers else None

    def forward(self, pixels: Tensor) -> Tensor:
        """Return ``(n, 1 + n_registers + n_patches, d_model)``.

        Parameters
        ----------
        pixels
            ``(n, n_channels, height, width)``, scaled as in pretraining.

        Raises
        ------
        ValueError
            The images have a size that is not read.
        """
        fits = pixels.ndim == 4 and pixels.shape[1] == self.shape[0]
        if not fits or not (self.any_size or tuple(pixels.shape[1:]) == self.shape):
            raise ValueError(
                f"pixels must have the shape (n, {', '.join(map(str, self.shape))}), found {tuple(pixels.shape)}: "
                "resize the images, or read a checkpoint for their size."
            )
        cut = self.patch(pixels)
        patches = cut.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1)
        tokens = tokens + self._placed(cut.shape[2], cut.shape[3])
        if self.registers is None:
            return tokens
        return torch.cat([tokens[:, :1], self.registers.expand(len(tokens), -1, -1), tokens[:, 1:]], dim=1)

    def _placed(self, rows: int, columns: int) -> Tensor:
        """Return ``(1, 1 + rows * columns, d_model)`` positions of the class token and of patches."""
        if (rows, columns) == self.grid:
            return self.positions
        grid = self.positions[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2)
        size = F.interpolate(
            grid.float(), (rows, columns), mode="bicubic", align_corners=False, antialias=self.registers is not None
        )
        return torch.cat([self.positions[:, :1], size.to(grid.dtype).flatten(2).transpose(1, 2)], dim=1)


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
    registers
        Name of register tokens, where there are any.
    scales
        Names within a layer of the factors of attention and feed-forward part (layer scale), where there are any.
    model_types
        What ``config.json`` calls such a model.
    """

    patch: str
    class_token: str
    positions: str
    layers: str
    norm: str
    parts: dict[str, str]
    eps: float
    ignored: tuple[str, ...] = ()
    registers: str = "embeddings.register_tokens"
    scales: tuple[str, str] = ("layer_scale1.lambda1", "layer_scale2.lambda1")
    model_types: tuple[str, ...] = ("vit",)

    @property
    def is_timm(self) -> bool:
        """Whether it is that of timm, or of the authors of DINOv2."""
        return self.layers == "blocks"


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
# Of transformers' Dinov2 and Dinov2WithRegisters, which version 5 writes as version 4 did.
_DINOV2 = Dialect(
    **vars(_TRANSFORMERS_4)
    | {
        "parts": {f"attention.{name}": f"attention.attention.{name}" for name in ("query", "key", "value")}
        | {"attention.output": "attention.output.dense", "attention_norm": "norm1", "feedforward_norm": "norm2"}
        | _MLP,
        "eps": 1e-6,
        "model_types": ("dinov2", "dinov2_with_registers"),
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
    ignored=("head.", "mask_token"),
    eps=1e-6,
    registers="reg_token",
    scales=("ls1.gamma", "ls2.gamma"),
)
# Other names of gated feed-forward parts: of transformers, and of the authors of DINOv2.
_GATED = (("mlp.weights_in", "mlp.weights_out"), ("mlp.w12", "mlp.w3"))
_ROOTS = ("vit.", "dinov2.", "dinov2_with_registers.")
# Heads by width and timm's name for a size: they cannot be seen in shapes, and are not always width / 64.
_TIMM_HEADS = {
    "tiny": {192: 3},
    "small": {384: 6},
    "medium": {512: 8},
    "base": {768: 12},
    "large": {1024: 16},
    "huge": {1280: 16},
    "giant": {1408: 16, 1536: 24},
    "gigantic": {1664: 16},
}
_DINOV2_HEADS = {384: 6, 768: 12, 1024: 16, 1536: 24}
_UNSUPPORTED = {
    r"dist(illation)?_token|head_dist|distillation_classifier": "a distillation token",
    r"\bgamma_[12]|relative_position": "relative positions (BEiT)",
    r"[qk]_norm": "norms of queries and keys",
    r"fc1_[gx]": "a gate apart from the feed-forward part (EVA)",
    r"gate_proj": "names of gates as transformers 5 has them in memory, not in the files of save_pretrained,",
    r"norm_pre|pre_layr?norm": "a norm before the first layer",
    r"\brope": "rotary positions (DINOv3)",
}


def build_stack(config: Mapping[str, Any], **options: Any) -> TransformerStack:
    """Make the layers of a model with a final norm."""
    return TransformerStack(
        config["d_model"],
        config["n_heads"],
        config["n_layers"],
        d_feedforward=config["d_feedforward"],
        eps=config["eps"],
        activation=config.get("activation", "gelu"),
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
    root = next((root for root in _ROOTS if any(key.startswith(root) for key in weights)), "")
    for key in weights:
        for pattern, what in _UNSUPPORTED.items():
            if re.search(pattern, key):
                raise CheckpointError(
                    f"{str(weights.path)!r} has {key!r}: vision transformers with {what} are not supported."
                )
    dialect = _TRANSFORMERS_4
    if any(key.startswith(f"{_TIMM.layers}.") for key in weights):
        root = ""
        dialect = replace(_TIMM, registers="register_tokens") if "register_tokens" in weights else _TIMM
    elif any(key.startswith(f"{root}{_TRANSFORMERS_5.layers}.") for key in weights):
        dialect = _TRANSFORMERS_5
    elif f"{root}{_DINOV2.layers}.0.norm1.weight" in weights:
        dialect = _DINOV2
    for expand, contract in _GATED:
        if any(f"{root}{dialect.layers}.0.{part}.weight" in weights for part in (expand, contract)):
            dialect = replace(dialect, parts=dialect.parts | {"expand": expand, "contract": contract})
    return root, dialect


def read_sizes(
    weights: Weights, config: Config, root: str, dialect: Dialect, d_model: int, n_heads: int | None = None
) -> dict[str, Any]:
    """Return the sizes of the layers from the shapes of their weights, after checking that the configuration agrees.

    Raises
    ------
    CheckpointError
        It does not, the number of heads is not known, or layers compute something else.
    """
    first = f"{root}{dialect.layers}.0."
    hidden = weights.take(f"{first}{dialect.parts['expand']}.weight", (None, d_model)).shape[0]
    gated = weights.shape(f"{first}{dialect.parts['contract']}.weight") == (d_model, hidden / 2)
    hidden = hidden // 2 if gated else hidden
    numbers = [re.match(rf"{re.escape(root + dialect.layers)}\.(\d+)\.", key) for key in weights]
    n_layers = len({number[1] for number in numbers if number})
    if not dialect.is_timm:
        config.agree("hidden_size", d_model)
        config.agree("intermediate_size", hidden)
        config.agree("num_hidden_layers", n_layers)
        config.agree("use_swiglu_ffn", gated)
        config.must("hidden_act", ["gelu"])
        config.must("qkv_bias", [True])
    scaled = _scale_name(root, dialect, 0, 0) in weights
    return {
        "d_model": d_model,
        "n_heads": _heads(config, d_model, n_heads, timm=dialect.is_timm, gated=gated, scaled=scaled),
        "n_layers": n_layers,
        "d_feedforward": hidden,
        "eps": dialect.eps if dialect.is_timm else config.eps(dialect.eps),
    } | ({"activation": "swiglu"} if gated else {})


def read_patch(weights: Weights, config: Config, root: str, dialect: Dialect) -> tuple[int, int, list[int]]:
    """Return the width of tokens, the number of channels and the size of patches, checked like :func:`read_sizes`."""
    d_model, n_channels, *patch = weights.take(f"{root}{dialect.patch}.weight", (None,) * 4).shape
    if not dialect.is_timm:
        config.agree("num_channels", n_channels)
        if "patch_size" in config.values and list(config.pair("patch_size")) != patch:
            config.agree("patch_size", patch)
    return d_model, n_channels, patch


@torch.no_grad()
def load_stack(stack: TransformerStack, weights: Weights, root: str, dialect: Dialect) -> None:
    """Copy the weights of all layers and of the final norm; layer scale becomes part of them."""
    for i, module in enumerate(stack.layers):
        layer = cast("TransformerLayer", module)
        copy_layer(layer, weights, f"{root}{dialect.layers}.{i}.", dialect.parts)
        for which, linear in enumerate((layer.attention.output, layer.contract)):
            name = _scale_name(root, dialect, i, which)
            # All layers have factors, or none.
            if name in weights or _scale_name(root, dialect, 0, which) in weights:
                scale = weights.take(name, (stack.d_model,))
                linear.weight.mul_(scale[:, None])
                linear.bias.mul_(scale)
    copy_weights(stack.norm, weights, root + dialect.norm)


def _scale_name(root: str, dialect: Dialect, layer: int, which: int) -> str:
    return f"{root}{dialect.layers}.{layer}.{dialect.scales[which]}"


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


def _heads(config: Config, d_model: int, n_heads: int | None, *, timm: bool, gated: bool, scaled: bool) -> int:
    key = "num_attention_heads"
    if timm:
        key = "num_heads"
        known = {key: _DINOV2_HEADS[d_model]} if scaled and d_model in _DINOV2_HEADS else {}
        config = Config(config.path, known | _timm_arguments(config, d_model))
        config.must("act_layer", ["silu"] if gated else ["gelu"])
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
    heads = _TIMM_HEADS.get(size[1], {}).get(d_model) if size else None
    return arguments if heads is None else {"num_heads": heads} | arguments


def _image_size(
    weights: Weights, config: Config, root: str, dialect: Dialect, sizes: Mapping[str, Any]
) -> tuple[list[int], int]:
    """Return the size of images that the configuration tells, or else the square that has so many patches.

    Besides, how many positions come before those of patches: none, that of the class token, or also those of registers.
    """
    key = f"{root}{dialect.positions}"
    n_positions = weights.take(key, (1, None, sizes["d_model"])).shape[1]
    height, width = sizes["patch_size"]
    placed, stated = [1], config.pair("image_size", (1, 1)) if "image_size" in config.values else None
    if dialect.is_timm:
        placed = list(dict.fromkeys([1, 1 + sizes["n_registers"], 0]))
        stated = _timm_size(config, sizes["d_model"])
    found = None
    # Files of timm may state the size of use, to which it interpolates the positions of another one.
    sought = [stated, None] if sizes["any_size"] and dialect.is_timm else [stated]
    for image, n_placed in ((image, n) for image in sought for n in placed):
        side = math.isqrt(max(n_positions - n_placed, 0))
        image = (side * height, side * width) if image is None else image
        fitting = (image[0] // height) * (image[1] // width)
        if fitting == n_positions - n_placed and (n_placed or root + dialect.class_token in weights):
            return list(image), n_placed
        found = found or (image, fitting)
    image, fitting = found  # type: ignore[misc]
    raise CheckpointError(
        f"{key!r} in {str(weights.path)!r} has {n_positions - 1} positions after the class token's, but images of "
        f"{image[0]} x {image[1]} pixels have {fitting} patches of {height} x {width}: config.json belongs to "
        "another model, or this one has no class token, which is not supported."
    )


def _timm_size(config: Config, d_model: int) -> tuple[int, int] | None:
    pretrained = config.values.get("pretrained_cfg")
    given = pretrained.get("input_size") if isinstance(pretrained, dict) else None
    given = given[1:] if isinstance(given, list) else given  # channels come first
    stated = {"input_size": given, "img_size": _timm_arguments(config, d_model).get("img_size")}
    known = Config(config.path, {name: size for name, size in stated.items() if size is not None})
    return next((known.pair(name) for name in ("img_size", "input_size") if name in known.values), None)


def _colors(
    config: Config,
    dialect: Dialect,
    n_channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    *,
    scaled: bool,
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of colors from 0 to 1, ``(n_channels,)``, by which images are normalized."""
    if (mean is None) != (std is None):
        raise ValueError("mean= and std= belong together: pass both, or neither.")
    file = None
    if mean is None:
        file, mean, std = _stated_colors(config, dialect)
    if mean is None or std is None:
        mean, std = _IMAGENET if scaled else _HALVES
        if scaled:
            warn(
                f"No file in {str(config.path.parent)!r} says how the colors of images are normalized: mean and "
                "standard deviation of ImageNet are used. Put preprocessor_config.json (transformers) or config.json "
                "(timm) there, or pass mean= and std= to load."
            )
    both = []
    for name, numbers, least in (("mean", mean, -1.0), ("std", std, 0.0)):
        try:
            values = torch.tensor([float(number) for number in numbers])
        except (TypeError, ValueError):
            values = torch.zeros(0)
        values = values.expand(n_channels) if len(values) == 1 else values
        if len(values) != n_channels or not bool(((values > least) & (values >= 0) & (values <= 1)).all()):
            wanted = f"{n_channels} numbers from 0 to 1{', above 0' if name == 'std' else ''}: found {numbers!r}"
            if file is None:
                raise ValueError(f"{name} must be {wanted}. It is of colors between black, 0, and white, 1.")
            raise CheckpointError(
                f"{str(file)!r} says {name!r} of colors, which must be {wanted}. Pass mean= and std=."
            )
        both.append(values)
    return both[0], both[1]


def _stated_colors(config: Config, dialect: Dialect) -> tuple[Path | None, Any, Any]:
    """Return the file that says how colors are normalized, their mean and standard deviation, as far as one does."""
    if dialect.is_timm:
        stated = config.values.get("pretrained_cfg")
        found = stated if isinstance(stated, dict) else {}
        return config.path, found.get("mean"), found.get("std")
    path = config.path.with_name("preprocessor_config.json")
    if not path.is_file():
        return None, None, None
    values = read_json(path)
    if values.get("do_normalize") is False:
        return path, (0.0,), (1.0,)
    return path, values.get("image_mean"), values.get("image_std")


@torch.no_grad()
def _fold_colors(patch: Any, mean: Tensor, std: Tensor) -> None:
    """Make the projection of patches read pixels from -1 to 1 instead of normalized ones."""
    shift = (0.5 - mean) / std
    patch.bias.add_((patch.weight * shift[:, None, None]).sum((1, 2, 3)))
    patch.weight.mul_((0.5 / std)[:, None, None])


def _whole(size: int, side: int) -> int:
    return max(round(size / side), 1) * side


register(ViT())
