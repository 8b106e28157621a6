"""Where values are stored; arrays in HDF5 and zarr stores, read in spans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
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
