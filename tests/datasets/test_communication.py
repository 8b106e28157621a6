from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.neighbors import NearestNeighbors

from fimp_sc.datasets import toy_communication


@pytest.fixture(scope="module")
def planted() -> ad.AnnData:
    return toy_communication(600, 11, n_genes=20)


@pytest.fixture(scope="module")
def nothing() -> ad.AnnData:
    return toy_communication(600, 11, n_genes=20, planted=False)


def _signal(adata: ad.AnnData) -> dict[str, np.ndarray]:
    """Return, for each type, how much receptor goes with ligand of the senders among the five next cells."""
    names = adata.uns["communication"]
    ligand, receptor = (adata[:, names[gene]].X.toarray().ravel() for gene in ("ligand", "receptor"))
    kind, heard = adata.obs["cell_type"].to_numpy(), np.full(adata.n_obs, np.nan)
    for rows in adata.obs.groupby("section", observed=True).indices.values():
        xy = adata.obsm["spatial"][rows]
        for row, near in zip(
            rows, NearestNeighbors(n_neighbors=6).fit(xy).kneighbors(return_distance=False), strict=True
        ):
            senders = rows[near][kind[rows[near]] == names["sender"]]
            heard[row] = ligand[senders].mean() if len(senders) else np.nan
    chosen = (kind == names["receiver"]) & np.isfinite(heard)
    return spearmanr(heard[chosen], receptor[chosen]).statistic


def test_contents(planted: ad.AnnData) -> None:
    assert planted.shape == (600, 20)
    assert planted.X.dtype == np.float32
    np.testing.assert_array_equal(planted.X.data, np.rint(planted.X.data))
    assert (planted.X.data > 0).all()
    assert planted.obs["section"].value_counts().tolist() == [300, 300]
    assert planted.obs["cell_type"].nunique() == 3
    names = planted.uns["communication"]
    assert {names["ligand"], names["receptor"]} <= set(planted.var_names)
    assert names["planted"] is True
    assert planted.uns["provenance"]["random_state"] == 11


def test_only_senders_have_the_ligand_and_only_receivers_the_receptor(planted: ad.AnnData, nothing) -> None:
    for adata in (planted, nothing):
        names = adata.uns["communication"]
        for who, gene in (("sender", "ligand"), ("receiver", "receptor")):
            has = adata[:, names[gene]].X.toarray().ravel() > 0
            kind = (adata.obs["cell_type"] == names[who]).to_numpy()
            assert not has[~kind].any()
            assert has[kind].mean() > 0.5


def test_receivers_answer_only_where_that_is_planted(planted: ad.AnnData, nothing) -> None:
    assert _signal(planted) > 0.7
    assert abs(_signal(nothing)) < 0.2


def test_without_an_answer_each_gene_by_itself_looks_the_same(planted: ad.AnnData, nothing) -> None:
    names = planted.uns["communication"]
    assert nothing.uns["communication"] == names | {"planted": False}
    for key in ("cell_type", "section"):
        assert (planted.obs[key] == nothing.obs[key]).all()
    np.testing.assert_array_equal(planted.obsm["spatial"], nothing.obsm["spatial"])
    sums = [adata[:, names["receptor"]].X.sum() for adata in (planted, nothing)]
    assert sums[0] == pytest.approx(sums[1], rel=0.05)


def test_types_lie_at_random(planted: ad.AnnData) -> None:
    kind = planted.obs["cell_type"].to_numpy()
    same = []
    for rows in planted.obs.groupby("section", observed=True).indices.values():
        near = NearestNeighbors(n_neighbors=5).fit(planted.obsm["spatial"][rows]).kneighbors(return_distance=False)
        same.append((kind[rows][near] == kind[rows][:, None]).mean())
    assert np.mean(same) == pytest.approx(np.square(np.unique(kind, return_counts=True)[1] / 600).sum(), abs=0.05)


def test_same_seed_same_object() -> None:
    one, two, other = (toy_communication(100, seed, n_genes=10) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.X.toarray(), two.X.toarray())
    assert (one.X != other.X).nnz


def test_unusable_arguments() -> None:
    with pytest.raises(ValueError, match="n_obs=50 is too small"):
        toy_communication(50)
    with pytest.raises(ValueError, match="n_genes must be from 10 to 765, found 9"):
        toy_communication(100, n_genes=9)
