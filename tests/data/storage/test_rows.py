"""`open_rows`: the rows of one matrix are the same wherever it is stored, and no others are read."""

from __future__ import annotations

import os
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from fimp_sc.data.storage._rows import MatrixRows, StoredArray, identity, open_rows, storage
from fimp_sc.data.validate._checks import check_values

da = pytest.importorskip("dask.array")
h5py = pytest.importorskip("h5py")
zarr = pytest.importorskip("zarr")

# anndata says which version of zarr's format it will write some day.
pytestmark = pytest.mark.filterwarnings("ignore:.*zarr v[23]:UserWarning")

N_OBS, N_VARS = 53, 20


def _matrix() -> np.ndarray:
    rng = np.random.default_rng(0)
    matrix = rng.poisson(3, size=(N_OBS, N_VARS)) * (rng.random((N_OBS, N_VARS)) < 0.3)
    matrix[[0, 7, 8]] = 0  # rows without a value
    return matrix.astype(np.float32)


DENSE = _matrix()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    adata = ad.AnnData(sparse.csr_matrix(DENSE), layers={"csc": sparse.csc_matrix(DENSE), "dense": DENSE})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above; fixtures are made before the mark applies
        adata.write_h5ad(folder / "a.h5ad")
        adata.write_h5ad(folder / "zipped.h5ad", compression="gzip")
        adata.write_zarr(folder / "a.zarr")
    return folder


@pytest.fixture(scope="module")
def sources(folder: Path) -> dict[str, Any]:
    h5, zipped = h5py.File(folder / "a.h5ad", "r"), h5py.File(folder / "zipped.h5ad", "r")
    store = zarr.open(str(folder / "a.zarr"), mode="r")
    chunked = da.from_array(DENSE, chunks=((10, 1, 0, 42), (6, 14)))
    return {
        "dense": DENSE,
        "fortran": np.asfortranarray(DENSE),
        "csr": sparse.csr_matrix(DENSE),
        "csc": sparse.csc_matrix(DENSE),
        "csr_array": sparse.csr_array(DENSE),
        "hdf5 dense": h5["layers/dense"],
        "hdf5 csr": ad.io.sparse_dataset(h5["X"]),
        "hdf5 gzip": ad.io.sparse_dataset(zipped["X"]),
        "hdf5 gzip dense": zipped["layers/dense"],
        "zarr dense": store["layers/dense"],
        "zarr csr": ad.io.sparse_dataset(store["X"]),
        "dask dense": chunked,
        "dask csr": chunked.map_blocks(sparse.csr_matrix),
        "dask csc_array": chunked.map_blocks(sparse.csc_array),
        "dask mistaken": chunked.map_blocks(sparse.csr_matrix, meta=np.zeros((0, 0), np.float32)),
    }


NAMES = (
    "dense", "fortran", "csr", "csc", "csr_array", "hdf5 dense", "hdf5 csr", "hdf5 gzip", "hdf5 gzip dense",
    "zarr dense", "zarr csr", "dask dense", "dask csr", "dask csc_array", "dask mistaken",
)  # fmt: skip


def values(rows: Any) -> np.ndarray:
    assert type(rows) in {np.ndarray, sparse.csr_matrix}
    return rows.toarray() if sparse.issparse(rows) else rows


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(nodes=st.lists(st.integers(0, N_OBS - 1), max_size=80), name=st.sampled_from(NAMES))
def test_rows_in_any_order(sources: dict[str, Any], nodes: list[int], name: str) -> None:
    rows = open_rows(sources[name])
    found = rows.read(np.array(nodes, dtype=np.int64))
    assert found.dtype == rows.dtype == DENSE.dtype
    np.testing.assert_array_equal(values(found), DENSE[nodes])


@pytest.mark.parametrize("name", NAMES)
def test_kind_shape_and_all_rows(sources: dict[str, Any], name: str) -> None:
    rows = open_rows(sources[name])
    assert isinstance(rows, MatrixRows)
    assert rows.shape == (N_OBS, N_VARS)
    assert rows.in_memory == (not name.startswith(("hdf5", "zarr", "dask")))
    some = rows.read(np.array([2, 1, 2]))
    assert sparse.issparse(some) == ("cs" in name or name in {"hdf5 gzip", "dask mistaken"})
    np.testing.assert_array_equal(values(rows.read(np.arange(N_OBS))), DENSE)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 2 * DENSE.size), name=st.sampled_from(NAMES))
