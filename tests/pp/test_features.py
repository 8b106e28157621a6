"""Features of any kind: values and graph as they were given."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fimp_sc._errors import MissingKeyError
from fimp_sc.data import describe_modality
from fimp_sc.data._modality import quiet_mudata
from fimp_sc.pp import features, spatial_graph


def toy_values(seed=0):
    return np.random.default_rng(seed).normal(size=(12, 5))


def toy_adjacency(seed=1):
    return sparse.random(12, 12, density=0.3, format="coo", random_state=seed)


def test_array_keeps_values_weights_and_self_loops():
    values, adjacency = toy_values().astype(np.float32), toy_adjacency()
    adjacency = sparse.coo_matrix(adjacency + sparse.identity(12) * 2)
    mdata = features(values, adjacency, labels=["a", "b", "c"] * 4, feature_names=list("vwxyz"))
    adata = mdata["feature"]
    np.testing.assert_array_equal(adata.X, values)
    np.testing.assert_array_equal(adata.obsp["spatial_connectivities"].toarray(), adjacency.toarray())
    assert adata.obs_names[11] == "node_11"
    assert adata.var_names.tolist() == list("vwxyz")
    assert adata.obs["label"].tolist() == ["a", "b", "c"] * 4
    assert dict(adata.uns["fimp_modality"]) == {
        "kind": "feature",
        "connectivities_key": "spatial_connectivities",
        "weighted": True,
        "graph": "adjacency",
    }
    values[:] = 0
    assert adata.X.any()


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.float32, np.float64])
def test_values_become_floating(dtype):
    values = (toy_values() * 3).astype(dtype)
    stored = features(values, toy_adjacency())["feature"].X
    assert stored.dtype == (dtype if np.issubdtype(dtype, np.floating) else np.float32)
    np.testing.assert_array_equal(stored, values)


def test_sparse_values_and_data_frames():
    values = toy_values() * (toy_values(3) > 0)
    stored = features(sparse.coo_matrix(values), toy_adjacency())["feature"].X
    assert sparse.issparse(stored)
    assert stored.format == "csr"
    np.testing.assert_array_equal(stored.toarray(), values)
    frame = pd.DataFrame(values, index=[f"n{i}" for i in range(12)], columns=list("vwxyz"))
    adata = features(frame, toy_adjacency())["feature"]
    assert adata.obs_names.tolist() == frame.index.tolist()
    assert adata.var_names.tolist() == list("vwxyz")
    np.testing.assert_array_equal(adata.X, values)


def test_coordinates_give_lengths_of_edges():
    points = np.random.default_rng(0).normal(size=(12, 2))
    adata = features(toy_values(), toy_adjacency(), coordinates=points)["feature"]
    np.testing.assert_array_equal(adata.obsm["spatial"], points)
    lengths = np.linalg.norm(points[:, None] - points[None], axis=-1) * (toy_adjacency().toarray() > 0)
    np.testing.assert_allclose(adata.obsp["spatial_distances"].toarray(), lengths)


def test_object_with_its_own_graph_is_copied_with_all_it_has(toy):
    spatial_graph(toy, library_key="section", key_added="tissue")
    before = toy.copy()
    mdata = features(toy, connectivities_key="tissue_connectivities", modality="rna")
    adata = mdata["rna"]
    assert set(before.obs) <= set(adata.obs)
    assert (adata.X != before.X).nnz == 0
    assert (adata.obsp["tissue_connectivities"] != before.obsp["tissue_connectivities"]).nnz == 0
    assert "fimp_modality" not in toy.uns
    assert describe_modality(mdata, "rna")["connectivities_key"] == "tissue_connectivities"
    with pytest.raises(MissingKeyError, match=r"Did you mean 'tissue_connectivities'\?.*Pass adjacency="):
        features(toy, connectivities_key="tisue_connectivities")


def test_backed_object_comes_to_memory(toy, tmp_path):
    spatial_graph(toy, library_key="section")
    toy.write_h5ad(tmp_path / "toy.h5ad")
    backed = ad.read_h5ad(tmp_path / "toy.h5ad", backed="r")
    mdata = features(backed)
    backed.file.close()
    assert (mdata["feature"].X != toy.X).nnz == 0


WRONG = [
    ({"adjacency": None}, ValueError, "pass adjacency="),
    ({"adjacency": np.ones((11, 11))}, ValueError, r"shape \(11, 11\), but 12 nodes need \(12, 12\)"),
    ({"adjacency": np.full((12, 12), -1)}, ValueError, "144 negative weights"),
    ({"adjacency": np.eye(12)}, ValueError, "no edges between different nodes"),
    ({"adjacency": np.full((12, 12), "a")}, TypeError, "real weights"),
    ({"features": np.full((12, 5), np.inf)}, ValueError, "60 NaN or infinite"),
    ({"features": np.full((12, 5), "a")}, TypeError, "real numbers"),
    ({"features": np.ones(12)}, ValueError, r"found \(12,\)"),
    ({"features": np.ones((12, 0))}, ValueError, r"found \(12, 0\)"),
    ({"node_names": ["a"]}, ValueError, "node_names has 1 names, but there are 12"),
    ({"feature_names": list("aabcd")}, ValueError, "feature_names must be unique, but repeats 'a'"),
    ({"labels": np.arange(11)}, ValueError, r"shape \(11,\), but 12 nodes"),
    ({"coordinates": np.ones((11, 2))}, ValueError, r"shape \(11, 2\), but there are 12 nodes"),
    ({"coordinates": np.ones((12, 4))}, ValueError, r"found \(12, 4\)"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_wrong_input_is_explained(arguments, error, message):
    with pytest.raises(error, match=message):
        features(**{"features": toy_values(), "adjacency": toy_adjacency()} | arguments)


def test_isolated_nodes_are_logged(caplog):
    adjacency = np.zeros((12, 12))
    adjacency[:3, 5] = 1
    adjacency[7, 7] = 1  # a node is not its own neighbor
    with caplog.at_level(logging.WARNING, logger="fimp_sc"):
        features(toy_values(), adjacency)
    assert "9 of 12 nodes have no neighbors" in caplog.text


def test_survives_a_file(tmp_path):
    import mudata

    mdata = features(toy_values(), toy_adjacency(), coordinates=np.random.default_rng(0).normal(size=(12, 3)))
    with quiet_mudata():
        mudata.write_h5mu(tmp_path / "any.h5mu", mdata)
        back = mudata.read_h5mu(tmp_path / "any.h5mu")
    assert describe_modality(back, "feature") == describe_modality(mdata, "feature")
    np.testing.assert_array_equal(back["feature"].X, mdata["feature"].X)
    for key in ("spatial_connectivities", "spatial_distances"):
        assert (back["feature"].obsp[key] != mdata["feature"].obsp[key]).nnz == 0


def test_values_of_an_object_are_checked_and_cast_as_those_of_an_array():
    values = (toy_values() * 3).astype(np.int64)
    adata = ad.AnnData(sparse.csc_matrix(values))
    with quiet_mudata():
        stored = features(adata, toy_adjacency())["feature"].X
    assert stored.format == "csr"
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored.toarray(), values)
    assert adata.X.format == "csc"
    broken = ad.AnnData(np.where(np.eye(12, 5) > 0, np.nan, toy_values()))
    with pytest.raises(ValueError, match="5 NaN or infinite"):
        features(broken, toy_adjacency())


def test_columns_of_several_types():
    table = pd.DataFrame({"x": np.arange(12) / 2, "flag": np.arange(12) > 5, "n": np.arange(12)})
    stored = features(table, toy_adjacency())["feature"].X
    np.testing.assert_array_equal(stored, table.to_numpy(dtype=float))
    np.testing.assert_array_equal(features(table.convert_dtypes(), toy_adjacency())["feature"].X, stored)
    with pytest.raises(TypeError, match=r"columns 'text' \((object|str)\): leave them out"):
        features(table.assign(text="a"), toy_adjacency())


def test_what_has_the_names_of_nodes_is_brought_into_their_order():
    names = [f"n{i}" for i in range(12)]
    table = pd.DataFrame(toy_values(), index=names)
    adjacency = toy_adjacency().toarray()
    order = np.random.default_rng(0).permutation(12)
    framed = pd.DataFrame(adjacency, index=names, columns=names).iloc[order]
    places = np.random.default_rng(1).normal(size=(12, 2))
    labels = pd.Series(np.arange(12), index=names).iloc[order]
    adata = features(table, framed, labels=labels, coordinates=pd.DataFrame(places, index=names).iloc[order])["feature"]
    np.testing.assert_array_equal(adata.obsp["spatial_connectivities"].toarray(), adjacency)
    np.testing.assert_array_equal(adata.obs["label"], np.arange(12))
    np.testing.assert_array_equal(adata.obsm["spatial"], places)


def test_the_object_keeps_its_coordinates():
    places = np.random.default_rng(1).normal(size=(12, 2))
    adata = features(toy_values(), toy_adjacency(), coordinates=places)["feature"]
    places[:] = 0
    assert adata.obsm["spatial"].any()
