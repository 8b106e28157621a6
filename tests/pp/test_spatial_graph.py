"""`fimp_sc.pp.spatial_graph` against independent constructions of the same graphs."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import squidpy
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.spatial import Delaunay
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from fimp_sc.pp import spatial_graph

CONNECTIVITIES, DISTANCES, NEIGHBORS = "spatial_connectivities", "spatial_distances", "spatial_neighbors"


def make_adata(coordinates, library=None) -> ad.AnnData:
    coordinates = np.asarray(coordinates)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(len(coordinates))])
    if library is not None:
        obs["section"] = np.asarray(library)
    matrix = sparse.csr_matrix(np.ones((len(coordinates), 2), dtype=np.float32))
    return ad.AnnData(matrix, obs=obs, obsm={"spatial": coordinates}, uns={"kept": {"a": 1}})


def random_points(n, seed=0, dimensions=2) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 100, size=(n, dimensions))


def square_grid() -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(7), np.arange(6)), axis=-1).reshape(-1, 2) * 55.0


def knn_truth(coordinates, k, library=None) -> np.ndarray:
    dense = np.zeros((len(coordinates), len(coordinates)), dtype=bool)
    library = np.zeros(len(coordinates)) if library is None else np.asarray(library)
    for name in np.unique(library):
        cells = np.flatnonzero(library == name)
        neighbors = NearestNeighbors(n_neighbors=k).fit(coordinates[cells]).kneighbors(return_distance=False)
        dense[np.repeat(cells, k), cells[neighbors].ravel()] = True
    return dense


def radius_truth(coordinates, low, high, library=None) -> np.ndarray:
    distance = cdist(coordinates, coordinates)
    edges = (distance <= high) & (distance >= low)
    np.fill_diagonal(edges, False)
    return edges if library is None else edges & (np.asarray(library)[:, None] == np.asarray(library)[None])


def delaunay_truth(coordinates) -> np.ndarray:
    dense = np.zeros((len(coordinates), len(coordinates)), dtype=bool)
    for simplex in Delaunay(coordinates).simplices:
        for a in simplex:
            dense[a, simplex] = True
    np.fill_diagonal(dense, False)
    return dense


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(12, 50),
    k=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    n_libraries=st.integers(1, 2),
    dimensions=st.sampled_from([2, 3]),
)
def test_knn_equals_sklearn_sample_by_sample(n, k, seed, n_libraries, dimensions):
    coordinates = random_points(n, seed, dimensions)
    library = np.random.default_rng(seed).permutation(np.arange(n) % n_libraries).astype(str)  # samples interleaved
    adata = make_adata(coordinates, library)
    spatial_graph(adata, n_neighbors=k, library_key="section")
    graph, distances = adata.obsp[CONNECTIVITIES], adata.obsp[DISTANCES]
    expected = knn_truth(coordinates, k, library)
    np.testing.assert_array_equal(graph.toarray(), expected)
    np.testing.assert_allclose(distances.toarray(), cdist(coordinates, coordinates) * expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(15, 60), seed=st.integers(0, 10_000), radius=st.floats(30, 80), low=st.sampled_from([None, 10.0]))
def test_radius_equals_brute_force(n, seed, radius, low):
    coordinates = random_points(n, seed)
    library = np.arange(n) % 2
    adata = make_adata(coordinates, library)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no neighbors")
        spatial_graph(adata, method="radius", radius=radius if low is None else (low, radius), library_key="section")
    expected = radius_truth(coordinates, low or 0, radius, library)
    np.testing.assert_array_equal(adata.obsp[CONNECTIVITIES].toarray(), expected)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(8, 60), seed=st.integers(0, 10_000), dimensions=st.sampled_from([2, 3]))
def test_delaunay_equals_scipy(n, seed, dimensions):
    coordinates = random_points(n, seed, dimensions)
    adata = make_adata(coordinates)
    spatial_graph(adata, method="delaunay")
    np.testing.assert_array_equal(adata.obsp[CONNECTIVITIES].toarray(), delaunay_truth(coordinates))


def test_delaunay_radius_removes_long_edges():
    coordinates = random_points(80)
    adata = make_adata(coordinates)
    spatial_graph(adata, method="delaunay", radius=25.0)
    expected = delaunay_truth(coordinates) & (cdist(coordinates, coordinates) <= 25)
    np.testing.assert_array_equal(adata.obsp[CONNECTIVITIES].toarray(), expected)


@pytest.mark.parametrize("n_rings", [1, 2])
def test_grid_connects_adjacent_squares(n_rings):
    coordinates = square_grid()
    adata = make_adata(coordinates)
    spatial_graph(adata, method="grid", n_neighbors=4, n_rings=n_rings)
    steps = np.abs(coordinates[:, None] - coordinates[None]).sum(-1) / 55
    np.testing.assert_array_equal(adata.obsp[CONNECTIVITIES].toarray(), (steps > 0) & (steps <= n_rings))
    np.testing.assert_array_equal(adata.obsp[DISTANCES].toarray(), steps * (steps <= n_rings))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"method": "knn", "n_neighbors": 4}, {"n_neighs": 4}),
        ({"method": "radius", "radius": 120.0}, {"radius": 120.0}),
        ({"method": "delaunay"}, {}),
        ({"method": "grid"}, {}),
    ],
)
def test_same_keys_and_values_as_squidpy(ours, theirs):
    builder = getattr(squidpy.gr, f"spatial_neighbors_{ours['method']}", None)
    if builder is None:
        pytest.skip("this squidpy has one function for all graphs")
    adata = make_adata(square_grid(), np.arange(42) // 21)
    adata.obs["section"] = adata.obs["section"].astype("category")
    reference = adata.copy()
    spatial_graph(adata, library_key="section", key_added="near", **ours)
    builder(reference, library_key="section", key_added="near", **theirs)
    assert set(adata.obsp) == set(reference.obsp) == {"near_connectivities", "near_distances"}
    for key in reference.obsp:
        assert adata.obsp[key].format == "csr"
        assert adata.obsp[key].dtype == reference.obsp[key].dtype
        assert (adata.obsp[key] != reference.obsp[key]).nnz == 0
    assert adata.obsp["near_connectivities"].dtype == np.float32
    params = {key: value for key, value in reference.uns["near_neighbors"]["params"].items() if value is not None}
    assert adata.uns["near_neighbors"] == reference.uns["near_neighbors"] | {"params": params}


@pytest.mark.parametrize("method", ["knn", "radius", "delaunay", "grid"])
def test_older_squidpy_gives_the_same_graph(method, monkeypatch):
    if not hasattr(squidpy.gr, "spatial_neighbors"):
        pytest.skip("this squidpy no longer has the older function")
    arguments = {"radius": {"radius": 30.0}, "delaunay": {"radius": 30.0}}.get(method, {})
    coordinates = square_grid() if method == "grid" else random_points(40)
    new, old = make_adata(coordinates), make_adata(coordinates)
    spatial_graph(new, method=method, **arguments)
    monkeypatch.delattr(squidpy.gr, f"spatial_neighbors_{method}", raising=False)
    spatial_graph(old, method=method, **arguments)
    assert (new.obsp[CONNECTIVITIES] != old.obsp[CONNECTIVITIES]).nnz == 0
    assert (new.obsp[DISTANCES] != old.obsp[DISTANCES]).nnz == 0


def test_existing_graph_is_kept_unless_overwrite(caplog):
    adata = make_adata(random_points(30))
    spatial_graph(adata, n_neighbors=3)
    stored = adata.obsp[CONNECTIVITIES]
    with caplog.at_level(logging.INFO, logger="fimp_sc"):
        spatial_graph(adata, n_neighbors=5)
    assert adata.obsp[CONNECTIVITIES] is stored
    assert "as it is" in caplog.text
    spatial_graph(adata, n_neighbors=5, overwrite=True)
    assert adata.obsp[CONNECTIVITIES].nnz == 150
    assert adata.uns[NEIGHBORS]["params"]["n_neighbors"] == 5


def test_logs_what_was_built_and_prints_nothing(caplog, capfd):
    adata = make_adata(random_points(30), ["a", "b"] * 15)
    with caplog.at_level(logging.INFO, logger="fimp_sc"):
        spatial_graph(adata, n_neighbors=3, library_key="section")
    assert "knn graph of 30 cells in 2 samples, 3.0 neighbors per cell" in caplog.text
    assert capfd.readouterr().out == ""


def test_first_call_in_a_process_prints_nothing():
    code = """
