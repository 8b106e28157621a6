"""Gains of genes in batches: a known distortion is found, tissue that one batch lacks is not taken for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pytest
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

import fimp_sc
from fimp_sc.model import FIMP
from fimp_sc.model.module._matched_batches import matched_gains

if TYPE_CHECKING:
    pass

N, GENES = 300, 60
QUICK = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False}


def section(classes: list[int], seed: int, factors: np.ndarray | None = None) -> ad.AnnData:
    """Stripes of classes, each with genes of its own, as counts."""
    rng = np.random.default_rng(seed)
    rates = np.full((4, GENES), 1.5)
    for code in range(4):
        rates[code, code * 15 : (code + 1) * 15] *= 4
    xy = rng.uniform(0, 1, (N, 2))
    label = np.array(classes)[(xy[:, 0] * len(classes)).astype(int)]
    rate = rates[label] * (1 if factors is None else factors)
    adata = ad.AnnData(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)))
    adata.obsm["spatial"] = xy * 100
    adata.obs["class"] = [f"class {code}" for code in label]
    return adata


def joined(first: ad.AnnData, second: ad.AnnData) -> ad.AnnData:
    both = ad.concat([first, second], label="section", keys=["a", "b"], index_unique="-")
    fimp_sc.pp.spatial_graph(both, library_key="section")
    return both


def trained(adata: ad.AnnData, **setup: str) -> FIMP:
    FIMP.setup_anndata(adata, **{"library_key": "section", "center": "matched", **setup})
    model = FIMP(adata, random_state=0)
    model.train(**QUICK)
    return model


@pytest.fixture(scope="module")
def factors() -> np.ndarray:
    return np.exp(np.random.default_rng(7).normal(0, 0.6, GENES))


@pytest.fixture(scope="module")
def distorted(factors: np.ndarray) -> ad.AnnData:
    """The second section lacks one class, has one of its own, and its genes are multiplied."""
    return joined(section([0, 1, 2], 0), section([0, 1, 3], 1, factors))


@pytest.fixture(scope="module")
def model(distorted: ad.AnnData) -> FIMP:
    return trained(distorted)


def mixing(embedding: np.ndarray, adata: ad.AnnData, which: np.ndarray) -> float:
    """Fraction of the 15 nearest cells of these cells that are of the other section; about a half where they mix."""
    near = NearestNeighbors(n_neighbors=16).fit(embedding).kneighbors(embedding[which], return_distance=False)[:, 1:]
    code = adata.obs["section"].cat.codes.to_numpy()
    return float((code[near] != code[which][:, None]).mean())


def test_shared_classes_mix_and_a_class_of_one_section_stays_apart(model: FIMP, distorted: ad.AnnData) -> None:
    shared = distorted.obs["class"].isin(["class 0", "class 1"]).to_numpy()
    embedding = model.get_latent_representation()
    before = trained(distorted.copy(), center="training").get_latent_representation()
    assert mixing(before, distorted, shared) < 0.1
    assert mixing(embedding, distorted, shared) > 0.25
    # Cells at the border of a stripe see both classes.
    assert mixing(embedding, distorted, ~shared) < 0.1


def test_gains_are_the_distortion_of_matched_cells(model: FIMP, factors: np.ndarray) -> None:
    gain = np.log(model.module.batch_gain.numpy())
    found = gain[0] - gain[1]
    assert np.corrcoef(found, np.log(factors))[0, 1] > 0.85
    np.testing.assert_allclose(gain.sum(0), 0, atol=1e-5)


def test_without_a_difference_there_are_no_gains_to_speak_of() -> None:
    # What three sections of the same tissue differ by is what counting explains.
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(2.0, (600, GENES)).astype(np.float32))
    batch = np.repeat([0, 1, 2], 200)
    gains = matched_gains(counts, counts, sparse.eye(600, format="csr"), batch, batch)
    assert np.abs(np.log(gains)).max() < 0.1


def test_one_batch_is_read_as_without_batches(distorted: ad.AnnData) -> None:
    one = distorted.copy()
    one.obs["kit"] = "one"
    expected = trained(one, center="training").get_latent_representation()
    model = trained(one, batch_key="kit")
    assert not len(model.module.batch_gain)
    np.testing.assert_array_equal(model.get_latent_representation(), expected)


def test_saved_with_the_model_and_applied_by_name_of_batch(model: FIMP, distorted: ad.AnnData, tmp_path) -> None:
    model.save_pretrained(tmp_path / "model")
    expected = model.get_latent_representation()
    loaded = FIMP.from_pretrained(tmp_path / "model", distorted)
    np.testing.assert_array_equal(loaded.get_latent_representation(), expected)
    alone = distorted[distorted.obs["section"] == "b"].copy()
    rows = (distorted.obs["section"] == "b").to_numpy()
    own = FIMP.load_query_data(alone, model).get_latent_representation()
    np.testing.assert_allclose(own, expected[rows], atol=1e-4)
    # A section of another name is read as it is.
    alone.obs["section"] = "new"
    new = FIMP.load_query_data(alone, model).get_latent_representation()
    assert np.abs(new - expected[rows]).max() > 0.1


def test_expression_is_predicted_on_the_scale_of_its_batch(model: FIMP, distorted: ad.AnnData) -> None:
    found = model.get_expression(scale="log")
    for name in ("a", "b"):
        rows = (distorted.obs["section"] == name).to_numpy()
        totals = np.asarray(distorted.X.sum(1))
        true = np.log1p(distorted.X.toarray() / totals * np.median(totals))[rows].mean(0)
        assert np.abs(found[rows].mean(0) - true).mean() < 0.08


def test_masked_rows_are_scaled_by_values_without_gains(model: FIMP) -> None:
    import torch

    from fimp_sc.model.registry._graph_data import graph_data, study_of

    source = graph_data(model, study_of(model, None)).expression
    nodes = np.arange(250, 350)
    rows = source.sparse_rows(nodes)
    seen = source.as_seen(
        rows, nodes, torch.ones(1, GENES, dtype=torch.bool), torch.zeros(len(nodes), dtype=torch.int64)
    )
    np.testing.assert_allclose(seen.toarray(), rows.toarray(), rtol=1e-4, atol=1e-6)
