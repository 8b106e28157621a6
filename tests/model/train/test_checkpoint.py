"""A training that was killed goes on from its checkpoint, to the result that it would have had."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback

from fimp_sc.model import FIMP
from fimp_sc.model.train._plan import frozen
from fimp_sc.pretrained.files._weights import CheckpointError

SCRIPT = """
import os, signal, sys
import numpy as np, torch
import fimp_sc
from lightning.pytorch import Callback

class Killed(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.current_epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)

def trained(callbacks=(), checkpoint=None):
    adata = fimp_sc.datasets.toy_tissue(n_obs=120, random_state=1)
    fimp_sc.pp.spatial_graph(adata, library_key="section")
    fimp_sc.model.FIMP.setup_anndata(adata, labels_key="cell_type", library_key="section")
    model = fimp_sc.model.FIMP(adata, n_latent=16, n_heads=2)
    how = {"accelerator": "cpu", "batch_size": 32, "enable_progress_bar": False, "validation_size": 0.3}
    model.train(5, callbacks=list(callbacks), checkpoint=checkpoint, **how)
    weights = {name: value.numpy() for name, value in model.module.state_dict().items()}
    curves = {"curve " + name: curve.to_numpy(dtype=float) for name, curve in model.history.items()}
    return weights | curves | {"embedding": model.get_latent_representation()}

torch.set_num_threads(1)
if sys.argv[1] == "killed":
    trained([Killed()], sys.argv[2])
