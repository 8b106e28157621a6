"""Foundation models by name: the handle, models that others register, and the places that list the names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fimp_sc
from fimp_sc import cli
from fimp_sc.model import FIMP
from fimp_sc.nn import TransformerStack
from fimp_sc.pretrained import (
    Backbone,
    CheckpointError,
    FoundationReader,
    SequenceTokens,
    _registry,
    copy_layer,
    copy_weights,
    foundation_names,
    load,
    open_checkpoint,
    register,
)

NAMES = "'scgpt', 'geneformer', 'nicheformer', 'vit', 'brainlm', 'bert'"
DOCS = Path(__file__).resolve().parents[2] / "docs"
WIDTH = 12
QUICK = {"max_epochs": 1, "accelerator": "cpu", "verbose": False}
LAYER = {
    "attention.qkv": "self_attn.in_proj",
    "attention.output": "self_attn.out_proj",
    "attention_norm": "norm1",
    "expand": "linear1",
    "contract": "linear2",
    "feedforward_norm": "norm2",
}


class WaveTokens(SequenceTokens):
    """Four time points by a linear map; no class token."""

    token_size, n_class = 4, 0

    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Linear(4, WIDTH)

    def forward(self, nodes):
        return self.wave(nodes["value"])

    def check(self, size, n_coordinates):
        if size[0] < 8:
            message = f"Waves need 8 time points, found {size[0]}."
            raise ValueError(message)


class Wave(FoundationReader):
    """A model of signals that nobody made."""

    name, reads, nodes, files = "wave", "signal", "waves", "model.safetensors"

    def build(self, config, **stack):
        layers = TransformerStack(WIDTH, 2, config["layers"], d_feedforward=16, norm_first=True, **stack)
        return Backbone(dict(config), WaveTokens(), layers)

    def read(self, folder, rows=None, *, layers: int = 2, **stack):
        weights, _ = open_checkpoint(folder)
        backbone = self.build({"layers": layers}, **stack)
        copy_weights(backbone.embedding.wave, weights, "wave")
        for i, layer in enumerate(backbone.stack.layers):
            copy_layer(layer, weights, f"layers.{i}.", LAYER)
        return backbone


@pytest.fixture
def wave(monkeypatch, tmp_path) -> tuple[Path, nn.Linear, nn.TransformerEncoder]:
    """A checkpoint of a registered model, and what wrote it."""
    for own in _registry._OWN:  # a module registers its reader once, when it is imported
        _registry.foundation_reader(own)
    monkeypatch.setattr(_registry, "_readers", dict(_registry._readers))
    register(Wave())
    torch.manual_seed(0)
    one = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True)
    layers, tokens = nn.TransformerEncoder(one, 2, enable_nested_tensor=False).eval(), nn.Linear(4, WIDTH)
    folder = tmp_path / "wave"
    folder.mkdir()
    state = layers.state_dict() | {f"wave.{name}": value for name, value in tokens.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder, tokens, layers


@pytest.mark.filterwarnings("ignore:.*have no neighbors", "ignore:.*are left out")
def test_a_model_from_outside_is_used_as_any_other(wave, recordings, tmp_path) -> None:
    folder, tokens, layers = wave
    graph = recordings["fmri"].obsp["spatial_connectivities"].tolil()
    graph[:3] = 0
    recordings["fmri"].obsp["spatial_connectivities"] = graph.tocsr()
    fimp_sc.tl.embed(recordings, foundation=load("wave", folder), zero_shot=True, **QUICK)
    found = recordings["fmri"].obsm["X_fimp"]
    signal = recordings["fmri"].X.astype(np.float32)[:, :44]
    scaled = (signal - signal.mean(1, keepdims=True)) / signal.std(1, keepdims=True)
    with torch.no_grad():
        expected = layers(tokens(torch.from_numpy(scaled).unflatten(1, (11, 4)))).mean(1).numpy()
    # Alone it is what torch makes of it, with neighbors something else.
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-3, atol=1e-4)
    assert np.abs(found[3:] - expected[3:]).max() > 1e-2
    assert recordings["fmri"].uns["X_fimp"]["model"]["foundation"]["name"] == "wave"

    FIMP.setup_mudata(recordings, labels_key="lobe")
    model = FIMP(recordings, foundation=load("wave", folder, train="lora", neighbor_states="static"))
    model.train(1, accelerator="cpu", enable_progress_bar=False)
    model.save_pretrained(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    again = FIMP.from_pretrained(tmp_path / "model", recordings, accelerator="cpu")
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())
    np.testing.assert_array_equal(again.get_reconstruction(), model.get_reconstruction())
    assert (again.foundation.name, again.foundation.train) == ("wave", "lora")
    with pytest.raises(ValueError, match="keeps no checkpoint: name its folder"):
        FIMP(recordings, foundation=again.foundation)


def test_what_a_model_from_outside_refuses(wave, recordings, pictures) -> None:
    folder, *_ = wave
    with pytest.raises(CheckpointError, match=r"no tensor 'layers\.2\.self_attn\.in_proj\.weight'"):
        load("wave", folder, layers=3).read()
    with pytest.raises(TypeError, match=r"got source=, and takes train, neighbor_states, .*, layers\."):
        load("wave", folder, source="static")
    FIMP.setup_mudata(pictures)
    with pytest.raises(ValueError, match="foundation='wave' reads waves, and the modality is of kind 'patch'"):
        FIMP(pictures, foundation=load("wave", folder))
    FIMP.setup_mudata(recordings)
    with pytest.raises(ValueError, match="token_size is that of foundation='wave' itself"):
        FIMP(recordings, foundation=load("wave", folder), token_size=4)


def test_command_line_and_errors_know_registered_models(wave) -> None:
    folder, *_ = wave
    options = ["embed", "a.h5mu", "--output", "b.h5mu", "--foundation", "wave", "--checkpoint", str(folder)]
    assert cli._parser().parse_args(options).foundation == "wave"
    with pytest.raises(
        ValueError, match=r"'scgpt', 'geneformer', 'nicheformer', 'vit', 'brainlm', 'bert', 'wave': found 'wafe'"
    ):
        load("wafe", folder)


def test_only_readers_are_registered() -> None:
    with pytest.raises(TypeError, match=r"register takes an instance of a FoundationReader, found .*Wave"):
        register(Wave)
    assert "wave" not in foundation_names()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("scGPT", {}, f"name must be that of a foundation model, {NAMES}: found 'scGPT'"),
        ("vit", {"checkpoint": None}, r"load\('vit'\) needs checkpoint, the folder with config\.json"),
        ("vit", {"checkpoint": "no folder"}, "There is no folder 'no folder'"),
        ("vit", {"species": "mouse"}, "are for genes, and 'vit' reads images"),
        ("brainlm", {"vocabulary_key": "id"}, "are for genes, and 'brainlm' reads signals of brain regions"),
        ("scgpt", {"train": "last"}, r"train must be 'frozen', .* found 'last'"),
        ("scgpt", {"neighbor_states": "moving"}, "neighbor_states must be one of 'evolving', 'static', found 'moving'"),
        ("scgpt", {"aggregate": "edge"}, "aggregate must be one of 'layer', 'final', found 'edge'"),
        ("scgpt", {"species": "rat"}, "species must be one of 'human', 'mouse', found 'rat'"),
    ],
)
def test_arguments_of_the_handle_are_checked_at_once(tmp_path, name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, **{"checkpoint": tmp_path, **arguments})


@pytest.mark.parametrize(
    ("name", "there", "message"),
    [
        ("scgpt", [], r"has no 'args\.json'; found there: nothing"),
        ("scgpt", ["args.json"], r"has no 'vocab\.json'; found there: 'args\.json'"),
        (
            "scgpt",
            ["args.json", "vocab.json", "a.pt"],
            r"has no 'best_model\.pt' or .*; found there: 'a\.pt'",
        ),
        ("vit", ["config.json"], r"has no 'model\.safetensors' or 'pytorch_model\.bin'; found there: 'config\.json'"),
        ("brainlm", ["model.safetensors"], r"has no 'config\.json'; found there: 'model\.safetensors'"),
    ],
)
def test_files_of_a_folder_are_looked_for_at_once(tmp_path, name: str, there: list[str], message: str) -> None:
    for file in there:
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=message):
        load(name, tmp_path)


def test_names_of_models_stand_in_their_own_file_alone() -> None:
    """But for the list of modules that are loaded when asked for, and examples in texts and messages."""
    package = Path(fimp_sc.__file__).parent
    for name in foundation_names():
        users = [
            path.relative_to(package).as_posix()
            for path in package.rglob("*.py")
            if re.search(rf'(?<!load\()(?<!`)"{name}"', path.read_text(encoding="utf-8"))
        ]
        assert set(users) == {f"pretrained/_{name}.py", "pretrained/_registry.py"}


def test_guide_lists_all_models() -> None:
    page = (DOCS / "guide" / "settings.md").read_text(encoding="utf-8")
    table = page[page.index("| `load` |") :].split("\n\n")[0]
    assert tuple(re.findall(r'^\| `"(\w+)"`', table, re.MULTILINE)) == foundation_names()


def test_models_saved_when_settings_stood_beside_the_name_are_read(wave, recordings, tmp_path, monkeypatch) -> None:
    from fimp_sc.model.io import _folder

    FIMP.setup_mudata(recordings)
    model = FIMP(recordings, foundation=load("wave", wave[0], train="lora:2", neighbor_states="static"))
    describe = _folder.describe

    def former(model) -> dict:
        config = describe(model)
        handle = config["init_params"].pop("foundation")
        config["init_params"] |= {
            "foundation": handle["name"], "checkpoint": "wave", "train_foundation": handle["train"],
            "source": handle["neighbor_states"], "aggregate": "layer", "species": "human", "orthologs": None,
            "vocabulary_key": None,
        }  # fmt: skip
        return json.loads(json.dumps(config))

    monkeypatch.setattr(_folder, "describe", former)
    monkeypatch.setattr(_folder, "model_card", lambda *_: "")
    model.save_pretrained(tmp_path / "model")
    again = FIMP.from_pretrained(tmp_path / "model", recordings, accelerator="cpu")
    assert (again.foundation.train, again.foundation.neighbor_states) == ("lora:2", "static")
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())
