"""Training: what is learned, what is reproducible, and what is left alone."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch

import fimp_sc
from fimp_sc.data import BlockSplitter
from fimp_sc.model import FIMP


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
    train(model, max_epochs=12, validation_size=0.25, plan_kwargs={"lr": 1e-3})
    curves = {name: frame.to_numpy(dtype=float).ravel() for name, frame in model.history.items()}
    assert curves["validation_loss"].min() < 0.85 * curves["validation_loss"][0]
    assert curves["label_loss_validation"].min() < 0.9 * np.log(3), "better than guessing"
    assert curves["masked_loss_validation"].min() < 0.9, "better than the means of genes"
    assert curves["train_loss"][-1] < 0.85 * curves["train_loss"][0]


def test_weights_of_the_best_epoch_are_kept(tissue, make_model, train) -> None:
    """A learning rate that ruins the model after the first epoch: the kept weights are those before."""
    model = make_model(tissue, {"labels_key": "label"})
    train(model, max_epochs=4, validation_size=0.3, early_stopping=False, plan_kwargs={"lr": 1.0, "lr_loadings": 1.0})
    curve = model.history["validation_loss"]["validation_loss"].astype(float).to_numpy()
    assert curve.argmin() < 3, "the test needs a run that gets worse"
    data = model._graph_data(tissue)
    train_idx, val_idx = model._split(data, 0.3, None, None)
    splitter = BlockSplitter(
        data, train_idx, val_idx, batch_size=32, n_layers=2, n_tokens=12, mask_ratio=(0.0, 0.4), random_state=0
    )
    total = weight = 0.0
    with torch.no_grad():
        for batch in splitter.val_dataloader():
            loss = model.module(batch)[2]
            total, weight = total + float(loss.loss) * loss.n_obs_minibatch, weight + loss.n_obs_minibatch
    assert total / weight == pytest.approx(curve.min(), rel=1e-3)


def test_early_stopping_ends_a_run_that_gets_worse(tissue, make_model, train) -> None:
    model = make_model(tissue, {"labels_key": "label"})
    plan = {"lr": 0.3, "lr_loadings": 0.3}
    train(model, max_epochs=30, validation_size=0.3, early_stopping_patience=2, plan_kwargs=plan)
    curve = model.history["validation_loss"]["validation_loss"].astype(float)
    assert len(curve) < 30
    assert curve.to_numpy().argmin() == len(curve) - 3


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

    monkeypatch.setattr("fimp_sc.model._train.BlockSplitter", spy)
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
        ({"validation_size": 1.0}, ValueError, "validation_size must be in"),
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


def test_labels_and_expression_of_validation_cells_do_not_reach_the_loss(tissue, make_model, train) -> None:
    """Wrong labels on the held-out cells: training and its losses stay the same to the last bit."""
    held = np.arange(40)
    curves = []
    for wrong in (False, True):
        adata = tissue.copy()
        if wrong:
            adata.obs.loc[adata.obs_names[held], "label"] = adata.obs["label"].cat.categories[0]
        model = make_model(adata, {"labels_key": "label"})
        train(model, validation_indices=held, max_epochs=2)
        curves.append(model.history)
    for name in ("train_loss", "masked_loss_validation"):
        np.testing.assert_array_equal(curves[0][name].to_numpy(), curves[1][name].to_numpy())
    assert (curves[0]["label_loss_validation"].to_numpy() != curves[1]["label_loss_validation"].to_numpy()).any()


def test_training_goes_on_where_it_stopped(tissue, make_model, train) -> None:
    model = train(make_model(tissue), max_epochs=1)
    loading, mean = model.module.value_head.loading.detach().clone(), model.module.gene_mean.clone()
    modes = []
    model.module.network.register_forward_pre_hook(lambda module, _: modes.append(module.training))
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
    assert 8 <= asked["max_epochs"] <= 500 / (120 / 4 * 0.85)


def test_training_is_silent_about_its_own_design(tissue, make_model, train) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(make_model(tissue), max_epochs=1)
    about = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert not [m for m in about if "workers" in m or "training batches" in m], about


def test_training_leaves_no_files_behind(tissue, make_model, train, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(make_model(tissue), max_epochs=1)
    assert list(tmp_path.iterdir()) == []
