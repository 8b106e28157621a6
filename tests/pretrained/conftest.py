"""What tests of checkpoints share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

# (transformers 5, transformers <= 4)
LAYER_NAMES = [
    ("layers.", "encoder.layer."),
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
]
TIMM_NAMES = [
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("attention.o_proj", "attn.proj"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("layernorm", "norm"),
    ("layers.", "blocks."),
]


def new_names(state):
    """Names of transformers 5, from those of any version."""
    out = {}
    for key, value in state.items():
        # Of the old names "output.dense" is the end of another.
        for new, old in sorted(LAYER_NAMES, key=lambda pair: -len(pair[1])):
            key = key.replace(old, new)
        out[key] = value
    return out


def old_names(state):
    out = {}
    for key, value in new_names(state).items():
        for new, old in LAYER_NAMES:
            key = key.replace(new, old)
        out[key] = value
    return out


def timm_names(state):
    state = {key: value for key, value in new_names(state).items() if not key.startswith("pooler.")}
    for key in [key for key in state if "q_proj" in key]:
        rows = [state.pop(key.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        state[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(rows)
    out = {}
    for key, value in state.items():
        for ours, theirs in TIMM_NAMES:
            key = key.replace(ours, theirs)
        out[key] = value
    return out


@pytest.fixture(scope="session")
def vit_names() -> dict[str, Callable[[Any], Any]]:
    """What gives weights of a vision transformer the names of transformers 5, of versions before, or of timm."""
    return {"new": new_names, "old": old_names, "timm": timm_names}
