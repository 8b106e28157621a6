"""DINOv2 and models built on it: layer scale, registers, gated feed-forward parts, other image sizes, colors."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fimp_sc
from fimp_sc.model import FIMP
from fimp_sc.pretrained import CheckpointError, load

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
COLORS = {"mean": (0.7, 0.58, 0.7), "std": (0.21, 0.23, 0.17)}
KINDS = {"gelu": ("Dinov2", {}), "swiglu": ("Dinov2", {"use_swiglu_ffn": True})}
KINDS |= {
    "registers": ("Dinov2WithRegisters", {"num_register_tokens": 3}),
    "both": ("Dinov2WithRegisters", {"num_register_tokens": 3, "use_swiglu_ffn": True}),
}


@torch.no_grad()
def randomize(module):
    for name, parameter in module.named_parameters():
        noise = torch.randn_like(parameter)
        # Of a size at which hidden states stay near one.
        size = parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.4
        parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else size * noise)
    return module.eval()


def dinov2(kind: str):
    transformers = pytest.importorskip("transformers")
    name, options = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    return randomize(getattr(transformers, f"{name}Model")(config))


def saved(model, folder):
    """Weights under the names that transformers gives them in files, and config.json in the folder."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def images(height=28, width=28, n=4):
    return np.random.default_rng(1).integers(0, 256, (n, height, width, 3)).astype(np.uint8)


def normalized(pixels, mean=COLORS["mean"], std=COLORS["std"]):
    values = (torch.from_numpy(pixels).double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return values.permute(0, 3, 1, 2).float()


@torch.no_grad()
def through(foundation, pixels):
    """Last hidden states of images from 0 to 255, each by itself."""
    back = foundation.read() if hasattr(foundation, "read") else foundation
    tokens = back.embedding.tokens((torch.from_numpy(pixels).float() / 127.5 - 1).permute(0, 3, 1, 2))
    return back.stack.alone(tokens, torch.zeros(tokens.shape[:2], dtype=torch.bool))


@torch.no_grad()
def reference(model, pixels, **colors):
    return model(normalized(pixels, **colors)).last_hidden_state


# Real weights ---------------------------------------------------------------------------------------------------------


def test_real_weights_equal_transformers() -> None:
    folder = os.environ.get("FIMP_SC_DINOV2")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set FIMP_SC_DINOV2 to a folder with config.json and model.safetensors of facebook/dinov2-small")
    transformers = pytest.importorskip("transformers")
    model = transformers.Dinov2Model.from_pretrained(folder).eval()
    for side in (112, 224):
        pixels = images(side, side, 2)
        found = through(load("vit", folder, **COLORS), pixels)
        assert found.shape == (2, 1 + (side // 14) ** 2, 384)
        torch.testing.assert_close(found, reference(model, pixels), rtol=0, atol=1e-4)


# Layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(28, 28), (21, 42)])
def test_equals_transformers(tmp_path, kind: str, shape) -> None:
    model = dinov2(kind)
    saved(model, tmp_path)
    pixels = images(*shape)
    foundation = load("vit", tmp_path, **COLORS)
    torch.testing.assert_close(through(foundation, pixels), reference(model, pixels), rtol=1e-5, atol=2e-5)
    config = foundation.read().config
    assert config["n_registers"] == (3 if kind in ("registers", "both") else 0)
    assert (config.get("activation") == "swiglu") == (kind in ("swiglu", "both"))


def timm_names(state, register: str, gates: tuple[str, str]):
    """The names of timm and of the authors, from those of transformers."""
    out = {}
    for key, value in state.items():
        if "attention.attention.query" in key:
            rows = [state[key.replace("query", name)] for name in ("query", "key", "value")]
            key, value = key.replace("attention.attention.query", "attn.qkv"), torch.cat(rows)
        elif "attention.attention" in key:
            continue
        for theirs, ours in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("encoder.layer", "blocks"),
            ("embeddings.cls_token", "cls_token"), ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.mask_token", "mask_token"), ("embeddings.register_tokens", register),
            ("attention.output.dense", "attn.proj"), ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"), ("mlp.weights_in", gates[0]), ("mlp.weights_out", gates[1]),
            ("layernorm", "norm"),
        ):  # fmt: skip
            key = key.replace(theirs, ours)
        out[key] = value
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["authors", "timm", "no_embed_class", "placed registers"])
def test_equals_transformers_under_other_names(tmp_path, kind: str, layout: str) -> None:
    model = dinov2(kind)
    state = saved(model, tmp_path / "original")
    authors = layout == "authors"
    gates = ("mlp.w12", "mlp.w3") if authors else ("mlp.fc1", "mlp.fc2")
    state = timm_names(state, "register_tokens" if authors else "reg_token", gates)
    settings = {}
    if authors:
        torch.save(state, tmp_path / "dinov2_pretrain.pth")
    else:
        del state["mask_token"]
        arguments = {"img_size": 28, "num_heads": 4}
        if layout == "no_embed_class":
            state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
            state["pos_embed"] = state["pos_embed"][:, 1:]
            arguments["no_embed_class"] = True
        if layout == "placed registers" and "reg_token" in state:
            places = torch.randn(1, 3, 48)
            state["reg_token"] = state["reg_token"] - places
            state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], places, state["pos_embed"][:, 1:]], 1)
        settings = {"model_args": arguments, "pretrained_cfg": {"input_size": [3, 28, 28], **COLORS}}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    files = tmp_path / "dinov2_pretrain.pth" if authors else tmp_path
    foundation = load("vit", files, **({"n_heads": 4, **COLORS} if authors else {}))
    for shape in ((28, 28), (14, 35)):
        pixels = images(*shape)
        torch.testing.assert_close(through(foundation, pixels), reference(model, pixels), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2", "gated"])
def test_equals_timm(tmp_path, name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 28, "depth": 2}
    heads = {}
    if name == "gated":
        # As Virchow2 and UNI2-h are made.
        name = "vit_tiny_patch16_224"
        options |= {"patch_size": 14, "mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
        options |= {"mlp_ratio": 5.3375, "init_values": 1e-5, "reg_tokens": 4, "dynamic_img_size": True}
        heads = {"n_heads": 3}
    model = randomize(timm.create_model(name, pretrained=False, num_classes=0, **options))
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": name, "pretrained_cfg": {"input_size": [3, 28, 28], **COLORS}})
    )
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    pixels = images()
    with torch.no_grad():
        expected = model.forward_features(normalized(pixels))
    found = through(load("vit", tmp_path, **heads), pixels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1536, 24)])
