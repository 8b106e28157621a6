"""Weights read from files that torch and safetensors wrote, and from files that are broken or hostile."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fimp_sc.pretrained.files._files import (
    CheckpointError,
    Weights,
    checkpoint_folder,
    find_weights,
    read_json,
    read_weights,
)

STATE = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.tensor([1.0, -1.0])}


class Touches:
    """Creates a file where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def check(weights: Weights) -> None:
    assert sorted(weights) == sorted(STATE)
    for key, expected in STATE.items():
        assert key in weights
        assert weights.shape(key) == tuple(expected.shape)
        torch.testing.assert_close(weights.take(key, tuple(expected.shape)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "ckpt"])
def test_files_of_torch(tmp_path: Path, ending: str, old: bool) -> None:
    torch.save(STATE, tmp_path / f"x.{ending}", _use_new_zipfile_serialization=not old)
    check(read_weights(tmp_path / f"x.{ending}"))


def test_files_of_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    check(read_weights(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state_dict": state, "optimizer": {"state": {}}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{key}": torch.nn.Parameter(value) for key, value in state.items()},
        lambda state: {**state, "step": 4},
    ],
)
def test_weights_are_found_inside_what_training_programs_save(tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap(STATE), tmp_path / "x.pt")
    check(read_weights(tmp_path / "x.pt"))


def test_a_prefix_that_some_names_lack_stays(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.pt")
    assert read_weights(tmp_path / "x.pt").keys() == ["module.a", "b"]


@pytest.mark.parametrize("old", [False, True])
def test_code_is_not_run(tmp_path: Path, old: bool) -> None:
    target, path = tmp_path / "created", tmp_path / "x.pt"
    torch.save({**STATE, "extra": Touches(target)}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(
        CheckpointError, match=r"x\.pt.*carries code, which was not run: besides tensors it asks for '\w+"
    ) as raised:
        read_weights(path)
    assert not target.exists()
    assert "weights_only" not in str(raised.value)
    torch.load(path, weights_only=False)  # which would have done it
    assert target.exists()


def test_objects_of_other_programs_are_named(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "args": argparse.Namespace(width=3)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace.*state_dict\(\)"):
        read_weights(tmp_path / "x.ckpt")


def test_formats_that_carry_programs_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    with pytest.raises(CheckpointError, match="tar archive"):
        read_weights(tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"")
        archive.writestr("x/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["new.pt", "old.pt", "x.safetensors"])
@pytest.mark.parametrize("keep", [10, 100, -1])
def test_files_cut_short_are_named(tmp_path: Path, name: str, keep: int) -> None:
    if name == "x.safetensors":
        save_file(STATE, tmp_path / name)
    else:
        torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=name == "new.pt")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{name}.*damaged.*Download") as raised:
        read_weights(tmp_path / name)
    assert "weights_only" not in str(raised.value)


def test_a_changed_pickle_is_an_error_or_harmless(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    refused = 0
    for position in range(2, len(entries[pickled]), 7):
        raw = bytearray(entries[pickled])
        raw[position] ^= 0x15
        with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, bytes(raw) if name == pickled else content)
        try:
            read_weights(tmp_path / "y.pt")
        except CheckpointError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"neither of them", "damaged"),
    ],
)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_what_a_failed_download_leaves(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "holds list"), ({"epoch": 1}, "dictionary of 'epoch'"), ({}, "of nothing"), ({"model": {}}, "nothing")],
)
def test_files_without_weights(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "x.pt")


def test_other_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no file"):
        read_weights(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path)
    (tmp_path / "x.h5").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"x\.h5.*expected \.safetensors"):
        read_weights(tmp_path / "x.h5")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_taken_tensors_are_float32(dtype: torch.dtype) -> None:
    taken = Weights(Path("x.pt"), {"a": torch.ones(2, dtype=dtype)}).take("a", (None,))
    torch.testing.assert_close(taken, torch.ones(2), rtol=0, atol=0)


def test_a_missing_tensor_names_the_nearest() -> None:
    weights = Weights(Path("x.pt"), STATE)
    with pytest.raises(CheckpointError, match=r"'x\.pt' has no tensor 'layers\.weight'.*'layer\.weight'"):
        weights.take("layers.weight", (2, 3))


