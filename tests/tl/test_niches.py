from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import normalize

from fimp_sc import datasets, pl, pp, tl
from fimp_sc.tl._smooth import smoothed
from fimp_sc.tl._statistics import _clusterings

FAST = {"n_seeds": 2, "smooth": 0}


@pytest.fixture(scope="session")
def _planted() -> ad.AnnData:
    adata = datasets.toy_tissue(n_obs=1000, random_state=0)
    pp.spatial_graph(adata, library_key="section")
    counts = normalize(adata.X.astype(np.float64), norm="l1") * np.median(adata.X.sum(axis=1).A1)
    around = normalize(adata.obsp["spatial_connectivities"], norm="l1") @ np.log1p(counts.toarray())
    adata.obsm["X_fimp"] = PCA(10, random_state=0).fit_transform(around).astype(np.float32)
    return adata


@pytest.fixture
def planted(_planted) -> ad.AnnData:
    """Toy tissue with a graph and, as its representation, principal components of the mean over neighbors."""
    return _planted.copy()


@pytest.fixture
def blobs() -> ad.AnnData:
    """Four clear groups of 40, 60, 80 and 100 cells in five dimensions, shuffled, without a graph."""
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat(np.arange(4), [40, 60, 80, 100]))
    centers = 9 * np.eye(5)[:4]
    adata = ad.AnnData(obs=pd.DataFrame({"group": group.astype(str)}, index=[f"c{i}" for i in range(280)]))
    adata.obsm["X_fimp"] = (centers[group] + rng.normal(size=(280, 5))).astype(np.float32)
    return adata


def test_planted_niches_are_found(planted) -> None:
    tl.niches(planted, 4, library_key="section")
    # 0.89, without smoothing 0.82; components of single cells give 0.22.
    assert adjusted_rand_score(planted.obs["region"], planted.obs["fimp_niche"]) > 0.8


def test_the_number_of_clear_groups_is_found(blobs) -> None:
    tl.niches(blobs, n_range=(2, 7), smooth=0)
    assert adjusted_rand_score(blobs.obs["group"], blobs.obs["fimp_niche"]) == 1
    table = blobs.uns["fimp_niche"]["stability"]
    assert list(table["n_niches"]) == [2, 3, 4, 5, 6, 7]
    assert table.loc["4", "stability"] == pytest.approx(1)
    assert table.loc["5", "stability"] < 0.95


def test_niches_are_numbered_by_size(blobs) -> None:
    tl.niches(blobs, 4, key_added="n", **FAST)
    assert list(blobs.obs["n"].cat.categories) == ["0", "1", "2", "3"]
    pd.testing.assert_series_equal(
        blobs.obs["n"].astype(str), blobs.obs["group"].map({"3": "0", "2": "1", "1": "2", "0": "3"}), check_names=False
    )


def test_same_seed_same_niches_in_any_order_and_unit(planted) -> None:
    tl.niches(planted, 6, library_key="section", random_state=3)
    order = np.random.default_rng(0).permutation(planted.n_obs)
    shuffled = planted[order].copy()
    del shuffled.obs["fimp_niche"]
    shuffled.obsm["X_fimp"] = shuffled.obsm["X_fimp"] * 1024
    tl.niches(shuffled, 6, library_key="section", random_state=3)
    assert (shuffled.obs["fimp_niche"] == planted.obs["fimp_niche"].iloc[order]).all()


def test_seeds_differ_and_chosen_numbers_repeat(planted) -> None:
    rng = np.random.default_rng(0)
    planted.obsm["X_fimp"] = rng.normal(size=(planted.n_obs, 3))
    runs = [
        tl.niches(planted, n_range=(3, 5), n_seeds=2, smooth=0, random_state=seed, copy=True).uns["fimp_niche"]
        for seed in (0, 0, 1)
    ]
    pd.testing.assert_frame_equal(runs[0]["stability"], runs[1]["stability"])
    assert not runs[0]["stability"].equals(runs[2]["stability"])


