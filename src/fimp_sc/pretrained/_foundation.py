"""What every foundation model is to FIMP: tokens, a stack, and perhaps a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from fimp_sc.nn import TransformerLayer, TransformerStack
    from fimp_sc.pretrained.files._files import Weights

FOUNDATIONS = ("scgpt", "vit", "brainlm")


@dataclass
class Foundation:
    """A foundation model read from a checkpoint.

    Attributes
    ----------
    name
        ``"scgpt"``, ``"vit"`` or ``"brainlm"``.
    config
        Plain numbers and strings from which the same modules can be built without the checkpoint.
    embedding
        Makes the tokens of nodes.
    stack
        The transformer layers, ready to run across nodes.
    decoder
        Reads values off tokens, where the checkpoint has such a part.
    vocabulary
        Row of each feature name in the embedding's table, where there is one.
    """

    name: str
    config: dict[str, Any]
    embedding: nn.Module
    stack: TransformerStack
    decoder: nn.Module | None = None
    vocabulary: dict[str, int] | None = None


def read_foundation(name: str, checkpoint: str | Path, **options: Any) -> Foundation:
    """Read a foundation model from its checkpoint.

    Parameters
    ----------
    name
        ``"scgpt"``, ``"vit"`` or ``"brainlm"``.
    checkpoint
        Folder, or name of a repository on the Hugging Face hub.
    **options
        How messages are made, see :class:`~fimp_sc.nn.TransformerStack`, and what the model's own reader takes.

    Raises
    ------
    ValueError
        When ``name`` is none of these.
    CheckpointError
        When a file is missing, damaged or does not fit the others.
    """
    return getattr(_module(name), f"read_{name}")(checkpoint, **options)


def build_foundation(name: str, config: Mapping[str, Any], **options: Any) -> Foundation:
    """Build a foundation model with random weights, as for a saved model whose own weights are loaded next.

    Parameters
    ----------
    name
        ``"scgpt"``, ``"vit"`` or ``"brainlm"``.
    config
        :attr:`Foundation.config` of what :func:`read_foundation` returned.
    **options
        How messages are made, see :class:`~fimp_sc.nn.TransformerStack`.

    Raises
    ------
    ValueError
        When ``name`` is none of these.
    """
    return getattr(_module(name), f"build_{name}")(dict(config), **options)


def _module(name: str) -> Any:
    if name not in FOUNDATIONS:
        raise ValueError(f"foundation must be one of {', '.join(map(repr, FOUNDATIONS))}, found {name!r}")
    return import_module(f"fimp_sc.pretrained._{name}")


@torch.no_grad()
def load_module(module: nn.Module, weights: Weights, name: str) -> None:
    """Copy the tensors ``{name}.{parameter}`` into the parameters and buffers of ``module``.

    Raises
    ------
    CheckpointError
        When a tensor is missing or has another shape.
    """
    for parameter, value in module.state_dict(keep_vars=True).items():
        value.data.copy_(weights.take(f"{name}.{parameter}" if name else parameter, tuple(value.shape)))


@torch.no_grad()
def load_layer(layer: TransformerLayer, weights: Weights, prefix: str, names: Mapping[str, str]) -> None:
    """Copy the weights of one layer.

    Parameters
    ----------
    layer
        Where to.
    weights, prefix
        Where from; all names in the file start with ``prefix``.
    names
        Name in the file of each part of the layer, without ``.weight`` and ``.bias``. A projection that makes queries,
        keys and values at once is named under ``"attention.qkv"``; its rows are theirs, in this order.

    Raises
    ------
    CheckpointError
        When a tensor is missing or has another shape.
    """
    for part, name in names.items():
        if part != "attention.qkv":
            load_module(layer.get_submodule(part), weights, prefix + name)
            continue
        width = layer.attention.query.in_features
        # torch's own attention joins with an underscore: in_proj_weight.
        joint = "_" if f"{prefix}{name}_weight" in weights else "."
        for kind, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
            rows = weights.take(f"{prefix}{name}{joint}{kind}", shape).split(width)
            for projection, value in zip(("query", "key", "value"), rows, strict=True):
                getattr(layer.attention.get_submodule(projection), kind).copy_(value)
