"""Predictions smoothed over neighbors, as the benchmarks offer them to every method."""

from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp


@pytest.fixture
def smoothing(load_script):
    return load_script("_smoothing")


def path(n: int) -> sp.csr_matrix:
    """Every node is joined with the one before and the one after it."""
    return sp.csr_matrix(np.eye(n, k=1) + np.eye(n, k=-1))


def test_means_are_over_a_node_and_its_neighbors(smoothing):
    graph = sp.csr_matrix(np.array([[0.0, 5.0, 0.0], [0.5, 1.0, 2.0], [0.0, 0.0, 0.0]]))
    values = np.array([[0.0, 1.0], [0.6, 0.4], [0.9, 0.1]])
    expected = [values[:2].mean(0), values.mean(0), values[2]]
    np.testing.assert_allclose(smoothing.averaged(values, graph), expected)
    np.testing.assert_allclose(smoothing.smooth(values, graph, 0.25), 0.25 * np.array(expected) + 0.75 * values)


@pytest.mark.parametrize(("period", "expected"), [(20, 1.0), (1, 0.0)])
def test_domains_are_smoothed_and_a_chequerboard_is_not(smoothing, period, expected):
    """Two of three predictions are right; in domains the neighbors of a wrong one know better."""
    truth = np.arange(60) // period % 2
    right = np.where(np.arange(60) % 3, 0.8, 0.3)
    probability = np.where(np.arange(2) == truth[:, None], right[:, None], 1 - right[:, None])
    share = smoothing.best_share(probability, path(60), np.arange(60), truth)
    assert abs(share - expected) < 0.3
    own = (probability.argmax(1) == truth).mean()
    assert (smoothing.smooth(probability, path(60), share).argmax(1) == truth).mean() >= own
    if expected:
        assert (smoothing.smooth(probability, path(60), share).argmax(1) == truth).mean() >= 0.95


def test_a_linear_classifier_gains_in_domains(load_script):
    """The share comes from cells that the classifier has not seen, and the cells to label have a graph of their own."""
    baselines = load_script("_baselines")
    rng = np.random.default_rng(0)
    xy = np.stack(np.meshgrid(np.arange(20), np.arange(20)), -1).reshape(-1, 2).astype(float)

    def section():
        kind = (xy[:, 0] >= 10).astype(int)
        # Genes tell little of the kind, and some tell nothing.
        rates = 3 + 1.5 * (np.arange(30) % 2 == kind[:, None]) * (np.arange(30) < 10)
        adata = ad.AnnData(sp.csr_matrix(rng.poisson(rates).astype(np.float32)))
        adata.obsm["spatial"] = xy
        adata.obs["label"] = np.array(["left", "right"])[kind]
        return adata

    reference, query = section(), section()
    truth = query.obs["label"].to_numpy().copy()
    query.obs["label"] = "Unknown"
    blocks = (xy[:, 0] // 5).astype(int) * 10 + (xy[:, 1] // 5).astype(int)
    problem = SimpleNamespace(
        data="starmap", reference=reference, query=query, library_key=None, blocks=blocks, target=100.0
    )
    own = baselines.ANNOTATION["logistic, own, C chosen"](problem, None)
    smooth = baselines.ANNOTATION["logistic, own, C chosen, smoothed"](problem, None)
    accuracy = {fit.note: (fit.values == truth).mean() for fit in (own, smooth)}
    share = float(smooth.note.split()[-1])
    assert share > 0.5
    assert accuracy[smooth.note] > accuracy[""] + 0.05