def test_smoothing_is_the_mean_over_cell_and_neighbors() -> None:
    rng = np.random.default_rng(0)
    weights = rng.random((30, 30)) * (rng.random((30, 30)) < 0.1)
    weights[4] = 0  # without neighbors
    graph = sparse.csr_matrix(weights)
    adata = ad.AnnData(obs=pd.DataFrame(index=[f"c{i}" for i in range(30)]), obsp={"g": graph})
    values, order = rng.normal(size=(30, 3)), rng.permutation(30)
    expected = values.copy()
    for _ in range(2):
        before = expected.copy()
        for i in range(30):
            cells = {i, *graph[i].indices}
            expected[i] = np.mean([before[j] for j in cells], axis=0)
    np.testing.assert_allclose(smoothed(adata, values, order, 2, "g", None), expected[order])
    np.testing.assert_array_equal(smoothed(adata, values, order, 0, "absent", None), values[order])


def test_sections_do_not_mix(planted) -> None:
    first = (planted.obs["section"] == "section_1").to_numpy()
    values, order = planted.obsm["X_fimp"].astype(float), np.arange(planted.n_obs)
    whole = smoothed(planted, values, order, 2, "spatial_connectivities", "section")
    changed = smoothed(planted, np.where(first[:, None], values, 1e6), order, 2, "spatial_connectivities", "section")
    np.testing.assert_array_equal(whole[first], changed[first])
    across = sparse.coo_matrix(([1.0], ([0], [planted.n_obs - 1])), shape=(planted.n_obs, planted.n_obs))
    planted.obsp["spatial_connectivities"] = (planted.obsp["spatial_connectivities"] + across).tocsr()
    with pytest.raises(ValueError, match="1 edges that join samples"):
        tl.niches(planted, 4, library_key="section")


def test_labels_are_counted_and_everything_survives_a_file(planted, tmp_path, unchanged) -> None:
    planted.obs["type"] = planted.obs["cell_type"].astype(str).replace({"CD14+ Monocyte": "T / naïve"})
    planted.obs.loc[planted.obs_names[:30], "type"] = np.nan
    with unchanged(planted, obs={"fimp_niche"}, uns={"fimp_niche", "fimp_niche_colors"}):
        tl.niches(planted, labels_key="type", library_key="section", n_range=(3, 4), n_seeds=2)
    table = planted.uns["fimp_niche"]["composition"]
    assert list(table.columns) == list(planted.obs["fimp_niche"].cat.categories)
    assert table.to_numpy().sum() == planted.n_obs - 30
    one = (planted.obs["type"] == "T / naïve") & (planted.obs["fimp_niche"] == "1")
    assert table.loc["T / naïve", "1"] == one.sum()
    planted.write_h5ad(tmp_path / "niches.h5ad")
    back = ad.read_h5ad(tmp_path / "niches.h5ad")
    pd.testing.assert_series_equal(back.obs["fimp_niche"], planted.obs["fimp_niche"])
    assert list(back.uns["fimp_niche_colors"]) == list(planted.uns["fimp_niche_colors"])
    held, kept = planted.uns["fimp_niche"], back.uns["fimp_niche"]
    assert set(kept) == set(held)
    assert kept["params"]["use_rep"] == "X_fimp"
    assert kept["params"]["smooth"] == 1
    np.testing.assert_array_equal(kept["composition"], held["composition"])
    assert list(kept["composition"].index) == list(table.index)
    pd.testing.assert_frame_equal(kept["stability"], held["stability"], check_names=False, check_index_type=False)


def test_colors_stay_with_the_niche(blobs) -> None:
    tl.niches(blobs, 2, **FAST)
    few = blobs.uns["fimp_niche_colors"]
    tl.niches(blobs, 30, **FAST)
    many = blobs.uns["fimp_niche_colors"]
    assert many[:2] == few
    assert len(set(many)) == len(many) == blobs.uns["fimp_niche"]["n_niches"]


def test_the_map_has_these_colors(planted) -> None:
    from matplotlib.colors import to_rgba

    tl.niches(planted, 3, n_seeds=2)
    (ax,) = pl.spatial(planted, "fimp_niche", show=False)[0]
    codes, colors = planted.obs["fimp_niche"].cat.codes.to_numpy(), planted.uns["fimp_niche_colors"]
    np.testing.assert_allclose(ax.collections[0].get_facecolors(), [to_rgba(colors[code]) for code in codes])


