"""Vision transformers against transformers, timm, and loops over edges."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fimp_sc.pretrained import load
from fimp_sc.pretrained._registry import foundation_reader

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
CONFIG = {**SIZES, "model_type": "vit", "image_size": 32, "patch_size": 8, "num_channels": 3, "hidden_act": "gelu"}


def write(folder, state, config=None):
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def randomize(module):
    for name, parameter in module.named_parameters():
        noise = torch.randn_like(parameter)
        # Of a size at which hidden states stay near one.
        size = parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.15
        parameter.copy_(1 + 0.2 * noise if re.search(r"norm.*weight", name) else size * noise)
    return module.eval()


def transformers_vit(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8, **options)
    return randomize(transformers.ViTModel(config))


@pytest.fixture(scope="module")
def vit():
    return transformers_vit()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def layer_outputs(layers, run):
    """What each layer returns while ``run`` runs, and what that returns."""
    seen = []
    keep = [layer.register_forward_hook(lambda *call: seen.append(call[2])) for layer in layers]
    last = run()
    for hook in keep:
        hook.remove()
    return [out[0] if isinstance(out, tuple) else out for out in seen], last


@torch.no_grad()
def states(foundation, *inputs):
    tokens = foundation.embedding.tokens(*inputs)
    padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    return tokens, [*foundation.stack.alone_states(tokens, padding)], foundation.stack.alone(tokens, padding)


def assert_same(foundation, pixels, embedding, layers, run):
    expected, last = layer_outputs([embedding, *layers], run)
    tokens, ours, final = states(foundation, pixels)
    assert len(ours) == len(layers)
    for a, b in zip([tokens, *ours, final], [*expected, last], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", ["own", "saved", "new", "old", "prefixed", "bin"])
def test_equals_transformers_under_all_names(vit_names, vit, pixels, tmp_path, file: str) -> None:
    state = vit.state_dict()
    if file == "saved":
        vit.save_pretrained(tmp_path)
    elif file == "bin":
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        state = (vit_names | {"prefixed": vit_names["old"]}).get(file, dict)(state)
        if file == "prefixed":
            state = {f"vit.{key}": value for key, value in state.items() if not key.startswith("pooler")}
            state |= {"classifier.weight": torch.zeros(2, 48), "classifier.bias": torch.zeros(2)}
        assert any(key.startswith("layers.0.") for key in state) or file != "new"
        assert any("encoder.layer.0.attention.attention.query" in key for key in state) or file not in (
            "old",
            "prefixed",
        )
        write(tmp_path, state, CONFIG)
    foundation = load("vit", tmp_path).read()
    layers = vit.layers if hasattr(vit, "layers") else vit.encoder.layer
    assert_same(foundation, pixels, vit.embeddings, layers, lambda: vit(pixels).last_hidden_state)


def test_equals_transformers_under_names_of_timm(vit_names, pixels, tmp_path) -> None:
    model = transformers_vit(layer_norm_eps=1e-6)
    foundation = load("vit", write(tmp_path, vit_names["timm"](model.state_dict())), n_heads=4).read()
    layers = model.layers if hasattr(model, "layers") else model.encoder.layer
    assert foundation.stack.layers[0].attention_norm.eps == foundation.stack.norm.eps == 1e-6
    assert_same(foundation, pixels, model.embeddings, layers, lambda: model(pixels).last_hidden_state)


def test_norms_add_what_the_configuration_says(pixels, tmp_path) -> None:
    model = transformers_vit(layer_norm_eps=0.1)
    foundation = load("vit", write(tmp_path, model.state_dict(), CONFIG | {"layer_norm_eps": 0.1})).read()
    layers = model.layers if hasattr(model, "layers") else model.encoder.layer
    assert_same(foundation, pixels, model.embeddings, layers, lambda: model(pixels).last_hidden_state)


def test_equals_timm(tmp_path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = randomize(timm.create_model("vit_tiny_patch16_224", pretrained=False))
    pixels = torch.randn(2, 3, 224, 224)
    settings = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": [3, 224, 224]}}
    foundation = load("vit", write(tmp_path, model.state_dict(), settings)).read()
    assert foundation.config["n_heads"] == 3
    # timm adds positions after it has embedded patches, and calls that "norm_pre" of nothing.
    assert_same(foundation, pixels, model.norm_pre, model.blocks, lambda: model.forward_features(pixels))


def test_bfloat16_is_close(vit, pixels, tmp_path) -> None:
    foundation = load("vit", write(tmp_path, vit.state_dict(), CONFIG)).read()
    _, exact, last = states(foundation, pixels)
    foundation.embedding.bfloat16()
    foundation.stack.bfloat16()
    _, rough, rough_last = states(foundation, pixels.bfloat16())
    assert rough_last.dtype == torch.bfloat16
    for a, b in zip([*rough, rough_last], [*exact, last], strict=True):
        assert (a.float() - b).abs().max() < 2e-2 * b.abs().max()


def naive_static(state, tokens, neighbors):
    """All layers with one attention per edge; sources always send their first tokens, a node itself what it is."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (48,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    def heads(x):
        return x.unflatten(1, (4, 12)).transpose(0, 1)

    own = list(tokens[: len(neighbors)])
    for i in range(3):
        at = f"layers.{i}."
        for node, sources in enumerate(neighbors):
            messages = []
            for source in [own[node], *(tokens[j] for j in sources)]:
                query, sent = norm(own[node], at + "layernorm_before"), norm(source, at + "layernorm_before")
                parts = [query, sent, sent]
                q, k, v = (heads(linear(x, f"{at}attention.{n}_proj")) for x, n in zip(parts, "qkv", strict=True))
                messages.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
            x = own[node] + linear(torch.stack(messages).mean(0), at + "attention.o_proj")
            hidden = F.gelu(linear(norm(x, at + "layernorm_after"), at + "mlp.fc1"))
            own[node] = x + linear(hidden, at + "mlp.fc2")
    return norm(torch.stack(own), "layernorm")


