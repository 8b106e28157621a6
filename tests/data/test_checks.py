"""`fimp_sc.data._checks`: every way an input can be wrong, and that correct input passes without a word."""

from __future__ import annotations

import pickle
import tracemalloc
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from fimp_sc._errors import MissingKeyError
from fimp_sc.data import _value_checks
from fimp_sc.data._checks import (
    check_anndata,
    check_connectivities,
    check_coordinates,
    check_graph,
    check_labels,
    check_obs_key,
    check_values,
    get_matrix,
)

FORMATS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "csr_array": sparse.csr_array, "dense": np.asarray}
FORMATS["fortran"] = np.asfortranarray


def counts(n_obs=12, n_vars=7, seed=0) -> np.ndarray:
    matrix = np.random.default_rng(seed).poisson(1.5, size=(n_obs, n_vars)).astype(np.float32)
    matrix[np.arange(n_obs), np.arange(n_obs) % n_vars] += 1  # no empty cell, no empty gene
    return matrix


def make_adata(**obs) -> ad.AnnData:
    names = pd.DataFrame({k: pd.Series(v, dtype=object) for k, v in obs.items()}, index=range(12))
    names.index = [f"cell{i}" for i in range(12)]
    return ad.AnnData(
        sparse.csr_matrix(counts()), obs=names, obsm={"spatial": np.random.default_rng(0).random((12, 2))}
    )


def ring(n=12) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.ones(n, dtype=np.float32), (np.arange(n), (np.arange(n) + 1) % n)), shape=(n, n))


# Errors ---------------------------------------------------------------------------------------------------------------


def test_missing_key_error_reads_as_text_and_is_a_key_error():
    error = MissingKeyError("'a' is not in adata.obs")
    assert str(error) == "'a' is not in adata.obs"
    assert isinstance(error, KeyError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# The object -----------------------------------------------------------------------------------------------------------


def test_good_object_and_view_pass():
    adata, view = make_adata(), make_adata()[:5, 2:]
    for good in (adata, view):
        before = good.copy()
        check_anndata(good)
        np.testing.assert_array_equal(good.to_df(), before.to_df())
    assert view.is_view, "looking at a view does not copy it"


@pytest.mark.parametrize("thing", [None, pd.DataFrame(), np.ones((2, 2))])
def test_other_types(thing):
    with pytest.raises(TypeError, match=f"Expected an AnnData object, found {type(thing).__name__}"):
        check_anndata(thing)


def test_mudata_is_told_to_pass_a_modality():
    with pytest.raises(TypeError, match=r"pass one modality"):
        check_anndata(SimpleNamespace(mod={}))


def test_no_cells_no_genes():
    with pytest.raises(ValueError, match=r"no cells \(n_obs = 0\)"):
        check_anndata(make_adata()[:0])
    with pytest.raises(ValueError, match=r"no genes \(n_vars = 0\)"):
        check_anndata(make_adata()[:, :0])


def test_duplicate_genes():
    adata = make_adata()
    adata.var_names = ["A", "B", "A", "C", "B", "D", "E"]
    with pytest.raises(ValueError, match=r"2 duplicate gene names: 'A', 'B'.*var_names_make_unique"):
        check_anndata(adata)


def test_backed(tmp_path):
    make_adata().write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    check_anndata(backed)
    assert check_values(get_matrix(backed, None), where="adata.X") == "counts"
    with pytest.raises(ValueError, match=r"view of an object backed by '.*a\.h5ad'.*to_memory\(\)"):
        check_anndata(backed[:5])
    check_anndata(backed[:5].to_memory())
    backed.file.close()


# The matrix -----------------------------------------------------------------------------------------------------------


def test_get_matrix_returns_what_is_stored():
    adata = make_adata()
    adata.layers["counts"] = adata.X.copy()
    assert get_matrix(adata, None) is adata.X
    assert get_matrix(adata, "counts") is adata.layers["counts"]


def test_missing_layer_and_missing_x():
    adata = make_adata()
    with pytest.raises(MissingKeyError, match=r"'counts' is not in adata.layers \(it holds no keys\)"):
        get_matrix(adata, "counts")
    adata.layers["count"] = adata.X
    with pytest.raises(MissingKeyError, match=r"found there: 'count'\). Did you mean 'count'"):
        get_matrix(adata, "counts")
    adata.X = None
    with pytest.raises(ValueError, match=r"adata.X is None: pass layer=.*'count'"):
        get_matrix(adata, None)


@pytest.fixture(params=[3, 1 << 20], ids=["many chunks", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(_value_checks, "CHUNK_VALUES", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"contains 2 values that are NaN, first at cell (4, gene 5|9, gene 2)"),
        (np.inf, r"contains 2 values that are infinite, first at cell (4, gene 5|9, gene 2)"),
        (-1.5, r"contains 2 values that are below zero \(lowest -1.5\), first at cell (4, gene 5|9, gene 2)"),
        (1.5, r"contains 2 values that are not whole numbers, first at cell (4, gene 5|9, gene 2).*raw counts"),
    ],
)
def test_bad_values_are_counted_and_located(form, value, message):
    matrix = counts()
    matrix[4, 5] = matrix[9, 2] = value
    with pytest.raises(ValueError, match=r"^adata\.X " + message):
        check_values(FORMATS[form](matrix), where="adata.X", input_scale="counts")


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 10_000),
    chunk_values=st.integers(1, 12),
    form=st.sampled_from(sorted(FORMATS)),
)
def test_position_is_of_the_damaged_entry(shape, seed, chunk_values, form):
    rng = np.random.default_rng(seed)
    matrix = rng.poisson(0.7, size=shape).astype(np.float64)
    cell, gene = int(rng.integers(shape[0])), int(rng.integers(shape[1]))
    matrix[cell, gene] = np.nan
    stored, before = FORMATS[form](matrix), _value_checks.CHUNK_VALUES
    _value_checks.CHUNK_VALUES = chunk_values
    try:
        with pytest.raises(ValueError, match=rf"1 value that is NaN, first at cell {cell}, gene {gene} "):
            check_values(stored, where="adata.X")
    finally:
        _value_checks.CHUNK_VALUES = before


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("form", FORMATS)
def test_empty_cells_and_genes_warn(form):
    matrix = counts()
    matrix[[3, 8]] = 0
    matrix[:, 6] = 0
    stored = FORMATS[form](matrix)
    cells = r"^2 of 12 cells are empty \(zero for every gene in adata\.X\), first at position 3\."
    genes = r"^1 of 7 genes are zero for every cell in adata\.X, first at position 6\."
    with pytest.warns(UserWarning, match=cells), pytest.warns(UserWarning, match=genes):
        assert check_values(stored, where="adata.X") == "counts"


