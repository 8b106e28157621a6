"""Rows of a cells × genes matrix, read where it is stored: memory, an HDF5 or zarr store, or a dask array."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


_KINDS = {
    ("dask", "Array"): "dask",
    ("h5py", "Dataset"): "dense",
    ("zarr", "Array"): "dense",
    ("anndata", "CSRDataset"): "sparse",
    ("anndata", "CSCDataset"): "sparse",
    ("anndata", "Dataset2D"): "table",
}


def storage(values: Any) -> str:
    """Return how values are kept.

    Returns
    -------
    ``"memory"`` (numpy array, or scipy CSR or CSC), ``"dask"``, ``"dense"`` or ``"sparse"`` (array or sparse matrix in
    an HDF5 or zarr store), ``"table"`` (data frame that is not in memory) or ``"other"``.
    """
    if isinstance(values, np.ndarray) or (sparse.issparse(values) and values.format in {"csr", "csc"}):
        return "memory"
    # By name: the packages may not be installed, and are slow to import where none of their objects is about.
    for base in type(values).__mro__:
        kind = _KINDS.get((base.__module__.partition(".")[0], base.__name__))
        if kind is not None:
            return kind
    return "other"


def identity(matrix: Any) -> tuple[Any, ...]:
    """Return what changes when a matrix that is not in memory is replaced: its place, and size and age of the file."""
    if storage(matrix) == "dask":
        return "dask", matrix.name
    element = matrix.group if storage(matrix) == "sparse" else matrix
    root = Path(element.file.filename if _is_hdf5(element) else _zarr_folder(element.store))
    inside = [root] if root.is_file() else (root / element.name.strip("/")).rglob("*")
    stats = [path.stat() for path in inside if path.is_file()]
    newest = max((stat.st_mtime_ns for stat in stats), default=0)
    return type(matrix).__name__, str(root), element.name, len(stats), sum(stat.st_size for stat in stats), newest


def _zarr_folder(store: Any) -> str:
    return str(getattr(store, "root", None) or getattr(store, "path", store))  # of zarr 3, of zarr 2


def is_closed(matrix: Any) -> bool:
    """Tell whether the file with a stored matrix has been closed."""
    element = matrix.group if storage(matrix) == "sparse" else matrix
    return _is_hdf5(element) and not element


def _is_hdf5(element: Any) -> bool:
    return type(element).__module__.partition(".")[0] == "h5py"


class StoredArray:
    """An array in an HDF5 or zarr store, read in spans of its first axis; opened again where it is unpickled."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self._is_hdf5 = _is_hdf5(array)
        self._place = (str(Path(array.file.filename).resolve()), array.name) if self._is_hdf5 else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"_array": None} if self._is_hdf5 else {})  # zarr's own can be pickled

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the values from ``start`` to ``stop``."""
        return np.asarray(self._open()[start:stop])

    def take(
        self, starts: NDArray[np.int64], stops: NDArray[np.int64], gap: int
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the values of increasing spans, and where in them each span starts; there may be others between."""
        array = self._open()
        if not self._is_hdf5:
            length = stops - starts
            position = np.concatenate([[0], np.cumsum(length)])
            wanted = np.repeat(starts - position[:-1], length) + np.arange(position[-1])
            # One selection lets zarr read, and decompress, every chunk once.
            selection = (wanted, *[slice(None)] * (array.ndim - 1))
            return np.asarray(array.get_orthogonal_selection(selection)), position[:-1]
        if not len(starts):
            return np.empty((0, *array.shape[1:]), dtype=array.dtype), starts
        first = np.flatnonzero(np.concatenate([[True], starts[1:] - stops[:-1] > gap]))
        low, high = starts[first], stops[np.append(first[1:], len(starts)) - 1]
        offset = np.concatenate([[0], np.cumsum(high - low)])
        # Slices are many times faster in h5py than lists of indices, and than `read_direct`.
        values = np.concatenate([array[a:b] for a, b in zip(low.tolist(), high.tolist(), strict=True)])
        run = np.searchsorted(first, np.arange(len(starts)), side="right") - 1
        return values, starts - low[run] + offset[run]

    def _open(self) -> Any:
        if self._place is not None and not self._array:  # unpickled, or the file was closed meanwhile
            import h5py  # type: ignore[import-untyped]

            self._array = h5py.File(self._place[0], "r")[self._place[1]]
        return self._array


