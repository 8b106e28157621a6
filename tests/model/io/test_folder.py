"""Models as folders to share: what is in them, and that nothing is lost on the way."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import fimp_sc
from fimp_sc.model import FIMP
from fimp_sc.model.io import _folder
from fimp_sc.model.io._card import model_card
from fimp_sc.pretrained import load

FILES = ["README.md", "config.json", "model.safetensors"]
ONE_EPOCH = {"max_epochs": 1}
# The small checkpoint has few of the genes of the tissue.
FEW_KNOWN = "ignore:.*knows 8 of the 40 genes"
# The section has less than half of the genes.
UNLIKE, FEW_SHARED = "ignore:.*unlike all cells", "ignore:Only 19 of the 40 genes"


@pytest.fixture(scope="module")
def section():
    """Another section with some of the genes, and others."""
    adata = fimp_sc.datasets.toy_tissue(n_obs=60, random_state=5)
    common = adata.X.sum(axis=0).A1.argsort()[::-1][:90]
    adata = adata[:, np.sort(common[::2])].copy()
    fimp_sc.pp.spatial_graph(adata, library_key="section", n_neighbors=4)
    return adata


def results(model: FIMP) -> list[np.ndarray]:
    found = [model.get_latent_representation()]
    if model.is_trained:
        found += [model.get_expression(), model.get_expression(genes=model.genes, scale="counts")]
        found += [model.predict(soft=True).to_numpy(), model.predict()] if model.classes else []
    return found


def check_same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def check_round_trip(model: FIMP, folder: Path, section) -> FIMP:
    loaded = FIMP.from_pretrained(str(folder), accelerator="cpu")
    assert loaded.adata is None
    assert not loaded.module.training
    assert loaded.is_trained == model.is_trained
    check_same(results(FIMP.from_pretrained(folder, model.adata.copy(), accelerator="cpu")), results(model))
    assert set(section.var_names) - set(model.genes)
    assert 0 < len(set(section.var_names) & set(model.genes)) < len(model.genes)
    wanted = results(FIMP.load_query_data(section.copy(), model))
    check_same(results(FIMP.load_query_data(section.copy(), loaded)), wanted)
    check_same(results(FIMP.from_pretrained(folder, section.copy(), accelerator="cpu")), wanted)
    return loaded


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Round trips ----------------------------------------------------------------------------------------------------------


def test_labels_and_sections(trained, saved, section) -> None:
    loaded = check_round_trip(trained, saved, section)
    assert loaded.classes == trained.classes
    assert list(loaded.genes) == list(trained.genes)


@pytest.mark.filterwarnings(UNLIKE)
def test_layer_of_log_values_without_labels(tissue, section, make_model, train, tmp_path) -> None:
    for adata in (tissue, section := section.copy()):
        adata.layers["log"] = adata.X.log1p()
    model = make_model(tissue, {"layer": "log", "batch_key": "section"}, layer="paper", n_layers=1, dropout=0)
    train(model, **ONE_EPOCH).save_pretrained(tmp_path / "model")
    loaded = check_round_trip(model, tmp_path / "model", section)
    assert loaded.classes == []
    assert loaded.registry["setup_args"]["layer"] == "log"


@pytest.mark.filterwarnings(UNLIKE)
def test_vectors_of_genes(tissue, section, make_model, train, tmp_path) -> None:
    rng = np.random.default_rng(0)
    vectors = {gene: rng.normal(size=6) for gene in tissue.var_names[:25]}
    model = make_model(tissue, {"labels_key": "label"}, gene_embeddings=vectors, n_latent=np.int64(16))
    train(model, **ONE_EPOCH).save_pretrained(tmp_path / "model")
    loaded = check_round_trip(model, tmp_path / "model", section)
    assert loaded.init_params_["non_kwargs"]["architecture"] == {"vector_width": 6}


@pytest.mark.filterwarnings(FEW_KNOWN, UNLIKE)
@pytest.mark.parametrize("trained_part", ["frozen", "lora:2"])
def test_foundation_model_without_its_checkpoint(
    tissue, section, make_model, train, shared_data, tmp_path, trained_part: str
) -> None:
    original = shared_data / "scgpt_tiny_checkpoint"
    if not original.is_dir():
        pytest.skip(f"no {original}")
    checkpoint = Path(shutil.copytree(original, tmp_path / "private" / "tiny"))
    foundation = load("scgpt", checkpoint, train=trained_part)
    model = make_model(tissue, {"labels_key": "label"}, foundation=foundation, n_tokens=8)
    train(model, **ONE_EPOCH)
    shutil.rmtree(tmp_path / "private")
    model.save_pretrained(tmp_path / "model")
    loaded = check_round_trip(model, tmp_path / "model", section)
    assert loaded.init_params_["non_kwargs"]["foundation"]["checkpoint"] == "tiny"
    assert not any(b"private" in content for content in contents(tmp_path / "model").values())
    change = "network.stack.layers.0.attention.query"
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    if trained_part != "frozen":
        assert bool(tensors[f"{change}.up"].any())
        assert f"{change}.weight" in tensors
    else:
        assert f"{change}.up" not in tensors
    frozen = [not p.requires_grad for p in loaded.module.parameters()]
    assert frozen == [not p.requires_grad for p in model.module.parameters()]


@pytest.mark.filterwarnings(FEW_KNOWN, FEW_SHARED)
def test_foundation_model_as_it_is(tissue, section, make_model, shared_data, tmp_path) -> None:
    checkpoint = shared_data / "scgpt_tiny_checkpoint"
    if not checkpoint.is_dir():
        pytest.skip(f"no {checkpoint}")
    model = make_model(tissue, foundation=load("scgpt", checkpoint), n_tokens=8)
    model.save_pretrained(tmp_path / "model")
    assert not check_round_trip(model, tmp_path / "model", section).is_trained
    assert "not trained" in (tmp_path / "model" / "README.md").read_text()


def test_everything_known_about_the_data_comes_back(trained, saved) -> None:
    found, wanted = FIMP.from_pretrained(saved, accelerator="cpu").registry, dict(trained.registry)
    del wanted["_scvi_uuid"]
    np.testing.assert_equal(found, {**wanted, "field_registries": dict(wanted["field_registries"])})


def test_weights_keep_their_types_and_are_copies(trained, saved) -> None:
    wanted, found = trained.module.state_dict(), load_file(saved / "model.safetensors")
    assert {value.dtype for value in wanted.values()} == {torch.float32, torch.float64, torch.int64}
    assert {name: value.dtype for name, value in found.items()} == {name: v.dtype for name, v in wanted.items()}
    loaded = FIMP.from_pretrained(saved, accelerator="cpu").module.state_dict()
    for name, value in wanted.items():
        assert torch.equal(loaded[name], value), name


def test_weights_that_share_memory_are_saved(tissue, section, make_model, train, tmp_path) -> None:
    model = train(make_model(tissue), **ONE_EPOCH)
    layers = model.module.network.layers
    layers[0].attention.query.weight = layers[0].attention.key.weight
    layers[1].expand.weight.data = layers[1].expand.weight.data.T.contiguous().T
    model.save_pretrained(tmp_path / "model")
    loaded = check_round_trip(model, tmp_path / "model", section)
    weights = loaded.module.network.layers[0].attention
    assert torch.equal(weights.query.weight, layers[0].attention.key.weight)
    assert torch.equal(loaded.module.network.layers[1].expand.weight, layers[1].expand.weight)


@pytest.mark.parametrize("bound", [False, True])
def test_training_curves_come_back(trained, saved, section, bound: bool) -> None:
    history = FIMP.from_pretrained(saved, section.copy() if bound else None, accelerator="cpu").history
    assert history.keys() == trained.history.keys()
    for name, frame in trained.history.items():
        pd.testing.assert_frame_equal(history[name], frame.astype(float))


def test_saved_again_it_is_the_same(saved, tmp_path) -> None:
    FIMP.from_pretrained(saved, accelerator="cpu").save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)


def test_global_random_state_is_not_touched(saved) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    FIMP.from_pretrained(saved, accelerator="cpu")
    assert torch.equal(torch.rand(2), wanted)


def test_embed_takes_the_folder(trained, saved, section) -> None:
    options = {"library_key": "section", "accelerator": "cpu", "verbose": False}
    found, wanted = section.copy(), section.copy()
    fimp_sc.tl.embed(found, model=str(saved), **options)
    fimp_sc.tl.embed(wanted, model=trained, **options)
    np.testing.assert_array_equal(found.obsm["X_fimp"], wanted.obsm["X_fimp"])


def test_name_on_the_hub(saved, trained, monkeypatch, tmp_path) -> None:
    hub = types.ModuleType("huggingface_hub")
    asked = []
    hub.snapshot_download = lambda name, **_: (asked.append(name), str(saved))[1]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    model = FIMP.from_pretrained("owner/name", accelerator="cpu")
    assert asked == ["owner/name"]
    assert list(model.genes) == list(trained.genes)


# Files ----------------------------------------------------------------------------------------------------------------


def test_folder_holds_plain_data_only(trained, saved) -> None:
    assert sorted(path.name for path in saved.iterdir()) == FILES
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1  # all can be read by whom one of them can
    for path in saved.iterdir():
        assert not zipfile.is_zipfile(path)
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert config["n_genes"] == 40
    assert config["genes"] == list(trained.genes)
    # A header of JSON, and tensors that fill the rest without a gap.
    content = (saved / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert json.loads(header.pop("__metadata__")["config"]) == config
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert [end for _, end in spans[:-1]] == [start for start, _ in spans[1:]]
    assert (spans[0][0], 8 + length + spans[-1][1]) == (0, len(content))


def test_card_says_what_the_model_is(saved, trained) -> None:
    text = (saved / "README.md").read_text(encoding="utf-8")
    front = text.split("---\n")[1].splitlines()
    assert {"library_name: fimp-sc", "license: unknown", "tags:", "- fimp-sc"} <= set(front)
    for part in ("from_pretrained(", "arXiv:2210.09475", "cells: 120", "`Dendritic`", fimp_sc.__version__, "after 2"):
        assert part in text
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 3
    compile(code, "card", "exec")


def test_card_keeps_names_inside_their_quotes(saved) -> None:
    config = json.loads((saved / "config.json").read_text())
    text = model_card({**config, "classes": ["a`b\n# c"], "genes": ["x`\n---"]}, 7)
    assert "`a'b # c`" in text
    assert "`x' ---`" in text
    assert len([line for line in text.splitlines() if line == "---"]) == 2


# Writing --------------------------------------------------------------------------------------------------------------


def test_a_model_is_replaced_only_on_request(trained, copied) -> None:
    before = contents(copied)
    (copied / "config.json").write_text("other\n")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        trained.save_pretrained(copied)
    assert (copied / "config.json").read_text() == "other\n"
    trained.save_pretrained(copied, overwrite=True)
    assert contents(copied) == before
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_other_files_are_never_replaced(trained, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        trained.save_pretrained(tmp_path, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        trained.save_pretrained(tmp_path / "notes.txt", overwrite=True)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_empty_and_linked_folders_are_filled(trained, saved, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    trained.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "empty") == contents(saved)


@pytest.mark.parametrize("broken", ["card", "rename"])
def test_nothing_is_left_when_writing_fails(trained, copied, monkeypatch, broken: str) -> None:
    before = contents(copied)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    if broken == "card":
        monkeypatch.setattr(_folder, "model_card", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail)
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        trained.save_pretrained(copied, overwrite=True)
    with pytest.raises(OSError, match="disk full"):
        trained.save_pretrained(copied.parent / "new")
    assert contents(copied) == before
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_what_could_not_be_read_is_not_written(tissue, make_model, tmp_path) -> None:
    model = make_model(tissue)
    model.module.value_head.bias.data[3] = np.nan
    with pytest.raises(ValueError, match=r"value_head\.bias.*diverged"):
        model.save_pretrained(tmp_path / "model")
    model.module.value_head.bias.data[3] = 0
    model.registry["field_registries"]["X"]["state_registry"]["column_names"] = np.array(["a", *["b"] * 39])
    with pytest.raises(ValueError, match="'b' is there twice"):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_names_of_genes_may_hold_anything(tissue, make_model, tmp_path) -> None:
    tissue.var_names = ["line\nbreak", 'ü\u2028 "\\', *tissue.var_names[2:]]
    make_model(tissue).save(tmp_path / "model")
    assert list(FIMP.load(tmp_path / "model", accelerator="cpu").genes) == list(tissue.var_names)