def test_copy_view_and_other_forms(blobs, unchanged) -> None:
    with unchanged(blobs):
        done = tl.niches(blobs, 4, copy=True, **FAST)
    view = blobs[:200]
    tl.niches(view, 3, **FAST)
    assert view.obs["fimp_niche"].notna().all()
    assert "fimp_niche" not in blobs.obs
    blobs.obsm["X_fimp"] = pd.DataFrame(blobs.obsm["X_fimp"], index=blobs.obs_names, columns=list("abcde"))
    tl.niches(blobs, 4, **FAST)
    pd.testing.assert_series_equal(blobs.obs["fimp_niche"], done.obs["fimp_niche"])


def test_several_modalities_as_a_whole(joint, only_changed) -> None:
    joint.obsm["X_fimp"] = np.random.default_rng(0).normal(size=(joint.n_obs, 3))
    written = [("", "obs", "fimp_niche"), ("", "uns", "fimp_niche"), ("", "uns", "fimp_niche_colors")]
    with only_changed(joint, *written):
        tl.niches(joint, 3, n_seeds=2)
    assert joint.obs["fimp_niche"].nunique() == 3


def test_leiden_finds_the_groups(blobs) -> None:
    pytest.importorskip("igraph")
    tl.niches(blobs, 4, method="leiden", **FAST)
    assert adjusted_rand_score(blobs.obs["group"], blobs.obs["fimp_niche"]) == 1
    assert blobs.uns["fimp_niche"]["resolution"] > 0
    tl.niches(blobs, 6, method="leiden", **FAST)
    assert blobs.obs["fimp_niche"].nunique() == 6
    tl.niches(blobs, n_range=(3, 6), method="leiden", **FAST)
    assert set(blobs.uns["fimp_niche"]["stability"]["n_niches"]) == {3, 4, 5, 6}


def test_leiden_is_the_same_in_any_order(planted) -> None:
    pytest.importorskip("igraph")
    tl.niches(planted, 4, method="leiden")
    order = np.random.default_rng(0).permutation(planted.n_obs)
    shuffled = planted[order].copy()
    tl.niches(shuffled, 4, method="leiden")
    assert (shuffled.obs["fimp_niche"] == planted.obs["fimp_niche"].iloc[order]).all()


def test_leiden_without_igraph_names_the_package(blobs, unchanged, monkeypatch) -> None:
    monkeypatch.setattr(_clusterings, "find_spec", lambda name: None)
    with unchanged(blobs), pytest.raises(ImportError, match="pip install igraph"):
        tl.niches(blobs, 4, method="leiden", **FAST)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"use_rep": "X_other"}, KeyError, r"'X_other' is not in adata.obsm.*fimp_sc\.tl\.embed"),
        ({"smooth": 1}, KeyError, r"spatial_graph\(adata\).*smooth=0"),
        ({"n_niches": 281}, ValueError, "number of cells, 280, found 281"),
        ({"n_niches": 1}, ValueError, "whole number of at least 2"),
        ({"n_niches": None, "n_range": (5, 4)}, ValueError, "n_range must be a pair .* in increasing order"),
        ({"n_niches": None, "n_range": (200, 300)}, ValueError, r"280 cells are too few .* n_range=\(200, 300\).* 400"),
        ({"n_niches": None, "n_range": (281, 300), "method": "leiden"}, ValueError, "which takes 281 cells: pass"),
        ({"method": "kmeans"}, ValueError, "'mixture', 'leiden', found 'kmeans'"),
        ({"covariance_type": "round"}, ValueError, "covariance_type must be one of 'tied'"),
        ({"smooth": -1}, ValueError, "smooth must be a whole number of at least 0"),
        ({"smooth": 1.5}, TypeError, "smooth must be a whole number"),
        ({"n_seeds": 1}, ValueError, "n_seeds must be a whole number of at least 2"),
        ({"labels_key": "type"}, KeyError, "'type' is not in adata.obs"),
        ({"labels_key": "depth"}, TypeError, r"obs\['depth'\] holds numbers .* not groups"),
        ({"labels_key": "group", "key_added": "group"}, ValueError, r"reads \(labels_key\)"),
        ({"library_key": "slide"}, KeyError, "'slide' is not in adata.obs"),
    ],
)
def test_nothing_is_written_when_it_fails(blobs, unchanged, arguments, error, message) -> None:
    blobs.obs["depth"] = np.random.default_rng(0).random(blobs.n_obs)
    with unchanged(blobs), pytest.raises(error, match=message):
        tl.niches(blobs, **{"n_niches": 4, **FAST, **arguments})


