from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import mean_squared_error, r2_score

from fimp_sc.metrics import _imputation_scores, imputation_scores


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    truth = rng.poisson(1.0, (50, 6)).astype(float)
    return truth, truth + rng.normal(0, 0.7, truth.shape)


def test_like_scikit_learn(pair, monkeypatch) -> None:
    truth, imputed = pair
    monkeypatch.setattr(_imputation_scores, "_ROWS", 7)
    scores = imputation_scores(truth, imputed)
    assert scores["r2"] == pytest.approx(r2_score(truth.ravel(), imputed.ravel()))
    assert scores["mse"] == pytest.approx(mean_squared_error(truth, imputed))
    np.testing.assert_allclose(scores["r2_per_gene"], r2_score(truth, imputed, multioutput="raw_values"))
    centered = truth - truth.mean(0)
    assert scores["r2_gene"] == pytest.approx(1 - ((truth - imputed) ** 2).sum() / (centered**2).sum())
    assert scores["n_entries"] == 300


def test_hidden_entries_around_given_means(pair) -> None:
    truth, imputed = pair
    rng = np.random.default_rng(1)
    hidden, means = rng.random(truth.shape) < 0.2, rng.random(6)
    row, gene = np.nonzero(hidden)
    t, p = truth[row, gene], imputed[row, gene]
    scores = imputation_scores(truth, imputed, entries=hidden, gene_means=means)
    assert scores["r2"] == pytest.approx(r2_score(t, p))
    assert scores["r2_gene"] == pytest.approx(1 - ((t - p) ** 2).sum() / ((t - means[gene]) ** 2).sum())
    assert scores["n_entries"] == hidden.sum()
    one = gene == 2
    assert scores["r2_per_gene"][2] == pytest.approx(r2_score(t[one], p[one]))
    of_means = imputation_scores(truth, np.tile(means, (50, 1)), entries=hidden, gene_means=means)
    assert of_means["r2_gene"] == pytest.approx(0)


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, sparse.coo_matrix])
def test_sparse_like_dense(pair, form) -> None:
    truth, imputed = pair
    hidden = np.random.default_rng(1).random(truth.shape) < 0.3
    dense = imputation_scores(truth, imputed, entries=hidden)
    scores = imputation_scores(form(truth), imputed, entries=form(hidden))
    assert {k: v for k, v in scores.items() if k != "r2_per_gene"} == {
        k: dense[k] for k in scores if k != "r2_per_gene"
    }
    np.testing.assert_array_equal(scores["r2_per_gene"], dense["r2_per_gene"])


def test_missing_and_constant_genes(pair) -> None:
    truth, imputed = pair
    imputed[:, 1], truth[:, 2], truth[0, 0] = np.nan, 3.0, np.nan
    scores = imputation_scores(truth, imputed)
    assert scores["n_entries"] == 5 * 50 - 1
    np.testing.assert_array_equal(np.isnan(scores["r2_per_gene"]), [False, True, True, False, False, False])
    kept = ~np.isnan(truth + imputed)
    assert scores["r2"] == pytest.approx(r2_score(truth[kept], imputed[kept]))


def test_layers_and_chosen_genes(toy) -> None:
    rng = np.random.default_rng(0)
    dense = toy.X.toarray()
    toy.layers["fimp"] = (dense + rng.normal(0, 0.1, dense.shape)).astype(np.float32)
    toy.layers["hidden"] = sparse.csr_matrix(rng.random(dense.shape) < 0.1)
    scores = imputation_scores(toy, None, "fimp", entries="hidden")
    plain = imputation_scores(dense, toy.layers["fimp"], entries=toy.layers["hidden"])
    assert scores["r2"] == pytest.approx(plain["r2"])
    assert list(scores["r2_per_gene"].index) == list(toy.var_names)
    genes = toy.var_names[[40, 3, 11]]
    toy.obsm["some"], toy.uns["some"] = toy.layers["fimp"][:, [40, 3, 11]], {"genes": np.array(genes, dtype=object)}
    some = imputation_scores(toy, None, "some", entries="hidden")
    assert list(some["r2_per_gene"].index) == list(genes)
    np.testing.assert_allclose(some["r2_per_gene"], scores["r2_per_gene"][genes])
    assert some["n_entries"] == toy.layers["hidden"][:, [40, 3, 11]].sum()


@pytest.mark.filterwarnings("ignore:.*zarr v[23]:UserWarning")
def test_chosen_genes_after_a_zarr_store(toy, tmp_path) -> None:
    toy.obsm["some"] = toy.X[:, [40, 3]].toarray() + 0.5
    toy.uns["some"] = {"genes": np.array(toy.var_names[[40, 3]], dtype=object)}
    toy.write_zarr(tmp_path / "toy.zarr")
    again = ad.read_zarr(tmp_path / "toy.zarr")
    # What zarr's own strings become depends on versions.
    if hasattr(np.dtypes, "StringDType"):
        again.uns["some"]["genes"] = np.array(toy.var_names[[40, 3]].tolist(), dtype=np.dtypes.StringDType())
    scores = imputation_scores(again, None, "some")
    assert list(scores["r2_per_gene"].index) == list(toy.var_names[[40, 3]])
    assert scores["mse"] == pytest.approx(0.25)


def test_unusable_input(toy, pair) -> None:
    truth, imputed = pair
    with pytest.raises(KeyError, match=r"'fimp' is not in adata\.layers"):
        imputation_scores(toy, None, "fimp")
    toy.obsm["some"], toy.uns["some"] = np.ones((toy.n_obs, 1)), {"genes": np.array(["no gene"], dtype=object)}
    with pytest.raises(KeyError, match="'no gene' is not in the genes of the truth"):
        imputation_scores(toy, None, "some")
    with pytest.raises(ValueError, match=r"\(50, 6\).*\(50, 5\)"):
        imputation_scores(truth, imputed[:, :5])
    with pytest.raises(ValueError, match="No entry is left"):
        imputation_scores(truth, imputed, entries=np.zeros(truth.shape, bool))
    with pytest.raises(ValueError, match="gene_means has 5 values"):
        imputation_scores(truth, imputed, gene_means=np.zeros(5))
