"""Folders of models that are not in order, or that another version wrote."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import FILES, forge, read_config, set_entry, to_first_version, write_config

import fimp_sc
from fimp_sc.model import FIMP
from fimp_sc.pretrained import CheckpointError, load


def refusal(folder: Path) -> str:
    """Return the message of the refusal; the object to bind stays as it is."""
    adata = ad.AnnData(np.ones((3, 2), dtype=np.float32))
    with pytest.raises(CheckpointError) as caught:
        FIMP.from_pretrained(folder, adata, accelerator="cpu")
    assert dict(adata.uns) == {}
    return str(caught.value)


def check_same(found: FIMP, wanted: FIMP) -> None:
    np.testing.assert_array_equal(found.get_latent_representation(), wanted.get_latent_representation())
    np.testing.assert_array_equal(found.get_expression(), wanted.get_expression())
    assert found.predict(soft=True).equals(wanted.predict(soft=True))


@pytest.mark.parametrize("file", FILES[1:])
@pytest.mark.parametrize("damage", ["empty", "cut", "binary", "folder"])
def test_damaged_files_are_refused(copied, file: str, damage: str) -> None:
    path, content = copied / file, (copied / file).read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "cut": content[:-20], "binary": b"\xff\xfe\x80\x04" * 10}[damage])
    assert file in refusal(copied)


def test_every_bit_of_the_weights_counts(copied) -> None:
    path = copied / "model.safetensors"
    content = path.read_bytes()
    for position in np.random.default_rng(0).integers(8, len(content), 60).tolist():
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        assert repr(str(path)) in refusal(copied)


def test_weights_alone_are_the_model(copied, trained) -> None:
    for name in ("config.json", "README.md"):
        (copied / name).unlink()
    check_same(FIMP.load(copied, trained.adata.copy(), accelerator="cpu"), trained)
    (copied / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(copied)


def test_line_ends_of_another_system_are_fine(copied, trained) -> None:
    path = copied / "config.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert list(FIMP.from_pretrained(copied, accelerator="cpu").genes) == list(trained.genes)


def test_any_change_of_the_configuration_is_refused(copied) -> None:
    config = read_config(copied)
    assert len(config["classes"]) == 4
    assert config["init_params"]["n_heads"] == 2
    changes = {
        "classes": config["classes"][::-1], "init_params.n_heads": 4, "init_params.n_layers": 10**12,
        "init_params.self_loops": False, "input_scale": "log", "genes": config["genes"][::-1],
        "setup_args.layer": "other", "history": {}, "is_trained": False, "sequences": {"a": {}}, "class": "SCVI",
        "versions": {}, "n_cells": 1, "n_genes": 12, "sha256": {}, "extra": 1, "format": "other", "format_version": 1,
    }  # fmt: skip
    assert {path.split(".")[0] for path in changes} >= set(config) - {"init_params"}
    for path, value in changes.items():
        changed = read_config(copied)
        set_entry(changed, path, value)
        write_config(copied, changed)
        message = refusal(copied)
        assert repr(str(copied / "config.json")) in message, path
        assert "'sha256'" in message
        write_config(copied, config)
    for name in config:
        write_config(copied, {other: value for other, value in config.items() if other != name})
        assert "'sha256'" in refusal(copied), name


def test_configuration_of_another_save_does_not_count(copied, trained, tmp_path) -> None:
    """As a save leaves it that is killed between its two files."""
    forge(Path(tmp_path / "copied"), lambda config: config.update(classes=config["classes"][::-1]))
    other = (copied / "config.json").read_bytes()
    trained.save(copied, overwrite=True)
    (copied / "config.json").write_bytes(other)
    with pytest.warns(UserWarning, match="is not of the model beside it"):
        loaded = FIMP.load(copied, accelerator="cpu")
    assert loaded.classes == trained.classes


TENSORS = {
    "missing": (lambda t: t.pop("gene_mean"), "gene_mean"),
    "unknown": (lambda t: t.update(extra=torch.zeros(2)), "extra"),
    "shape": (lambda t: t.update(gene_mean=torch.zeros(39)), "gene_mean"),
}


@pytest.mark.parametrize("change", TENSORS)
def test_other_tensors_are_refused(copied, change: str) -> None:
    edit, name = TENSORS[change]
    tensors = load_file(copied / "model.safetensors")
    edit(tensors)
    save_file(tensors, copied / "model.safetensors")
    assert "'sha256'" in refusal(copied)
    forge(copied, change_tensors=lambda t: None)
    message = refusal(copied)
    assert repr(str(copied / "model.safetensors")) in message
    assert name in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "other"),
        ("format_version", 3),
        ("class", "SCVI"),
        ("genes", ["A", "B"]),
        ("classes", 7),
        ("sequences", {"a": {}}),
        ("setup_args", None),
        ("init_params", []),
        ("init_params.extra", 1),
        ("init_params.adata", None),
        ("init_params.registry", {}),
        ("init_params.n_latent", "16"),
        ("init_params.n_latent", -4),
        ("init_params.n_latent", 8),
        ("init_params.n_latent", 10**5),
        ("init_params.n_latent", 10**12),
        ("init_params.n_layers", 3),
        ("init_params.n_layers", 10**12),
        ("init_params.n_heads", 10**12),
        ("init_params.layer", "other"),
        ("init_params.architecture", [1]),
        ("init_params.architecture", {"vector_width": 10**12}),
        ("init_params.foundation", "scgpt"),
        ("history.train_loss", [1.0]),
    ],
)
def test_forged_configurations_are_refused_at_once(copied, path: str, value: object) -> None:
    """Their checksums fit, and nothing of the sizes that they state may be made."""
    forge(copied, lambda config: set_entry(config, path, value))
    assert repr(str(copied / "model.safetensors")) in refusal(copied)


# The small checkpoint has few of the genes of the tissue.
@pytest.mark.filterwarnings("ignore:.*knows 8 of the 40 genes")
def test_sizes_of_a_foundation_model_are_those_of_its_weights(copied, shared_data, make_model, tissue) -> None:
    checkpoint = shared_data / "scgpt_tiny_checkpoint"
    model = make_model(tissue, foundation=load("scgpt", checkpoint, train="lora:2"), n_tokens=8)
    for path, value in (
        ("init_params.foundation.train", "lora:1000000000"),
        ("init_params.architecture.foundation.nlayers", 10**12),
        ("init_params.architecture.foundation.embsize", 10**6),
        ("init_params.architecture.foundation.d_hid", 10**9),
    ):
        model.save(copied, overwrite=True)
        FIMP.load(copied, accelerator="cpu")
        forge(copied, lambda config, path=path, value=value: set_entry(config, path, value))
        assert repr(str(copied / "model.safetensors")) in refusal(copied)


def test_arguments_that_the_writer_did_not_know_take_their_defaults(copied, trained) -> None:
    def forget(config: dict) -> None:
        del config["init_params"]["use_weights"], config["setup_args"]["batch_key"]

    forge(copied, forget)
    loaded = FIMP.from_pretrained(copied, trained.adata.copy(), accelerator="cpu")
    assert loaded.init_params_["non_kwargs"]["use_weights"] is False
    check_same(loaded, trained)


def test_a_newer_version_is_named(copied) -> None:
    forge(copied, lambda config: config.update(format_version=3))
    assert "upgrade" in refusal(copied)


# The first version of the format --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("sequences", [True, False])
def test_the_first_version_is_read_with_a_warning(copied, trained, ends: str, sequences: bool) -> None:
    """It knew nothing of checksums of the configuration, and at first nothing of sequences."""
    to_first_version(copied)
    if not sequences:
        config = read_config(copied)
        assert config.pop("sequences") == {}
        write_config(copied, config)
    (copied / "genes.txt").write_text((copied / "genes.txt").read_text(), newline=ends)
    with pytest.warns(UserWarning, match="checksum"):
        loaded = FIMP.load(copied, trained.adata.copy(), accelerator="cpu")
    check_same(loaded, trained)
    loaded.save(copied, overwrite=True)
    assert sorted(path.name for path in copied.iterdir()) == FILES
    check_same(FIMP.load(copied, trained.adata.copy(), accelerator="cpu"), trained)


@pytest.mark.parametrize("change", ["order", "name", "fewer", "binary", "missing", "weights", "version"])
def test_changed_files_of_the_first_version_are_refused(copied, change: str) -> None:
    to_first_version(copied)
    genes, weights = (copied / "genes.txt").read_text().split(), bytearray((copied / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    if change == "version":
        write_config(copied, read_config(copied) | {"format_version": 2})
    elif change == "weights":
        (copied / "model.safetensors").write_bytes(weights)
    elif change == "binary":
        (copied / "genes.txt").write_bytes(b"\xff\xfe\x80\x04" * 10)
    elif change == "missing":
        (copied / "genes.txt").unlink()
    else:
        changed = {"order": genes[::-1], "name": ["OTHER", *genes[1:]], "fewer": genes[1:]}[change]
        (copied / "genes.txt").write_text("\n".join(changed) + "\n")
    refusal(copied)


@pytest.mark.filterwarnings("ignore:.*checksum")
def test_sizes_in_the_first_version_are_those_of_the_weights(copied) -> None:
    to_first_version(copied)
    for path, value in (("init_params.n_layers", 10**12), ("init_params.n_latent", 10**9), ("init_params.n_heads", 3)):
        config = read_config(copied)
        set_entry(config, path, value)
        write_config(copied, config)
        refusal(copied)


def test_folders_of_other_programs_are_refused(trained, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        FIMP.from_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors.*model\.save"):
        fimp_sc.tl.embed(trained.adata.copy(), model=tmp_path)