PIECE_VALUES = 1 << 20
# Two reads cost more than one read of up to as many values that nobody asked for.
_GAP_VALUES = 1 << 12
_CACHED_BYTES = 1 << 27

Rows: TypeAlias = "sparse.csr_matrix | NDArray[Any]"


class MatrixRows(ABC):
    """Rows of a cells × genes matrix, in memory or not; made by :func:`open_rows`.

    Attributes
    ----------
    shape
        Cells and genes.
    dtype
        Of the values.
    in_memory
        Whether the whole matrix is in memory already.
    """

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    in_memory = False

    @abstractmethod
    def read(self, nodes: NDArray[np.int64]) -> Rows:
        """Return the rows in the given order, which may repeat some.

        They are CSR where the source is sparse, an array otherwise; always a copy that the caller may modify.
        """

    @abstractmethod
    def stream(self, values: int = PIECE_VALUES) -> Iterator[tuple[int, Rows]]:
        """Yield the whole matrix as pieces: the first row and consecutive rows of about ``values`` stored values.

        Pieces may share memory with the source: they must not be modified.
        """


def open_rows(matrix: Any, where: str = "adata.X") -> MatrixRows:
    """Return a reader of rows; nothing but the places of sparse rows is read yet.

    Parameters
    ----------
    matrix
        numpy array; scipy CSR or CSC; a sparse matrix or array in an HDF5 or zarr store (as in a backed object);
        dask array of any of the former.
    where
        Where it was found, for messages.

    Raises
    ------
    TypeError
        Another kind of matrix, or no real numbers.
    ValueError
        A CSC matrix in a file, whose rows cannot be read without reading all of it.
    """
    kind = storage(matrix)
    if kind in {"other", "table"}:
        found = f"a sparse {matrix.format.upper()} matrix" if sparse.issparse(matrix) else type(matrix).__name__
        advice = "convert it with .tocsr()" if sparse.issparse(matrix) else "bring it into memory in one of these forms"
        raise TypeError(
            f"{where} must be a CSR or CSC matrix or a numpy array (also in a file, or in the chunks of a dask array), "
            f"found {found}: {advice}."
        )
    if kind in {"dense", "sparse"} and is_closed(matrix):
        raise ValueError(f"{where} is in a file that has been closed: open the file again and pass the new object.")
    if len(matrix.shape) != 2:
        raise TypeError(f"{where} must have two dimensions, cells × genes, found {len(matrix.shape)}.")
    if matrix.dtype.kind not in "buif":
        raise TypeError(f"{where} must hold real numbers, found dtype {matrix.dtype}.")
    if matrix.dtype == np.float16 and (kind == "sparse" or sparse.issparse(matrix)):
        raise TypeError(
            f"{where} is a sparse matrix of float16, with which scipy cannot compute: convert it with "
            ".astype('float32')."
        )
    if kind == "memory":
        return _MemoryRows(matrix)
    if kind == "dask":
        return _DaskRows(matrix, where)
    if kind == "dense":
        return _DenseRows(matrix)
    if matrix.format != "csr":
        raise ValueError(
            f"{where} is stored in a file as CSC, column by column, so that reading a cell means reading everything: "
            "load it with adata = adata.to_memory(), or write the file again with a CSR matrix."
        )
    return _SparseRows(matrix)


