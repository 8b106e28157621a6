"""Brain regions: the graph against dense formulas, the object against the arrays it was made of."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fimp_sc.data import describe_modality
from fimp_sc.data._modality import quiet_mudata
from fimp_sc.pp import fmri

N_RECORDINGS, N_REGIONS, N_TIMES = 3, 10, 40


def toy_bold(seed=0):
    return np.random.default_rng(seed).normal(1e4, 50, size=(N_RECORDINGS, N_REGIONS, N_TIMES))


def toy_points(seed=1):
    return np.random.default_rng(seed).normal(size=(N_REGIONS, 3))


def test_array_becomes_regions_by_recordings():
    bold, points = toy_bold(), toy_points()
    names = [f"area {i}" for i in range(N_REGIONS)]
    mdata = fmri(
        bold, coordinates=points, region_names=names, recordings=["a", "b", "c"], sampling_interval=np.float32(0.5)
    )
    adata = mdata["fmri"]
    assert list(mdata.mod) == ["fmri"]
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X, bold.astype(np.float32).reshape(-1, N_TIMES))
    assert adata.obs_names[N_REGIONS + 2] == "b:area 2"
    assert adata.obs["recording"].tolist() == ["a"] * 10 + ["b"] * 10 + ["c"] * 10
    assert adata.obs["region"].cat.categories.tolist() == names
    assert adata.obs["region"].iloc[N_REGIONS + 2] == "area 2"
    assert adata.var_names[:2].tolist() == ["t0", "t1"]
    assert adata.var["time"].tolist() == [i * 0.5 for i in range(N_TIMES)]
    np.testing.assert_array_equal(adata.obsm["spatial"], np.tile(points, (3, 1)))
    assert dict(adata.uns["fimp_modality"]) == {
        "kind": "signal",
        "connectivities_key": "spatial_connectivities",
        "weighted": False,
        "library_key": "recording",
        "graph": "coordinates",
        "sampling_interval": 0.5,
    }


def test_the_object_shares_no_memory_with_the_array():
    bold = toy_bold().astype(np.float32)
    mdata = fmri(bold, coordinates=toy_points())
    before = mdata["fmri"].X.copy()
    bold[:] = 0
    np.testing.assert_array_equal(mdata["fmri"].X, before)


def test_lists_and_dictionaries_hold_time_by_region():
    bold, points = toy_bold(), toy_points()
    expected = fmri(bold, coordinates=points, recordings=["a", "b", "c"])["fmri"]
    nilearn = [recording.T for recording in bold]
    for mdata in (
        fmri(nilearn, coordinates=points, recordings=["a", "b", "c"]),
        fmri(dict(zip("abc", nilearn, strict=True)), coordinates=points),
        fmri(np.stack(nilearn), coordinates=points, recordings=["a", "b", "c"], orientation="time_region"),
        fmri(list(bold), coordinates=points, recordings=["a", "b", "c"], orientation="region_time"),
    ):
        np.testing.assert_array_equal(mdata["fmri"].X, expected.X)
        assert mdata["fmri"].obs_names.equals(expected.obs_names)
    one = fmri(bold[1], coordinates=points)["fmri"]
    np.testing.assert_array_equal(one.X, expected.X[N_REGIONS : 2 * N_REGIONS])


def test_labels_of_regions_recordings_and_observations():
    each = np.arange(30).reshape(3, 10)
    labels = {"lobe": ["x", "y"] * 5, "age": [20.5, 30.5, 40.5], "number": each}
    obs = fmri(toy_bold(), coordinates=toy_points(), labels=labels)["fmri"].obs
    assert obs["lobe"].dtype == "category"
    assert obs["lobe"].tolist() == ["x", "y"] * 15
    assert obs["age"].tolist() == [20.5] * 10 + [30.5] * 10 + [40.5] * 10
    assert obs["number"].tolist() == list(range(30))
    frame = pd.DataFrame({"lobe": pd.Categorical(["x", "y"] * 5, categories=["y", "x", "z"])})
    obs = fmri(toy_bold(), coordinates=toy_points(), labels=frame)["fmri"].obs
    assert obs["lobe"].cat.categories.tolist() == ["y", "x", "z"]
    assert obs["lobe"].tolist() == ["x", "y"] * 15
    with pytest.raises(ValueError, match="of the 10 regions or of the 10 recordings"):
        fmri(np.random.default_rng(0).normal(size=(10, 10, 20)), coordinates=toy_points(), labels=np.arange(10))


def test_labels_with_names_of_regions_or_recordings_are_theirs_in_any_order():
    regions = [f"r{i}" for i in range(10)]
    labels = {
        "lobe": pd.Series(list("abcdefghij"), index=regions).iloc[::-1],
        "age": pd.Series([20.5, 30.5, 40.5], index=["x", "y", "z"]).iloc[::-1],
    }
    names = {"region_names": regions, "recordings": ["x", "y", "z"]}
    obs = fmri(toy_bold(), coordinates=toy_points(), labels=labels, **names)["fmri"].obs
    assert obs["lobe"].tolist() == list("abcdefghij") * 3
    assert obs["age"].tolist() == [20.5] * 10 + [30.5] * 10 + [40.5] * 10


def with_value(recording, region, value):
    bold = toy_bold()
    bold[recording, region] = value
    return bold


WRONG = [
    (
        {"bold": with_value(1, 4, np.nan)},
        ValueError,
        "1 of 30 .* NaN or infinite, .*'region_4' of .*'recording_1'",
    ),
    ({"bold": with_value(2, 3, 7.0)}, ValueError, "1 of 30 signals are constant, .*'region_3' of .*'recording_2'"),
    ({"bold": toy_bold().transpose(0, 2, 1)}, ValueError, "looks transposed: pass orientation='time_region'"),
    ({"bold": list(toy_bold())}, ValueError, "looks transposed: pass orientation='region_time'"),
    ({"bold": toy_bold()[:, :7]}, ValueError, "7 regions, but coordinates has 10"),
    (
        {"bold": [np.ones((30, 10)), np.ones((25, 10))]},
        ValueError,
        "'recording_1' 25.*crop all to 25",
    ),
    ({"bold": np.zeros(5)}, ValueError, r"shape \(5,\)"),
    ({"bold": []}, ValueError, "no recordings"),
    ({"bold": toy_bold().astype(str)}, TypeError, "real numbers"),
    ({"bold": {"a": toy_bold()[0].T}, "recordings": ["a"]}, ValueError, "recordings= is not needed"),
    ({"recordings": ["a", "b"]}, ValueError, "recordings has 2 names, but there are 3"),
    ({"recordings": ["a", "a", "b"]}, ValueError, "repeats 'a'"),
    ({"recordings": "abc"}, TypeError, "list of names"),
    ({"region_names": ["a"] * 9}, ValueError, "region_names 9, coordinates 10"),
    ({"coordinates": toy_points()[:, :2]}, ValueError, r"found \(10, 2\)"),
    (
        {"coordinates": np.where(np.eye(10, 3) == 0, 1.0, np.nan)},
        ValueError,
        "first for region 0",
    ),
    ({"coordinates": np.stack([toy_points()] * 2)}, ValueError, "of 2 recordings, but bold has 3"),
    ({"coordinates": None}, ValueError, "coordinates graph needs coordinates="),
    ({"connectivity": np.ones((9, 9))}, ValueError, "coordinates 10, connectivity 9"),
    ({"connectivity": np.ones((10, 9))}, ValueError, r"square.*\(10, 9\)"),
    ({"connectivity": np.zeros((10, 10))}, ValueError, "no edges"),
    ({"connectivity": np.full((10, 10), np.nan)}, ValueError, "100 NaN or infinite weights"),
    ({"connectivity": np.ones((2, 10, 10))}, ValueError, "2 matrices, but bold has 3"),
    ({"connectivity": {"a": np.ones((10, 10))}}, ValueError, "different recordings: 'a'"),
    ({"connectivity": np.ones((10, 10)), "method": "coordinates"}, ValueError, "connectivity= only applies"),
    ({"connectivity": np.ones((10, 10)), "top_fraction": 0.1, "threshold": 1}, ValueError, "not both"),
    ({"connectivity": np.ones((10, 10)), "top_fraction": 10}, ValueError, "at most 1"),
    ({"connectivity": np.ones((10, 10)), "n_neighbors": 3}, ValueError, "does not apply"),
    ({"threshold": 1.0}, ValueError, "threshold= only applies"),
    ({"method": "functional"}, ValueError, "needs train_recordings="),
    ({"method": "functional", "train_recordings": ["x"]}, ValueError, "has 'x', but the recordings are 'recording_0'"),
    (
        {"method": "functional", "train_recordings": "a"},
        TypeError,
        "train_recordings must be a list of names .* found 'a'",
    ),
    ({"train_recordings": [0]}, ValueError, "train_recordings= only applies"),
    ({"method": "nearest"}, ValueError, "method must be one of .* found 'nearest'"),
    ({"n_neighbors": 10}, ValueError, "pass 9 or less"),
    ({"n_neighbors": 2.5}, TypeError, "whole number"),
    ({"sampling_interval": 0}, ValueError, "sampling_interval must be .* above 0"),
    ({"sampling_interval": "2"}, TypeError, "sampling_interval must be .* number"),
    ({"orientation": "time"}, ValueError, "orientation must be one of 'region_time', 'time_region'"),
    ({"labels": np.arange(7)}, ValueError, r"shape \(7,\)"),
    ({"labels": {"region": np.arange(10)}}, ValueError, "used for something else"),
    (
        {"recordings": ["a", "a:b", "c"], "region_names": ["b:c", "c", *"defghijk"]},
        ValueError,
        "Two observations would be named 'a:b:c'",
    ),
    ({"modality": "a/b"}, ValueError, "must not contain"),
    ({"modality": 3}, TypeError, "name"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_wrong_input_is_explained(arguments, error, message):
    with pytest.raises(error, match=message):
        fmri(**{"bold": toy_bold(), "coordinates": toy_points()} | arguments)


def test_more_regions_than_time_points_need_an_orientation():
    bold = np.random.default_rng(0).normal(size=(2, 30, 20))
    options = {"method": "functional", "train_recordings": [0]}
    with pytest.raises(ValueError, match="may be transposed"):
        fmri(bold, **options)
    assert fmri(bold, orientation="region_time", **options)["fmri"].shape == (60, 20)
    assert fmri(bold, orientation="time_region", **options)["fmri"].shape == (40, 30)


def test_survives_a_file(tmp_path):
    import mudata

    mdata = fmri(
        toy_bold(),
        method="functional",
        train_recordings=[0, 1],
        coordinates=toy_points(),
        sampling_interval=2,
        labels=["x", "y"] * 5,
    )
    with quiet_mudata():
        mudata.write_h5mu(tmp_path / "brain.h5mu", mdata)
        back = mudata.read_h5mu(tmp_path / "brain.h5mu")
    assert describe_modality(back, "fmri") == describe_modality(mdata, "fmri")
    old, new = mdata["fmri"], back["fmri"]
    np.testing.assert_array_equal(new.X, old.X)
    for key in ("spatial_connectivities", "spatial_distances"):
        assert new.obsp[key].nnz == old.obsp[key].nnz
        assert (new.obsp[key] != old.obsp[key]).nnz == 0
    assert new.obs_names.tolist() == old.obs_names.tolist()
    assert new.obs["label"].tolist() == old.obs["label"].tolist()
    assert list(new.uns["fimp_modality"]["train_recordings"]) == ["recording_0", "recording_1"]


def test_real_recordings_with_tractography(shared_data):
    with np.load(shared_data / "fmri_hcp_aal2_7subjects.npz") as stored:
        data = dict(stored)
    mdata = fmri(
        data["bold"],
        connectivity=data["sc"],
        coordinates=data["roi_xyz"],
        region_names=data["roi_names"],
        recordings=data["subjects"],
        labels={"is_cortex": data["is_cortex"]},
        sampling_interval=data["tr_seconds"],
        top_fraction=0.1,
    )
    adata = mdata["fmri"]
    assert adata.shape == (7 * 94, 1200)
    np.testing.assert_array_equal(adata.X, data["bold"].reshape(-1, 1200))
    assert adata.obs_names[94] == f"{data['subjects'][1]}:Precentral_L"
    graph = adata.obsp["spatial_connectivities"].tocoo()
    assert (graph.row // 94 == graph.col // 94).all()
    np.testing.assert_array_equal(graph.data, data["sc"][graph.row // 94, graph.row % 94, graph.col % 94])
    assert np.bincount(graph.row // 94).min() >= 874  # 0.1 of 94 × 93 pairs
    assert describe_modality(mdata, "fmri") == {
        "modality": "fmri",
        "kind": "signal",
        "n_obs": 658,
        "n_edges": graph.nnz,
        "connectivities_key": "spatial_connectivities",
        "library_key": "recording",
        "n_dimensions": 3,
        "n_times": 1200,
        "sampling_interval": pytest.approx(0.72),
        "n_recordings": 7,
    }
    with pytest.raises(ValueError, match="looks transposed"):
        fmri(list(data["bold"]), connectivity=data["sc"])


def test_real_surface_patches_with_mesh_edges(shared_data):
    with np.load(shared_data / "fmri_lemon_fsa5_424patches.npz") as stored:
        data = dict(stored)
    source, destination = data["edges"].T
    mesh = sparse.coo_matrix((np.ones(len(source)), (destination, source)), shape=(424, 424))
    mdata = fmri(data["bold"], connectivity=mesh + mesh.T, coordinates=data["xyz"], labels={"hemisphere": data["hemi"]})
    adata = mdata["fmri"]
    graph = adata.obsp["spatial_connectivities"]
    assert graph.nnz == 2 * len(source)
    assert (graph != graph.T).nnz == 0
    distances = adata.obsp["spatial_distances"]
    i, j = data["edges"][7]
    assert distances[i, j] == pytest.approx(np.linalg.norm(data["xyz"][i] - data["xyz"][j]))
    counts = adata.obs["hemisphere"].value_counts().to_dict()
    assert counts == {
        "lh": (data["hemi"] == "lh").sum(),
        "rh": (data["hemi"] == "rh").sum(),
    }
