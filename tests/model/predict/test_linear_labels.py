"""The linear model of labels that reads all genes: against scikit-learn, and what the network does not see."""

from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData
from graph_toys import data_of
from scipy import sparse
from sklearn.linear_model import LogisticRegression

import fimp_sc
from fimp_sc._recipe import RECIPE, changed
from fimp_sc.model import FIMP
from fimp_sc.model.predict._linear_labels import has_linear_labels, linear_labels

LABELS = {"labels_key": "label", "library_key": "section"}


def make_marked(n_obs: int = 400, random_state: int = 0) -> AnnData:
    """Cells of three classes, which two weak genes tell apart; places and all other genes know nothing of them."""
    rng = np.random.default_rng(random_state)
    label = rng.integers(0, 3, n_obs)
    # Programs of strong genes fill tokens and components.
    loadings = np.random.default_rng(0).normal(size=(12, 60))
    programs = np.exp(rng.normal(size=(n_obs, 12)) @ loadings / 3 + 3)
    weak = np.stack([1.0 + 6.0 * (label == 1), 1.0 + 6.0 * (label == 2)], axis=1)
    adata = AnnData(sparse.csr_matrix(rng.poisson(np.hstack([programs, weak])).astype(np.float32)))
    adata.var_names = [f"gene{i}" for i in range(60)] + ["first", "second"]
    adata.obs_names = [f"cell{random_state}_{i}" for i in range(n_obs)]
    adata.obs["truth"] = np.array(["zero", "one", "two"])[label]
    adata.obs["label"] = np.where(rng.random(n_obs) < 0.75, adata.obs["truth"], "Unknown")
    adata.obs["section"] = "a"
    adata.obsm["spatial"] = rng.uniform(0, 100, (n_obs, 2))
    fimp_sc.pp.spatial_graph(adata, n_neighbors=5)
    return adata


@pytest.fixture(scope="module")
def marked():
    """A model of marked cells with four tokens a cell; not to be changed."""
    adata = make_marked()
    FIMP.setup_anndata(adata, unlabeled_category="Unknown", **LABELS)
    model = FIMP(adata, n_latent=16, n_tokens=4)
    model.train(max_epochs=6, accelerator="cpu", enable_progress_bar=False, train_indices=range(330),
                validation_indices=range(330, 400))  # fmt: skip
    return model


def test_it_is_the_logistic_regression_of_all_genes(marked) -> None:
    adata = marked.adata
    counts = adata.X.toarray().astype(float)
    total = counts.sum(1, keepdims=True)
    values = np.log1p(counts * (np.median(total) / total))
    train = np.arange(330)[(adata.obs["label"] != "Unknown").to_numpy()[:330]]
    label = adata.obs["label"].to_numpy()[train]
    std = values[train].std(0)
    values = values * std**-0.5
    values *= np.sqrt(RECIPE.linear_strength / values[train].var(0).sum())
    names, counts = np.unique(label, return_counts=True)
    weight = counts**-0.5 / (counts**-0.5 @ counts / counts.sum())
    expected = LogisticRegression(solver="newton-cholesky")
    expected.fit(values[train], label, weight[np.searchsorted(names, label)])
    found = linear_labels(marked, data_of(marked, adata), np.arange(400))
    # L-BFGS stops a little before the minimum, which Newton's method reaches.
    np.testing.assert_allclose(np.exp(found), expected.predict_proba(values), atol=0.02)


def test_genes_that_the_network_does_not_see_decide(marked) -> None:
    adata = marked.adata
    asked = (adata.obs["label"] == "Unknown").to_numpy()
    truth = adata.obs["truth"].to_numpy()[asked]
    assert marked.linear_weight >= 0.5
    assert (marked.predict()[asked] == truth).mean() > 0.85
    new = make_marked(random_state=1)
    assert (marked.predict(new) == new.obs["truth"]).mean() > 0.85, "cells of another section"
    with changed(linear_genes=61):
        network = FIMP(adata, n_latent=16, n_tokens=4)
        assert not has_linear_labels(network)
        network.train(max_epochs=6, accelerator="cpu", enable_progress_bar=False)
        assert network.linear_weight == 0
        assert (network.predict()[asked] == truth).mean() < 0.7


def test_saved_models_predict_the_same(marked, tmp_path) -> None:
    marked.save_pretrained(tmp_path / "model")
    again = FIMP.from_pretrained(tmp_path / "model", marked.adata)
    assert again.linear_weight == marked.linear_weight
    np.testing.assert_allclose(again.predict(soft=True), marked.predict(soft=True), atol=1e-6)


def test_a_gene_that_an_object_lacks_is_at_its_mean(marked) -> None:
    new = make_marked(random_state=1)
    lacking = new[:, new.var_names != "second"].copy()
    found = marked.predict(lacking, soft=True)
    kept = new.obs["truth"].to_numpy() != "two"
    assert (found.columns[found.to_numpy().argmax(1)] == new.obs["truth"])[kept].mean() > 0.7
    bound = FIMP.load_query_data(lacking, marked)
    data = data_of(bound, lacking)
    rows = data.expression.rows(np.arange(lacking.n_obs)).astype(float)
    mean = marked.module.gene_mean.numpy().astype(float)
    rows[:, -1] = mean[-1]
    scores = (rows - mean) @ marked.module.linear_scores.numpy() + marked.module.linear_bias.numpy()
    expected = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(linear_labels(bound, data, np.arange(lacking.n_obs))), expected, atol=1e-4)


def test_models_without_messages_have_it_too() -> None:
    adata = make_marked()
    FIMP.setup_anndata(adata, unlabeled_category="Unknown", **LABELS)
    model = FIMP(adata, n_latent=16, n_tokens=4, messages=False)
    model.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    asked = (adata.obs["label"] == "Unknown").to_numpy()
    assert model.linear_weight >= 0.5
    assert (model.neighbor_weight, model.smoothing_weight) == (0.0, 0.0)
    assert (model.predict() == adata.obs["truth"])[asked].mean() > 0.85


def test_two_classes_and_classes_that_no_training_cell_has() -> None:
    adata = make_marked()
    rare = np.flatnonzero(adata.obs["truth"] == "two")
    # Validation cells alone have it.
    adata.obs.loc[adata.obs_names[rare[rare < 330]], "label"] = "Unknown"
    FIMP.setup_anndata(adata, unlabeled_category="Unknown", **LABELS)
    model = FIMP(adata, n_latent=16, n_tokens=4)
    model.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False, train_indices=range(330),
                validation_indices=range(330, 400))  # fmt: skip
    found = np.exp(linear_labels(model, data_of(model, adata), np.arange(400)))
    column = {name: i for i, name in enumerate(model.classes)}
    assert found[:, column["two"]].max() < 1e-6
    one = (adata.obs["truth"] == "one").to_numpy()
    assert found[one, column["one"]].mean() > 0.8
    assert found[(adata.obs["truth"] == "zero").to_numpy(), column["zero"]].mean() > 0.8
    assert np.isfinite(model.predict(soft=True)).all(None)
