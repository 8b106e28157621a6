"""Weights of the graph in models."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import sparse
from section_toys import other_section

import fimp_sc
from fimp_sc.model import FIMP


def weigh(adata: ad.AnnData, weights) -> ad.AnnData:
    """Store a graph of the same edges whose weights are a function of their lengths."""
    graph = adata.obsp["spatial_distances"].copy()
    graph.data = weights(graph.data)
    adata.obsp["near_connectivities"] = graph
    return adata


def near(length: np.ndarray) -> np.ndarray:
    return np.exp(-length / length.mean())


WEIGHTED = {"labels_key": "label", "library_key": "section", "connectivities_key": "near_connectivities"}


def test_weights_count_when_they_are_asked_for(tissue, make_model, train, trained: FIMP, tmp_path) -> None:
    plain = train(make_model(weigh(tissue, near), WEIGHTED)).get_latent_representation()
    np.testing.assert_array_equal(plain, trained.get_latent_representation())
    model = train(make_model(tissue, WEIGHTED, use_weights=True))
    z = model.get_latent_representation()
    assert (np.abs(z - plain).max(1) > 1e-3).all()
    for strategy in ("blocks", "layers"):
        np.testing.assert_allclose(model.get_latent_representation(strategy=strategy, batch_size=9), z, atol=2e-5)
    influence = model.get_edge_influence()
    assert influence.nnz == tissue.obsp["near_connectivities"].nnz
    model.save(tmp_path / "saved", save_anndata=False)
    model.save_pretrained(tmp_path / "shared")
    assert "messages are weighed by the graph" in (tmp_path / "shared" / "README.md").read_text()
    for again in (FIMP.load(tmp_path / "saved", adata=tissue), FIMP.from_pretrained(tmp_path / "shared", adata=tissue)):
        assert again.use_weights
        np.testing.assert_allclose(again.get_latent_representation(), z, atol=2e-5)
    other = weigh(other_section(), near)
    there = FIMP.load_query_data(other, model).get_latent_representation()
    same = weigh(other.copy(), lambda length: 5 * near(length))
    np.testing.assert_allclose(model.get_latent_representation(same), there, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*(have no neighbors|all alike):UserWarning")
def test_neighbors_of_hardly_any_weight_are_as_good_as_none(tissue, make_model, train) -> None:
    """Without self-loops, whose share depends on the number of neighbors."""
    weigh(tissue, lambda length: np.where(length > np.median(length), 1e-20, 1.0))
    graph = tissue.obsp["near_connectivities"]
    kept = np.asarray((graph > 0.5).sum(1)).ravel()
    model = train(make_model(tissue, WEIGHTED, use_weights=True, self_loops=False, n_layers=1), max_epochs=1)
    z, cut = model.get_latent_representation(), tissue.copy()
    cut.obsp["near_connectivities"] = sparse.csr_matrix(graph.multiply(graph > 0.5))
    some = kept > 0
    assert 20 < some.sum() < 120
    found = model.get_latent_representation(cut)
    np.testing.assert_allclose(found[some], z[some], atol=2e-5)


def test_weights_that_are_all_alike_are_announced(tissue, make_model, train) -> None:
    message = r"neighbors of a node are all alike in obsp\['spatial_connectivities'\]"
    model = train(make_model(weigh(tissue, near), WEIGHTED, use_weights=True), max_epochs=1)
    with pytest.warns(UserWarning, match=message):
        train(make_model(tissue.copy(), use_weights=True), max_epochs=1)
    other, graph = other_section(), {"connectivities_key": "spatial_connectivities"}
    with pytest.warns(UserWarning, match=message):
        fimp_sc.tl.embed(other, **graph, library_key="section", model=model, verbose=False)
    with pytest.raises(ValueError, match="messages=False leaves none"):
        make_model(tissue, use_weights=True, messages=False)


def test_weights_reach_a_foundation_model(distinct, make) -> None:
    setup = {**WEIGHTED, "input_scale": "log"}
    plain = make(weigh(distinct, near), setup).get_latent_representation()
    modes = [{}, {"neighbor_states": "static"}, {"aggregate": "final"}]
    for mode in modes:
        model = make(distinct, setup, use_weights=True, **mode)
        z = model.get_latent_representation()
        assert (np.abs(z - plain).max(1) > 1e-4).all()
        np.testing.assert_allclose(model.get_latent_representation(batch_size=7), z, atol=2e-5)