def test_stream_covers_the_matrix_in_bounded_pieces(sources: dict[str, Any], size: int, name: str) -> None:
    first = 0
    for start, piece in open_rows(sources[name]).stream(size):
        assert start == first
        np.testing.assert_array_equal(values(piece), DENSE[start : start + piece.shape[0]])
        stored = piece.nnz if sparse.issparse(piece) else piece.size
        # One row is never cut; a stored chunk may be read whole rather than twice.
        assert stored <= max(size, N_VARS) or (piece.shape[0] > 1 and "dense" in name and stored <= 4 * size)
        first = start + piece.shape[0]
    assert first == N_OBS


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_may_be_modified(sources: dict[str, Any], name: str) -> None:
    rows = open_rows(sources[name])
    for nodes in (np.arange(N_OBS), np.arange(3), np.array([5])):
        found = rows.read(nodes)
        if sparse.issparse(found):
            found.data[:] = -1
            found.indices[:] = 0
        else:
            found[:] = -1
    np.testing.assert_array_equal(values(rows.read(np.arange(N_OBS))), DENSE)
    np.testing.assert_array_equal(DENSE, _matrix())


@pytest.mark.parametrize("name", NAMES)
def test_pickled_readers_read(sources: dict[str, Any], name: str) -> None:
    rows = open_rows(sources[name])
    rows.read(np.array([1]))
    other = pickle.loads(pickle.dumps(rows))
    np.testing.assert_array_equal(values(other.read(np.array([9, 4]))), DENSE[[9, 4]])
    np.testing.assert_array_equal(np.concatenate([values(piece) for _, piece in other.stream()]), DENSE)


def test_readers_of_a_file_open_it_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.h5ad").write_bytes((folder / "a.h5ad").read_bytes())
    monkeypatch.chdir(tmp_path)
    file = h5py.File("b.h5ad", "r")
    rows = open_rows(ad.io.sparse_dataset(file["X"]))
    text = pickle.dumps(rows)
    assert len(text) < 5000  # places of rows, no values
    file.close()
    monkeypatch.chdir(tmp_path.parent)
    for reader in (rows, pickle.loads(text)):
        np.testing.assert_array_equal(values(reader.read(np.array([9, 4]))), DENSE[[9, 4]])


def test_cached_chunks_are_not_pickled() -> None:
    array = da.random.default_rng(0).random((1000, 100), chunks=(100, 100))
    rows = open_rows(array)
    before = len(pickle.dumps(rows))
    rows.read(np.arange(0, 1000, 10))
    assert len(pickle.dumps(rows)) <= before + 100


# Nothing is read that is not asked for --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hdf5 dense", "hdf5 csr"])
def test_only_the_rows_asked_for_are_read_from_a_file(
    sources: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    class Recorded:
        def __init__(self, array: Any) -> None:
            self._array = array

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self._array, attribute)

        def __getitem__(self, key: slice) -> np.ndarray:
            part = self._array[key]
            read.append(part.size)
            return part

    monkeypatch.setattr("fimp_sc.data.storage._rows._GAP_VALUES", 0)
    opened = StoredArray._open
    rows = open_rows(sources[name])
    monkeypatch.setattr(StoredArray, "_open", lambda self: Recorded(opened(self)))
    nodes = np.array([40, 12, 11, 12, 30, 10])
    np.testing.assert_array_equal(values(rows.read(nodes)), DENSE[nodes])
    distinct = DENSE[np.unique(nodes)]
    wanted = distinct.size if name == "hdf5 dense" else 2 * np.count_nonzero(distinct)  # values and their columns
    assert sum(read) == wanted
    assert len(read) == (3 if name == "hdf5 dense" else 6)  # neighbors in one go


def recording(computed: list[int], chunks: Any = (10, 8)) -> Any:
    """Return the matrix as a dask array that notes the first row of every chunk when it is computed."""

    def note(block: np.ndarray, block_info: Any = None) -> sparse.csr_matrix:
        if block_info:
            computed.append(block_info[0]["array-location"][0][0])
        return sparse.csr_matrix(block)

    return da.from_array(DENSE, chunks=chunks).map_blocks(note, dtype=DENSE.dtype, meta=sparse.csr_matrix((0, 0)))


