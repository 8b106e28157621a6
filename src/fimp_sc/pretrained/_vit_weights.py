"""Weights of vision transformers: their names in files by transformers and timm, their sizes, and their loading."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from fimp_sc.data.storage._elements import shorten
from fimp_sc.pretrained._foundation import load_layer, load_module
from fimp_sc.pretrained.files._files import CheckpointError
from fimp_sc.pretrained.files._settings import Config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fimp_sc.nn import TransformerLayer, TransformerStack
    from fimp_sc.pretrained.files._files import Weights


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
TIMM = Dialect(
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
    if any(key.startswith(f"{TIMM.layers}.") for key in weights):
        return "", TIMM
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
    if dialect is not TIMM:
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
        "eps": dialect.eps if dialect is TIMM else config.eps(dialect.eps),
    }


def read_patch(weights: Weights, config: Config, root: str, dialect: Dialect) -> tuple[int, int, list[int]]:
    """Return the width of tokens, the number of channels and the size of patches, checked like :func:`read_sizes`."""
    d_model, n_channels, *patch = weights.take(f"{root}{dialect.patch}.weight", (None,) * 4).shape
    if dialect is not TIMM:
        config.agree("num_channels", n_channels)
        if "patch_size" in config.values and list(config.pair("patch_size")) != patch:
            config.agree("patch_size", patch)
    return d_model, n_channels, patch


def load_stack(stack: TransformerStack, weights: Weights, root: str, dialect: Dialect) -> None:
    """Copy the weights of all layers and of the final norm."""
    for i, layer in enumerate(stack.layers):
        load_layer(cast("TransformerLayer", layer), weights, f"{root}{dialect.layers}.{i}.", dialect.parts)
    load_module(stack.norm, weights, root + dialect.norm)


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
    if dialect is TIMM:
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