def test_heads_of_the_authors_models_follow_from_their_width(tmp_path, width: int, heads: int) -> None:
    state = {"cls_token": torch.zeros(1, 1, width), "pos_embed": torch.zeros(1, 5, width)}
    state |= {"patch_embed.proj.weight": torch.zeros(width, 3, 2, 2), "patch_embed.proj.bias": torch.zeros(width)}
    parts = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (8, width), "mlp.fc2": (width, 8)}
    for name, shape in parts.items():
        state |= {f"blocks.0.{name}.weight": torch.zeros(shape), f"blocks.0.{name}.bias": torch.zeros(shape[0])}
    for name in ("blocks.0.norm1", "blocks.0.norm2", "norm"):
        state |= {f"{name}.weight": torch.zeros(width), f"{name}.bias": torch.zeros(width)}
    state |= {f"blocks.0.ls{i}.gamma": torch.zeros(width) for i in (1, 2)}
    torch.save(state, tmp_path / "weights.pth")
    assert load("vit", tmp_path / "weights.pth", **COLORS).read().config["n_heads"] == heads


# Colors ---------------------------------------------------------------------------------------------------------------


def test_colors_come_with_the_model(tmp_path) -> None:
    model = dinov2("gelu")
    saved(model, tmp_path)
    pixels = images()
    expected = reference(model, pixels)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": COLORS["mean"], "image_std": COLORS["std"]}))
    torch.testing.assert_close(through(load("vit", tmp_path), pixels), expected, rtol=1e-5, atol=2e-5)
    # Those that are passed count.
    path.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    torch.testing.assert_close(through(load("vit", tmp_path, **COLORS), pixels), expected, rtol=1e-5, atol=2e-5)
    assert (through(load("vit", tmp_path), pixels) - expected).abs().max() > 0.1
    path.write_text(json.dumps({"do_normalize": False}))
    torch.testing.assert_close(
        through(load("vit", tmp_path), pixels),
        reference(model, pixels, mean=(0.0,), std=(1.0,)), rtol=1e-5, atol=2e-5,
    )  # fmt: skip
    path.write_text(json.dumps({"image_mean": [0.5, 0.5], "image_std": [0.5] * 3}))
    with pytest.raises(
        CheckpointError, match=r"preprocessor_config.json' says 'mean' of colors, .* found \[0.5, 0.5\]"
    ):
        load("vit", tmp_path).read()