def test_across_nodes_equals_a_loop_over_edges(vit_names, vit, pixels, tmp_path) -> None:
    foundation = load(
        "vit", write(tmp_path, vit.state_dict(), CONFIG), neighbor_states="static", aggregate="layer"
    ).read(self_loops=True)
    stack, tokens = foundation.stack.double(), foundation.embedding.double().tokens(pixels.double()).detach()
    padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    neighbors = [[1, 4], [], [0, 1, 3], [2]]
    indptr, indices = torch.tensor([0, 2, 2, 5, 6]), torch.tensor([1, 4, 0, 1, 3, 2])
    state = {key: value.double() for key, value in vit_names["new"](vit.state_dict()).items()}
    with torch.no_grad():
        ours = stack(tokens, padding, indptr, indices)
        summary = stack(tokens, padding, indptr, indices, 1)
    expected = naive_static(state, tokens, neighbors)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(summary, expected[:, :1], rtol=1e-9, atol=1e-11)


def test_without_neighbors_it_is_the_model_itself(vit, pixels, tmp_path) -> None:
    foundation = load("vit", write(tmp_path, vit.state_dict(), CONFIG)).read()
    tokens, _, last = states(foundation, pixels)
    padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        ours = foundation.stack(tokens, padding, torch.zeros(6, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    torch.testing.assert_close(ours, last, rtol=0, atol=0)


def test_is_built_again_from_its_configuration(vit, pixels, tmp_path) -> None:
    config = CONFIG | {"image_size": [32, 32], "layer_norm_eps": 1e-3}
    foundation = load("vit", write(tmp_path, vit.state_dict(), config)).read(dropout=0.3)
    again = foundation_reader("vit").build(json.loads(json.dumps(foundation.config)))
    assert foundation.stack.layers[0].dropout.p == 0.3
    assert again.stack.layers[0].dropout.p == 0.0
    again.embedding.load_state_dict(foundation.embedding.state_dict())
    again.stack.load_state_dict(foundation.stack.state_dict())
    foundation.stack.eval()
    torch.testing.assert_close(states(again, pixels)[2], states(foundation, pixels)[2], rtol=0, atol=0)


def test_images_of_another_size_are_refused(vit, tmp_path) -> None:
    embedding = load("vit", write(tmp_path, vit.state_dict(), CONFIG)).read().embedding.tokens
    with pytest.raises(ValueError, match=r"\(n, 3, 32, 32\), found \(2, 3, 40, 32\)"):
        embedding(torch.zeros(2, 3, 40, 32))
    with pytest.raises(ValueError, match=r"found \(2, 1, 32, 32\)"):
        embedding(torch.zeros(2, 1, 32, 32))
