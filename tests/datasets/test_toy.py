from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors

from fimp_sc.datasets import toy_tissue


@pytest.fixture(scope="module")
def tissue() -> ad.AnnData:
    return toy_tissue()


def _log(counts: np.ndarray) -> np.ndarray:
    return np.log1p(100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))


def _neighbor_mean(adata: ad.AnnData, values: np.ndarray) -> np.ndarray:
    mean = np.empty_like(values)
    for rows in adata.obs.groupby("section", observed=True).indices.values():
        xy = adata.obsm["spatial"][rows]
        nearest = NearestNeighbors(n_neighbors=11).fit(xy).kneighbors(xy, return_distance=False)[:, 1:]
        mean[rows] = values[rows][nearest].mean(axis=1)
    return mean


def test_contents(tissue: ad.AnnData) -> None:
    assert tissue.shape == (1500, 765)
    assert sparse.isspmatrix_csr(tissue.X)
    assert tissue.X.dtype == np.float32
    assert (tissue.X.data > 0).all()
    np.testing.assert_array_equal(tissue.X.data, np.rint(tissue.X.data))
    assert tissue.X.sum(axis=1).min() > 0
    assert tissue.obsm["spatial"].shape == (1500, 2)
    assert tissue.obs_names.is_unique
    assert tissue.var_names.is_unique
    assert {"expression", "simulated", "random_state"} <= set(tissue.uns["provenance"])


def test_every_region_is_in_every_section(tissue: ad.AnnData) -> None:
    cells = tissue.obs.groupby(["section", "region"], observed=False).size()
    assert len(cells) == 8
    assert cells.min() >= 20


def test_same_seed_same_tissue() -> None:
    one, two, other = (toy_tissue(n_obs=100, random_state=seed) for seed in (3, 3, 4))
    assert (one.X != two.X).nnz == 0
    np.testing.assert_array_equal(one.obsm["spatial"], two.obsm["spatial"])
    assert (one.X != other.X).nnz > 0


def test_counts_are_recovered_from_the_source() -> None:
    import scanpy as sc

    from fimp_sc.datasets._toy import _source_cells

    counts, *_ = _source_cells()
    raw = np.expm1(sc.datasets.pbmc68k_reduced().raw.X.toarray())
    fraction = counts / counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(fraction, raw / raw.sum(axis=1, keepdims=True), atol=2e-3)


def test_neighbors_inform_the_region(tissue: ad.AnnData) -> None:
    own = _log(tissue.X.toarray())
    half = (tissue.obsm["spatial"] // 60).astype(int).sum(axis=1) % 2 == 0
    score = {}
    for name, values in {"own": own, "neighbors": _neighbor_mean(tissue, own)}.items():
        parts = PCA(30, random_state=0).fit_transform(values)
        parts /= parts.std(axis=0)
        probe = LogisticRegression(max_iter=1000, C=0.1).fit(parts[half], tissue.obs["region"][half])
        score[name] = probe.score(parts[~half], tissue.obs["region"][~half])
    assert 0.5 < score["own"] < score["neighbors"] - 0.05


def test_neighbors_inform_unseen_expression(tissue: ad.AnnData) -> None:
    counts = tissue.X.toarray().astype(int)
    seen = np.random.default_rng(0).binomial(counts, 0.5)
    own, unseen = _log(seen), _log(counts - seen)
    pca = PCA(20, random_state=0).fit(own)
    rebuilt = pca.inverse_transform(pca.transform(own))
    with_neighbors = 0.8 * rebuilt + 0.2 * _neighbor_mean(tissue, own)
    errors = [np.square(unseen - guess).sum() for guess in (own.mean(axis=0), rebuilt, with_neighbors)]
    assert errors[2] < 0.99 * errors[1] < 0.95 * errors[0]


def test_survives_a_file(tmp_path) -> None:
    tissue = toy_tissue(n_obs=100)
    tissue.write_h5ad(tmp_path / "toy.h5ad")
    again = ad.read_h5ad(tmp_path / "toy.h5ad")
    assert again.obs["region"].tolist() == tissue.obs["region"].tolist()
    assert again.uns["provenance"]["random_state"] == 0


def test_too_few_cells() -> None:
    with pytest.raises(ValueError, match="n_obs=10 is too small"):
        toy_tissue(n_obs=10)
