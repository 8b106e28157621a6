"""Checkpoints of vision transformers that contradict themselves, are incomplete or not supported."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from fimp_sc.pretrained import CheckpointError, load

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
CONFIG = {**SIZES, "model_type": "vit", "image_size": 32, "patch_size": 8, "num_channels": 3, "hidden_act": "gelu"}


def write(folder, state, config=None):
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def hand_made():
    """A state with the names of transformers 5, without transformers."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embeddings.cls_token": (1, 1, 48),
        "embeddings.position_embeddings": (1, 17, 48),
        "embeddings.patch_embeddings.projection.weight": (48, 3, 8, 8),
        "embeddings.patch_embeddings.projection.bias": (48,),
        "layernorm.weight": (48,),
        "layernorm.bias": (48,),
    }
    linear = {f"attention.{letter}_proj": (48, 48) for letter in "qkvo"} | {"mlp.fc1": (96, 48), "mlp.fc2": (48, 96)}
    for i in range(3):
        for name, shape in linear.items():
            shapes |= {f"layers.{i}.{name}.weight": shape, f"layers.{i}.{name}.bias": shape[:1]}
        for name in ("layernorm_before", "layernorm_after"):
            shapes |= {f"layers.{i}.{name}.weight": (48,), f"layers.{i}.{name}.bias": (48,)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu_new"}, r"config.json' has 'hidden_act': 'gelu_new', supported: 'gelu'"),
        ({"model_type": "dinov2"}, r"config.json' has 'model_type': 'dinov2'"),
        ({"qkv_bias": False}, r"config.json' has 'qkv_bias': False"),
        ({"hidden_size": 64}, r"config.json' has 'hidden_size': 64, but its weights say 48"),
        ({"num_hidden_layers": 2}, r"'num_hidden_layers': 2, but its weights say 3"),
        ({"intermediate_size": 48}, r"'intermediate_size': 48, but its weights say 96"),
        ({"num_channels": 1}, r"'num_channels': 1, but its weights say 3"),
        ({"patch_size": 16}, r"'patch_size': 16, but its weights say \[8, 8\]"),
        ({"patch_size": [8, 8, 8]}, r"'patch_size': \[8, 8, 8\], expected one or two whole numbers"),
        ({"image_size": 64}, r"position_embeddings'.* has 16 positions .* 64 x 64 pixels have 64 patches"),
        ({"image_size": "big"}, r"'image_size': 'big', expected one or two whole numbers"),
        ({"num_attention_heads": 5}, r"5 attention heads do not divide the width 48"),
        ({"num_attention_heads": "four"}, r"'num_attention_heads': 'four', expected a whole number"),
        ({"num_attention_heads": True}, r"'num_attention_heads': True, expected a whole number"),
        ({"layer_norm_eps": -1.0}, r"'layer_norm_eps': -1.0, expected a number"),
    ],
)
def test_contradictions_of_the_configuration_are_told(hand_made, tmp_path, change, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load("vit", write(tmp_path, hand_made, CONFIG | change)).read()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("embeddings.distillation_token", "'embeddings.distillation_token': .* a distillation token"),
        (
            "embeddings.register_tokens",
            r"'embeddings.register_tokens' .* has the shape \(48,\), expected \(1, any, 48\)",
        ),
        ("layers.0.layer_scale1.lambda1", "has no tensor 'layers.1.layer_scale1.lambda1'"),
        ("layers.1.attention.q_norm.weight", "'layers.1.attention.q_norm.weight': .* norms of queries and keys"),
        ("layers.0.mlp.weights_in.weight", r"'layers.0.mlp.weights_in.weight' .* has the shape \(48,\)"),
        ("layers.1.mlp.weights_in.weight", "no place for: 'layers.1.mlp.weights_in.weight'"),
        ("layers.0.mlp.fc1_g.weight", "'layers.0.mlp.fc1_g.weight': .* a gate apart from the feed-forward part"),
        ("layers.0.mlp.gate_proj.weight", "'layers.0.mlp.gate_proj.weight': .* save_pretrained"),
        ("rope_embed.periods", "'rope_embed.periods': .* rotary positions"),
        ("blocks.0.gamma_1", "'blocks.0.gamma_1': .* relative positions"),
        ("norm_pre.weight", "'norm_pre.weight': .* a norm before the first layer"),
        (
            "layers.2.attention.bias_table",
            r"1 tensors that the model has no place for: 'layers.2.attention.bias_table'",
        ),
        ("adapter.weight", "no place for: 'adapter.weight'"),
    ],
)
def test_parts_that_are_not_supported_are_named(hand_made, tmp_path, key: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load("vit", write(tmp_path, hand_made | {key: torch.zeros(48)}, CONFIG), mean=[0.5], std=[0.5]).read()


@pytest.mark.parametrize("names", ["new", "old", "timm"])
def test_missing_and_misshapen_weights_are_named(vit_names, hand_made, tmp_path, names: str) -> None:
    state = vit_names[names](hand_made)
    options = {"n_heads": 4} if names == "timm" else {}
    load("vit", write(tmp_path, state, CONFIG), **options).read()
    for key in state:
        rest = {name: value for name, value in state.items() if name != key}
        with pytest.raises(CheckpointError, match=rf"model\.safetensors' has no tensor '{re.escape(key)}'"):
            load("vit", write(tmp_path, rest, CONFIG), **options).read()
    last = next(
        key for key in state if "2." in key and key.endswith("fc2.weight" if names != "old" else "dense.weight")
    )
    with pytest.raises(CheckpointError, match=re.escape(last)):
        load("vit", write(tmp_path, state | {last: state[last][:, 1:]}, CONFIG), **options).read()


def test_heads_must_be_known(hand_made, tmp_path) -> None:
    write(tmp_path, hand_made)
    with pytest.raises(CheckpointError, match=r"heads is not known: .*config.json.* Pass n_heads="):
        load("vit", tmp_path).read()
    # A file by itself, with the sizes that its shapes tell.
    foundation = load("vit", tmp_path / "model.safetensors", n_heads=4).read()
    assert foundation.config["image_size"] == [32, 32]
    assert foundation.config["n_layers"] == 3
    with pytest.raises(CheckpointError, match=r"'num_attention_heads': 4, but n_heads=2 was passed"):
        load("vit", write(tmp_path, hand_made, CONFIG), n_heads=2).read()
    with pytest.raises(CheckpointError, match=r"^7 attention heads do not divide the width 48\.$"):
        load("vit", write(tmp_path / "alone", hand_made), n_heads=7).read()


@pytest.mark.parametrize(
    ("settings", "heads"),
    [
        ({"architecture": "vit_tiny_patch16_224"}, 3),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 6}}, 6),
        ({"architecture": "vit_base_patch16_224"}, None),
        ({"architecture": "samvit_tiny_patch16"}, None),
    ],
)
def test_heads_of_timm_follow_from_the_architecture(
    vit_names, hand_made, tmp_path, settings, heads: int | None
) -> None:
    state = {}
    for key, value in vit_names["timm"](hand_made).items():
        # Four times as wide.
        wide = [4 if length in (48, 96, 144) else 1 for length in value.shape]
        state[key] = value.repeat(*wide)
    write(tmp_path, state, settings)
    if heads is None:
        with pytest.raises(CheckpointError, match="heads is not known"):
            load("vit", tmp_path).read()
    else:
        foundation = load("vit", tmp_path).read()
        assert foundation.config["n_heads"] == heads
        assert foundation.stack.layers[0].attention.n_heads == heads


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_args": {"act_layer": "quick_gelu"}}, "'act_layer': 'quick_gelu'"),
        ({"pretrained_cfg": {"input_size": [3, 64, 64]}}, "64 x 64 pixels have 64 patches of 8 x 8"),
        ({"pretrained_cfg": {"input_size": "large"}}, "'input_size': 'large', expected one or two"),
    ],
)
def test_contradictions_of_timm_are_told(vit_names, hand_made, tmp_path, settings, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load("vit", write(tmp_path, vit_names["timm"](hand_made), settings), n_heads=4).read()


def test_models_without_class_token_are_refused(vit_names, hand_made, tmp_path) -> None:
    state = vit_names["timm"](hand_made)
    del state["cls_token"]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    with pytest.raises(CheckpointError, match=r"'pos_embed' .* has no class token"):
        load("vit", write(tmp_path, state), n_heads=4).read()
