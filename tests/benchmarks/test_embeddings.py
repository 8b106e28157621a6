"""Features without labels: shapes, sections, BANKSY's terms against loops, and the latent that is kept."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

N, GENES = 80, 30


@pytest.fixture
def emb(load_script, tmp_path, monkeypatch):
    module = load_script("_embeddings")
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    return module


@pytest.fixture
def problem(load_script):
    """Two sections of 40 cells at the same places, no labels."""
    rng = np.random.default_rng(0)
    x = sp.csr_matrix(rng.poisson(rng.gamma(2.0, 1.0, GENES) + 0.5, (N, GENES)).astype(np.float32))
    xy = np.tile(rng.random((N // 2, 2)), (2, 1))
    obs = pd.DataFrame({"section": np.repeat(["a", "b"], N // 2)}, index=[f"c{i}" for i in range(N)])
    return load_script("_problems").Embedding("toy", anndata.AnnData(x, obs, obsm={"spatial": xy}), "section")


@pytest.fixture
def run(load_script):
    return load_script("_harness").Run(seed=0, quick=True, data=Path(), accelerator="cpu")


def changed(problem, cells):
    """The same problem with other counts in some cells."""
    adata = problem.adata.copy()
    x = adata.X.toarray()
    x[cells] = np.random.default_rng(9).permuted(x[cells], axis=1)
    adata.X = sp.csr_matrix(x)
    return type(problem)(problem.data, adata, problem.library_key)


def test_simple_methods(emb, problem, run):
    width = {"PCA": 29, "PCA, own + neighbors": 58, "PCA, mean of neighbors": 29, "PCA, mean of neighbors twice": 29}
    width |= {"BANKSY-style, lambda 0.2": 20, "BANKSY-style, lambda 0.8": 20}
    before = problem.adata.copy()
    for name, columns in width.items():
        values = emb.EMBEDDING[name](problem, run).values
        assert values.shape == (N, columns), name
        assert np.isfinite(values).all(), name
    assert (problem.adata.X != before.X).nnz == 0


def test_trained_methods_without_labels(emb, problem, run):
    width = {"scVI": 10, "scVI, mean of neighbors": 10, "scVI, own + 3 hops": 40, "scVIVA, clusters of scVI": 10}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fits = {name: emb.EMBEDDING[name](problem, run) for name in width}
    for name, columns in width.items():
        assert fits[name].values.shape == (N, columns), name
        assert np.isfinite(fits[name].values).all(), name
        assert fits[name].epochs == 1, name
    own = fits["scVI"].values
    np.testing.assert_array_equal(fits["scVI, own + 3 hops"].values[:, :10], own)
    expected = [own[[i, *row.indices]].mean(0) for i, row in enumerate(emb.spatial(problem, 6))]
    np.testing.assert_allclose(fits["scVI, mean of neighbors"].values, expected, atol=1e-5)
    # One latent was trained and kept.
    assert fits["scVI, own + 3 hops"].training_s == fits["scVI"].training_s
    assert len(list(emb.CACHE.glob("*.npz"))) == 1


def test_another_seed_or_other_data_are_trained_anew(emb, problem, run, monkeypatch):
    seen = []

    def train_scvi(x, how):
        seen.append(how.seed)
        return emb.Fit(np.full((N, 2), len(seen), float), 1, 1, 1.0)

    monkeypatch.setattr(emb, "train_scvi", train_scvi)
    other = type(run)(seed=1, quick=True, data=Path(), accelerator="cpu")
    cases = [(problem, run), (problem, run), (problem, other), (changed(problem, [3]), run)]
    assert [emb.scvi_latent(*case).values[0, 0] for case in cases] == [1, 1, 2, 3]


def test_neighbors_never_join_sections(emb, problem, load_script):
    section = problem.adata.obs["section"].to_numpy()
    graphs = [emb.spatial(problem, 6), *emb.kernel(problem, 12)]
    for graph in graphs:
        row, col = graph.nonzero()
        assert (section[row] == section[col]).all()
    features = np.where(section == "a", 1.0, 5.0)[:, None]
    np.testing.assert_allclose(load_script("_smoothing").averaged(features, graphs[0], times=2), features)
    hops = emb.own_and_hops(features, graphs[0], 3)
    assert set(hops[section == "a"].round(5).ravel()) <= {0.0, 1.0}


def test_hops_are_rings(emb):
    path = sp.csr_matrix(np.eye(5, k=1) + np.eye(5, k=-1))
    got = emb.own_and_hops(np.arange(5.0)[:, None], path, 3)
    expected = [[0, 1, 2, 3], [1, 1, 3, 4], [2, 2, 2, 0], [3, 3, 1, 0], [4, 3, 2, 1]]
    np.testing.assert_allclose(got, expected)


def test_banksy_without_neighbors_is_pca_of_standardized_expression(emb, problem):
    x = emb.log_values(problem).toarray()
    u, s, _ = np.linalg.svd((x - x.mean(0)) / x.std(0), full_matrices=False)
    got, expected = emb.banksy(problem, 0.0).values, u[:, :20] * s[:20]
    sign = np.sign((got * expected).sum(0))
    np.testing.assert_allclose(got * sign, expected, atol=1e-3)


def test_banksy_terms_against_loops(emb, problem, monkeypatch):
    monkeypatch.setattr(emb, "BANKSY", {"mean": 4, "gradient": 7, "components": 8})
    x, xy = emb.log_values(problem).toarray().astype(float), problem.adata.obsm["spatial"]
    section = problem.adata.obs["section"].to_numpy()

    def weights(i, k):
        others = [j for j in range(N) if section[j] == section[i] and j != i]
        near = sorted(others, key=lambda j: np.linalg.norm(xy[j] - xy[i]))[:k]
        d = np.array([np.linalg.norm(xy[j] - xy[i]) for j in near])
        w = np.exp(-((d / np.median(d)) ** 2))
        return near, w / w.sum()

    mean, gradient = np.zeros_like(x), np.zeros_like(x)
    for i in range(N):
        near, w = weights(i, 4)
        mean[i] = w @ x[near]
        near, w = weights(i, 7)
        angle = np.array([complex(*(xy[j] - xy[i])) / abs(complex(*(xy[j] - xy[i]))) for j in near])
        gradient[i] = abs(sum(w[j] * angle[j] * (x[near[j]] - w @ x[near]) for j in range(7)))

    def scaled(a):
        return (a - a.mean(0)) / a.std(0)

    terms = [0.2**0.5 * scaled(x), (0.8 * 2 / 3) ** 0.5 * scaled(mean), (0.8 / 3) ** 0.5 * scaled(gradient)]
    joint = np.hstack(terms)
    u, s, _ = np.linalg.svd(joint - joint.mean(0), full_matrices=False)
    got, expected = emb.banksy(problem, 0.8).values, u[:, :8] * s[:8]
    np.testing.assert_allclose(np.abs(got), np.abs(expected), atol=1e-2)


def test_counts_and_genes(emb, problem, monkeypatch):
    x = problem.adata.X.toarray() * 1.1
    x[:, 4] = 0.2  # rounds to nothing
    near = type(problem)("toy", anndata.AnnData(sp.csr_matrix(x)), None)
    assert (emb.counts(near).data % 1 == 0).all()
    assert np.flatnonzero(~emb.variable_genes(near)).tolist() == [4]
    monkeypatch.setattr(emb, "N_GENES", 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scanpy with recent pandas
        assert emb.variable_genes(near).sum() == 12


@pytest.mark.parametrize("name", ["GraphST", "STAGATE"])
def test_peers(load_script, problem, run, name):
    method = load_script("_peers").EMBEDDING[name]
    package = {"GraphST": "GraphST", "STAGATE": "STAGATE_pyG"}[name]
    if importlib.util.find_spec(package) is None:
        with pytest.raises(ImportError, match=f"{name} needs `pip install {name.lower()}-modern`"):
            method(problem, run)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = method(problem, run)
    assert len(fit.values) == N
    assert np.isfinite(fit.values).all()


def test_sections_are_moved_apart(emb, load_script, problem):
    moved = type(problem)("toy", problem.adata.copy(), None)
    moved.adata.obsm["spatial"] = load_script("_peers").apart(problem)
    assert (emb.spatial(moved, 39) != emb.spatial(problem, 39)).nnz == 0
