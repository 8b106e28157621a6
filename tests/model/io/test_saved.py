"""Saved models: nothing in a folder is run, and no kill or full disk loses one."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from saved_models import FILES, forge
from scvi.model.base import BaseModelClass

import fimp_sc
from fimp_sc import cli
from fimp_sc.model import FIMP
from fimp_sc.pretrained import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

N_KILLS = int(os.environ.get("FIMP_SC_KILLS", "6"))
QUIET = {"accelerator": "cpu", "verbose": False}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_save_and_load(trained, tmp_path) -> None:
    trained.save(str(tmp_path / "model"))
    assert names(tmp_path / "model") == FILES
    for loaded in (
        FIMP.load(str(tmp_path / "model"), trained.adata.copy(), "cpu"),
        FIMP.from_pretrained(tmp_path / "model", trained.adata.copy(), accelerator="cpu"),
    ):
        np.testing.assert_array_equal(loaded.get_latent_representation(), trained.get_latent_representation())
        np.testing.assert_array_equal(loaded.predict(), trained.predict())
    for unbound in (FIMP.load(tmp_path / "model", False, "cpu"), FIMP.load(tmp_path / "model", accelerator="cpu")):
        assert unbound.adata is None
    registry = FIMP.load_registry(tmp_path / "model")
    assert registry["setup_args"] == trained.registry["setup_args"]


def test_arguments_of_scvi_tools_that_have_no_meaning_are_told(trained, tmp_path) -> None:
    with pytest.raises(ValueError, match="prefix"):
        trained.save(tmp_path / "model", prefix="a_")
    with pytest.raises(ValueError, match="write_h5ad"):
        trained.save(tmp_path / "model", save_anndata=True)
    with pytest.raises(ValueError, match="backup_url: only with trust=True"):
        FIMP.load(tmp_path / "model", backup_url="https://example.org")
    assert names(tmp_path) == []


# Pickles --------------------------------------------------------------------------------------------------------------


class Touches:
    """Creates a file where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def entry_points(adata: Any, folder: Path, tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """Return all that opens the folder of a model."""
    cells = tmp_path / "cells.h5ad"
    adata.write_h5ad(cells)
    options = [str(cells), "--output", str(tmp_path / "out.h5ad"), "--model", str(folder), "--quiet"]
    return {
        "load": lambda: FIMP.load(folder),
        "load with an object": lambda: FIMP.load(str(folder), adata, accelerator="cpu"),
        "load without": lambda: FIMP.load(folder, adata=False),
        "from_pretrained": lambda: FIMP.from_pretrained(folder, adata),
        "load_query_data": lambda: FIMP.load_query_data(adata, folder),
        "load_registry": lambda: FIMP.load_registry(folder),
        "convert_legacy_save": lambda: FIMP.convert_legacy_save(str(folder), str(tmp_path / "converted")),
        "embed": lambda: fimp_sc.tl.embed(adata, model=folder, **QUIET),
        "annotate": lambda: fimp_sc.tl.annotate(adata, "label", model=str(folder), **QUIET),
        "impute": lambda: fimp_sc.tl.impute(adata, model=folder, **QUIET),
        "attention": lambda: fimp_sc.tl.attention(adata, "label", model=folder, **QUIET),
        "cli embed": lambda: sys.exit(cli.main(["embed", *options])),
        "cli annotate": lambda: sys.exit(cli.main(["annotate", *options, "--labels-key", "label"])),
        "cli impute": lambda: sys.exit(cli.main(["impute", *options])),
        "cli attention": lambda: sys.exit(cli.main(["attention", *options, "--groupby", "label"])),
    }


@pytest.mark.parametrize("protocol", ["zip", "plain"])
def test_no_entry_point_runs_what_a_pickle_asks_for(tissue, trained, tmp_path, capsys, protocol: str) -> None:
    folder, marker = tmp_path / "model", tmp_path / "marker"
    BaseModelClass.save(trained, str(folder))
    content = torch.load(folder / "model.pt", weights_only=False) | {"extra": Touches(marker)}
    for name in ("model.pt", "model_params.pt", "attr.pkl"):
        if protocol == "zip":
            torch.save(content, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(content))
    (folder / "var_names.csv").write_text("A,B")
    for name, call in entry_points(tissue, folder, tmp_path).items():
        with pytest.raises((CheckpointError, AttributeError, SystemExit)) as caught:
            call()
        assert not marker.exists(), name
        if caught.type is CheckpointError:
            assert "a pickle, which can run code" in str(caught.value), name
            assert "trust=True" in str(caught.value)
        elif caught.type is SystemExit:
            assert caught.value.code == 2, name
            assert "a pickle, which can run code" in capsys.readouterr().err, name
    assert not (tmp_path / "out.h5ad").exists()
    if protocol == "zip":
        FIMP.load(folder, adata=False, accelerator="cpu", trust=True)
        assert marker.exists(), "the pickle would have done it"


def test_pickles_under_our_own_names_are_not_read(tissue, trained, tmp_path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "marker"
    for replaced in FILES:
        trained.save(folder, overwrite=True)
        (folder / replaced).write_bytes(pickle.dumps(Touches(marker)))
        (folder / "model.pt").write_bytes(pickle.dumps(Touches(marker)))
        for call in entry_points(tissue, folder, tmp_path).values():
            if replaced == "README.md":
                continue  # which nobody reads
            with pytest.raises((CheckpointError, AttributeError, SystemExit)):
                call()
        with pytest.raises(CheckpointError) if replaced != "README.md" else warnings.catch_warnings():
            FIMP.load(folder, accelerator="cpu", trust=True)
        assert not marker.exists()


def test_a_trusted_pickle_of_scvi_tools_is_read_and_converted(trained, tmp_path) -> None:
    folder, adata = tmp_path / "model", trained.adata
    BaseModelClass.save(trained, str(folder), prefix="here_")
    loaded = FIMP.load(folder, adata.copy(), accelerator="cpu", trust=True, prefix="here_")
    np.testing.assert_array_equal(loaded.get_latent_representation(), trained.get_latent_representation())
    (folder / "here_model.pt").rename(folder / "model.pt")
    FIMP.load(folder, adata.copy(), accelerator="cpu", trust=True).save(folder, overwrite=True)
    assert names(folder) == FILES
    loaded = FIMP.load(folder, adata.copy(), accelerator="cpu", trust=True)
    np.testing.assert_array_equal(loaded.predict(), trained.predict())


# Kills and full disks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(saved, tmp_path_factory) -> tuple[FIMP, FIMP]:
    """Two models that differ in weights and classes, bound to no object."""
    folder = tmp_path_factory.mktemp("other") / "model"
    first = FIMP.load(saved, accelerator="cpu")
    first.save(folder)
    forge(folder, lambda config: config.update(classes=config["classes"][::-1]), lambda t: t["gene_mean"].add_(1))
    return first, FIMP.load(folder, accelerator="cpu")


def which(folder: Path, both: tuple[FIMP, FIMP]) -> int:
    """Return which of two models is in a folder, after a look at all of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is not of the model beside it")
        found = FIMP.load(folder, accelerator="cpu")
    same = [
        found.classes == model.classes
        and all(
            torch.equal(value, found.module.state_dict()[name]) for name, value in model.module.state_dict().items()
        )
        for model in both
    ]
    assert sum(same) == 1
    return same.index(True)


def duration(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def run_and_kill(work: Callable[[Callable[[], None]], None], delay: float) -> None:
    """Run ``work`` in a forked process, and kill it ``delay`` seconds after it calls its argument."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 about forks beside threads
        child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - ends with the process
            work(lambda: (os.write(writing, b"x"), None)[1])
        finally:
            os._exit(0)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"x"
        time.sleep(delay)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="kills a forked process")
@pytest.mark.parametrize("way", ["save", "save_pretrained"])
def test_kills_lose_nothing(both, tmp_path, way: str) -> None:
    rng, folder, seen = np.random.default_rng(0), tmp_path / "model", []
    both[0].save(folder)
    longest = 8 * duration(lambda: both[0].save(folder, overwrite=True))

    def save_in_turn(start: Callable[[], None]) -> None:
        start()
        for i in range(10_000):
            getattr(both[(i + 1) % 2], way)(folder, overwrite=True)

    for _ in range(N_KILLS):
        run_and_kill(save_in_turn, rng.uniform(0, longest))
        seen.append(which(folder, both))
    if N_KILLS >= 50:
        assert {*seen} == {0, 1}
    both[1].save(folder, overwrite=True)
    assert which(folder, both) == 1
    assert names(folder) == FILES
    assert names(tmp_path) == ["model"]


@pytest.mark.skipif(sys.platform != "linux", reason="kills a forked process")
def test_kills_of_the_command_line_leave_a_whole_model_or_none(both, tissue, tmp_path, monkeypatch) -> None:
    rng, found = np.random.default_rng(1), []
    tissue.write_h5ad(tmp_path / "cells.h5ad")
    arguments = ["embed", str(tmp_path / "cells.h5ad"), "--output", str(tmp_path / "out.h5ad"), "--quiet"]
    save = FIMP.save
    monkeypatch.setattr(fimp_sc.tl, "embed", lambda *_, **__: None)
    monkeypatch.setattr(fimp_sc.tl, "get_model", lambda *_: both[0])
    assert cli.main([*arguments, "--save-model", str(tmp_path / "warm")]) == 0
    longest = 4 * duration(lambda: both[0].save(tmp_path / "timed"))
    for i in range(N_KILLS):
        folder = tmp_path / "models" / f"{i % 5}"

        def run(start: Callable[[], None], folder: Path = folder) -> None:
            monkeypatch.setattr(FIMP, "save", lambda *args, **how: (start(), save(*args, **how)))
            cli.main([*arguments, "--save-model", str(folder)])

        if folder.exists():  # else the command line refuses
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        run_and_kill(run, rng.uniform(0, longest))
        found.append(folder.exists())
        assert not folder.exists() or which(folder, both) == 0
    if N_KILLS >= 50:
        assert {*found} == {False, True}
    for i in range(5):
        both[1].save(tmp_path / "models" / f"{i}", overwrite=True)
    assert names(tmp_path / "models") == [str(i) for i in range(5)]


@pytest.mark.skipif(sys.platform != "linux", reason="limits a forked process")
@pytest.mark.parametrize("limit", [0, 100, 20_000])
def test_what_cannot_be_written_leaves_the_old(both, tmp_path, limit: int) -> None:
    """The system refuses to write more than ``limit`` bytes, as a full disk does."""
    folder, told = tmp_path / "model", tmp_path / "told"
    both[0].save(folder)
    assert (folder / "model.safetensors").stat().st_size > 20_000
    told.touch()

    def fill(start: Callable[[], None]) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with told.open("w") as file:
            for target in (folder, tmp_path / "new"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                try:
                    both[1].save(target, overwrite=True)
                except OSError as error:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
                    file.write(f"{error}\n")
        start()

    run_and_kill(fill, 0)
    for line, target in zip(told.read_text().splitlines(), (folder, tmp_path / "new"), strict=True):
        assert line.endswith(f"File too large; nothing was written to the folder: {str(target)!r}")
    assert which(folder, both) == 0
    assert names(folder) == FILES
    assert names(tmp_path) == ["model", "told"]


def test_nobody_writes_between_two_looks(both, tmp_path) -> None:
    """A reader beside a writer finds one model or the other."""
    folder, done = tmp_path / "model", tmp_path / "done"
    both[0].save(folder)
    code = (
        "import sys, pathlib; from fimp_sc._files import write_files\n"
        "folder, done = map(pathlib.Path, sys.argv[1:3])\n"
        "contents = [{n: pathlib.Path(f, n).read_bytes() for n in sys.argv[5:]} for f in sys.argv[3:5]]\n"
        "i = 0\n"
        "while not done.exists():\n"
        "    write_files(folder, contents[i % 2]); i += 1\n"
    )
    for i, model in enumerate(both):
        model.save(tmp_path / f"{i}")
    order = ["model.safetensors", "config.json", "README.md"]
    arguments = [str(folder), str(done), str(tmp_path / "0"), str(tmp_path / "1"), *order]
    writer = subprocess.Popen([sys.executable, "-c", code, *arguments])
    try:
        seen = {which(folder, both) for _ in range(40)}
    finally:
        done.touch()
        assert writer.wait(60) == 0
    assert seen == {0, 1}
    assert load_file(folder / "model.safetensors").keys() == both[0].module.state_dict().keys()