def test_stored_zeros_are_zeros():
    matrix = sparse.csr_matrix(counts())
    matrix.data[:] = 0
    with pytest.raises(ValueError, match="zero everywhere"):
        check_values(matrix, where="adata.X")


@pytest.mark.parametrize("form", FORMATS)
def test_all_zero(form):
    with pytest.raises(ValueError, match=r"adata\.X is zero everywhere"):
        check_values(FORMATS[form](np.zeros((3, 4), dtype=np.float32)), where="adata.X")


def proportions(total: float) -> np.ndarray:
    matrix = counts(300, 40).astype(np.float64)
    return matrix / matrix.sum(axis=1, keepdims=True) * total


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("matrix", "scale"),
    [
        (counts(), "counts"),
        (counts().astype(np.int64), "counts"),
        (counts() > 0, "counts"),
        (np.log1p(proportions(1e4)), "log"),
        (np.log1p(counts() * 1.5), "log"),  # totals differ
        (proportions(1e4), "normalized"),
        (proportions(1.0), "normalized"),  # small values, equal totals
        (counts() * 40.5, "normalized"),
        (np.log1p(np.stack([np.roll([5, 0, 2, 1.5], i) for i in range(4)])), "log"),  # equal totals before and after
    ],
)
def test_auto_scale(form, matrix, scale):
    assert check_values(FORMATS[form](matrix), where="adata.X") == scale


def test_float32_log_values_of_unequal_counts():
    assert check_values(sparse.csr_matrix(np.log1p(proportions(1e4)).astype(np.float32)), where="adata.X") == "log"


