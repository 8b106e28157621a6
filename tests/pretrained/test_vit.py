"""Vision transformers against transformers, timm, and loops over edges."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fimp_sc.pretrained import CheckpointError, build_foundation, read_foundation

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
CONFIG = {**SIZES, "model_type": "vit", "image_size": 32, "patch_size": 8, "num_channels": 3, "hidden_act": "gelu"}
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


def write(folder, state, config=None):
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def randomise(module):
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
    return randomise(transformers.ViTModel(config))


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
    tokens = foundation.embedding(*inputs)
    padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    return tokens, [*foundation.stack.alone_states(tokens, padding)], foundation.stack.alone(tokens, padding)


def assert_same(foundation, pixels, embedding, layers, run):
    expected, last = layer_outputs([embedding, *layers], run)
    tokens, ours, final = states(foundation, pixels)
    assert len(ours) == len(layers)
    for a, b in zip([tokens, *ours, final], [*expected, last], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", ["own", "saved", "new", "old", "prefixed", "bin"])
def test_equals_transformers_under_all_names(vit, pixels, tmp_path, file: str) -> None:
    state = vit.state_dict()
    if file == "saved":
        vit.save_pretrained(tmp_path)
    elif file == "bin":
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        state = {"new": new_names, "old": old_names, "prefixed": old_names}.get(file, dict)(state)
        if file == "prefixed":
            state = {f"vit.{key}": value for key, value in state.items() if not key.startswith("pooler")}
            state |= {"classifier.weight": torch.zeros(2, 48), "classifier.bias": torch.zeros(2)}
        assert any(key.startswith("layers.0.") for key in state) or file != "new"
        assert any("encoder.layer.0.attention.attention.query" in key for key in state) or file not in (
            "old",
            "prefixed",
        )
        write(tmp_path, state, CONFIG)
    foundation = read_foundation("vit", tmp_path)
    layers = vit.layers if hasattr(vit, "layers") else vit.encoder.layer
    assert_same(foundation, pixels, vit.embeddings, layers, lambda: vit(pixels).last_hidden_state)


def test_equals_transformers_under_names_of_timm(pixels, tmp_path) -> None:
    model = transformers_vit(layer_norm_eps=1e-6)
    foundation = read_foundation("vit", write(tmp_path, timm_names(model.state_dict())), n_heads=4)
    layers = model.layers if hasattr(model, "layers") else model.encoder.layer
    assert foundation.stack.layers[0].attention_norm.eps == foundation.stack.norm.eps == 1e-6
    assert_same(foundation, pixels, model.embeddings, layers, lambda: model(pixels).last_hidden_state)


def test_norms_add_what_the_configuration_says(pixels, tmp_path) -> None:
    model = transformers_vit(layer_norm_eps=0.1)
    foundation = read_foundation("vit", write(tmp_path, model.state_dict(), CONFIG | {"layer_norm_eps": 0.1}))
    layers = model.layers if hasattr(model, "layers") else model.encoder.layer
    assert_same(foundation, pixels, model.embeddings, layers, lambda: model(pixels).last_hidden_state)


def test_equals_timm(tmp_path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = randomise(timm.create_model("vit_tiny_patch16_224", pretrained=False))
    pixels = torch.randn(2, 3, 224, 224)
    settings = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": [3, 224, 224]}}
    foundation = read_foundation("vit", write(tmp_path, model.state_dict(), settings))
    assert foundation.config["n_heads"] == 3
    # timm adds positions after it has embedded patches, and calls that "norm_pre" of nothing.
    assert_same(foundation, pixels, model.norm_pre, model.blocks, lambda: model.forward_features(pixels))


def test_bfloat16_is_close(vit, pixels, tmp_path) -> None:
    foundation = read_foundation("vit", write(tmp_path, vit.state_dict(), CONFIG))
    _, exact, last = states(foundation, pixels)
    foundation.embedding.bfloat16()
    foundation.stack.bfloat16()
    _, rough, rough_last = states(foundation, pixels.bfloat16())
    assert rough_last.dtype == torch.bfloat16
    for a, b in zip([*rough, rough_last], [*exact, last], strict=True):
        assert (a.float() - b).abs().max() < 2e-2 * b.abs().max()


def naive_static(state, tokens, neighbours):
    """All layers with one attention per edge; sources always send their first tokens, a node itself what it is."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (48,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    def heads(x):
        return x.unflatten(1, (4, 12)).transpose(0, 1)

    own = list(tokens[: len(neighbours)])
    for i in range(3):
        at = f"layers.{i}."
        for node, sources in enumerate(neighbours):
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


def test_across_nodes_equals_a_loop_over_edges(vit, pixels, tmp_path) -> None:
    foundation = read_foundation(
        "vit", write(tmp_path, vit.state_dict(), CONFIG), source="static", aggregate="layer", self_loops=True
    )
    stack, tokens = foundation.stack.double(), foundation.embedding.double()(pixels.double()).detach()
    padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    neighbours = [[1, 4], [], [0, 1, 3], [2]]
    indptr, indices = torch.tensor([0, 2, 2, 5, 6]), torch.tensor([1, 4, 0, 1, 3, 2])
    state = {key: value.double() for key, value in new_names(vit.state_dict()).items()}
    with torch.no_grad():
        ours = stack(tokens, padding, indptr, indices)
        summary = stack(tokens, padding, indptr, indices, 1)
    expected = naive_static(state, tokens, neighbours)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(summary, expected[:, :1], rtol=1e-9, atol=1e-11)


