"""Strata: the cells among which places are swapped."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def rows_of(strata: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the nodes of each stratum; those of -1 have none."""
    order = np.argsort(strata, kind="stable")
    bounds = np.searchsorted(strata[order], [*np.unique(strata[strata >= 0]), np.iinfo(np.int64).max])
    return [order[start:stop] for start, stop in pairwise(bounds.tolist())]


def shuffled(strata: list[NDArray[np.int64]], n_nodes: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return which node takes the place of each, among the nodes of its stratum; those of none stay."""
    place = np.arange(n_nodes)
    for rows in strata:
        place[rows] = rng.permutation(rows)
    return place


def centered(value: NDArray[np.float32], strata: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return values minus the mean of their stratum; 0 for those of -1."""
    out = np.zeros_like(value)
    for rows in rows_of(strata):
        # Of equal values the mean must be these very values, lest what rounding leaves is tested.
        out[rows] = value[rows] - value[rows].mean(0, dtype=np.float64).astype(np.float32)
    return out