def test_predictions_are_not_replaced(blobs, unchanged) -> None:
    tl.niches(blobs, 3, **FAST)
    tl.niches(blobs, 4, **FAST)  # its own results are
    assert blobs.uns["fimp_niche"]["n_niches"] == 4
    # As version 0.1 wrote it.
    blobs.uns["fimp_niche"] = {
        "classes": np.array(["a", "b"], dtype=object),
        "params": {},
        "versions": {"fimp-sc": "0"},
    }
    with unchanged(blobs), pytest.raises(ValueError, match=r"key_added='fimp_niche'.*fimp_sc\.tl\.annotate"):
        tl.niches(blobs, 4, **FAST)
    with unchanged(blobs, obs={"regions"}, uns={"regions", "regions_colors"}):
        tl.niches(blobs, 4, key_added="regions", **FAST)


def test_unusable_representations(blobs) -> None:
    for bad in (np.nan, np.inf):
        blobs.obsm["bad"] = blobs.obsm["X_fimp"].copy()
        blobs.obsm["bad"][[7, 9], 2] = bad
        with pytest.raises(ValueError, match="NaN or infinite for 2 of 280 cells, first 'c7'"):
            tl.niches(blobs, 4, use_rep="bad", **FAST)
    blobs.obsm["flat"] = np.ones((280, 3))
    with pytest.raises(ValueError, match="the same for all 280 cells"):
        tl.niches(blobs, 4, use_rep="flat", **FAST)
    blobs.obsm["table"] = pd.DataFrame({"depth": np.arange(280.0), "batch": "a"}, index=blobs.obs_names)
    with pytest.raises(TypeError, match=r"obsm\['table'\] must hold numbers, and these columns do not: 'batch'"):
        tl.niches(blobs, 4, use_rep="table", **FAST)
    blobs.obsm["words"] = np.array([["a", "b"]] * 280)
    with pytest.raises(TypeError, match=r"obsm\['words'\] must hold numbers \(could not convert .*'a'"):
        tl.niches(blobs, 4, use_rep="words", **FAST)


def test_fewer_places_than_niches_is_told(blobs, caplog) -> None:
    blobs.obsm["two"] = np.repeat([[0.0, 0.0], [1.0, 1.0]], 140, axis=0)
    tl.niches(blobs, 4, use_rep="two", **FAST)
    assert blobs.obs["fimp_niche"].nunique() == blobs.uns["fimp_niche"]["n_niches"] == 2
    assert "Found 2 niches instead of 4" in caplog.text


def test_components_are_the_leading_ones_of_the_averaged_representation():
    rng = np.random.default_rng(0)
    adata = ad.AnnData(np.zeros((300, 1), np.float32))
    adata.obsm["X_fimp"] = rng.normal(size=(300, 20)) + 6 * rng.integers(0, 3, 300)[:, None] * (np.arange(20) < 3)
    adata.obsm["X_components"] = PCA(4, svd_solver="full").fit_transform(adata.obsm["X_fimp"])
    tl.niches(adata, 3, smooth=0, n_components=4)
    tl.niches(adata, 3, smooth=0, n_components=None, use_rep="X_components", key_added="other")
    assert (adata.obs["fimp_niche"] == adata.obs["other"]).all()
    assert adata.uns["fimp_niche"]["params"]["n_components"] == 4
    assert "n_components" not in adata.uns["other"]["params"]
    with pytest.raises(ValueError, match=r"n_components must be a whole number of at least 1 \(or None\), found 0"):
        tl.niches(adata, 3, smooth=0, n_components=0)


def test_a_handful_of_cells_is_too_few_to_choose_a_number(blobs, unchanged) -> None:
    few = blobs[:5].copy()
    with (
        unchanged(few),
        pytest.raises(ValueError, match=r"5 cells are too few .* takes 8 cells, 4 in each half.*n_niches="),
    ):
        tl.niches(few, smooth=0)
    tl.niches(few, 2, smooth=0)
    assert few.uns["fimp_niche"]["n_niches"] == 2