def test_only_chunks_with_the_rows_asked_for_are_computed_and_the_last_are_kept() -> None:
    computed: list[int] = []
    rows = open_rows(recording(computed))
    assert computed == []
    rows.read(np.array([35, 11, 12]))
    assert computed == [10] * 3 + [30] * 3  # three chunks side by side
    rows.read(np.array([19, 38]))
    assert len(computed) == 6


def test_kept_chunks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    rows = open_rows(recording(computed, chunks=(10, 20)))
    monkeypatch.setattr("fimp_sc.data.storage._rows._CACHED_BYTES", 1500)  # less than two chunks
    rows.read(np.arange(N_OBS))
    rows.read(np.array([52]))
    assert computed == [0, 10, 20, 30, 40, 50]
    rows.read(np.array([0]))
    assert computed[6:] == [0]


def test_streaming_computes_every_chunk_once_and_keeps_none() -> None:
    computed: list[int] = []
    rows = open_rows(recording(computed))
    stream = rows.stream(7)
    next(stream)
    assert computed == [0] * 3
    assert len(list(stream)) > 5
    assert computed == [start for start in range(0, N_OBS, 10) for _ in range(3)]


def test_dask_computes_in_the_calling_thread() -> None:
    threads = set()

    def note(block: np.ndarray) -> np.ndarray:
        threads.add(threading.get_ident())
        return block

    open_rows(da.from_array(DENSE, chunks=(10, 8)).map_blocks(note, meta=DENSE[:0])).read(np.arange(N_OBS))
    assert threads == {threading.get_ident()}


# What cannot be read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hdf5", "zarr"])
def test_csc_in_a_file(folder: Path, form: str) -> None:
    group = h5py.File(folder / "a.h5ad", "r") if form == "hdf5" else zarr.open(str(folder / "a.zarr"), mode="r")
    with pytest.raises(ValueError, match=r"adata\.layers\['csc'\] is stored in a file as CSC.*adata\.to_memory\(\)"):
        open_rows(ad.io.sparse_dataset(group["layers/csc"]), "adata.layers['csc']")


def test_closed_file(folder: Path) -> None:
    with h5py.File(folder / "a.h5ad", "r") as file:
        dense, csr = file["layers/dense"], ad.io.sparse_dataset(file["X"])
    for matrix in (dense, csr):
        with pytest.raises(ValueError, match=r"adata\.X is in a file that has been closed: open the file again"):
            open_rows(matrix)


def test_chunks_of_another_kind() -> None:
    array = da.from_array(DENSE, chunks=(10, 8)).map_blocks(lambda b: sparse.coo_matrix(b).todok(), meta=DENSE[:0])
    np.testing.assert_array_equal(values(open_rows(array).read(np.arange(3))), DENSE[:3])
    strange = da.from_array(DENSE, chunks=(10, 8)).map_blocks(lambda _: "text", meta=DENSE[:0])
    with pytest.raises(TypeError, match=r"adata\.X is a dask array whose chunks must be .* found str"):
        open_rows(strange).read(np.arange(3))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (sparse.coo_matrix(DENSE), r"found a sparse COO matrix: convert it with \.tocsr\(\)"),
        ([[1.0]], "found list: bring it into memory"),
        (np.ones(3), "two dimensions"),
        (da.ones(3), "two dimensions"),
        (da.from_array(np.full((2, 2), "a")), "real numbers, found dtype <U1"),
    ],
)
def test_other_kinds(matrix: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"^adata\.layers\['a'\] must.*{message}"):
        open_rows(matrix, "adata.layers['a']")


# Checks of values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_values_are_checked_where_they_are(sources: dict[str, Any], name: str) -> None:
    with pytest.warns(UserWarning, match=r"^3 of 53 cells are empty.*first at position 0\."):
        assert check_values(sources[name], where="adata.X") == "counts"