@pytest.mark.parametrize("scale", ["counts", "normalized", "log"])
def test_given_scale_is_kept(scale):
    assert check_values(counts(), where="adata.X", input_scale=scale) == scale


def test_unknown_scale():
    with pytest.raises(ValueError, match=r"input_scale='raw' is unknown: choose one of 'auto', 'counts'"):
        check_values(counts(), where="adata.X", input_scale="raw")


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (sparse.coo_matrix(counts()), r"found a sparse COO matrix: convert it with \.tocsr\(\)"),
        (pd.DataFrame(counts()), "found DataFrame"),
        (np.ones(3), "two dimensions"),
        (np.full((2, 2), "a"), "real numbers"),
        (np.full((2, 2), 1, dtype=object), "real numbers"),
        (sparse.csr_matrix(np.ones((2, 2), dtype=complex)), "real numbers, found dtype complex128"),
    ],
)
def test_other_kinds_of_matrix(matrix, message):
    with pytest.raises(TypeError, match=message):
        check_values(matrix, where="adata.X")


def test_anndata_views_are_matrices():
    adata = make_adata()
    assert check_values(adata[:, :6].X, where="adata.X") == "counts"
    adata.X = adata.X.toarray()
    assert check_values(adata[2:, :6].X, where="adata.X") == "counts"


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_memory_is_bounded_and_matrix_untouched(form, monkeypatch):
    monkeypatch.setattr(_value_checks, "CHUNK_VALUES", 1 << 14)
    matrix = FORMATS[form](np.random.default_rng(0).poisson(3, size=(2000, 1000)).astype(np.float32) + 1)
    copy = matrix.copy()
    tracemalloc.start()
    check_values(matrix, where="adata.X")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # the matrix takes 8e6 bytes or more
    assert abs(matrix - copy).sum() == 0


# Coordinates and columns ----------------------------------------------------------------------------------------------


def test_coordinates():
    adata = make_adata()
    found = check_coordinates(adata, "spatial")
    np.testing.assert_array_equal(found, adata.obsm["spatial"])
    found[:] = 0
    assert adata.obsm["spatial"].any(), "a copy is returned"
    adata.obsm["words"] = pd.DataFrame({"x": ["a"] * 12, "y": ["b"] * 12}, index=adata.obs_names)
    adata.obsm["sparse"] = sparse.csr_matrix(np.ones((12, 2)))
    adata.obsm["X_pca"] = np.ones((12, 5))
    with pytest.raises(TypeError, match="array of numbers, found DataFrame"):
        check_coordinates(adata, "words")
    with pytest.raises(TypeError, match="array of numbers, found csr_matrix"):
        check_coordinates(adata, "sparse")
    with pytest.raises(ValueError, match=r"found \(12, 5\)"):
        check_coordinates(adata, "X_pca")
    with pytest.raises(MissingKeyError, match=r"'X_spatial' is not in adata.obsm .*Did you mean 'spatial'"):
        check_coordinates(adata, "X_spatial")


def test_obs_key():
    adata = make_adata(batch=["a"] * 6 + ["b"] * 6, hole=["a"] * 5 + [np.nan] * 2 + ["b"] * 5)
    assert list(check_obs_key(adata, "batch", "batch")) == list(adata.obs["batch"])
    assert list(check_obs_key(adata[:6], "batch", "batch").categories) == ["a"]
    with pytest.raises(MissingKeyError, match=r"'bach' is not in adata.obs .*Did you mean 'batch'.*batch_key="):
        check_obs_key(adata, "bach", "batch")
    with pytest.raises(ValueError, match=r"\(library_key\) is missing \(NaN\) for 2 of 12 cells, first 'cell5'"):
        check_obs_key(adata, "hole", "library")


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["object", "category"])
def test_good_labels_may_have_gaps(kind):
    adata = make_adata(label=["a"] * 4 + ["b"] * 4 + ["Unknown"] + [np.nan] * 3)
    adata.obs["label"] = adata.obs["label"].astype(kind)
    before = adata.obs.copy()
    check_labels(adata, "label", "Unknown")
    pd.testing.assert_frame_equal(adata.obs, before)


