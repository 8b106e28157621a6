"""Arguments of training: what is hidden, when it stops, how classes are weighed; and training after one that failed."""

from __future__ import annotations

import numpy as np
import pytest
from lightning.pytorch import Callback

from fimp_sc.model import FIMP


@pytest.mark.parametrize("name", ["fmri", "image"])
def test_hidden_tokens_have_no_influence_on_training(name, request, copied_mudata) -> None:
    mdata = request.getfixturevalue("_recordings" if name == "fmri" else "_pictures")
    rng = np.random.default_rng(0)
    first, second = copied_mudata(mdata), copied_mudata(mdata)
    if name == "fmri":
        tokens = rng.random((mdata.n_obs, 9)) < 0.3
        places, values = np.zeros(mdata[name].shape, dtype=bool), mdata[name].X.copy()
        places[:, :45] = tokens.repeat(5, 1)
        values[places] = rng.normal(-500, 300, places.sum())
        second[name].X = values
    else:
        tokens = rng.random((mdata.n_obs, 6)) < 0.3
        pixels = mdata[name].obsm["pixels"].reshape(-1, 8, 9, 3).copy()
        places = np.zeros(pixels.shape[:3], dtype=bool)
        places[:, :6] = tokens.reshape(-1, 2, 3).repeat(3, 1).repeat(3, 2)
        pixels[places] = 255 - pixels[places]
        second[name].obsm["pixels"] = pixels.reshape(len(pixels), -1)
    found = []
    for each in (first, second):
        FIMP.setup_mudata(each, modality=name)
        with pytest.warns(UserWarning, match="left out"):
            model = FIMP(each, n_latent=16, n_heads=2, token_size=5 if name == "fmri" else 3)
        model.train(hidden=tokens, max_epochs=2, accelerator="cpu", enable_progress_bar=False)
        found.append(model.get_reconstruction(hidden=tokens))
    np.testing.assert_array_equal(*found)


def test_hidden_of_what_is_not_there_is_an_error(tissue, make_model) -> None:
    model = make_model(tissue)
    with pytest.raises(ValueError, match="hidden names 'protein', but the model reads"):
        model.train(hidden={"protein": np.zeros(tissue.shape, dtype=bool)})
    with pytest.raises(ValueError, match="hidden must have the shape"):
        model.train(hidden=np.zeros((3, 4), dtype=bool))
    assert not model.is_trained


# So small that no weight moves.
STILL = {"lr": 1e-30, "lr_loadings": 1e-30, "lr_head": 1e-30}


@pytest.mark.parametrize("how", [{"early_stopping_min_delta": 1e9}, {"plan_kwargs": STILL}])
@pytest.mark.parametrize(("patience", "epochs"), [(0, 2), (1, 2), (2, 3)])
def test_patience_and_least_gain_are_as_asked_for(tissue, make_model, train, how, patience, epochs) -> None:
    model = train(make_model(tissue), max_epochs=8, early_stopping_patience=patience, **how)
    assert len(model.history["train_loss"]) == epochs


def test_other_objects_are_compared_with_cells_of_the_last_training(tissue, make_model, train) -> None:
    """Without validation cells there is no telling how far is far; those of an earlier training had other weights."""
    model = train(make_model(tissue), max_epochs=1)
    assert int(model.module.n_reference) > 0
    train(model, max_epochs=1, validation_size=0, plan_kwargs={"lr": 1.0})
    assert int(model.module.n_reference) == 0
    FIMP.load_query_data(tissue.copy(), model)


def test_what_lightning_is_told_holds(tissue, make_model, train) -> None:
    model = train(make_model(tissue), max_epochs=4, check_val_every_n_epoch=2)
    assert model.history["validation_loss"].notna().to_numpy().sum() == 2
    with pytest.raises(ValueError, match="early_stopping_monitor cannot be chosen"):
        train(make_model(tissue), max_epochs=1, early_stopping_monitor="train_loss")


def test_classes_are_weighed_anew_in_every_training(tissue, make_model, train) -> None:
    def weights(model):
        return model.module.class_weight.tolist()

    model = train(make_model(tissue, {"labels_key": "label"}), max_epochs=1, class_balance=0.0)
    assert len(set(weights(model))) == 1
    fresh = train(make_model(tissue, {"labels_key": "label"}), max_epochs=1, class_balance=1.0)
    train(model, max_epochs=1, class_balance=1.0)
    assert weights(model) == weights(fresh)
    assert len(set(weights(fresh))) > 1


def test_a_training_that_failed_leaves_no_trace_in_the_next(tissue, make_model, train) -> None:
    class Fails(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("out of luck")

    setup = {"labels_key": "label"}
    first, second = make_model(tissue.copy(), setup), make_model(tissue.copy(), setup)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(first, max_epochs=3, callbacks=[Fails()])
    assert not first.is_trained
    a, b = (train(model, max_epochs=2).get_latent_representation() for model in (first, second))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_hidden_features_are_scored_on_their_own_scale(tissue, make_model, train, scale) -> None:
    tissue.X = np.asarray(tissue.X.todense(), dtype=np.float64)
    other = tissue.copy()
    other.X = tissue.X * scale
    setup = {"input_scale": "real"}
    a, b = (train(make_model(adata, setup), max_epochs=1) for adata in (tissue, other))
    assert float(b.module.value_variance) == pytest.approx(scale**2 * float(a.module.value_variance), rel=1e-3)


@pytest.mark.parametrize("scale", ["counts", "log"])
def test_hidden_values_have_no_influence_on_labels(tissue, make_model, train, scale) -> None:
    """Nor on how much neighbors count."""
    tissue.X = tissue.X.toarray() if scale == "counts" else np.log1p(tissue.X.toarray())
    mask = np.random.default_rng(0).random(tissue.shape) < 0.2
    other = tissue.copy()
    other.X = np.where(mask, 7.0, tissue.X)
    setup = {"labels_key": "label", "input_scale": scale}
    a, b = (train(make_model(adata, setup), max_epochs=2, hidden=mask) for adata in (tissue, other))
    state, same = a.module.state_dict(), b.module.state_dict()
    differ = [name for name in state if not np.array_equal(state[name].numpy(), same[name].numpy())]
    assert differ == []
    assert 0 <= a.smoothing_weight <= 1
