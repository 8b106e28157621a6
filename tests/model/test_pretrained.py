"""Models as folders to share: what is in them, that nothing is lost on the way, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import sys
import types
import zipfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import fimp_sc
from fimp_sc.model import FIMP, _pretrained
from fimp_sc.model._card import model_card
from fimp_sc.pretrained import CheckpointError

FILES = ["README.md", "config.json", "genes.txt", "model.safetensors"]
ONE_EPOCH = {"max_epochs": 1}


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory) -> Path:
    """The trained model of this folder's tests, saved; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    trained.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copied"))


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


def test_layer_of_log_values_without_labels(tissue, section, make_model, train, tmp_path) -> None:
    for adata in (tissue, section := section.copy()):
        adata.layers["log"] = adata.X.log1p()
    model = make_model(tissue, {"layer": "log", "batch_key": "section"}, layer="paper", n_layers=1, dropout=0)
    train(model, **ONE_EPOCH).save_pretrained(tmp_path / "model")
    loaded = check_round_trip(model, tmp_path / "model", section)
    assert loaded.classes == []
    assert loaded.registry["setup_args"]["layer"] == "log"


def test_vectors_of_genes(tissue, section, make_model, train, tmp_path) -> None:
    rng = np.random.default_rng(0)
    vectors = {gene: rng.normal(size=6) for gene in tissue.var_names[:25]}
    model = make_model(tissue, {"labels_key": "label"}, gene_embeddings=vectors, n_latent=np.int64(16))
    train(model, **ONE_EPOCH).save_pretrained(tmp_path / "model")
    loaded = check_round_trip(model, tmp_path / "model", section)
    assert loaded.init_params_["non_kwargs"]["architecture"] == {"vector_width": 6}


@pytest.mark.parametrize("trained_part", ["frozen", "lora:2"])
def test_foundation_model_without_its_checkpoint(
    tissue, section, make_model, train, shared_data, tmp_path, trained_part: str
) -> None:
    original = shared_data / "scgpt_tiny_checkpoint"
    if not original.is_dir():
        pytest.skip(f"no {original}")
    checkpoint = Path(shutil.copytree(original, tmp_path / "private" / "tiny"))
    model = make_model(
        tissue, {"labels_key": "label"}, foundation="scgpt", checkpoint=checkpoint, train_foundation=trained_part,
        n_tokens=8,
    )  # fmt: skip
    train(model, **ONE_EPOCH)
    shutil.rmtree(tmp_path / "private")
    model.save_pretrained(tmp_path / "model")
    loaded = check_round_trip(model, tmp_path / "model", section)
    assert loaded.init_params_["non_kwargs"]["checkpoint"] == "tiny"
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


def test_foundation_model_as_it_is(tissue, section, make_model, shared_data, tmp_path) -> None:
    checkpoint = shared_data / "scgpt_tiny_checkpoint"
    if not checkpoint.is_dir():
        pytest.skip(f"no {checkpoint}")
    model = make_model(tissue, foundation="scgpt", checkpoint=checkpoint, n_tokens=8)
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
    assert (saved / "genes.txt").read_text(encoding="utf-8") == "".join(f"{gene}\n" for gene in trained.genes)
    # A header of JSON, and tensors that fill the rest without a gap.
    content = (saved / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
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
    text = model_card({**config, "classes": ["a`b\n# c"]}, ["x`\n---"], 7)
    assert "`a'b # c`" in text
    assert "`x' ---`" in text
    assert len([line for line in text.splitlines() if line == "---"]) == 2


# Writing --------------------------------------------------------------------------------------------------------------


def test_a_model_is_replaced_only_on_request(trained, copied) -> None:
    before = contents(copied)
    (copied / "genes.txt").write_text("other\n")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        trained.save_pretrained(copied)
    assert (copied / "genes.txt").read_text() == "other\n"
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
        monkeypatch.setattr(_pretrained, "model_card", fail)
    else:
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda a, b: fail() if a.suffix == ".part" else rename(a, b))
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
    tissue.var_names = ["line\nbreak", *tissue.var_names[1:]]
    with pytest.raises(ValueError, match=r"line\\nbreak"):
        make_model(tissue).save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# Reading what is not in order -----------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write_config(folder: Path, config: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def agree(folder: Path) -> None:
    """Let the digests fit the files, so that only other checks can refuse them."""
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES[2:]}
    write_config(folder, read_config(folder) | {"sha256": digests})


def refusal(folder: Path) -> str:
    """Return the message of the refusal; the object to bind stays as it is."""
    adata = ad.AnnData(np.ones((3, 2), dtype=np.float32))
    with pytest.raises(CheckpointError) as caught:
        FIMP.from_pretrained(folder, adata, accelerator="cpu")
    assert dict(adata.uns) == {}
    return str(caught.value)


@pytest.mark.parametrize("file", FILES[1:])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "binary"])
def test_damaged_files_are_refused(copied, file: str, damage: str) -> None:
    path, content = copied / file, (copied / file).read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[:-20], "binary": b"\xff\xfe\x80\x04" * 10}[damage])
    assert repr(str(path)) in refusal(copied)


def test_line_ends_of_another_system_are_fine(copied, trained) -> None:
    path = copied / "genes.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert list(FIMP.from_pretrained(copied, accelerator="cpu").genes) == list(trained.genes)