import anndata, numpy
from fimp_sc.pp import spatial_graph
points = numpy.random.default_rng(0).random((9, 2))
spatial_graph(anndata.AnnData(numpy.ones((9, 1)), obsm={"spatial": points}))
"""
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == ""


@pytest.mark.parametrize("library", [["a", "b"] * 10, [0, 1] * 10, [0.21, 0.26] * 10, [True, False] * 10])
def test_library_of_any_type_and_obs_untouched(library):
    adata = make_adata(random_points(20), library)
    before = adata.obs.copy()
    spatial_graph(adata, n_neighbors=3, library_key="section")
    pd.testing.assert_frame_equal(adata.obs, before)
    edges = adata.obsp[CONNECTIVITIES].tocoo()
    assert (edges.row % 2 == edges.col % 2).all()


def test_unused_library_categories_are_ignored():
    adata = make_adata(random_points(20), ["a", "b"] * 10)
    adata.obs["section"] = pd.Categorical(adata.obs["section"], categories=["a", "gone", "b"])
    spatial_graph(adata, n_neighbors=3, library_key="section")
    assert list(adata.obs["section"].cat.categories) == ["a", "gone", "b"]
    assert (np.diff(adata.obsp[CONNECTIVITIES].indptr) == 3).all()


def test_duplicate_coordinates_and_duplicate_cell_names():
    coordinates = np.repeat(random_points(10), 2, axis=0)
    adata = make_adata(coordinates)
    with pytest.warns(UserWarning, match=r"20 of 20 cells share their place in adata\.obsm\['spatial'\] with another"):
        spatial_graph(adata, n_neighbors=3)
    graph = adata.obsp[CONNECTIVITIES]
    assert (np.diff(graph.indptr) == 3).all()
    assert graph.diagonal().sum() == 0
    assert all(graph[i, i ^ 1] == 1 for i in range(20))  # the cell at the same place is the nearest


def test_coordinates_in_a_data_frame_of_integers():
    coordinates = random_points(20).astype(int)
    adata = make_adata(coordinates)
    adata.obsm["spatial"] = pd.DataFrame(coordinates, index=adata.obs_names, columns=["x", "y"])
    spatial_graph(adata, n_neighbors=3)
    assert adata.obsp[CONNECTIVITIES].nnz == 60


def test_view_becomes_independent_and_parent_stays(assert_unchanged):
    parent = make_adata(random_points(40), ["a", "b"] * 20)
    before = parent.copy()
    view = parent[::2]
    spatial_graph(view, n_neighbors=3)
    assert_unchanged(parent, before)
    np.testing.assert_array_equal(view.obsp[CONNECTIVITIES].toarray(), knn_truth(parent.obsm["spatial"][::2], 3))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"method": "radius", "radius": (1, 120.0)}, {"method": "delaunay"}, {"method": "grid", "n_rings": 2}],
)
def test_survives_h5ad(arguments, tmp_path):
    adata = make_adata(square_grid(), ["a"] * 21 + ["b"] * 21)
    spatial_graph(adata, library_key="section", **arguments)
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    for key in (CONNECTIVITIES, DISTANCES):
        assert (back.obsp[key] != adata.obsp[key]).nnz == 0
    assert back.uns[NEIGHBORS]["connectivities_key"] == CONNECTIVITIES
    spatial_graph(back, library_key="section")  # found and used
    assert back.obsp[CONNECTIVITIES].nnz == adata.obsp[CONNECTIVITIES].nnz


def test_isolated_cells_warn_once():
    adata = make_adata([[0, 0], [1, 0], [0, 1], [500, 500]])
    with pytest.warns(UserWarning, match="1 of 4 nodes have no neighbors") as record:
        spatial_graph(adata, method="radius", radius=2)
    assert sum("no neighbors" in str(warning.message) for warning in record) == 1


def test_real_sections_are_never_joined(shared_data):
    adata = ad.read_h5ad(shared_data / "merfish_hypothalamus_animal1.h5ad")
    spatial_graph(adata, library_key="bregma")
    edges = adata.obsp[CONNECTIVITIES].tocoo()
    bregma = adata.obs["bregma"].to_numpy()
    assert len(np.unique(bregma)) == 2
    assert (bregma[edges.row] == bregma[edges.col]).all()
    assert (np.bincount(edges.row, minlength=adata.n_obs) == 6).all()
    with pytest.warns(UserWarning, match="53 % of the edges join different samples.*library_key='bregma'"):
        spatial_graph(adata, key_added="joined")
    edges = adata.obsp["joined_connectivities"].tocoo()
    assert (bregma[edges.row] != bregma[edges.col]).any(), "the samples overlap, so the test above could have failed"


def test_real_visium_grid(shared_data):
    adata = ad.read_h5ad(shared_data / "dlpfc_visium_151673.h5ad")
    with pytest.warns(UserWarning, match="1 of 3,639 nodes have no neighbors"):  # a spot on its own
        spatial_graph(adata, method="grid", key_added="grid")
    spatial_graph(adata)
    degree = np.diff(adata.obsp["grid_connectivities"].indptr)
    assert degree.max() == 6
    assert np.median(degree) == 6
    graph = adata.obsp["grid_connectivities"]
    assert (graph != graph.T).nnz == 0
    assert adata.obsp[CONNECTIVITIES].multiply(graph).nnz == graph.nnz  # adjacent spots are the nearest ones


def test_asking_for_another_graph_than_the_one_that_is_there_is_a_warning(caplog):
    adata = make_adata(random_points(20))
    spatial_graph(adata, n_neighbors=3)
    with caplog.at_level(logging.WARNING, logger="fimp_sc"):
        spatial_graph(adata)
        assert not caplog.records
        spatial_graph(adata, method="radius", radius=0.4)
    assert "pass overwrite=True to build it again" in caplog.text


def test_the_first_call_is_silent() -> None:
    """Also where squidpy is imported by it, whose docstrings another package complains of."""
    code = (
        "import warnings; warnings.simplefilter('error', SyntaxWarning)\n"
        "import fimp_sc\n"
        "adata = fimp_sc.datasets.toy_tissue(n_obs=60)\n"
        "fimp_sc.pp.spatial_graph(adata, library_key='section')\n"
        "assert adata.obsp['spatial_connectivities'].nnz == 360"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SyntaxWarning" not in done.stderr


def test_no_neighbors_need_no_coordinates():
    adata = make_adata(random_points(20))
    del adata.obsm["spatial"]
    spatial_graph(adata, n_neighbors=0)
    assert adata.obsp[CONNECTIVITIES].shape == adata.obsp[DISTANCES].shape == (20, 20)
    assert adata.obsp[CONNECTIVITIES].nnz == adata.obsp[DISTANCES].nnz == 0
    keys = {"connectivities_key": CONNECTIVITIES, "distances_key": DISTANCES, "params": {"n_neighbors": 0}}
    assert adata.uns[NEIGHBORS] == keys
    spatial_graph(adata)  # keeps the graph that is there
    adata.obsm["spatial"] = random_points(20)
    spatial_graph(adata, overwrite=True)
    assert adata.obsp[CONNECTIVITIES].nnz == 120
