"""Graphs of brain regions against dense formulas."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fimp_sc.pp import fmri

N_RECORDINGS, N_REGIONS, N_TIMES = 3, 10, 40


def toy_bold(seed=0):
    return np.random.default_rng(seed).normal(1e4, 50, size=(N_RECORDINGS, N_REGIONS, N_TIMES))


def toy_points(seed=1):
    return np.random.default_rng(seed).normal(size=(N_REGIONS, 3))


def toy_weights(seed=2, *, symmetric=True):
    weights = np.random.default_rng(seed).random((N_REGIONS, N_REGIONS))
    return weights + weights.T if symmetric else weights


def blocks(mdata, key="spatial_connectivities"):
    """Return the dense block of every recording after a check that there is nothing outside."""
    graph = mdata["fmri"].obsp[key]
    dense = graph.toarray()
    n = N_REGIONS
    parts = [dense[i : i + n, i : i + n].copy() for i in range(0, len(dense), n)]
    assert sum((part != 0).sum() for part in parts) == (dense != 0).sum()
    return parts


def test_nearest_regions_by_coordinates():
    points = toy_points()
    mdata = fmri(toy_bold(), coordinates=points, n_neighbors=4)
    lengths = np.linalg.norm(points[:, None] - points[None], axis=-1)
    expected = np.zeros((N_REGIONS, N_REGIONS))
    for row, order in enumerate(np.argsort(lengths + np.diag(np.full(N_REGIONS, np.inf)), axis=1)):
        expected[row, order[:4]] = 1
    for part, distances in zip(blocks(mdata), blocks(mdata, "spatial_distances"), strict=True):
        np.testing.assert_array_equal(part, expected)
        np.testing.assert_allclose(distances, lengths * expected)
    assert mdata["fmri"].obsp["spatial_connectivities"].dtype == np.float32


def test_regions_at_one_place_are_neighbors_at_distance_zero():
    points = toy_points()
    points[:4] = points[0]
    mdata = fmri(toy_bold(), coordinates=points, n_neighbors=2)
    graph = mdata["fmri"].obsp["spatial_connectivities"]
    assert (np.diff(graph.indptr) == 2).all()
    assert graph.diagonal().sum() == 0
    distances = mdata["fmri"].obsp["spatial_distances"]
    assert distances.nnz == graph.nnz
    assert (distances[:4].data == 0).all()


def test_every_recording_may_have_its_own_coordinates():
    points = np.stack([toy_points(seed) for seed in range(N_RECORDINGS)])
    together = fmri(toy_bold(), coordinates=points)
    np.testing.assert_array_equal(together["fmri"].obsm["spatial"], points.reshape(-1, 3))
    for i, part in enumerate(blocks(together)):
        np.testing.assert_array_equal(part, blocks(fmri(toy_bold(), coordinates=points[i]))[0])


def test_structural_weights_are_kept_without_the_diagonal():
    weights = toy_weights(symmetric=False)
    weights[2, 5] = 0
    mdata = fmri(toy_bold(), connectivity=weights)
    expected = weights.astype(np.float32)
    np.fill_diagonal(expected, 0)
    for part in blocks(mdata):
        np.testing.assert_array_equal(part, expected)
    assert "spatial_distances" not in mdata["fmri"].obsp
    assert "spatial" not in mdata["fmri"].obsm
    assert mdata["fmri"].uns["fimp_modality"]["graph"] == "structural"
    assert weights[0, 0] != 0, "the caller's matrix must stay as it is"


@pytest.mark.parametrize("form", ["array", "list", "sparse list", "dictionary"])
def test_every_recording_may_have_its_own_connectivity(form):
    each = [toy_weights(seed) for seed in range(N_RECORDINGS)]
    names = ["a", "b", "c"]
    given = {
        "array": np.stack(each),
        "list": each,
        "sparse list": [sparse.coo_matrix(w) for w in each],
        "dictionary": {name: each[names.index(name)] for name in "cab"},
    }[form]
    mdata = fmri(toy_bold(), connectivity=given, recordings=names, coordinates=toy_points())
    lengths = np.linalg.norm(toy_points()[:, None] - toy_points()[None], axis=-1)
    for part, distances, weights in zip(blocks(mdata), blocks(mdata, "spatial_distances"), each, strict=True):
        np.testing.assert_array_equal(part, (weights - np.diag(np.diag(weights))).astype(np.float32))
        np.testing.assert_allclose(distances, lengths)


def test_a_sparse_connectivity_serves_all_recordings():
    weights = sparse.random(N_REGIONS, N_REGIONS, density=0.3, random_state=0, format="coo")
    expected = weights.toarray().astype(np.float32)
    np.fill_diagonal(expected, 0)
    for form in ("coo", "csr"):
        given = weights.asformat(form)
        given.setdiag(2)
        before = given.toarray()
        for part in blocks(fmri(toy_bold(), connectivity=given)):
            np.testing.assert_array_equal(part, expected)
        np.testing.assert_array_equal(given.toarray(), before)


def test_dense_connectivities_are_thinned_out(caplog):
    weights = toy_weights()
    np.fill_diagonal(weights, 9)
    off = weights[~np.eye(N_REGIONS, dtype=bool)]
    with caplog.at_level(logging.WARNING, logger="fimp_sc"):
        part = blocks(fmri(toy_bold(), connectivity=weights, top_fraction=0.2))[0]
    assert "of all pairs" not in caplog.text
    assert (part > 0).sum() == 18
    assert sorted(part[part > 0]) == sorted(off.astype(np.float32))[-18:]
    np.testing.assert_array_equal(part, part.T)
    part = blocks(fmri(toy_bold(), connectivity=weights, threshold=1.2))[0]
    np.testing.assert_array_equal(part > 0, (weights >= 1.2) & ~np.eye(N_REGIONS, dtype=bool))
    with caplog.at_level(logging.WARNING, logger="fimp_sc"):
        fmri(toy_bold(), connectivity=weights)
    assert "joins 100 % of all pairs" in caplog.text


def test_signed_connectivities_need_a_threshold():
    weights = toy_weights() - 1
    with pytest.raises(ValueError, match=r"connectivity has \d+ negative weights"):
        fmri(toy_bold(), connectivity=weights)
    for part in (
        blocks(fmri(toy_bold(), connectivity=weights, threshold=0.3))[0],
        blocks(fmri(toy_bold(), connectivity=weights, top_fraction=1.0))[0],
    ):
        assert (part[part != 0] > 0).all()
        assert part.any()


def test_functional_graph_knows_nothing_of_other_recordings():
    bold = toy_bold()
    options = {"method": "functional", "recordings": ["a", "b", "c"], "n_neighbors": 3}
    mdata = fmri(bold, train_recordings=["c", "a"], **options)
    expected = np.zeros((N_REGIONS, N_REGIONS))
    mean = (np.corrcoef(bold[0]) + np.corrcoef(bold[2])) / 2 - 2 * np.eye(N_REGIONS)
    for row, order in enumerate(np.argsort(-mean, axis=1)[:, :3]):
        expected[row, order] = mean[row, order].clip(0)
    for part in blocks(mdata):
        np.testing.assert_allclose(part, expected, atol=1e-5)
    bold[1] = toy_bold(seed=9)[1]
    same = fmri(bold, train_recordings=[0, "c"], **options)
    assert (same["fmri"].obsp["spatial_connectivities"] != mdata["fmri"].obsp["spatial_connectivities"]).nnz == 0
    bold[2] = toy_bold(seed=8)[2]
    other = fmri(bold, train_recordings=["a", "c"], **options)
    assert (other["fmri"].obsp["spatial_connectivities"] != mdata["fmri"].obsp["spatial_connectivities"]).nnz
    assert mdata["fmri"].uns["fimp_modality"]["train_recordings"] == ["a", "c"]


@pytest.mark.parametrize(("wanted", "found"), [([2, 3], ["2", "3"]), (["1", 2], ["1", "2"]), ([0], ["1"])])
def test_numbers_are_names_of_recordings_where_they_can_be(wanted, found):
    options = {"method": "functional", "recordings": [1, 2, 3], "n_neighbors": 3}
    mdata = fmri(toy_bold(), train_recordings=wanted, **options)
    assert mdata["fmri"].uns["fimp_modality"]["train_recordings"] == found
    with pytest.raises(ValueError, match="numbers that are names of recordings and others that are not"):
        fmri(toy_bold(), train_recordings=[0, 1], **options)


def test_weights_with_names_of_regions_are_brought_into_order():
    names = [f"r{i}" for i in range(N_REGIONS)]
    order = np.random.default_rng(0).permutation(N_REGIONS)
    framed = pd.DataFrame(toy_weights(), index=names, columns=names).iloc[order, order]
    found = fmri(toy_bold(), connectivity=framed, region_names=names, threshold=0.1)
    expected = fmri(toy_bold(), connectivity=toy_weights(), region_names=names, threshold=0.1)
    assert (found["fmri"].obsp["spatial_connectivities"] != expected["fmri"].obsp["spatial_connectivities"]).nnz == 0
    with pytest.raises(ValueError, match="index of connectivity has no 'r0'"):
        fmri(toy_bold(), connectivity=framed.rename(index={"r0": "x"}), region_names=names, threshold=0.1)


def test_regions_without_neighbors_are_logged(caplog):
    weights = toy_weights()
    weights[4] = 0
    with caplog.at_level(logging.WARNING, logger="fimp_sc"):
        fmri(toy_bold(), connectivity=weights, threshold=0.1)
    assert "3 of 30 regions have no neighbors" in caplog.text
    assert "'recording_0:region_4'" in caplog.text