def test_without_neighbours_it_is_the_model_itself(vit, pixels, tmp_path) -> None:
    foundation = read_foundation("vit", write(tmp_path, vit.state_dict(), CONFIG))
    tokens, _, last = states(foundation, pixels)
    padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        ours = foundation.stack(tokens, padding, torch.zeros(6, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    torch.testing.assert_close(ours, last, rtol=0, atol=0)


def test_is_built_again_from_its_configuration(vit, pixels, tmp_path) -> None:
    config = CONFIG | {"image_size": [32, 32], "layer_norm_eps": 1e-3}
    foundation = read_foundation("vit", write(tmp_path, vit.state_dict(), config), dropout=0.3)
    again = build_foundation("vit", json.loads(json.dumps(foundation.config)))
    assert foundation.stack.layers[0].dropout.p == 0.3
    assert again.stack.layers[0].dropout.p == 0.0
    again.embedding.load_state_dict(foundation.embedding.state_dict())
    again.stack.load_state_dict(foundation.stack.state_dict())
    foundation.stack.eval()
    torch.testing.assert_close(states(again, pixels)[2], states(foundation, pixels)[2], rtol=0, atol=0)


def test_images_of_another_size_are_refused(vit, tmp_path) -> None:
    embedding = read_foundation("vit", write(tmp_path, vit.state_dict(), CONFIG)).embedding
    with pytest.raises(ValueError, match=r"\(n, 3, 32, 32\), found \(2, 3, 40, 32\)"):
        embedding(torch.zeros(2, 3, 40, 32))
    with pytest.raises(ValueError, match=r"found \(2, 1, 32, 32\)"):
        embedding(torch.zeros(2, 1, 32, 32))


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
        read_foundation("vit", write(tmp_path, hand_made, CONFIG | change))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("embeddings.distillation_token", "'embeddings.distillation_token': .* a distillation token"),
        ("embeddings.register_tokens", "'embeddings.register_tokens': .* register tokens"),
        ("layers.0.layer_scale1.lambda1", "'layers.0.layer_scale1.lambda1': .* layer scale"),
        ("layers.1.attention.q_norm.weight", "'layers.1.attention.q_norm.weight': .* norms of queries and keys"),
        ("layers.0.mlp.weights_in.weight", "'layers.0.mlp.weights_in.weight': .* a gated feed-forward part"),
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
        read_foundation("vit", write(tmp_path, hand_made | {key: torch.zeros(48)}, CONFIG))


@pytest.mark.parametrize("names", ["new", "old", "timm"])
def test_missing_and_misshapen_weights_are_named(hand_made, tmp_path, names: str) -> None:
    state = {"new": new_names, "old": old_names, "timm": timm_names}[names](hand_made)
    options = {"n_heads": 4} if names == "timm" else {}
    read_foundation("vit", write(tmp_path, state, CONFIG), **options)
    for key in state:
        rest = {name: value for name, value in state.items() if name != key}
        with pytest.raises(CheckpointError, match=rf"model\.safetensors' has no tensor '{re.escape(key)}'"):
            read_foundation("vit", write(tmp_path, rest, CONFIG), **options)
    last = next(
        key for key in state if "2." in key and key.endswith("fc2.weight" if names != "old" else "dense.weight")
    )
    with pytest.raises(CheckpointError, match=re.escape(last)):
        read_foundation("vit", write(tmp_path, state | {last: state[last][:, 1:]}, CONFIG), **options)


def test_heads_must_be_known(hand_made, tmp_path) -> None:
    write(tmp_path, hand_made)
    with pytest.raises(CheckpointError, match=r"heads is not known: .*config.json.* Pass n_heads="):
        read_foundation("vit", tmp_path)
    # A file by itself, with the sizes that its shapes tell.
    foundation = read_foundation("vit", tmp_path / "model.safetensors", n_heads=4)
    assert foundation.config["image_size"] == [32, 32]
    assert foundation.config["n_layers"] == 3
    with pytest.raises(CheckpointError, match=r"'num_attention_heads': 4, but n_heads=2 was passed"):
        read_foundation("vit", write(tmp_path, hand_made, CONFIG), n_heads=2)
    with pytest.raises(CheckpointError, match=r"^7 attention heads do not divide the width 48\.$"):
        read_foundation("vit", write(tmp_path / "alone", hand_made), n_heads=7)


@pytest.mark.parametrize(
    ("settings", "heads"),
    [
        ({"architecture": "vit_tiny_patch16_224"}, 3),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 6}}, 6),
        ({"architecture": "vit_base_patch16_224"}, None),
        ({"architecture": "samvit_tiny_patch16"}, None),
    ],
)
def test_heads_of_timm_follow_from_the_architecture(hand_made, tmp_path, settings, heads: int | None) -> None:
    state = {}
    for key, value in timm_names(hand_made).items():
        # Four times as wide.
        wide = [4 if length in (48, 96, 144) else 1 for length in value.shape]
        state[key] = value.repeat(*wide)
    write(tmp_path, state, settings)
    if heads is None:
        with pytest.raises(CheckpointError, match="heads is not known"):
            read_foundation("vit", tmp_path)
    else:
        foundation = read_foundation("vit", tmp_path)
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
def test_contradictions_of_timm_are_told(hand_made, tmp_path, settings, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_foundation("vit", write(tmp_path, timm_names(hand_made), settings), n_heads=4)


def test_models_without_class_token_are_refused(hand_made, tmp_path) -> None:
    state = timm_names(hand_made)
    del state["cls_token"]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    with pytest.raises(CheckpointError, match=r"'pos_embed' .* has no class token"):
        read_foundation("vit", write(tmp_path, state), n_heads=4)