@settings(max_examples=15, deadline=None)
@given(
    cell=st.integers(0, N_OBS - 1),
    gene=st.integers(0, N_VARS - 1),
    kind=st.sampled_from(["memory", "dask", "dask csr", "hdf5", "hdf5 csr"]),
    value=st.sampled_from([(np.nan, "NaN"), (np.inf, "infinite"), (-1.0, "below zero"), (0.5, "not whole numbers")]),
)
def test_bad_values_are_located_wherever_they_are(
    cell: int, gene: int, kind: str, value: tuple[float, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    matrix = DENSE.copy()
    matrix[cell, gene] = value[0]
    with h5py.File(tmp_path_factory.mktemp("bad") / "bad.h5", "w") as file:
        stored = {
            "memory": lambda: matrix,
            "dask": lambda: da.from_array(matrix, chunks=(10, 8)),
            "dask csr": lambda: da.from_array(matrix, chunks=(10, 8)).map_blocks(sparse.csr_matrix),
            "hdf5": lambda: file.create_dataset("X", data=matrix),
            "hdf5 csr": lambda: _written(file, sparse.csr_matrix(matrix)),
        }[kind]()
        message = rf"^adata\.X contains 1 value that is {value[1]}.*first at cell {cell}, gene {gene} "
        with pytest.raises(ValueError, match=message):
            check_values(stored, where="adata.X", input_scale="counts")


def _written(file: Any, matrix: sparse.csr_matrix) -> Any:
    ad.io.write_elem(file, "X", matrix)
    return ad.io.sparse_dataset(file["X"])


@pytest.mark.parametrize("name", ["dask csr", "dask dense", "hdf5 csr", "zarr csr", "hdf5 dense"])
def test_scales_are_resolved_wherever_values_are(name: str, tmp_path: Path) -> None:
    counts = np.random.default_rng(0).poisson(3, size=(300, 10)) + 1.0
    logged = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 100)
    if name.startswith("dask"):
        array = da.from_array(logged, chunks=(100, 4))
        stored = array.map_blocks(sparse.csr_matrix) if name == "dask csr" else array
    else:
        store = h5py.File(tmp_path / "a.h5", "w") if "hdf5" in name else zarr.open_group(str(tmp_path / "a.zarr"))
        ad.io.write_elem(store, "X", sparse.csr_matrix(logged) if "csr" in name else logged)
        stored = ad.io.sparse_dataset(store["X"]) if "csr" in name else store["X"]
    assert check_values(stored, where="adata.X") == "log"


# Which matrix it is ---------------------------------------------------------------------------------------------------


def test_storage_is_told_by_type(sources: dict[str, Any]) -> None:
    expected = {"hdf5 dense": "dense", "zarr dense": "dense", "hdf5 csr": "sparse", "zarr csr": "sparse"}
    for name in NAMES[:5]:
        assert storage(sources[name]) == "memory"
    for name, kind in expected.items():
        assert storage(sources[name]) == kind
    assert storage(sources["dask csr"]) == "dask"
    assert storage(sparse.coo_matrix(DENSE)) == storage("text") == "other"


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_identity_changes_with_the_file_and_not_with_the_handle(tmp_path: Path, form: str) -> None:
    def opened(mode: str = "r") -> Any:
        path = tmp_path / f"a.{form}"
        return h5py.File(path, mode) if form == "h5ad" else zarr.open_group(str(path), mode=mode)

    def of(store: Any) -> tuple[Any, ...]:
        return identity(ad.io.sparse_dataset(store["X"]))

    store = opened("a")
    ad.io.write_elem(store, "X", sparse.csr_matrix(DENSE))
    ad.io.write_elem(store, "Y", sparse.csr_matrix(DENSE))
    if form == "h5ad":
        store.close()
    first = of(opened())
    assert first == of(opened())
    assert first != identity(ad.io.sparse_dataset(opened()["Y"]))
    path = tmp_path / "a.h5ad" if form == "h5ad" else next(p for p in (tmp_path / "a.zarr/X").rglob("*") if p.is_file())
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))
    assert of(opened()) != first


def test_identity_of_dask_is_its_name() -> None:
    array = da.from_array(DENSE, chunks=(10, 8))
    assert identity(array) == identity(da.from_array(DENSE, chunks=(10, 8))) != identity(array + 1)
