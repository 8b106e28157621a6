"""Niches of a reference in other cells: the same mixture, with names and colors as they are now."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.mixture import GaussianMixture

from fimp_sc import datasets, pp, tl

PARTS = "fimp_niche_probabilities"


def groups(seed: int, sizes=(40, 60, 80, 100)) -> ad.AnnData:
    """Four clear groups in five dimensions."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(4), sizes))
    adata = ad.AnnData(obs=pd.DataFrame({"group": group.astype(str)}, index=[f"c{i}" for i in range(len(group))]))
    adata.obsm["X_fimp"] = 9 * np.eye(5)[:4][group] + rng.normal(size=(len(group), 5))
    return adata


@pytest.fixture
def reference() -> ad.AnnData:
    adata = groups(0)
    tl.niches(adata, 4, smooth=0, n_seeds=2, labels_key="group")
    return adata


@pytest.mark.parametrize("covariance_type", ["tied", "full", "diag", "spherical"])
@pytest.mark.parametrize("n_components", [3, None])
def test_probabilities_are_those_of_the_mixture(covariance_type, n_components, tmp_path) -> None:
    adata, other = groups(0), groups(1)
    # Groups that overlap, so that probabilities are not all 0 or 1.
    adata.obsm["X_fimp"] /= [4, 4, 4, 4, 1]
    other.obsm["X_fimp"] /= [4, 4, 4, 4, 1]
    how = {"covariance_type": covariance_type, "n_components": n_components, "smooth": 0, "n_seeds": 3}
    tl.niches(adata, 4, **how)
    adata.write_h5ad(tmp_path / "reference.h5ad")
    again = ad.read_h5ad(tmp_path / "reference.h5ad")
    tl.niches(adata, reference=again, key_added="fimp_niche", overwrite=True)
    tl.niches(other, reference=again)
    held = again.uns["fimp_niche"]["mixture"]
    own = GaussianMixture(4, covariance_type="full")
    own.weights_, own.means_, own.covariances_ = (held[key] for key in ("weights", "means", "covariances"))
    own.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(own.covariances_))
    centered = other.obsm["X_fimp"] - again.obsm["X_fimp"].mean(0)
    values = (centered if n_components is None else centered @ held["components"].T) / held["unit"]
    np.testing.assert_allclose(other.obsm[PARTS], own.predict_proba(values), atol=1e-5)
    assert (other.obs["fimp_niche"].cat.codes == own.predict(values)).all()
    # In the reference itself: the niches that were found there.
    assert (adata.obs["fimp_niche"] == again.obs["fimp_niche"]).all()
    density = own.score_samples(values)
    rank = adata.obs["fimp_niche_fit"].rank() / adata.n_obs
    assert np.abs(adata.obs["fimp_niche_fit"] - rank).max() < 0.02
    assert (np.diff(other.obs["fimp_niche_fit"].to_numpy()[np.argsort(density)]) >= 0).all()


def test_names_and_colors_are_those_of_the_reference_now(reference, unchanged) -> None:
    names = reference.obs.groupby("fimp_niche", observed=True)["group"].first().map(lambda group: f"layer {group}")
    # Another order of categories, as a column that is mapped has them.
    reference.obs["fimp_niche"] = reference.obs["fimp_niche"].map(names).astype(str).astype("category")
    reference.uns["fimp_niche_colors"] = ["#000000", "#111111", "#222222", "#333333"]
    other = groups(1, sizes=(30, 0, 20, 50))
    with unchanged(reference):
        tl.niches(other, reference=reference, labels_key="group")
    assert (other.obs["fimp_niche"].astype(str) == "layer " + other.obs["group"]).all()
    assert list(other.obs["fimp_niche"].cat.categories) == [f"layer {i}" for i in range(4)]
    assert list(other.uns["fimp_niche_colors"]) == list(reference.uns["fimp_niche_colors"])
    table = other.uns["fimp_niche"]["composition"]
    assert table.loc["2", "layer 2"] == 20
    assert table["layer 1"].sum() == 0


def test_niches_of_one_name_are_one(reference) -> None:
    other = groups(1)
    tl.niches(other, reference=reference, key_added="fimp_niche")
    before = other.obsm[PARTS]
    merged = reference.obs["fimp_niche"].astype(str).replace({"3": "1"})
    reference.obs["fimp_niche"] = pd.Categorical(merged)
    tl.niches(other, reference=reference)
    expected = np.stack([before[:, 0], before[:, 1] + before[:, 3], before[:, 2]], axis=1)
    np.testing.assert_allclose(other.obsm[PARTS], expected, atol=1e-6)
    assert other.uns["fimp_niche"]["n_niches"] == 3


def test_cells_of_no_niche_are_told(reference) -> None:
    near, far = groups(1), groups(2)
    far.obsm["X_fimp"][:140] += [0, 0, 0, 0, 30]
    tl.niches(near, reference=reference)  # in silence
    assert (near.obs["fimp_niche_fit"] < 0.01).mean() < 0.05
    with pytest.warns(UserWarning, match="51 % of the cells fit none of the niches"):
        tl.niches(far, reference=reference)
    assert (far.obs["fimp_niche_fit"][:140] == 0).all()


