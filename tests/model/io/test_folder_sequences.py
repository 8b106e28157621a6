"""Models of signals and images as folders to share."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anndata import AnnData
from saved_models import forge, read_config

from fimp_sc.model import FIMP
from fimp_sc.pretrained import CheckpointError

TRAIN = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}
SETUPS = {
    "fmri": ({"labels_key": "lobe"}, {"token_size": 5}),
    "image": ({"labels_key": "site", "modality": "image"}, {"token_size": 3}),
    "joint": (
        {"labels_key": "kind", "modality": ["rna", "image", "bold"]},
        {"n_tokens": 6, "token_size": {"image": 3, "bold": 4}},
    ),
}
STATES = {
    "fmri": {"fmri": {"kind": "signal", "size": [47], "n_coordinates": 3}},
    "image": {"image": {"kind": "patch", "size": [8, 9, 3], "n_coordinates": 0}},
    "joint": {
        "image": {"kind": "patch", "size": [6, 6, 1], "n_coordinates": 0},
        "bold": {"kind": "signal", "size": [12], "n_coordinates": 2},
    },
}


@pytest.fixture(scope="module")
def models(_recordings, _pictures, _joint, copied_mudata, tmp_path_factory):
    """By name: a trained model and the folder where it is; not to be changed."""
    made = {}
    for name, mdata in (("fmri", _recordings), ("image", _pictures), ("joint", _joint)):
        setup, how = SETUPS[name]
        mdata, folder = copied_mudata(mdata), tmp_path_factory.mktemp("saved") / name
        FIMP.setup_mudata(mdata, **setup)
        model = make(mdata, how)
        model.train(**TRAIN)
        model.save_pretrained(folder)
        made[name] = model, folder
    return made


def make(mdata: Any, how: dict) -> FIMP:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*are left out")
        return FIMP(mdata, n_latent=16, n_heads=2, **how)


def results(model: FIMP) -> list[np.ndarray]:
    found = [model.get_latent_representation(), model.predict(soft=True).to_numpy()]
    found += [model.get_reconstruction(modality=name) for name in model.module.sequences]
    return found + ([model.get_expression()] if len(model.genes) else [])


@pytest.mark.parametrize("name", SETUPS)
def test_nothing_is_lost(models, name: str, copied_mudata) -> None:
    model, folder = models[name]
    loaded = FIMP.from_pretrained(folder, copied_mudata(model.adata), accelerator="cpu")
    assert loaded.token_sizes == model.token_sizes
    assert loaded.module.sequences == model.module.sequences
    assert loaded.is_trained
    for ours, expected in zip(results(loaded), results(model), strict=True):
        np.testing.assert_array_equal(ours, expected)
    unbound = FIMP.from_pretrained(folder, accelerator="cpu")
    assert unbound.adata is None
    again = FIMP.load_query_data(copied_mudata(model.adata), unbound)
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())


@pytest.mark.parametrize("name", SETUPS)
def test_saved_again_it_is_the_same(models, name: str, tmp_path) -> None:
    _, folder = models[name]
    FIMP.from_pretrained(folder, accelerator="cpu").save_pretrained(tmp_path / "again")
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", SETUPS)
def test_what_is_read_is_written_down(models, name: str) -> None:
    model, folder = models[name]
    config = read_config(folder)
    assert config["sequences"] == STATES[name]
    genes = len(model.genes)
    assert config["n_genes"] == genes == (14 if name == "joint" else 0)
    assert (config["input_scale"] is None) == (not genes)
    assert config["genes"] == list(model.genes)
    wanted = {"fmri": None, "image": ["image"], "joint": ["rna", "image", "bold"]}[name]
    assert config["setup_args"]["modality"] == wanted


@pytest.mark.parametrize("name", SETUPS)
def test_card_tells_what_is_read(models, name: str) -> None:
    card = (models[name][1] / "README.md").read_text(encoding="utf-8")
    part = card.split("## Signals and images\n\n")[1].split("\n\n")[0].splitlines()
    expected = {
        "fmri": ["- `fmri`: `signal`, time points: 47"],
        "image": ["- `image`: `patch`, height: 8, width: 9, channels: 3"],
        "joint": [
            "- `image`: `patch`, height: 6, width: 6, channels: 1",
            "- `bold`: `signal`, time points: 12",
        ],
    }
    assert part == expected[name]
    assert ("## Genes" in card) == (name == "joint")
    assert "# FIMP model of a graph" in card


@pytest.mark.parametrize("name", ["fmri", "image"])
def test_a_modality_alone_can_be_read(models, name: str) -> None:
    model, folder = models[name]
    adata = model.adata[name].copy()
    loaded = FIMP.from_pretrained(folder, adata, accelerator="cpu")
    np.testing.assert_allclose(loaded.get_latent_representation(), model.get_latent_representation(), atol=1e-6)


WRONG = [
    None, [], "signal", {}, {"kind": "signal", "size": [47]},
    {"kind": "sound", "size": [47], "n_coordinates": 3},
    {"kind": "signal", "size": 47, "n_coordinates": 3},
    {"kind": "signal", "size": [], "n_coordinates": 3},
    {"kind": "signal", "size": [0], "n_coordinates": 3},
    {"kind": "signal", "size": [47.0], "n_coordinates": 3},
    {"kind": "signal", "size": [10**12], "n_coordinates": 3},
    {"kind": "signal", "size": [47], "n_coordinates": 1},
    {"kind": "signal", "size": [47], "n_coordinates": None},
    {"kind": "signal", "size": [47], "n_coordinates": 10**12},
    {"kind": "patch", "size": [47], "n_coordinates": 3},
    {"kind": ["signal"], "size": [47], "n_coordinates": 3},
    {"kind": "signal", "size": [3], "n_coordinates": 3},  # shorter than a token
    {"kind": "signal", "size": [23], "n_coordinates": 3},  # not as many tokens as there are positions
    {"kind": "signal", "size": [47], "n_coordinates": 2},  # the weights say 3
]  # fmt: skip


@pytest.mark.parametrize("state", WRONG)
def test_wrong_entries_are_refused(models, state, tmp_path) -> None:
    folder = Path(shutil.copytree(models["fmri"][1], tmp_path / "copy"))
    forge(folder, lambda config: config["sequences"].update(fmri=state))
    adata = AnnData(np.ones((3, 2), dtype=np.float32))
    with pytest.raises(CheckpointError, match=r"model\.safetensors|the kind 'sound'"):
        FIMP.from_pretrained(folder, adata, accelerator="cpu")
    assert dict(adata.uns) == {}


def test_a_kind_that_is_not_known_here_is_named(models, tmp_path) -> None:
    folder = Path(shutil.copytree(models["fmri"][1], tmp_path / "copy"))
    forge(folder, lambda config: config["sequences"]["fmri"].update(kind="sound"))
    with pytest.raises(CheckpointError, match=r"the kind 'sound'.*register_kind"):
        FIMP.from_pretrained(folder, accelerator="cpu")


@pytest.mark.parametrize("sequences", [[], None, {}, "fmri"])
def test_without_what_is_read_nothing_can_be_built(models, sequences, tmp_path) -> None:
    folder = Path(shutil.copytree(models["image"][1], tmp_path / "copy"))
    forge(folder, lambda config: config.update(sequences=sequences))
    with pytest.raises(CheckpointError):
        FIMP.from_pretrained(folder, accelerator="cpu")


def test_size_of_tokens_must_fit(models, tmp_path) -> None:
    folder = Path(shutil.copytree(models["joint"][1], tmp_path / "copy"))
    for wrong in ({"image": 3, "bold": 99}, {"image": 0, "bold": 4}, {"image": "3", "bold": 4}, [3, 4], 2.5):
        forge(folder, lambda config, wrong=wrong: config["init_params"].update(token_size=wrong))
        with pytest.raises(CheckpointError, match="No model can be built"):
            FIMP.from_pretrained(folder, accelerator="cpu")