@pytest.mark.parametrize("shape", [(3, 2), (2, None, None), (6,), (None, 4)])
def test_another_shape_is_refused(shape: Any) -> None:
    weights = Weights(Path("x.pt"), STATE)
    with pytest.raises(CheckpointError, match=r"'layer\.weight' in 'x\.pt' has the shape \(2, 3\), expected"):
        weights.take("layer.weight", shape)
    assert weights.unused() == list(STATE)
    weights.take("layer.weight", (None, 3))
    assert weights.unused() == ["layer.bias"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    weights = Weights(Path("x.pt"), {"a": torch.tensor([1.0, value, 2.0]), "empty": torch.zeros(0)})
    with pytest.raises(CheckpointError, match=r"'a' in 'x\.pt' is NaN or infinite in 1 of 3"):
        weights.take("a", (3,))
    assert weights.take("empty", (0,)).shape == (0,)


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, dtype=torch.int8), torch.ones(2, dtype=torch.complex64), torch.ones(2).to_sparse()]
)
def test_tensors_of_other_kinds_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="not quantized"):
        Weights(Path("x.pt"), {"a": tensor}).take("a", (2,))


def test_renamed_weights_remember_the_file() -> None:
    weights = Weights(Path("x.pt"), {**STATE, "flag": torch.zeros(1)})
    renamed = weights.renamed(lambda key: key.replace("layer", "block") if "layer" in key else None)
    assert renamed.keys() == ["block.weight", "block.bias"]
    renamed.take("block.bias", (2,))
    assert renamed.unused() == ["block.weight"]
    assert weights.unused() == ["layer.weight", "flag"]
    with pytest.raises(CheckpointError, match=r"'layer\.weight' in 'x\.pt' \(read as 'block\.weight'\)"):
        renamed.take("block.weight", (1, 1))
    with pytest.raises(CheckpointError, match=r"'layer\.bias'.*'layer\.weight'.*same part"):
        weights.renamed(lambda key: "same")


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"ü": [1, {"a": None}]}), encoding="utf-8-sig")
    assert read_json(path) == {"ü": [1, {"a": None}]}
    for raw, message in [(b"[1]", "found list"), (b"{'a': 1}", "not valid JSON"), (b'{"a": "\xff"}', "not valid JSON")]:
        path.write_bytes(raw)
        with pytest.raises(CheckpointError, match=rf"config\.json.*{message}"):
            read_json(path)
    path.write_text('{"a":' + "[" * 200_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_json(path)
    with pytest.raises(CheckpointError, match="There is no file"):
        read_json(tmp_path / "absent.json")


def test_find_weights(tmp_path: Path) -> None:
    (tmp_path / "b.pt").touch()
    (tmp_path / "a.pt").mkdir()
    (tmp_path / "c.pt").touch()
    assert find_weights(tmp_path, ["a.pt", "c.pt", "b.pt"]) == tmp_path / "c.pt"
    with pytest.raises(CheckpointError, match=r"no 'a\.pt' or 'd\.pt'; found there: 'a\.pt', 'b\.pt', 'c\.pt'"):
        find_weights(tmp_path, ["a.pt", "d.pt"])


def test_checkpoint_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint_folder(str(tmp_path)) == tmp_path
    (tmp_path / "best_model.pt").touch()
    with pytest.raises(CheckpointError, match="is a file: pass the folder"):
        checkpoint_folder(tmp_path / "best_model.pt")
    for absent in ["nowhere", "./owner/name", "/owner/name", "a/b/c", Path("owner/name")]:
        with pytest.raises(CheckpointError, match=r"There is no folder '[^']*' \(looked from"):
            checkpoint_folder(absent)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        checkpoint_folder("owner/name")


def test_checkpoint_folder_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        if repo_id != "owner/name":
            raise OSError("Repository Not Found\nand a long explanation")
        assert "*.safetensors" in allow_patterns
        return str(tmp_path)

    hub = types.ModuleType("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert checkpoint_folder("owner/name") == tmp_path
    with pytest.raises(CheckpointError, match=r"\(Repository Not Found\)\. Check the name"):
        checkpoint_folder("owner/other")
