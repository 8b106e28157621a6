"""Folders of models that are not in order, or that another version wrote."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fimp_sc
from fimp_sc.model import FIMP
from fimp_sc.pretrained import CheckpointError

FILES = ["README.md", "config.json", "genes.txt", "model.safetensors"]


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
    assert config.pop("sequences") == {}, "what the first version of the format did not have"
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
    np.testing.assert_array_equal(loaded.get_latent_representation(), trained.get_latent_representation())
    np.testing.assert_array_equal(loaded.get_expression(), trained.get_expression())
    np.testing.assert_array_equal(loaded.predict(soft=True), trained.predict(soft=True))


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
