"""Graphs as people bring them: of any kind of node, and of cells in samples."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fimp_sc._errors import MissingKeyError
from fimp_sc.data.graph._adjacency import check_adjacency
from fimp_sc.data.validate._checks import check_connectivities, check_graph


def make_adata(**obs) -> ad.AnnData:
    names = pd.DataFrame({k: pd.Series(v, dtype=object) for k, v in obs.items()}, index=range(12))
    names.index = [f"cell{i}" for i in range(12)]
    return ad.AnnData(
        np.ones((12, 2), dtype=np.float32), obs=names, obsm={"spatial": np.random.default_rng(0).random((12, 2))}
    )


def ring(n=12) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.ones(n, dtype=np.float32), (np.arange(n), (np.arange(n) + 1) % n)), shape=(n, n))


@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
def test_good_graph_need_not_be_symmetric(form):
    for graph in (ring().asformat(form), ring().asformat(form).astype(bool)):
        assert (graph != graph.T).nnz, "the ring goes one way"
        before = graph.copy()
        check_connectivities(graph, 12)
        assert not (graph != before).nnz


def test_missing_graph():
    adata = make_adata()
    with pytest.raises(MissingKeyError, match=r"adata.obsp \(it holds no keys\).*fimp_sc.pp.spatial_graph\(adata\)"):
        check_graph(adata, "spatial_connectivities", None)


def damaged(value) -> sparse.csr_matrix:
    graph = ring()
    graph.data[[2, 5]] = value
    return graph


@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        (ring().toarray(), TypeError, r"must be a sparse matrix, found ndarray: convert it with scipy.sparse"),
        (ring().astype(complex), TypeError, "real weights"),
        (ring(11), ValueError, r"The graph has the shape \(11, 11\), but 12 nodes need \(12, 12\)"),
        (damaged(np.nan), ValueError, "2 NaN or infinite weights, first from node 3 to node 2"),
        (damaged(-1), ValueError, "2 negative weights, first from node 3 to node 2"),
        (sparse.csr_matrix((12, 12)), ValueError, "no edges between nodes"),
        (sparse.eye(12, format="csr"), ValueError, "no edges between nodes"),  # self-loops join nobody
        (ring() * 0, ValueError, "no edges between nodes"),  # nor do stored zeros
    ],
)
def test_bad_graphs(graph, error, message):
    with pytest.raises(error, match=message):
        check_connectivities(graph, 12)


def test_edges_joining_libraries_are_counted():
    adata = make_adata(section=["a"] * 6 + ["b"] * 6)
    adata.obsp["g"] = ring()
    check_graph(adata, "g", None)
    message = r"adata.obsp\['g'\] has 2 edges that join samples, for instance node 6 of 'b' with node 5 of 'a'"
    with pytest.raises(ValueError, match=message):
        check_graph(adata, "g", "section")
    with pytest.raises(MissingKeyError, match=r"'sample' is not in adata\.obs"):
        check_graph(adata, "g", "sample")
    graph = ring().tolil()
    graph[5, 6] = graph[11, 0] = 0
    graph[5, 0] = graph[11, 6] = 1
    adata.obsp["g"] = graph.tocsr()
    check_graph(adata, "g", "section")


def test_isolated_nodes_give_one_warning_and_self_loops_do_not_help():
    graph = (ring() + sparse.eye(12)).tolil()
    graph[3, 4] = graph[7, 8] = 0
    with pytest.warns(UserWarning, match="2 of 12 nodes have no neighbors.*their own tokens alone") as record:
        check_connectivities(graph.tocsr(), 12)
    assert sum("no neighbors" in str(warning.message) for warning in record) == 1


@pytest.mark.parametrize(
    ("key", "library", "call"),
    [
        ("spatial_connectivities", None, "spatial_graph(adata, overwrite=True)"),
        ("spatial_connectivities", "section", "spatial_graph(adata, library_key='section', overwrite=True)"),
        ("near_connectivities", None, "spatial_graph(adata, key_added='near', overwrite=True)"),
    ],
)
def test_cells_without_neighbors_after_others_were_left_out_are_told_to_build_again(key, library, call):
    adata = make_adata(section=["a"] * 12)
    adata.obsp[key] = ring()
    check_graph(adata, key, library)
    with pytest.warns(UserWarning, match="left out after the graph was built, build it again") as record:
        check_graph(adata[[0, 1, 5, 8]].copy(), key, library)
    assert f"fimp_sc.pp.{call}" in str(record[0].message)


@pytest.mark.parametrize("form", [np.asarray, sparse.csc_matrix, sparse.coo_array])
def test_adjacency_of_any_form_is_returned_as_edges(form):
    dense = np.array([[2, 1, 0], [0, 0, 3], [0, 0, 0]])
    given = form(dense)
    kept = check_adjacency(given, 3, where="adjacency")
    assert kept.format == "csr"
    assert kept.dtype == np.float32
    np.testing.assert_array_equal(kept.toarray(), dense)
    kept.data[:] = 9
    np.testing.assert_array_equal(given if form is np.asarray else given.toarray(), dense)
    loops_left_out = check_adjacency(given, 3, where="adjacency", self_loops=False)
    np.testing.assert_array_equal(loops_left_out.toarray(), [[0, 1, 0], [0, 0, 3], [0, 0, 0]])


def test_stored_zeros_are_dropped_and_repeated_entries_added():
    entries = ([1.0, 2.0, 0.0], ([0, 0, 1], [1, 1, 2]))
    graph = check_adjacency(sparse.coo_matrix(entries, shape=(3, 3)), 3, where="adjacency")
    assert graph.nnz == 1
    assert graph[0, 1] == 3


def test_negative_weights_may_stay_where_they_are_thinned_out_later():
    graph = check_adjacency(damaged(-1), 12, where="connectivity", signed=True)
    assert (graph.data < 0).sum() == 2


@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        ([["a", "b"], ["c", "d"]], TypeError, "connectivity must hold real weights, found ndarray with dtype <U1"),
        (np.ones((3, 2)), ValueError, r"has the shape \(3, 2\), but 12 regions need \(12, 12\): one row each"),
        (damaged(np.inf), ValueError, "2 NaN or infinite weights, first from region 3 to region 2"),
        (damaged(-1).toarray(), ValueError, "2 negative weights, first from region 3 to region 2 .*setting them to 0"),
    ],
)
def test_bad_adjacencies(graph, error, message):
    with pytest.raises(error, match=message):
        check_adjacency(graph, 12, where="connectivity", what="region")


@pytest.mark.parametrize(
    ("kind", "maker"), [("text", "fimp_sc.pp.text"), ("patch", "fimp_sc.pp.images"), ("signal", "fimp_sc.pp.fmri")]
)
def test_advice_names_what_makes_graphs_of_such_nodes(kind, maker):
    adata = make_adata(sample=["a", "b"] * 6)
    adata.uns["fimp_modality"] = {"kind": kind}
    found = []
    with pytest.raises(MissingKeyError) as error:
        check_graph(adata, "spatial_connectivities")
    found.append(str(error.value))
    adata.obsp["spatial_connectivities"] = sparse.csr_matrix((12, 12))
    with pytest.raises(ValueError, match="no edges") as error:
        check_graph(adata, "spatial_connectivities")
    found.append(str(error.value))
    adata.obsp["spatial_connectivities"] = ring()
    with pytest.raises(ValueError, match="join samples") as error:
        check_graph(adata, "spatial_connectivities", "sample")
    found.append(str(error.value))
    graph = ring().tolil()
    graph[0] = 0
    adata.obsp["spatial_connectivities"] = graph.tocsr()
    with pytest.warns(UserWarning, match="1 of 12 nodes have no neighbors") as told:
        check_graph(adata, "spatial_connectivities")
    found.append(str(told[0].message))
    for message in found:
        assert maker in message
        assert "spatial_graph" not in message
