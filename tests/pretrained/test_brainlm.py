"""BrainLM against outputs of the original, and against layers of transformers."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fimp_sc.pretrained import CheckpointError, load
from fimp_sc.pretrained._registry import foundation_reader

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
CONFIG = {**SIZES, "model_type": "brainlm_mae", "hidden_act": "gelu", "layer_norm_eps": 1e-12}
CONFIG |= {"timepoint_patching_size": 5, "conv_kernel_size": 7}
PICTURE = {**SIZES, "model_type": "vit_mae", "hidden_act": "gelu", "image_size": [24, 24], "patch_size": 4}
PICTURE |= {"num_channels": 3, "num_brain_voxels": 20, "num_timepoints_per_voxel": 14}


def write(folder, state, config):
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_state(shapes):
    generator = torch.Generator().manual_seed(0)
    return {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name, d=24):
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}


@pytest.fixture(scope="module")
def segments_state():
    """Weights of the first format: width 24, 3 heads, 2 layers, convolutions of width 7."""
    shapes = linear("vit.embeddings.signal_embedding_projection", 24, 5)
    shapes |= linear("vit.embeddings.xyz_embedding_projection", 24, 3) | norm("vit.layernorm")
    shapes |= {"vit.embeddings.cls_token": (1, 1, 24), "decoder.mask_token": (1, 1, 24)}
    for i in range(2):
        at = f"vit.encoder.layer.{i}."
        for name in ("query", "key", "value"):
            shapes |= linear(f"{at}attention.self.{name}", 24, 24)
        shapes |= linear(f"{at}attention.output.dense", 24, 24) | norm(f"{at}attention.output.LayerNorm")
        shapes |= linear(f"{at}intermediate.dense", 40, 24) | linear(f"{at}output.dense", 24, 40)
        shapes |= norm(f"{at}output.LayerNorm") | {f"{at}attention.self.conv.weight": (3, 1, 7, 1)}
    state = random_state(shapes)
    position = np.arange(50)[:, None] / 10000.0 ** (np.arange(0, 24, 2) / 24)
    table = np.stack([np.sin(position), np.cos(position)], axis=2).reshape(50, 24)
    return state | {"vit.embeddings.pos_embedding.pe": torch.from_numpy(table).float()}


@pytest.fixture(scope="module")
def picture_state():
    """Weights of the second format: a picture of 24 x 24 in patches of 4 x 4."""
    shapes = {"vit.embeddings.cls_token": (1, 1, 24), "vit.embeddings.position_embeddings": (1, 37, 24)}
    shapes |= linear("vit.embeddings.patch_embeddings.projection", 24, 5) | norm("vit.layernorm")
    shapes |= {"vit.embeddings.patch_embeddings.projection.weight": (24, 3, 4, 4), "decoder.mask_token": (1, 1, 8)}
    for i in range(2):
        at = f"vit.encoder.layer.{i}."
        for name in ("query", "key", "value"):
            shapes |= linear(f"{at}attention.attention.{name}", 24, 24)
        shapes |= linear(f"{at}attention.output.dense", 24, 24)
        shapes |= linear(f"{at}intermediate.dense", 40, 24) | linear(f"{at}output.dense", 24, 40)
        shapes |= norm(f"{at}layernorm_before") | norm(f"{at}layernorm_after")
    return random_state(shapes)


@torch.no_grad()
def states(foundation, *inputs):
    tokens = foundation.embedding.tokens(*inputs)
    padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    return tokens, [*foundation.stack.alone_states(tokens, padding)], foundation.stack.alone(tokens, padding)


@pytest.fixture(scope="module")
def released(shared_data):
    folder = shared_data / "brainlm_tiny_checkpoint"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


@pytest.fixture(scope="module")
def expected(released):
    with np.load(released / "expected.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def test_equals_the_original(released, expected) -> None:
    foundation = load("brainlm", released).read()
    tokens, hidden, last = states(foundation, expected["signal"].unflatten(1, (10, 20)), expected["xyz"])
    ours = {"token_embedding": tokens, "hidden_layer_1": hidden[0], "hidden": hidden[-1], "final_norm": last}
    assert len(hidden) == 3
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_bfloat16_is_close_to_the_original(released, expected) -> None:
    foundation = load("brainlm", released).read()
    foundation.embedding.bfloat16()
    foundation.stack.bfloat16()
    inputs = expected["signal"].unflatten(1, (10, 20)).bfloat16(), expected["xyz"].bfloat16()
    tokens, hidden, last = states(foundation, *inputs)
    ours = {"token_embedding": tokens, "hidden_layer_1": hidden[0], "hidden": hidden[-1], "final_norm": last}
    for name, value in ours.items():
        assert value.dtype == torch.bfloat16
        assert (value.float() - expected[name]).abs().max() < 2e-2 * expected[name].abs().max(), name


def naive_segments(state, signal, xyz):
    """The format's formulas, one region after the other, in float64."""
    w = {key: value.double() for key, value in state.items()}

    def lin(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def ln(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    out = []
    for s, place in zip(signal.double(), xyz.double(), strict=True):
        x = lin(s, "vit.embeddings.signal_embedding_projection") + lin(place, "vit.embeddings.xyz_embedding_projection")
        x = x + w["vit.embeddings.pos_embedding.pe"][: len(s)]
        for i in range(2):
            at = f"vit.encoder.layer.{i}."
            q, k, v = (lin(x, f"{at}attention.self.{name}") for name in ("query", "key", "value"))
            heads = []
            for h in range(3):
                part = slice(8 * h, 8 * h + 8)
                message = ((q[:, part] @ k[:, part].T) / math.sqrt(8)).softmax(-1) @ v[:, part]
                kernel = w[f"{at}attention.self.conv.weight"][h, 0, :, 0]
                padded = torch.cat([torch.zeros(3, 8), v[:, part], torch.zeros(3, 8)])
                for t in range(len(x)):
                    message[t] += kernel @ padded[t : t + 7]
                heads.append(message)
            x = ln(x + lin(torch.cat(heads, 1), f"{at}attention.output.dense"), f"{at}attention.output.LayerNorm")
            hidden = F.gelu(lin(x, f"{at}intermediate.dense"))
            x = ln(x + lin(hidden, f"{at}output.dense"), f"{at}output.LayerNorm")
        out.append(ln(x, "vit.layernorm"))
    return torch.stack(out)


def test_value_convolution_equals_the_formula(segments_state, tmp_path) -> None:
    foundation = load("brainlm", write(tmp_path, segments_state, CONFIG)).read()
    signal, xyz = torch.randn(4, 6, 5), torch.randn(4, 3)
    foundation.embedding.double()
    foundation.stack.double()
    _, _, last = states(foundation, signal.double(), xyz.double())
    torch.testing.assert_close(last, naive_segments(segments_state, signal, xyz), rtol=1e-6, atol=1e-6)


def test_value_convolution_equals_transformers(segments_state, tmp_path) -> None:
    pytest.importorskip("transformers")
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerLayer

    foundation = load("brainlm", write(tmp_path, segments_state, CONFIG)).read()
    tokens, hidden, _ = states(foundation, torch.randn(4, 6, 5), torch.randn(4, 3))
    # As many landmarks as tokens: the attention is exact.
    layer = NystromformerLayer(
        NystromformerConfig(
            **SIZES,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            conv_kernel_size=7,
            num_landmarks=6,
            segment_means_seq_len=6,
        )
    ).eval()
    for i, ours in enumerate(hidden):
        at = f"vit.encoder.layer.{i}."
        weights = {key.removeprefix(at): value for key, value in segments_state.items() if key.startswith(at)}
        layer.load_state_dict(weights)
        with torch.no_grad():
            tokens = layer(tokens)[0]
        torch.testing.assert_close(ours, tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch", [(4, 4), (1, 4), (3, 8)])
@pytest.mark.parametrize("names", ["old", "new"])
def test_a_region_in_a_picture_equals_transformers(picture_state, tmp_path, patch, names: str) -> None:
    """The embeddings and the encoder of a picture whose patches show one region."""
    transformers = pytest.importorskip("transformers")
    grid = (24 // patch[0], 24 // patch[1])
    state = dict(picture_state)
    state["vit.embeddings.patch_embeddings.projection.weight"] = torch.randn(24, 3, *patch)
    state["vit.embeddings.position_embeddings"] = torch.randn(1, 1 + grid[0] * grid[1], 24)
    stored = {new_name(key): value for key, value in state.items()} if names == "new" else state
    foundation = load("brainlm", write(tmp_path, stored, PICTURE | {"patch_size": list(patch)})).read()
    signal, rows = torch.randn(5, 14), torch.tensor([0, 19, 1, 2, 10])
    tokens, hidden, last = states(foundation, signal.unflatten(1, (2, 7)), rows)

    config = transformers.ViTConfig(**SIZES, image_size=[24, 24], patch_size=list(patch))
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    renamed = {key.removeprefix("vit."): value for key, value in state.items() if key.startswith("vit.")}
    if not hasattr(model, "encoder"):
        renamed = {new_name(key): value for key, value in renamed.items()}
    model.load_state_dict(renamed)
    # 14 points from column 5 to 18, 20 regions from row 2.
    columns = range(5 // patch[1], -(-19 // patch[1]))
    layers = model.layers if hasattr(model, "layers") else model.encoder.layer
    for node, row in enumerate(rows.tolist()):
        picture = torch.full((1, 3, 24, 24), -1.0)
        picture[..., 5:19] = signal[node]
        keep = [0, *(1 + (row + 2) // patch[0] * grid[1] + column for column in columns)]
        with torch.no_grad():
            x = model.embeddings(picture)[:, keep]
            torch.testing.assert_close(tokens[node], x[0], rtol=1e-5, atol=1e-5)
            for ours, layer in zip(hidden, layers, strict=True):
                x = layer(x)
                x = x[0] if isinstance(x, tuple) else x
                torch.testing.assert_close(ours[node], x[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(last[node], model.layernorm(x)[0], rtol=1e-5, atol=1e-5)


def new_name(key):
    key = key.replace("encoder.layer.", "layers.").replace("attention.output.dense", "attention.o_proj")
    for name in ("query", "key", "value"):
        key = key.replace(f"attention.attention.{name}", f"attention.{name[0]}_proj")
    return key.replace("intermediate.dense", "mlp.fc1").replace("output.dense", "mlp.fc2")


def test_the_released_picture_has_so_many_tokens() -> None:
    """424 x 200 in the padded squares of the released configurations."""
    config = {"layout": "picture", "d_model": 8, "n_heads": 2, "n_layers": 1, "d_feedforward": 8, "eps": 1e-12}
    for side, patch, first, n_tokens in ((432, 16, 7, 13), (434, 14, 8, 15)):
        sizes = {"image_size": [side, side], "patch_size": [patch, patch], "n_regions": 424}
        embedding = foundation_reader("brainlm").build(config | sizes).embedding.tokens
        tokens = embedding(torch.zeros(2, 10, 20), torch.tensor([0, 423]))
        assert tokens.shape == (2, 1 + n_tokens, 8)
        bias = embedding.signal.bias + embedding.positions[0, 1:].view(side // patch, side // patch, 8)[-1, first + 1]
        torch.testing.assert_close(tokens[1, 2], bias)


def test_places_follow_the_y_coordinate(picture_state, segments_state, tmp_path) -> None:
    xyz = torch.zeros(20, 3)
    xyz[:, 1] = torch.randperm(20, generator=torch.Generator().manual_seed(0)) - 10.0
    picture = load("brainlm", write(tmp_path, picture_state, PICTURE)).read().embedding.tokens
    assert picture.places(xyz).tolist() == (xyz[:, 1] + 10).long().tolist()
    # Of ten regions each has two rows.
    assert picture.places(xyz[xyz[:, 1] < 0]).sort().values.tolist() == list(range(0, 20, 2))
    assert load("brainlm", write(tmp_path, segments_state, CONFIG)).read().embedding.places(xyz) is xyz


@pytest.mark.parametrize("layout", ["segments", "picture"])
def test_is_built_again_from_its_configuration(segments_state, picture_state, tmp_path, layout: str) -> None:
    segments = layout == "segments"
    folder = write(tmp_path, segments_state if segments else picture_state, CONFIG if segments else PICTURE)
    foundation = load("brainlm", folder, neighbor_states="static").read(dropout=0.2)
    assert foundation.stack.neighbor_states == "static"
    assert foundation.stack.layers[0].dropout.p == 0.2
    again = foundation_reader("brainlm").build(json.loads(json.dumps(foundation.config)))
    again.embedding.load_state_dict(foundation.embedding.state_dict())
    again.stack.load_state_dict(foundation.stack.state_dict())
    inputs = (torch.randn(3, 6, 5), torch.randn(3, 3)) if segments else (torch.randn(3, 14), torch.arange(3))
    foundation.stack.eval()
    torch.testing.assert_close(states(again, *inputs)[2], states(foundation, *inputs)[2], rtol=0, atol=0)


def test_signals_of_another_shape_are_refused(segments_state, picture_state, tmp_path) -> None:
    segments = load("brainlm", write(tmp_path / "a", segments_state, CONFIG)).read().embedding.tokens
    with pytest.raises(ValueError, match=r"\(n, segments, 5\), found \(2, 6, 4\)"):
        segments(torch.zeros(2, 6, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"xyz must have the shape \(2, 3\), found \(1, 3\)"):
        segments(torch.zeros(2, 6, 5), torch.zeros(1, 3))
    picture = load("brainlm", write(tmp_path / "b", picture_state, PICTURE)).read().embedding.tokens
    with pytest.raises(ValueError, match=r"between 1 and 24 time points, found 25"):
        picture(torch.zeros(2, 25), torch.arange(2))
    with pytest.raises(ValueError, match=r"rows must lie between 0 and 19"):
        picture(torch.zeros(2, 14), torch.tensor([0, 20]))
    with pytest.raises(ValueError, match=r"rows must be \(2,\) whole numbers, found \(2, 3\)"):
        picture(torch.zeros(2, 14), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, r"config.json' has 'hidden_act': 'relu', supported: 'gelu'"),
        ({"model_type": "bert"}, r"'model_type': 'bert'"),
        ({"hidden_size": 32}, r"'hidden_size': 32, but its weights say 24"),
        ({"num_hidden_layers": 3}, r"'num_hidden_layers': 3, but its weights say 2"),
        ({"intermediate_size": 80}, r"'intermediate_size': 80, but its weights say 40"),
        ({"timepoint_patching_size": 20}, r"'timepoint_patching_size': 20, but its weights say 5"),
        ({"conv_kernel_size": None}, r"'conv_kernel_size': None, but its weights say 7"),
        ({"conv_kernel_size": 65}, r"'conv_kernel_size': 65, but its weights say 7"),
        ({"num_attention_heads": 4}, r"conv.weight' in .* has the shape \(3, 1, 7, 1\), expected \(4, 1, any, 1\)"),
        ({"num_attention_heads": 0}, r"'num_attention_heads': 0, expected a whole number above zero"),
        ({"layer_norm_eps": "tiny"}, r"'layer_norm_eps': 'tiny', expected a number"),
    ],
)
def test_contradictions_of_the_configuration_are_told(segments_state, tmp_path, change, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load("brainlm", write(tmp_path, segments_state, CONFIG | change)).read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_brain_voxels": 424}, r"'image_size': \[24, 24\], expected .* with room for 424 regions"),
        ({"num_timepoints_per_voxel": 200}, r"with room for 20 regions x 200 time points"),
        ({"image_size": [24, 26]}, r"'image_size': \[24, 26\], expected a picture in patches of 4 x 4"),
        ({"image_size": [24, 48]}, r"position_embeddings' in .* has the shape \(1, 37, 24\), expected \(1, 73, 24\)"),
        ({"patch_size": 8}, r"'patch_size': 8, but its weights say \[4, 4\]"),
        ({"num_channels": 1}, r"'num_channels': 1, but its weights say 3"),
        ({"hidden_act": "gelu_new"}, r"'hidden_act': 'gelu_new'"),
        ({"num_attention_heads": 5}, r"5 attention heads do not divide the width 24: check 'num_attention_heads'"),
    ],
)
def test_contradictions_of_a_picture_are_told(picture_state, tmp_path, change, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load("brainlm", write(tmp_path, picture_state, PICTURE | change)).read()


def test_convolutions_of_even_width_are_refused(segments_state, tmp_path) -> None:
    even = {key: value[:, :, 1:] if "conv" in key else value for key, value in segments_state.items()}
    with pytest.raises(CheckpointError, match="'conv_kernel_size': 6, but only odd widths"):
        load("brainlm", write(tmp_path, even, CONFIG | {"conv_kernel_size": 6})).read()


@pytest.mark.parametrize("layout", ["segments", "picture"])
def test_missing_weights_are_named(segments_state, picture_state, tmp_path, layout: str) -> None:
    state, config = (segments_state, CONFIG) if layout == "segments" else (picture_state, PICTURE)
    unread = {"decoder.mask_token"}
    if layout == "segments":
        unread |= {"vit.embeddings.cls_token", "vit.embeddings.pos_embedding.pe"}
    for key in state:
        rest = write(tmp_path, {name: value for name, value in state.items() if name != key}, config)
        if key in unread:
            load("brainlm", rest).read()
            continue
        message = rf"model\.safetensors' has no tensor '{key}'"
        if key == "vit.encoder.layer.0.attention.self.conv.weight":
            message = r"config.json' has 'conv_kernel_size': 7, but its weights say None"
        with pytest.raises(CheckpointError, match=message):
            load("brainlm", rest).read()


def test_weights_without_a_place_are_named(segments_state, picture_state, tmp_path) -> None:
    for state, config in ((segments_state, CONFIG), (picture_state, PICTURE)):
        more = state | {"vit.encoder.layer.1.adapter.weight": torch.zeros(2)}
        with pytest.raises(CheckpointError, match=r"no place for: 'vit.encoder.layer.1.adapter.weight'"):
            load("brainlm", write(tmp_path, more, config)).read()


def test_other_positions_are_refused(segments_state, tmp_path) -> None:
    key = "vit.embeddings.pos_embedding.pe"
    state = segments_state | {key: segments_state[key].roll(1, 0)}
    with pytest.raises(CheckpointError, match=r"pos_embedding.pe' in .* is not the table of sines and cosines"):
        load("brainlm", write(tmp_path, state, CONFIG)).read()


def test_damaged_files_are_told(segments_state, tmp_path) -> None:
    folder = write(tmp_path, segments_state, CONFIG)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors' cannot be read as weights"):
        load("brainlm", folder).read()
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text('{"hidden_size": 24,')
    with pytest.raises(CheckpointError, match=r"config.json' is not valid JSON"):
        load("brainlm", folder).read()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no 'config.json'"):
        load("brainlm", folder).read()


def test_heads_must_be_known(segments_state, picture_state, tmp_path) -> None:
    for state, config in ((segments_state, CONFIG), (picture_state, PICTURE)):
        rest = {key: value for key, value in config.items() if key != "num_attention_heads"}
        with pytest.raises(CheckpointError, match=r"config.json' has no 'num_attention_heads'"):
            load("brainlm", write(tmp_path, state, rest)).read()


def test_a_truncated_release_is_told(released, tmp_path) -> None:
    shutil.copyfile(released / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes((released / "pytorch_model.bin").read_bytes()[:1_000_000])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin' cannot be read as weights"):
        load("brainlm", tmp_path).read()