class _MemoryRows(MatrixRows):
    in_memory = True

    def __init__(self, matrix: Any) -> None:
        self.shape, self.dtype = matrix.shape, matrix.dtype
        self._source = matrix if sparse.issparse(matrix) else np.asarray(matrix)
        self._csr: sparse.csr_matrix | None = None

    def read(self, nodes: NDArray[np.int64]) -> Rows:
        return self._matrix[np.asarray(nodes, dtype=np.int64)]

    def stream(self, values: int = PIECE_VALUES) -> Iterator[tuple[int, Rows]]:
        yield from _cut(self._matrix, 0, values)

    @property
    def _matrix(self) -> Any:
        if isinstance(self._source, np.ndarray):
            return self._source
        if self._csr is None:  # CSC is converted when rows are asked for, once; CSR is shared
            self._csr = sparse.csr_matrix(self._source)
        return self._csr


class _DenseRows(MatrixRows):
    def __init__(self, array: Any) -> None:
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype)
        self._array = StoredArray(array)
        self._chunk = (array.chunks or (1,))[0]

    def read(self, nodes: NDArray[np.int64]) -> Rows:
        unique, inverse = np.unique(nodes, return_inverse=True)
        gap = _GAP_VALUES // max(1, self.shape[1])
        rows, position = self._array.take(unique, unique + 1, gap)
        return rows[position[inverse]]

    def stream(self, values: int = PIECE_VALUES) -> Iterator[tuple[int, Rows]]:
        step = max(1, values // max(1, self.shape[1]))
        if self._chunk <= 4 * step:  # a chunk that is cut would be read, and decompressed, more than once
            step = max(1, step // self._chunk) * self._chunk
        for start in range(0, self.shape[0], step):
            yield start, self._array.read(start, min(start + step, self.shape[0]))


class _SparseRows(MatrixRows):
    def __init__(self, dataset: Any) -> None:
        self.shape, self.dtype = tuple(dataset.shape), np.dtype(dataset.dtype)
        group = dataset.group
        self._indptr = np.asarray(group["indptr"][:], dtype=np.int64)
        self._data, self._indices = StoredArray(group["data"]), StoredArray(group["indices"])

    def read(self, nodes: NDArray[np.int64]) -> Rows:
        unique, inverse = np.unique(nodes, return_inverse=True)
        starts, stops = self._indptr[unique], self._indptr[unique + 1]
        data, position = self._data.take(starts, stops, _GAP_VALUES)
        indices, _ = self._indices.take(starts, stops, _GAP_VALUES)
        length = (stops - starts)[inverse]
        indptr = np.concatenate([[0], np.cumsum(length)])
        place = np.repeat(position[inverse] - indptr[:-1], length) + np.arange(indptr[-1])
        return sparse.csr_matrix((data[place], indices[place], indptr), shape=(len(length), self.shape[1]))

    def stream(self, values: int = PIECE_VALUES) -> Iterator[tuple[int, Rows]]:
        for start, stop in _ranges(self._indptr, values):
            low, high = int(self._indptr[start]), int(self._indptr[stop])
            arrays = self._data.read(low, high), self._indices.read(low, high), self._indptr[start : stop + 1] - low
            yield start, sparse.csr_matrix(arrays, shape=(stop - start, self.shape[1]))


class _DaskRows(MatrixRows):
    """Chunks are computed one row of chunks at a time, and the last ones kept within a limit of memory."""

    def __init__(self, array: Any, where: str) -> None:
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype)
        self._array, self._where = array, where
        self._edges = np.concatenate([[0], np.cumsum(array.chunks[0])]).astype(np.int64)
        self._cache: OrderedDict[int, Rows] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": OrderedDict()}

    def read(self, nodes: NDArray[np.int64]) -> Rows:
        unique, inverse = np.unique(nodes, return_inverse=True)
        chunk = np.searchsorted(self._edges, unique, side="right") - 1
        pieces = []
        for number in np.unique(chunk).tolist():
            # Held by its own name: another thread may drop it from the cache meanwhile.
            rows = self._cache.pop(number, None)
            rows = self._compute(number) if rows is None else rows
            self._keep(number, rows)
            pieces.append(rows[unique[chunk == number] - self._edges[number]])
        if not pieces:
            empty = np.zeros((0, self.shape[1]), dtype=self.dtype)
            return sparse.csr_matrix(empty) if sparse.issparse(self._array._meta) else empty
        rows = _join(pieces, axis=0)
        return rows if len(unique) == len(inverse) and (inverse[1:] > inverse[:-1]).all() else rows[inverse]

    def stream(self, values: int = PIECE_VALUES) -> Iterator[tuple[int, Rows]]:
        for number in range(len(self._edges) - 1):
            yield from _cut(self._compute(number), int(self._edges[number]), values)

    def _compute(self, number: int) -> Rows:
        from dask.base import compute

        chunks = [self._array.blocks[number, column] for column in range(self._array.numblocks[1])]
        # Here and now: with a client of dask.distributed at work the default would send rows around the cluster, and
        # the default without one starts threads, within the processes that a data loader may have started already.
        pieces = compute(*chunks, scheduler="synchronous")
        for piece in pieces:
            if not (sparse.issparse(piece) or isinstance(piece, np.ndarray)):
                raise TypeError(
                    f"{self._where} is a dask array whose chunks must be scipy sparse matrices or numpy arrays, found "
                    f"{type(piece).__name__}: convert them with .map_blocks()."
                )
        return _join([sparse.csr_matrix(p) if sparse.issparse(p) else np.asarray(p) for p in pieces], axis=1)

    def _keep(self, number: int, rows: Rows) -> None:
        self._cache[number] = rows
        while len(self._cache) > 1 and sum(map(_n_bytes, list(self._cache.values()))) > _CACHED_BYTES:
            self._cache.popitem(last=False)


def _ranges(indptr: NDArray[Any], values: int) -> Iterator[tuple[int, int]]:
    """Cut rows into ranges of about ``values`` stored values, at least one row each."""
    start, n_rows = 0, len(indptr) - 1
    while start < n_rows:
        stop = int(np.searchsorted(indptr, indptr[start] + values, side="right")) - 1
        # Rows without values cost as much to look at as those with one.
        stop = min(max(start + 1, stop), start + max(1, values), n_rows)
        yield start, stop
        start = stop


def _csr_slice(matrix: sparse.csr_matrix, start: int, stop: int) -> sparse.csr_matrix:
    """Return rows that share the values of ``matrix``, which scipy's own slices do not."""
    low, high = int(matrix.indptr[start]), int(matrix.indptr[stop])
    arrays = matrix.data[low:high], matrix.indices[low:high], matrix.indptr[start : stop + 1] - matrix.indptr[start]
    return sparse.csr_matrix(arrays, shape=(stop - start, matrix.shape[1]), copy=False)


def _cut(rows: Rows, first: int, values: int) -> Iterator[tuple[int, Rows]]:
    if isinstance(rows, np.ndarray):
        step = max(1, values // max(1, rows.shape[1]))
        for start in range(0, rows.shape[0], step):
            yield first + start, rows[start : start + step]
        return
    for start, stop in _ranges(rows.indptr, values):
        yield first + start, _csr_slice(rows, start, stop)


def _join(pieces: list[Any], axis: int) -> Rows:
    if len(pieces) == 1:
        return pieces[0]
    if any(sparse.issparse(piece) for piece in pieces):
        stack = sparse.hstack if axis else sparse.vstack
        return sparse.csr_matrix(stack([sparse.csr_matrix(piece) for piece in pieces], format="csr"))
    return np.concatenate(pieces, axis=axis)


def _n_bytes(rows: Rows) -> int:
    return rows.nbytes if isinstance(rows, np.ndarray) else rows.data.nbytes + rows.indices.nbytes + rows.indptr.nbytes
