"""Checksums of values, to tell whether they are those of before."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from fimp_sc.data.storage._rows import identity, storage

if TYPE_CHECKING:
    from collections.abc import Iterator


def checksum(*values: Any) -> int:
    """Return one number for all values, their order and their places.

    Parameters
    ----------
    *values
        Arrays, sparse matrices, tensors, pandas objects and text. What is not in memory is known by its place, and by
        size and age of its file: reading all of it would take longer than most calls.
    """
    check = 0
    for value in values:
        for array in _arrays(value):
            check = zlib.crc32(repr((array.dtype.str, array.shape)).encode(), check)
            check = zlib.crc32(np.ascontiguousarray(array).data, check)
    return check


def _arrays(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, str):
        yield np.frombuffer(value.encode(), dtype=np.uint8)
    elif isinstance(value, torch.Tensor):
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(value, pd.DataFrame | pd.Series | pd.Index):
        yield pd.util.hash_pandas_object(value, index=False).to_numpy()
    elif sparse.issparse(value):
        csr = sparse.csr_matrix(value)
        yield from (csr.data, csr.indices, csr.indptr)
    elif storage(value) in ("memory", "other", "table"):
        array = np.asarray(value)
        yield pd.util.hash_array(array.ravel()) if array.dtype.hasobject else array
    else:
        yield from _arrays(repr(identity(value)))
