"""The order of cells and genes in an object, and genes without any value, do not matter for what is trained."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import fimp_sc
from fimp_sc.model import FIMP

# Of sums in another order, after some steps of training.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


def in_another_order(adata: ad.AnnData, what: str) -> ad.AnnData:
    rng = np.random.default_rng(0)
    if what == "cells":
        return adata[rng.permutation(adata.n_obs)].copy()
    if what == "genes":
        return adata[:, rng.permutation(adata.n_vars)].copy()
    silent = ad.AnnData(sparse.csr_matrix((adata.n_obs, 1), dtype=np.float32), var=pd.DataFrame(index=["silent"]))
    silent.obs_names = adata.obs_names
    joined = ad.concat([adata[:, :7], silent, adata[:, 7:]], axis=1)
    joined.obs, joined.obsm["spatial"] = adata.obs, adata.obsm["spatial"]
    joined.obsp["spatial_connectivities"] = adata.obsp["spatial_connectivities"]
    return joined


def results(model: FIMP) -> tuple[pd.DataFrame, pd.DataFrame]:
    adata = model.adata
    embedding = pd.DataFrame(model.get_latent_representation(), index=adata.obs_names)
    return embedding, pd.DataFrame(model.get_expression(), index=adata.obs_names, columns=adata.var_names)


@pytest.mark.filterwarnings("ignore:1 of 41 genes are zero for every cell")
@pytest.mark.parametrize("what", ["cells", "genes", "silent gene"])
@pytest.mark.parametrize("labels_key", [None, "label"])
def test_training_is_the_same_in_another_order(tissue, make_model, train, what, labels_key) -> None:
    setup = {"library_key": "section", "labels_key": labels_key}
    model = train(make_model(tissue, setup), max_epochs=3)
    other = train(make_model(in_another_order(tissue, what), setup), max_epochs=3)
    if what != "cells":
        np.testing.assert_array_equal(other.adata.obs_names, tissue.obs_names)
    (embedding, expression), (other_embedding, other_expression) = results(model), results(other)
    assert embedding.to_numpy().std() > 0.05
    same = other_expression.loc[expression.index, expression.columns]
    if what == "silent gene":
        # It is one gene more that the loss is a mean over.
        for a, b in ((embedding, other_embedding), (expression, same)):
            assert np.corrcoef(a.to_numpy().ravel(), b.to_numpy().ravel())[0, 1] > 0.999
        return
    np.testing.assert_allclose(other_embedding.loc[embedding.index], embedding, **TOLERANCE)
    np.testing.assert_allclose(same, expression, **TOLERANCE)
    if labels_key:
        a, b = (m.predict(soft=True) for m in (model, other))
        np.testing.assert_allclose(b.loc[a.index, a.columns], a, **TOLERANCE)


@pytest.mark.parametrize("what", ["cells", "genes"])
def test_cells_at_one_place_and_graphs_without_places_are_ordered_by_name(tissue, make_model, train, what) -> None:
    tissue.obsm["spatial"] = np.round(tissue.obsm["spatial"] / 30)
    assert len(np.unique(tissue.obsm["spatial"], axis=0)) < 60
    for located in (True, False):
        if not located:
            del tissue.obsm["spatial"]
        first, second = (results(train(make_model(adata)))[0] for adata in (tissue, in_another_order(tissue, what)))
        np.testing.assert_allclose(second.loc[first.index], first, **TOLERANCE)


@pytest.mark.parametrize("what", ["cells", "genes"])
@pytest.mark.parametrize("what_is_trained", ["frozen", "full"])
def test_foundation_models_are_the_same_in_another_order(tissue, make, train, what, what_is_trained) -> None:
    """Counts have many equal values, whose bins and places among the tokens are drawn."""
    first, second = (
        results(train(make(adata, train=what_is_trained), max_epochs=1))
        for adata in (tissue, in_another_order(tissue, what))
    )
    np.testing.assert_allclose(second[0].loc[first[0].index], first[0], **TOLERANCE)
    np.testing.assert_allclose(second[1].loc[first[1].index, first[1].columns], first[1], **TOLERANCE)


def test_signals_are_the_same_in_another_order(make_model, train) -> None:
    rng = np.random.default_rng(0)
    n = 60
    waves = np.sin(np.arange(96) / 7 + rng.uniform(0, 6, (n, 1))) + 0.3 * rng.normal(size=(n, 96))
    place = rng.random((n, 3))
    found = []
    for order in (np.arange(n), rng.permutation(n)):
        names = [f"region_{i}" for i in order]
        mdata = fimp_sc.pp.fmri(waves[order], coordinates=place[order], sampling_interval=1.0, region_names=names)
        model = train(make_model(mdata, token_size=12))
        signals = model.get_reconstruction()
        found.append(
            (pd.DataFrame(model.get_latent_representation(), mdata.obs_names), pd.DataFrame(signals, mdata.obs_names))
        )
    for first, second in zip(*found, strict=True):
        np.testing.assert_allclose(second.loc[first.index], first, **TOLERANCE)