def test_number_labels():
    adata = make_adata()
    adata.obs["cluster"] = np.repeat([0, 1, 2], 4)
    adata.obs["cluster_with_gaps"] = np.repeat([0, 1, np.nan], 4)
    adata.obs["depth"] = np.linspace(0, 1, 12)
    check_labels(adata, "cluster", "Unknown")
    check_labels(adata, "cluster_with_gaps", "Unknown")
    with pytest.raises(TypeError, match=r"adata.obs\['depth'\] holds real numbers"):
        check_labels(adata, "depth", "Unknown")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([np.nan] * 12, "no labeled cell: all 12 are NaN or 'Unknown'"),
        (["Unknown"] * 12, "no labeled cell"),
        (["Unknown"] * 6 + ["T"] * 6, r"only one class, 'T' \(6 cells\)"),
    ],
)
def test_labels_that_cannot_be_learned(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(make_adata(label=labels), "label", "Unknown")


def test_missing_labels_key():
    with pytest.raises(MissingKeyError, match=r"'label' is not in adata.obs \(found there: 'labels'\)"):
        check_labels(make_adata(labels=["a"] * 12), "label", "Unknown")


def test_class_with_one_cell_warns_and_names_it():
    with pytest.warns(UserWarning, match=r"single cell.*: 'rare'\. Merge them, or set them to 'Unknown'"):
        check_labels(make_adata(label=["a"] * 6 + ["b"] * 5 + ["rare"]), "label", "Unknown")


# The graph ------------------------------------------------------------------------------------------------------------


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
        (ring(11), ValueError, r"The graph has the shape \(11, 11\), but 12 cells need \(12, 12\)"),
        (damaged(np.nan), ValueError, "2 NaN or infinite weights, first from cell 3 to cell 2"),
        (damaged(-1), ValueError, "2 negative weights, first from cell 3 to cell 2"),
        (sparse.csr_matrix((12, 12)), ValueError, "no edges between cells"),
        (sparse.eye(12, format="csr"), ValueError, "no edges between cells"),  # self-loops join nobody
        (ring() * 0, ValueError, "no edges between cells"),  # nor do stored zeros
    ],
)
def test_bad_graphs(graph, error, message):
    with pytest.raises(error, match=message):
        check_connectivities(graph, 12)


def test_edges_joining_libraries_are_counted():
    adata = make_adata(section=["a"] * 6 + ["b"] * 6)
    adata.obsp["g"] = ring()
    check_graph(adata, "g", None)
    message = r"adata.obsp\['g'\] has 2 edges that join samples, for instance cell 6 of 'b' with cell 5 of 'a'"
    with pytest.raises(ValueError, match=message):
        check_graph(adata, "g", "section")
    with pytest.raises(MissingKeyError, match=r"'sample' is not in adata\.obs"):
        check_graph(adata, "g", "sample")
    graph = ring().tolil()
    graph[5, 6] = graph[11, 0] = 0
    graph[5, 0] = graph[11, 6] = 1
    adata.obsp["g"] = graph.tocsr()
    check_graph(adata, "g", "section")


def test_isolated_cells_give_one_warning_and_self_loops_do_not_help():
    graph = (ring() + sparse.eye(12)).tolil()
    graph[3, 4] = graph[7, 8] = 0
    with pytest.warns(UserWarning, match="2 of 12 cells have no neighbours") as record:
        check_connectivities(graph.tocsr(), 12)
    assert sum("no neighbours" in str(warning.message) for warning in record) == 1


# Real data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scale", "empty"),
    [
        ("dlpfc_visium_151673", "counts", 39),
        ("merfish_hypothalamus_animal1", "normalized", 1),
        ("starmap_visual_cortex_1020", "counts", 0),
    ],
)
@pytest.mark.filterwarnings("ignore:.*genes are zero for every cell:UserWarning")
def test_real_data(shared_data, name, scale, empty):
    adata = ad.read_h5ad(shared_data / f"{name}.h5ad")
    check_anndata(adata)
    check_labels(adata, "cell_type", "Unlabelled")
    check_coordinates(adata, "spatial")
    assert check_values(get_matrix(adata, None), where="adata.X") == scale
    assert (np.asarray(adata.X.sum(axis=0)) == 0).sum() == empty
    logged = adata.X.copy()
    logged.data = np.log1p(logged.data / 7)
    assert check_values(logged, where="adata.X") == "log"