@pytest.mark.parametrize("change", ["more", "twice", "order", "name"])
def test_other_genes_are_refused(copied, change: str) -> None:
    genes = (copied / "genes.txt").read_text().split()
    changed, text = {
        "more": ([*genes, "ONE"], "41 lines"),
        "twice": ([*genes[:-1], genes[0]], f"{genes[0]!r} twice"),
        "order": (genes[::-1], "'sha256'"),
        "name": (["OTHER", *genes[1:]], "'sha256'"),
    }[change]
    (copied / "genes.txt").write_text("\n".join(changed) + "\n")
    if change in ("more", "twice"):
        agree(copied)
    message = refusal(copied)
    assert repr(str(copied / "genes.txt")) in message
    assert text in message


CHANGES = {
    "missing": (lambda t: t.pop("gene_mean"), "no 'gene_mean'"),
    "unknown": (lambda t: t.update(extra=torch.zeros(2)), "unknown 'extra'"),
    "shape": (lambda t: t.update(gene_mean=torch.zeros(39)), "'gene_mean'", "(39,)", "(40,)"),
    "type": (lambda t: t.update(target_sum=t["target_sum"].float()), "'target_sum'", "float32", "float64"),
    "nan": (lambda t: t["value_head.bias"].fill_(np.nan), "'value_head.bias'", "NaN"),
    "integers": (lambda t: t.update(gene_rank=t["gene_rank"].int()), "'gene_rank'", "int32", "int64"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_tensors_are_refused(copied, change: str) -> None:
    edit, *parts = CHANGES[change]
    tensors = load_file(copied / "model.safetensors")
    edit(tensors)
    save_file(tensors, copied / "model.safetensors")
    agree(copied)
    message = refusal(copied)
    assert [part for part in (repr(str(copied / "model.safetensors")), *parts) if part not in message] == []


def test_other_weights_of_the_same_shape_are_refused(copied) -> None:
    path = copied / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    message = refusal(copied)
    assert repr(str(path)) in message
    assert "'sha256'" in message


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("format", "other", "'format'"),
        ("format_version", 2, "newer version"),
        ("format_version", True, "'format_version'"),
        ("class", "SCVI", "'SCVI'"),
        ("extra", 1, "'extra'"),
        ("is_trained", "yes", "'is_trained'"),
        ("n_cells", 0, "'n_cells'"),
        ("n_genes", 12, "'n_genes'"),
        ("input_scale", "auto", "'input_scale'"),
        ("classes", None, "'classes'"),
        ("classes", ["a", "a", "b", "c"], "'classes'"),
        ("classes", ["a", 1, "b", "c"], "'classes'"),
        ("setup_args.extra", "x", "'setup_args.extra'"),
        ("setup_args.library_key", 3, "'setup_args.library_key'"),
        ("init_params.extra", 1, "'init_params.extra'"),
        ("init_params.adata", None, "'init_params.adata'"),
        ("init_params.n_latent", "16", "'init_params.n_latent'"),
        ("init_params.n_latent", -4, "'init_params'"),
        ("init_params.self_loops", 1, "'init_params.self_loops'"),
        ("init_params.layer", "other", "'init_params'"),
        ("init_params.architecture", [1], "'init_params.architecture'"),
        ("init_params.foundation", "scgpt", "'init_params'"),
        ("history.train_loss", [1.0], "'history.train_loss'"),
        ("sha256", [], "'sha256'"),
    ],
)
def test_other_configurations_are_refused(copied, path: str, value: object, text: str) -> None:
    config = read_config(copied)
    *outer, last = path.split(".")
    (config[outer[0]] if outer else config)[last] = value
    write_config(copied, config)
    message = refusal(copied)
    assert repr(str(copied / ("genes.txt" if path == "n_genes" else "config.json"))) in message
    assert text in message


def test_every_entry_of_the_configuration_is_needed(copied) -> None:
    config = read_config(copied)
    for key in config:
        write_config(copied, {name: value for name, value in config.items() if name != key})
        message = refusal(copied)
        assert repr(str(copied / "config.json")) in message
        assert repr(key) in message


def test_arguments_that_the_writer_did_not_know_take_their_defaults(copied, trained) -> None:
    config = read_config(copied)
    del config["init_params"]["source"], config["setup_args"]["batch_key"]
    write_config(copied, config)
    loaded = FIMP.from_pretrained(copied, trained.adata.copy(), accelerator="cpu")
    assert loaded.init_params_["non_kwargs"]["source"] == "evolving"
    check_same(results(loaded), results(trained))


def test_size_and_configuration_that_differ_are_refused(copied) -> None:
    config = read_config(copied)
    config["init_params"]["n_latent"] = 8
    write_config(copied, config)
    message = refusal(copied)
    assert repr(str(copied / "model.safetensors")) in message
    assert "(16," in message
    assert "(8," in message


def test_folders_of_other_programs_are_refused(trained, tmp_path) -> None:
    trained.save(str(tmp_path / "scvi"))
    with pytest.raises(CheckpointError, match=r"FIMP\.load"):
        FIMP.from_pretrained(tmp_path / "scvi")
    with pytest.raises(CheckpointError, match="no folder"):
        FIMP.from_pretrained(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        fimp_sc.tl.embed(trained.adata.copy(), model=tmp_path)
