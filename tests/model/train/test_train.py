"""Training: what is learned, what is reproducible, and what is left alone."""

from __future__ import annotations

import logging
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graph_toys import data_of
from lightning.pytorch import Callback
from validation_toys import validation_losses

import fimp_sc
from fimp_sc.model import FIMP
from fimp_sc.model.train._plan import FIMPTrainingPlan
from fimp_sc.model.train._train import _BestWeights, _split


def test_history_has_a_line_per_epoch(trained: FIMP) -> None:
    assert {"train_loss", "validation_loss", "masked_loss_train", "label_loss_validation"} <= set(trained.history)
    for name in ("train_loss", "validation_loss"):
        assert trained.history[name].shape == (2, 1)
        assert np.isfinite(trained.history[name].to_numpy(dtype=float)).all()


def test_same_seed_same_result_and_other_seed_another(tissue, make_model, train) -> None:
    setup = {"labels_key": "label", "library_key": "section"}
    results = [
        train(make_model(tissue.copy(), setup, random_state=seed), max_epochs=1).get_latent_representation()
        for seed in (3, 3, 4)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    assert np.abs(results[0] - results[2]).max() > 1e-3


def test_global_random_states_are_neither_used_nor_changed(tissue, make_model, train) -> None:
    def states():
        return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002

    def run():
        before = states()
        model = train(make_model(tissue.copy(), {"labels_key": "label"}), max_epochs=1)
        model.predict()
        after = states()
        assert (before[0] == after[0]).all()
        assert (before[1] == after[1]).all()
        assert before[2] == after[2]
        return model.get_latent_representation()

    first = run()
    torch.manual_seed(1234)
    np.random.seed(99)  # noqa: NPY002
    random.seed(99)
    np.testing.assert_array_equal(run(), first)


def test_training_lowers_both_losses_on_cells_that_are_held_out(make_model, train) -> None:
    adata = fimp_sc.datasets.toy_tissue(n_obs=150, random_state=2)
    genes = np.asarray(adata.X.sum(axis=0)).ravel().argsort()[::-1][:60]
    adata = adata[:, genes].copy()
    labels = adata.obs["cell_type"].astype(object)
    adata.obs["label"] = labels.where(labels.isin(labels.value_counts().index[:3]))
    fimp_sc.pp.spatial_graph(adata, library_key="section")
    model = make_model(adata, {"labels_key": "label", "library_key": "section"})
    train(model, max_epochs=8, batch_size=8, validation_size=0.25, plan_kwargs={"lr": 1e-3})
    curves = {name: frame.to_numpy(dtype=float).ravel() for name, frame in model.history.items()}
    assert curves["validation_loss"].min() < 0.85 * curves["validation_loss"][0]
    assert curves["label_loss_validation"].min() < 0.6 * np.log(3), "better than guessing"
    assert curves["masked_loss_validation"][0] < 1, "better than the means of genes from the start"
    assert curves["masked_loss_validation"].min() < 0.85
    assert curves["train_loss"][-1] < 0.85 * curves["train_loss"][0]


def test_weights_of_the_best_epoch_are_kept(tissue, make_model, train) -> None:
    """A learning rate that ruins the model after the first epoch: the kept weights are those before."""
    model = make_model(tissue, {"labels_key": "label"})
    train(model, max_epochs=4, validation_size=0.3, early_stopping=False, plan_kwargs={"lr": 10.0, "lr_head": 10.0})
    curve = model.history["validation_loss"]["validation_loss"].astype(float).to_numpy()
    assert curve.argmin() < 3, "the test needs a run that gets worse"
    val_idx = _split(model, data_of(model, tissue), 0.3, None, None)[1]
    assert validation_losses(model, val_idx, 32)["validation_loss"] == pytest.approx(curve.min(), rel=1e-3)


class Watch(Callback):
    """The weights after every step, and how many steps there were at each validation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.validated: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.steps.append({name: p.detach().clone() for name, p in pl_module.module.named_parameters()})

    def on_validation_end(self, trainer, pl_module) -> None:
        self.validated.append(len(self.steps))

    def average(self, n_steps: int) -> dict[str, torch.Tensor]:
        """The definition: the first weights, then 97 % of the average and 3 % of the weights of each step."""
        average = self.steps[0]
        for weights in self.steps[1:n_steps]:
            average = {name: 0.97 * average[name] + 0.03 * weights[name] for name in average}
        return average


def distance(module, weights) -> float:
    return max(float((p.detach() - weights[name]).abs().max()) for name, p in module.named_parameters())


@pytest.mark.parametrize("lr", [1e-3, 10.0])
def test_weights_kept_are_the_averaged_ones_that_were_validated(tissue, make_model, train, lr) -> None:
    watch, model = Watch(), make_model(tissue, {"labels_key": "label"})
    plan = {"lr": lr, "lr_head": lr}
    train(model, max_epochs=4, validation_size=0.3, early_stopping=False, callbacks=[watch], plan_kwargs=plan)
    best = model.history["validation_loss"]["validation_loss"].astype(float).to_numpy().argmin()
    assert len(watch.validated) == 4
    assert (best < 3) == (lr == 10.0), "the test needs a run that gets worse and one that does not"
    n_steps = watch.validated[best]
    assert distance(model.module, watch.average(n_steps)) < 1e-5
    assert distance(model.module, watch.steps[n_steps - 1]) > 0.1 * lr, "not those of the last step before"
    for other in set(watch.validated) - {n_steps}:
        assert distance(model.module, watch.average(other)) > 0.01 * lr, "nor the average at another epoch"


def test_without_validation_cells_the_last_average_is_kept(tissue, make_model, train) -> None:
    watch, model = Watch(), make_model(tissue)
    train(model, max_epochs=2, validation_size=0, callbacks=[watch])
    assert watch.validated == []
    assert distance(model.module, watch.average(len(watch.steps))) < 1e-5
    assert distance(model.module, watch.steps[-1]) > 1e-4


def test_validation_weighs_averaged_weights_and_training_goes_on_from_its_own(tissue, make_model, train) -> None:
    """With and without validation every step is the same: weights are swapped in for validation and out again."""
    runs = []
    for validated in (np.arange(30), np.arange(0)):
        runs.append(Watch())
        model = make_model(tissue)
        # The start is fitted to validation cells: train on from one start.
        train(model, max_epochs=1, train_indices=np.arange(30, 120), validation_indices=np.arange(30))
        asked = {"train_indices": np.arange(30, 120), "validation_indices": validated}
        train(model, max_epochs=2, early_stopping=False, callbacks=[runs[-1]], **asked)
    assert [len(run.validated) for run in runs] == [2, 0]
    for a, b in zip(runs[0].steps, runs[1].steps, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_best_weights_follow_the_validation_loss() -> None:
    best, plan = _BestWeights(), torch.nn.Linear(1, 1, bias=False)
    kept = []
    for weight, loss in ((1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, float("nan")), (5.0, 3.0), (6.0, 1.0)):
        trainer = SimpleNamespace(callback_metrics={"validation_loss": torch.tensor(loss)})
        torch.nn.init.constant_(plan.weight, weight)
        best.on_validation_epoch_end(trainer, plan)
        torch.nn.init.constant_(plan.weight, -1.0)  # swapped for the weights in training before the loss is known
        best.on_validation_end(trainer, plan)
        kept.append((best.weights["weight"].item(), best.loss))
    assert kept == [(1, 5), (2, 3), (2, 3), (2, 3), (2, 3), (6, 1)]


def test_early_stopping_ends_a_run_that_gets_worse(tissue, make_model, train) -> None:
    model = make_model(tissue, {"labels_key": "label"})
    plan = {"lr": 0.3, "lr_loadings": 0.3}
    train(model, max_epochs=30, validation_size=0.3, early_stopping_patience=2, plan_kwargs=plan)
    curve = model.history["validation_loss"]["validation_loss"].astype(float)
    assert len(curve) < 30
    lowest = np.minimum.accumulate(curve.to_numpy())
    gains = np.flatnonzero(np.diff(lowest) < -2e-4) + 1
    assert gains[-1] >= len(curve) - 4, "no epoch is waited for in vain longer than the patience"
    assert curve.to_numpy().argmin() >= gains[-1]
    assert len(curve) - 1 - gains[-1] >= 2


@pytest.mark.parametrize("labels_key", [None, "label"])
def test_without_validation_cells(tissue, make_model, train, labels_key) -> None:
    model = make_model(tissue, {"labels_key": labels_key})
    train(model, max_epochs=1, validation_size=0)
    assert model.is_trained
    assert len(model.history["train_loss"]) == 1
    assert "validation_loss" not in model.history
    assert np.isfinite(model.get_latent_representation()).all()


def test_one_epoch_with_validation(tissue, make_model, train) -> None:
    model = train(make_model(tissue), max_epochs=1)
    assert model.history["validation_loss"].shape == (1, 1)


def test_split_is_the_one_that_was_asked_for(tissue, make_model, train, monkeypatch) -> None:
    seen = {}

    def spy(data, train_idx, val_idx, **kwargs):
        seen.update(train=train_idx, validation=val_idx)
        raise InterruptedError

    monkeypatch.setattr("fimp_sc.model.train._train.BlockSplitter", spy)
    mask = np.zeros(120, dtype=bool)
    mask[10:30] = True
    cases = [
        ({"train_indices": [0, 1, 2], "validation_indices": [7, 5]}, [0, 1, 2], [5, 7]),
        ({"train_indices": [0, 1, 2]}, [0, 1, 2], []),
        ({"validation_indices": mask}, np.flatnonzero(~mask), np.flatnonzero(mask)),
        ({"train_indices": mask}, np.flatnonzero(mask), []),
    ]
    for asked, expected, held in cases:
        with pytest.raises(InterruptedError):
            train(make_model(tissue), **asked)
        np.testing.assert_array_equal(np.sort(seen["train"]), expected)
        np.testing.assert_array_equal(np.sort(seen["validation"]), held)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"train_indices": [0, 1, 2], "validation_indices": [2, 3]}, ValueError, "share 1 cells"),
        ({"train_indices": []}, ValueError, "No cell is left to train on"),
        ({"validation_indices": range(120)}, ValueError, "No cell is left to train on"),
        ({"validation_size": 1.0}, ValueError, "validation_size must be .* below 1"),
        ({"train_indices": [0, 120]}, IndexError, r"indices must be in \[0, 120\), found 0 to 120"),
        ({"train_indices": [-1, 4]}, IndexError, r"indices must be in \[0, 120\), found -1 to 4"),
        ({"validation_indices": [500]}, IndexError, r"found 500 to 500"),
    ],
)
def test_bad_splits_are_errors_before_anything_is_trained(tissue, make_model, train, asked, error, message) -> None:
    model = make_model(tissue)
    with pytest.raises(error, match=message):
        train(model, **asked)
    assert not model.is_trained


def test_training_cells_without_labels_are_an_error(tissue, make_model, train) -> None:
    model = make_model(tissue, {"labels_key": "label"})
    unlabeled = np.flatnonzero(tissue.obs["label"].isna())
    with pytest.raises(ValueError, match="No training cell has a label"):
        train(model, train_indices=unlabeled)


@pytest.mark.parametrize("messages", [True, False])
def test_labels_of_validation_cells_do_not_reach_the_training_loss(
    tissue, make_model, train, monkeypatch, messages: bool
) -> None:
    """Wrong labels on the held-out cells: training and its losses stay the same to the last bit.

    But for how much neighbors count, which these cells are there to tell, and which is kept as it is here.
    """
    monkeypatch.setattr(FIMPTrainingPlan, "_fit_weight", lambda plan, log_loss: None)
    held = np.arange(40)
    curves = []
    for wrong in (False, True):
        adata = tissue.copy()
        if wrong:
            adata.obs.loc[adata.obs_names[held], "label"] = adata.obs["label"].cat.categories[0]
        model = make_model(adata, {"labels_key": "label"}, messages=messages)
        train(model, validation_indices=held, max_epochs=2)
        curves.append(model.history)
    for name in ("train_loss", "masked_loss_validation"):
        np.testing.assert_array_equal(curves[0][name].to_numpy(), curves[1][name].to_numpy())
    assert (curves[0]["label_loss_validation"].to_numpy() != curves[1]["label_loss_validation"].to_numpy()).any()


def test_training_goes_on_where_it_stopped(tissue, make_model, train) -> None:
    model = train(make_model(tissue), max_epochs=1)
    loading, mean = model.module.value_head.loading.detach().clone(), model.module.gene_mean.clone()
    modes = []
    model.module.network.layers[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    train(model, max_epochs=1, train_indices=np.arange(60), validation_size=0)
    moved = (model.module.value_head.loading - loading).abs().max()
    assert 0 < moved < 0.1 * loading.abs().max(), "further steps, not a new start"
    assert (model.module.gene_mean == mean).all()
    assert modes
    assert all(modes), "with dropout"


def test_default_number_of_epochs_is_a_budget_of_steps(tissue, make_model, monkeypatch) -> None:
    asked = {}

    class Runner:
        def __init__(self, model, **kwargs):
            asked.update(kwargs)

        def __call__(self):
            pass

    monkeypatch.setattr(FIMP, "_train_runner_cls", Runner)
    model = make_model(tissue)
    model.train(batch_size=256, accelerator="cpu")
    assert asked["max_epochs"] == 100
    model.train(batch_size=4, accelerator="cpu")
    steps = asked["max_epochs"] * len(asked["data_splitter"].train_dataloader())
    assert abs(steps - 600) <= len(asked["data_splitter"].train_dataloader()) / 2
    assert 8 < asked["max_epochs"] < 100
    model.train(batch_size=1, accelerator="cpu")
    assert asked["max_epochs"] == 8, "some 100 steps an epoch: no fewer than 8"


def spy_on_loader_arguments(monkeypatch) -> dict:
    seen = {}

    def spy(data, train_idx, val_idx, **kwargs):
        seen.update(kwargs)
        raise InterruptedError

    monkeypatch.setattr("fimp_sc.model.train._train.BlockSplitter", spy)
    return seen


@pytest.mark.parametrize(
    ("n_train", "batch_size"), [(1, 64), (1500, 64), (2000, 64), (3072, 128), (5000, 256), (6144, 256), (10**6, 256)]
)
def test_default_batch_size_makes_some_24_steps_of_an_epoch(tissue, make_model, monkeypatch, n_train, batch_size):
    seen = spy_on_loader_arguments(monkeypatch)
    model = make_model(tissue)
    train_idx = np.resize(np.arange(tissue.n_obs), n_train)
    monkeypatch.setattr("fimp_sc.model.train._train._split", lambda *args: (train_idx, np.arange(0)))
    monkeypatch.setattr("fimp_sc.model.train._train.start_from_data", lambda model, study, data, *args: data)
    with pytest.raises(InterruptedError):
        model.train(accelerator="cpu")
    assert seen["batch_size"] == batch_size
    assert seen["tiles_per_batch"] == batch_size // 64, "compact blocks of 64 cells"
    if batch_size > 64:
        assert n_train / batch_size >= 24 / 2**0.5
    with pytest.raises(InterruptedError):
        model.train(accelerator="cpu", batch_size=17)
    assert (seen["batch_size"], seen["tiles_per_batch"]) == (17, 1)


def test_cells_are_masked_always_without_labels_and_half_the_time_with_them(tissue, make_model, monkeypatch) -> None:
    seen = spy_on_loader_arguments(monkeypatch)
    for setup, asked, expected in (({}, {}, 1.0), ({"labels_key": "label"}, {}, 0.5), ({}, {"mask_cells": 0.0}, 0.0)):
        with pytest.raises(InterruptedError):
            make_model(tissue.copy(), setup).train(accelerator="cpu", **asked)
        assert seen["mask_cells"] == expected


def test_training_is_silent_about_its_own_design(tissue, make_model, train) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(make_model(tissue), max_epochs=1)
    about = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert not [m for m in about if "workers" in m or "training batches" in m], about


def test_training_hides_what_lightning_says_routinely(tissue, make_model, train) -> None:
    """Its tips above all; levels are as before afterwards, and so is what a user sets."""
    model, seen = make_model(tissue), []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    loggers = [
        logging.getLogger(name) for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "scvi")
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        loggers[0].setLevel(logging.INFO)
        loggers[1].info("💡 Tip: heard")
        train(model, max_epochs=1)
        assert loggers[0].level == logging.INFO
    finally:
        loggers[0].setLevel(before[0])
        for logger in loggers:
            logger.removeHandler(handler)
    assert set(seen) == {"💡 Tip: heard"}


def test_training_leaves_no_files_behind(tissue, make_model, train, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(make_model(tissue), max_epochs=1)
    assert list(tmp_path.iterdir()) == []