def test_what_is_mapped_is_smoothed_like_the_reference_and_results_are_replaced() -> None:
    tissue = datasets.toy_tissue(n_obs=400, random_state=0)
    pp.spatial_graph(tissue, library_key="section")
    tissue.obsm["X_fimp"] = np.random.default_rng(0).normal(size=(400, 3))
    tl.niches(tissue, 3, smooth=2, n_seeds=2, library_key="section")
    found = tissue.copy()
    tl.niches(found, reference=tissue, library_key="section")
    assert (found.obs["fimp_niche"] == tissue.obs["fimp_niche"]).all()
    assert found.uns["fimp_niche"]["params"]["smooth"] == 2
    assert PARTS in found.obsm
    tl.niches(found, 3, n_seeds=2, library_key="section")
    assert PARTS not in found.obsm
    assert "fimp_niche_fit" not in found.obs


def test_another_model_is_refused(tissue, quick) -> None:
    other = tissue.copy()
    tl.embed(tissue, **quick)
    tl.embed(other, **{**quick, "random_state": 1})
    tl.niches(tissue, 2, n_seeds=2, verbose=False)
    with pytest.raises(ValueError, match=r"not made by the model of the reference.*model=fimp_sc.tl.get_model"):
        tl.niches(other, reference=tissue)
    tl.embed(other, model=tl.get_model(tissue), accelerator="cpu", verbose=False)
    tl.niches(other, reference=tissue, verbose=False)
    assert (other.obs["fimp_niche"] == tissue.obs["fimp_niche"]).all()


def test_references_that_cannot_serve(reference, unchanged) -> None:
    other = groups(1)
    with unchanged(other):
        for how in ({"n_niches": 3}, {"smooth": 1}):
            with pytest.raises(ValueError, match="are those of the reference: leave them out"):
                tl.niches(other, reference=reference, **how)
        with pytest.raises(KeyError, match=r"'own' is not in reference.uns.*key_added="):
            tl.niches(other, reference=reference, key_added="own")
        lost = reference[~reference.obs_names.isin(reference.uns["fimp_niche"]["mixture"]["typical"])].copy()
        with pytest.raises(KeyError, match="pass the object with all of its cells"):
            tl.niches(other, reference=lost)
        reference.obsm["X_fimp"] = reference.obsm["X_fimp"][:, :4]
        tl.niches(reference, 4, smooth=0, n_seeds=2)
        with pytest.raises(ValueError, match="has 5 columns, and that of the reference 4"):
            tl.niches(other, reference=reference)
        del reference.uns["fimp_niche"]["mixture"]
        with pytest.raises(ValueError, match="has no mixture"):
            tl.niches(other, reference=reference)


def test_a_reference_keeps_its_own_niches(reference) -> None:
    before = reference.uns["fimp_niche"]["mixture"]
    for given in (reference, [reference, groups(3)]):
        with pytest.raises(ValueError, match=r"The reference is the object itself.*copy=True"):
            tl.niches(given, reference=reference, verbose=False)
    assert reference.uns["fimp_niche"]["mixture"] is before
    again = tl.niches(reference, reference=reference, copy=True, verbose=False)
    assert (again.obs["fimp_niche"] == reference.obs["fimp_niche"]).all()


def test_one_cell_is_found_among_the_niches_of_a_reference(reference) -> None:
    other = groups(1)
    tl.niches(other, reference=reference, verbose=False)
    for i in (0, 7):
        one = groups(1)[[i]].copy()
        tl.niches(one, reference=reference, verbose=False)
        np.testing.assert_allclose(one.obsm[PARTS], other.obsm[PARTS][[i]], rtol=1e-6)


def test_each_of_several_objects_is_a_reference(tmp_path) -> None:
    whole, other = groups(0), groups(1)
    found = whole.copy()
    tl.niches(found, 4, smooth=0, n_seeds=2)
    tl.niches(other, reference=found, overwrite=True)
    expected = other.obs["fimp_niche"].astype(str).to_numpy()
    # The second has cells of the same names as the first, and none of one niche.
    lacking = (found.obs["fimp_niche"] == "1").to_numpy()
    half = np.arange(whole.n_obs) % 2 == 0
    first, second = whole[half | lacking].copy(), whole[~half & ~lacking].copy()
    second.obs_names = first.obs_names[: second.n_obs]
    tl.niches({"first": first, "second": second}, 4, smooth=0, n_seeds=2)
    second.write_h5ad(tmp_path / "second.h5ad")
    for reference in (first, second, ad.read_h5ad(tmp_path / "second.h5ad")):
        tl.niches(other, reference=reference)
        assert (other.obs["fimp_niche"].astype(str) == expected).mean() > 0.99
    names = {"0": "stroma", "1": "vessel", "2": "tumor", "3": "fat"}
    for reference in (first, second):
        reference.obs["fimp_niche"] = reference.obs["fimp_niche"].cat.rename_categories(names)
        tl.niches(other, reference=reference)
        assert (other.obs["fimp_niche"].astype(str) == pd.Series(expected).map(names).to_numpy()).mean() > 0.99
    second.obs["fimp_niche"] = second.obs["fimp_niche"].cat.remove_unused_categories()
    with pytest.raises(KeyError, match="have no niche there any more"):
        tl.niches(other, reference=second)
