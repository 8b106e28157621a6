"""How many niches: the largest number with which clusterings of other cells and seeds agree."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fimp_sc.tl._statistics._clusterings import fit_mixture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from fimp_sc.tl._statistics._clusterings import Leiden

    Clusterings = Callable[[int], Sequence[NDArray[np.integer]]]

# Agreement that a number may fall short of the best one's and still counts as stable.
TOLERANCE = 0.05
_MAX_CELLS = 20_000


def stability(clusterings: Clusterings, numbers: Iterable[int]) -> pd.DataFrame:
    """Compare clusterings of every number with each other.

    Parameters
    ----------
    clusterings
        From a number of clusters to several clusterings ``(n_obs,)`` of the same cells.

    Returns
    -------
    One row for each number: ``n_niches``, ``stability`` (mean adjusted Rand index of all pairs) and ``spread`` (their
    standard deviation).
    """
    from sklearn.metrics import adjusted_rand_score

    rows = []
    for n in numbers:
        pairs = [adjusted_rand_score(a, b) for a, b in combinations(clusterings(n), 2)]
        rows.append((n, float(np.mean(pairs)), float(np.std(pairs))))
    table = pd.DataFrame(rows, columns=["n_niches", "stability", "spread"])
    return table.set_index(table["n_niches"].astype(str).rename(None))


def most_stable(table: pd.DataFrame) -> int:
    """Return the largest number whose stability is within :data:`TOLERANCE` of the highest."""
    stable = table["stability"] >= table["stability"].max() - TOLERANCE
    return int(table.loc[stable, "n_niches"].max())


def mixtures_of_halves(
    values: NDArray[np.float64], *, covariance_type: str, n_seeds: int, random_state: int
) -> Clusterings:
    """Return mixtures fitted to random halves of the cells (at most 20,000 of them) and applied to all.

    Every number is tried on the same halves. Starts differ too, so that a solution found by luck counts as unstable.
    """
    rng = np.random.default_rng(random_state)
    size = min(max(len(values) // 2, 1), _MAX_CELLS)
    halves = [np.sort(rng.permutation(len(values))[:size]) for _ in range(n_seeds)]

    def clusterings(n: int) -> list[NDArray[np.integer]]:
        models = [
            fit_mixture(values[half], n, covariance_type=covariance_type, n_init=1, random_state=random_state + seed)
            for seed, half in enumerate(halves)
        ]
        return [model.predict(values) for model in models]

    return clusterings


def seeds_of_leiden(leiden: Leiden, *, n_seeds: int, random_state: int) -> Clusterings:
    """Return Leiden clusterings of other seeds at the resolution that gives the number with the first seed."""

    def clusterings(n: int) -> list[NDArray[np.integer]]:
        first, resolution = leiden.with_number(n, random_state)
        return [first, *(leiden.labels(resolution, random_state + seed) for seed in range(1, n_seeds))]

    return clusterings
