"""What is subtracted from expression: results of a cell must not depend on which other cells there are."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from anndata import concat
from graph_toys import data_of
from scipy import sparse

import fimp_sc
from fimp_sc.model import FIMP

# Of a part some genes are zero throughout.
pytestmark = pytest.mark.filterwarnings("ignore:.*genes are zero for every cell")
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


def toy(n_obs=600):
    adata = fimp_sc.datasets.toy_tissue(n_obs, random_state=1)
    part = adata[adata.obs["section"] == "section_1"].copy()
    part.obs["class"] = part.obs["region"].astype(str)
    return part


@pytest.fixture(scope="module")
def trained():
    adata = toy()
    fimp_sc.pp.spatial_graph(adata)
    FIMP.setup_anndata(adata, labels_key="class")
    model = FIMP(adata)
    model.train(max_epochs=2, **QUIET)
    return model


def crop(model):
    """One class and all that its cells' results depend on: two layers, and two rounds of smoothing."""
    adata = model.adata
    inside = np.flatnonzero(adata.obs["class"] == "core")
    graph = adata.obsp["spatial_connectivities"]
    wanted = np.zeros(adata.n_obs, bool)
    wanted[inside] = True
    for _ in range(4):
        wanted |= np.asarray(graph[wanted].sum(0)).ravel() > 0
    assert wanted.sum() < adata.n_obs - 50
    return inside, np.flatnonzero(wanted)


def test_results_of_a_crop_are_those_of_the_whole(trained):
    inside, wanted = crop(trained)
    part = FIMP.load_query_data(trained.adata[wanted].copy(), trained)
    rows = np.searchsorted(wanted, inside)
    np.testing.assert_allclose(
        part.get_latent_representation()[rows], trained.get_latent_representation()[inside], atol=1e-4
    )
    np.testing.assert_allclose(part.predict(soft=True).iloc[rows], trained.predict(soft=True).iloc[inside], atol=1e-4)
    np.testing.assert_allclose(part.get_expression()[rows], trained.get_expression()[inside], atol=1e-4)


def test_the_mean_of_the_crop_itself_is_an_option(trained):
    inside, wanted = crop(trained)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*unlike all cells")
        own = FIMP.load_query_data(trained.adata[wanted].copy(), trained, center="batch")
    source = data_of(own).expression
    rows = source.rows(np.arange(own.adata.n_obs))
    expected = (rows.sum(0) + 20 * trained.module.gene_mean.numpy()) / (len(rows) + 20)
    np.testing.assert_allclose(source.center, expected[None], rtol=1e-4, atol=1e-6)
    difference = own.get_latent_representation()[np.searchsorted(wanted, inside)]
    assert np.abs(difference - trained.get_latent_representation()[inside]).max() > 0.05


def test_an_unknown_center_is_named():
    adata = toy(120)
    fimp_sc.pp.spatial_graph(adata)
    with pytest.raises(ValueError, match="center must be one of 'training', 'batch', 'matched', found 'mean'"):
        FIMP.setup_anndata(adata, center="mean")


def test_sections_of_one_class_each_are_learned_together():
    """Each section lacks what sets it apart from the others when it is centered by itself."""
    adata = toy(1200)
    classes = adata.obs["class"].to_numpy()
    adata.obs["section"] = classes
    known = np.random.default_rng(0).random(adata.n_obs) < 0.5
    adata.obs["label"] = np.where(known, classes, "Unknown")
    fimp_sc.pp.spatial_graph(adata, library_key="section")
    accuracy = {}
    for center in ("training", "batch"):
        work = adata.copy()
        FIMP.setup_anndata(work, labels_key="label", library_key="section", center=center)
        model = FIMP(work)
        model.train(max_epochs=15, **QUIET)
        accuracy[center] = (model.predict()[~known] == classes[~known]).mean()
    assert accuracy["training"] > 0.95
    assert accuracy["batch"] < 0.5


def test_cells_unlike_those_of_training_are_reported():
    adata = toy(1200)
    fimp_sc.pp.spatial_graph(adata)
    FIMP.setup_anndata(adata, labels_key="class")
    model = FIMP(adata)
    model.train(max_epochs=2, **QUIET)
    part = adata[:200].copy()
    part.obs_names = [f"other_{name}" for name in part.obs_names]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unlike all cells")
        FIMP.load_query_data(part.copy(), model)
        FIMP.load_query_data(part[part.obs["class"] == "core"].copy(), model)
    # Cells that express little but a few genes.
    few = np.random.default_rng(0).random(part.n_vars) < 0.02
    part.X = sparse.csr_matrix(part.X.toarray() + 50 * few, dtype=np.float32)
    with pytest.warns(UserWarning, match="of the cells are unlike all cells that the model was trained on"):
        FIMP.load_query_data(part, model)


def test_a_second_section_keeps_its_shift(trained):
    """Sections trained together share one mean, so that none loses what sets it apart."""
    adata = concat([trained.adata, trained.adata], keys=["a", "b"], label="section", index_unique="-", merge="same")
    fimp_sc.pp.spatial_graph(adata, library_key="section")
    FIMP.setup_anndata(adata, library_key="section")
    model = FIMP(adata)
    model.train(max_epochs=1, **QUIET)
    center = data_of(model).expression.center
    np.testing.assert_allclose(center, model.module.gene_mean.numpy()[None])