else:
    whole, resumed = trained(), trained(checkpoint=sys.argv[2])
    np.savez(sys.argv[3], differ=[n for n in whole if not np.array_equal(whole[n], resumed[n], equal_nan=True)],
             names=[*whole], epochs=len(whole["curve train_loss"]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path) -> None:
    folder, result = tmp_path / "kept", tmp_path / "result.npz"
    killed = run("killed", str(folder))
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert torch.load(folder / "training.ckpt", weights_only=True)["epoch"] == 2, "one epoch is lost at most"
    resumed = run("resumed", str(folder), str(result))
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    found = np.load(result)
    assert int(found["epochs"]) == 5
    assert found["differ"].tolist() == []
    assert {"embedding", "curve validation_loss", "network.embedding.loading"} <= set(found["names"].tolist())


class Stops(Callback):
    """Fails in an epoch, once it has written what it writes."""

    def __init__(self, epoch: int, hook: str) -> None:
        def stop(trainer, *args) -> None:
            if trainer.current_epoch == epoch:
                raise InterruptedError

        setattr(self, hook, stop)


def state(model: FIMP) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def assert_same(model: FIMP, other: FIMP) -> None:
    a, b = model.module.state_dict(), other.module.state_dict()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert list(model.history) == list(other.history)
    for name, curve in model.history.items():
        pd.testing.assert_frame_equal(curve, other.history[name], check_exact=True)


def stopped(train, model: FIMP, folder: Path, epoch: int, hook: str = "on_train_batch_end", **how) -> None:
    with pytest.raises(InterruptedError):
        train(model, checkpoint=folder, callbacks=[Stops(epoch, hook)], **how)


HOW = {"max_epochs": 4, "validation_size": 0.3}


@pytest.mark.parametrize(
    ("epoch", "hook", "how"),
    [
        (0, "on_train_batch_end", {}),
        (1, "on_train_batch_end", {}),
        (2, "on_validation_batch_end", {}),
        (3, "on_train_epoch_end", {}),
        (4, "on_train_end", {}),
        (2, "on_train_epoch_end", {"check_val_every_n_epoch": 2}),
        (2, "on_train_batch_end", {"validation_size": 0}),
        (2, "on_train_batch_end", {"num_workers": 1}),
        (2, "on_train_batch_end", {"early_stopping": False, "accumulate_grad_batches": 2}),
    ],
)
def test_it_does_not_matter_where_a_training_stopped(tissue, make_model, train, tmp_path, epoch, hook, how) -> None:
    setup, how = {"labels_key": "label"}, {**HOW, **how}
    whole = train(make_model(tissue.copy(), setup), **how)
    stopped(train, make_model(tissue.copy(), setup), tmp_path / "kept", epoch, hook, **how)
    assert_same(train(make_model(tissue, setup), checkpoint=tmp_path / "kept", **how), whole)


def test_the_best_weights_may_be_older_than_the_checkpoint(tissue, make_model, train, tmp_path) -> None:
    setup, how = {"labels_key": "label"}, {**HOW, "early_stopping": False, "plan_kwargs": {"lr": 10.0, "lr_head": 10.0}}
    whole = train(make_model(tissue.copy(), setup), **how)
    assert whole.history["validation_loss"]["validation_loss"].astype(float).to_numpy().argmin() < 2
    stopped(train, make_model(tissue.copy(), setup), tmp_path, 2, **how)
    assert_same(train(make_model(tissue, setup), checkpoint=tmp_path, **how), whole)


def test_a_training_that_stopped_early_is_not_gone_on_with(tissue, make_model, train, tmp_path, caplog) -> None:
    """But for the last epoch, however often it is called."""
    how = {"max_epochs": 30, "validation_size": 0.3, "early_stopping_patience": 1}
    how["plan_kwargs"] = {"lr": 0.3, "lr_loadings": 0.3}
    whole = train(make_model(tissue.copy()), **how)
    n_epochs = len(whole.history["train_loss"])
    assert n_epochs < 30
    steps = []
    callback = Callback()
    callback.on_train_epoch_start = lambda trainer, plan: steps.append(trainer.current_epoch)
    with caplog.at_level("INFO", logger="fimp_sc"):
        for _ in range(2):
            steps.clear()
            again = train(make_model(tissue.copy()), checkpoint=tmp_path / "kept", callbacks=[callback], **how)
            assert_same(again, whole)
    assert steps == [n_epochs - 1]
    assert f"Going on with the training in {tmp_path / 'kept'}, after epoch {n_epochs - 1}." in caplog.messages
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["training.ckpt"]


def test_a_further_training_goes_on_too(tissue, make_model, train, tmp_path) -> None:
    models = [train(make_model(tissue.copy(), {"labels_key": "label"}), max_epochs=2) for _ in range(2)]
    before = state(models[1])
    train(models[0], **HOW)
    stopped(train, models[1], tmp_path, 2, **HOW)
    assert all(torch.equal(before[name], value) for name, value in state(models[1]).items())
    train(models[1], checkpoint=tmp_path, **HOW)
    assert_same(models[1], models[0])
    assert len(models[1].history["train_loss"]) == 6


def test_signals_images_and_expression_together(joint, copied_mudata, train, tmp_path) -> None:
    def made() -> FIMP:
        mdata = copied_mudata(joint)
        FIMP.setup_mudata(mdata, modality=["rna", "image", "bold"], labels_key="kind")
        return FIMP(mdata, n_latent=16, n_heads=2, n_layers=1, token_size={"image": 3, "bold": 4})

    how = {"max_epochs": 3, "batch_size": 8, "validation_size": 0.3}
    whole = train(made(), **how)
    stopped(train, made(), tmp_path, 2, **how)
    assert_same(train(made(), checkpoint=tmp_path, **how), whole)


@pytest.mark.parametrize("trained", ["frozen", "last:1", "lora"])
def test_frozen_weights_are_not_written(tissue, make, train, tmp_path, trained) -> None:
    how = {"max_epochs": 3, "validation_size": 0.3}
    whole = train(make(tissue.copy(), train=trained), **how)
    stopped(train, make(tissue.copy(), train=trained), tmp_path, 2, **how)
    kept = torch.load(tmp_path / "training.ckpt", weights_only=True)
    fixed = {f"module.{name}" for name in frozen(whole.module)}
    assert fixed
    for weights in (kept["state_dict"], kept["current_model_state"]):
        assert {name for name in (f"module.{n}" for n in whole.module.state_dict()) if name not in fixed} == set(
            weights
        )
    assert_same(train(make(tissue, train=trained), checkpoint=tmp_path, **how), whole)


@pytest.fixture(scope="module")
def _kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def kept(_kept, tissue, make_model, train) -> Path:
    """A folder with a training of the tissue with labels, stopped in epoch 2."""
    if not (_kept / "training.ckpt").exists():
        stopped(train, make_model(tissue.copy(), {"labels_key": "label"}), _kept, 2, **HOW)
    return _kept


def one_value(adata) -> None:
    adata.X[3, 4] = adata.X[3, 4] + 1


def one_edge(adata) -> None:
    graph = adata.obsp["spatial_connectivities"].tolil()
    graph[0, 119] = 1
    adata.obsp["spatial_connectivities"] = graph.tocsr()


def one_label(adata) -> None:
    adata.obs.loc[adata.obs["label"].dropna().index[7], "label"] = adata.obs["label"].cat.categories[0]


def one_place(adata) -> None:
    adata.obsm["spatial"][5] += 0.5


@pytest.mark.parametrize(
    ("change", "setup", "model", "how", "named"),
    [
        (one_value, {}, {}, {}, "values"),
        (one_edge, {}, {}, {}, "graph"),
        (one_place, {}, {}, {}, "graph"),
        (one_label, {}, {}, {}, "labels"),
        (None, {"batch_key": "section", "center": "batch"}, {}, {}, "values"),
        (None, {}, {"random_state": 1}, {}, "model, split"),
        (None, {}, {"dropout": 0.1}, {}, "model"),
        (None, {}, {}, {"max_epochs": 5}, "max_epochs"),
        (None, {}, {}, {"validation_size": 0.2}, "split"),
        (None, {}, {}, {"hidden": np.eye(120, 40) > 0}, "hidden"),
        (None, {}, {}, {"plan_kwargs": {"lr": 1e-4}, "class_balance": 1.0}, "class_balance, plan_kwargs"),
        (None, {}, {}, {"precision": "bf16-mixed"}, "precision"),
    ],
)
def test_another_training_is_refused_before_it_begins(
    tissue, make_model, train, kept, change, setup, model, how, named
) -> None:
    if change is not None:
        change(tissue)
    other, before = make_model(tissue, {"labels_key": "label", **setup}, **model), (kept / "training.ckpt").read_bytes()
    weights = state(other)
    with pytest.raises(ValueError, match=f"is of a training with another {named}, which .* Delete .* name another"):
        train(other, checkpoint=kept, **{**HOW, **how})
    assert all(torch.equal(weights[name], value) for name, value in state(other).items())
    assert (kept / "training.ckpt").read_bytes() == before
    assert not other.is_trained


def test_what_is_shown_and_where_it_runs_may_change(tissue, make_model, train, kept, tmp_path, capsys) -> None:
    (tmp_path / "training.ckpt").write_bytes((kept / "training.ckpt").read_bytes())
    setup = {"labels_key": "label"}
    how = {"enable_progress_bar": True, "num_workers": 1, "log_every_n_steps": 1}
    model = train(make_model(tissue.copy(), setup), checkpoint=str(tmp_path), **HOW, **how)
    assert_same(model, train(make_model(tissue, setup), **HOW))


class Runs:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "pickle", "other", "code"])
def test_a_file_that_is_no_checkpoint_is_refused(
    tissue, make_model, train, kept, tmp_path, monkeypatch, damage
) -> None:
    monkeypatch.chdir(tmp_path)
    file, good = tmp_path / "training.ckpt", (kept / "training.ckpt").read_bytes()
    raw = {"cut": good[: len(good) // 2], "garbage": b"no checkpoint", "empty": b"", "pickle": pickle.dumps(Runs())}
    if damage in raw:
        file.write_bytes(raw[damage])
    else:
        torch.save({"epoch": 1} if damage == "other" else {**torch.load(kept / "training.ckpt"), "more": Runs()}, file)
    model = make_model(tissue, {"labels_key": "label"})
    with pytest.raises(CheckpointError, match=r"is no checkpoint of a training, .* Delete .* name another folder"):
        train(model, checkpoint=tmp_path, **HOW)
    assert not (tmp_path / "code-was-run").exists()
    assert not model.is_trained


def test_a_checkpoint_that_cannot_be_written_keeps_the_one_before(
    tissue, make_model, train, kept, tmp_path, monkeypatch
) -> None:
    good = (kept / "training.ckpt").read_bytes()
    (tmp_path / "training.ckpt").write_bytes(good)

    def full(file) -> None:
        raise OSError(28, "No space left on device")

    setup = {"labels_key": "label"}
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        model = make_model(tissue.copy(), setup)
        with pytest.raises(OSError, match="No space left"):
            train(model, checkpoint=tmp_path, **HOW)
    assert (tmp_path / "training.ckpt").read_bytes() == good
    assert not model.is_trained
    resumed = train(model, checkpoint=tmp_path, **HOW)
    assert_same(resumed, train(make_model(tissue, setup), **HOW))


def test_a_file_in_place_of_the_folder(tissue, make_model, train, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file: name a folder"):
        train(make_model(tissue), checkpoint=tmp_path / "file")