def test_colors_of_imagenet_are_told(tmp_path) -> None:
    model = dinov2("gelu")
    saved(model, tmp_path)
    pixels = images()
    with pytest.warns(UserWarning, match="No file in .* colors of images .* ImageNet"):
        found = through(load("vit", tmp_path), pixels)
    expected = reference(model, pixels, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (0.5,) * 3}, "mean= and std= belong together"),
        (
            {"mean": (124, 116, 104), "std": (58, 57, 57)},
            r"mean must be 3 numbers from 0 to 1: found \(124, 116, 104\)",
        ),
        ({"mean": (0.5,) * 3, "std": (0.5, 0.5, 0)}, "std must be 3 numbers from 0 to 1, above 0"),
        ({"mean": "gray", "std": "gray"}, "mean must be 3 numbers"),
        ({"pooling": "mean"}, r"pooling must be 'cls' or 'cls\+mean', found 'mean'"),
    ],
)
def test_settings_out_of_range_are_told(tmp_path, settings, message: str) -> None:
    saved(dinov2("gelu"), tmp_path)
    with pytest.raises(ValueError, match=message):
        load("vit", tmp_path, **settings).read()


# What does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit"}, "'model_type': 'vit', supported: 'dinov2' or 'dinov2_with_registers'"),
        ({"use_swiglu_ffn": False}, "'use_swiglu_ffn': False, but its weights say True"),
        ({"num_register_tokens": 4}, "'num_register_tokens': 4, but its weights say 3"),
        ({"image_size": 518}, "has 16 positions after the class token's, but images of 518 x 518"),
        ({"qkv_bias": False}, "'qkv_bias': False"),
    ],
)
def test_contradictions_are_told(tmp_path, change, message: str) -> None:
    saved(dinov2("both"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        load("vit", tmp_path, **COLORS).read()


def test_every_missing_tensor_is_named(tmp_path) -> None:
    state = saved(dinov2("both"), tmp_path)
    for key in state:
        if key == "embeddings.mask_token" or ".0.layer_scale" in key:
            continue
        save_file({name: value for name, value in state.items() if name != key}, tmp_path / "model.safetensors")
        problem = f"has no tensor '{key}'"
        if key == "embeddings.register_tokens":
            problem = "'num_register_tokens': 3, but its weights say 0"
        elif key.endswith("0.norm1.weight"):
            problem = "'model_type'"
        with pytest.raises(CheckpointError, match=problem):
            load("vit", tmp_path, **COLORS).read()


# Models ---------------------------------------------------------------------------------------------------------------


def town(height=28, width=28):
    n = 12
    places = np.random.default_rng(0).random((n, 2))
    return fimp_sc.pp.images(images(height, width, n), coordinates=places, n_neighbors=2)


@pytest.mark.parametrize("kind", KINDS)
def test_pooling_of_a_model(tmp_path, kind: str) -> None:
    original = dinov2(kind)
    saved(original, tmp_path)
    mdata = town(21, 42)
    hidden = reference(original, mdata["image"].obsm["pixels"].reshape(-1, 21, 42, 3))
    n_class = 1 + (3 if kind in ("registers", "both") else 0)
    FIMP.setup_mudata(mdata, modality="image")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pooling in ("cls", "cls+mean"):
            model = FIMP(mdata, foundation=load("vit", tmp_path, pooling=pooling, **COLORS), messages=False)
            expected = hidden[:, 0]
            if pooling == "cls+mean":
                expected = torch.cat([expected, hidden[:, n_class:].mean(1)], 1)
            found = model.get_latent_representation()
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=2e-5)


def test_a_saved_model_is_built_again(tmp_path) -> None:
    saved(dinov2("both"), tmp_path / "files")
    mdata = town(14, 35)
    FIMP.setup_mudata(mdata, modality="image")
    foundation = load("vit", tmp_path / "files", train="last:1", pooling="cls+mean", **COLORS)
    model = FIMP(mdata, foundation=foundation)
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    expected, pixels = model.get_latent_representation(), model.get_reconstruction()
    assert expected.shape == (12, 96)
    assert pixels.shape == (12, 14, 35, 3)
    model.save_pretrained(tmp_path / "trained")
    again = FIMP.from_pretrained(tmp_path / "trained", mdata)
    np.testing.assert_allclose(again.get_latent_representation(), expected, rtol=1e-5, atol=1e-6)


def test_images_of_whole_patches_are_read(tmp_path) -> None:
    saved(dinov2("gelu"), tmp_path)
    mdata = town(30, 28)
    FIMP.setup_mudata(mdata, modality="image")
    with pytest.raises(ValueError, match=r"multiples of 7 pixels, found 30 × 28 with 3: .* for instance to 28 × 28"):
        FIMP(mdata, foundation=load("vit", tmp_path, **COLORS))
