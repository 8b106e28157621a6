"""Random numbers that belong to names, so that the order of genes and cells in an object decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def name_key(names: ArrayLike) -> NDArray[np.uint64]:
    """Return a number for each name, always the same: a key for the functions below."""
    import pandas as pd

    text = np.array([str(name) for name in np.asarray(names, dtype=object)], dtype=object)
    return pd.util.hash_array(text, categorize=False)


def combined(key: int | NDArray[np.uint64], other: NDArray[Any]) -> NDArray[np.uint64]:
    """Return a key for each pair of a key, or of a seed, and another one: a step of SplitMix64."""
    first = key if isinstance(key, np.ndarray) else np.uint64(int(key) % 2**64)
    x = first + _GOLDEN * (other.astype(np.uint64) + np.uint64(1))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: int, rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[np.float32]:
    """Return numbers in ``[0, 1)`` that depend on nothing but the seed and the keys of their row and column.

    Parameters
    ----------
    seed
        Whole number from 0.
    rows, columns
        ``(n,)`` and ``(m,)`` integer keys.

    Returns
    -------
    ``(n, m)`` float32.
    """
    row, column = (combined(seed + side, keys).astype(np.uint32) for side, keys in enumerate((rows, columns)))
    # Of 32 bits: a table has millions of entries, and seeds give each of its keys another place every time.
    bits = row[:, None] ^ column[None]
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits ^= bits >> np.uint32(shift)
        bits *= np.uint32(factor)
    bits ^= bits >> np.uint32(16)
    bits >>= np.uint32(8)
    out = bits.astype(np.float32)
    out *= np.float32(2**-24)
    return out


def normal(seed: int, rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[np.float32]:
    """Return the same as :func:`uniform` with the standard normal distribution."""
    from scipy.special import ndtri

    # The largest of the numbers plus half a step would be rounded to 1, and drawn as infinite.
    below_one = np.nextafter(np.float32(1), np.float32(0))
    return ndtri(np.minimum(uniform(seed, rows, columns) + np.float32(2**-25), below_one)).astype(np.float32)
