"""Permutation tests: p-values of many tests together, and the influence of groups of cells on each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from scipy.stats import false_discovery_control

from fimp_sc.tl._statistics._strata import rows_of, shuffled

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from scipy import sparse

T = TypeVar("T")

# Below this a standard deviation is rounding.
_LEAST = 1e-12
# Statistics that are standardized at once, and permutations that p-values are read from. Beyond this many standard
# deviations, where p-values must be told apart, it is all of them.
_TESTS, _POOLED, _TAIL = 4096, 1 << 25, 3.0


class Significance(NamedTuple):
    """Of each test, float64."""

    expected: NDArray[np.float64]
    """Mean of the permutations."""
    z: NDArray[np.float64]
    pvalue: NDArray[np.float64]
    fdr: NDArray[np.float64]


class Pool:
    """Compares statistics with their permutations, some tests at a time, one-sided: larger than expected.

    Each statistic is standardized by mean and standard deviation of its own permutations. Its p-value is the fraction
    of standardized permutations *of all tests* that are at least as large, where each permutation is standardized by
    the others of its test, and the statistic itself counts as one more: (1 + b) / (1 + n), never 0. 100 permutations of
    1,000 tests thus tell p-values down to 1e-5 apart, which a test by itself could not. That is right on average over
    tests, and for each of them as far as their standardized statistics are distributed alike.

    Permutations that do not vary tell nothing, for instance those of a gene that is constant within groups: z is 0
    and the p-value 1.

    Parameters
    ----------
    n_tests, n_permutations
        Numbers of tests and of permutations of each, at least 10. Of more than 33 million permutations together, every
        second, third, … stands for all, but for those of more than 3 standard deviations, which are all kept.
    """

    def __init__(self, n_tests: int, n_permutations: int) -> None:
        self._expected, self._z = np.zeros((2, n_tests))
        self._usable = np.zeros(n_tests, dtype=bool)
        self._step, self._offset = max(-(-n_tests * n_permutations // _POOLED), 1), 0
        self._pooled: list[NDArray[np.float32]] = []
        self._tail: list[NDArray[np.float32]] = []

    def add(self, tests: slice, true: NDArray[np.floating], permuted: NDArray[np.floating]) -> None:
        """Take the statistics ``(n,)`` of some tests, and their permutations ``(n, n_permutations)``."""
        for i in range(0, len(true), _TESTS):
            place = slice(tests.start + i, tests.start + min(i + _TESTS, len(true)))
            self._add(place, np.asarray(true[i : i + _TESTS]), np.asarray(permuted[i : i + _TESTS], dtype=np.float64))

    def _add(self, place: slice, true: NDArray[np.floating], permuted: NDArray[np.float64]) -> None:
        n = permuted.shape[1]
        expected, deviation = permuted.mean(1), permuted.std(1, ddof=1)
        usable = deviation > 1e-6 * np.maximum(np.abs(permuted).max(1), _LEAST)
        self._expected[place], self._usable[place] = expected, usable
        self._z[place] = np.where(usable, (true - expected) / np.where(usable, deviation, 1), 0)
        total = np.square(deviation) * (n - 1)

        def standardized(row: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.float32]:
            apart = permuted[row, column] - expected[row]
            # Mean and variance of the others follow from those of all.
            others = (total[row] - np.square(apart) * n / (n - 1)) / (n - 2)
            # One permutation may be all that varies: it tells nothing of how unusual it is.
            varied = usable[row] & (others > 1e-12 * total[row])
            return (apart[varied] * n / (n - 1) / np.sqrt(others[varied])).astype(np.float32)

        self._pooled.append(standardized(*np.divmod(np.arange(self._offset, permuted.size, self._step), n)))
        self._offset = (self._offset - permuted.size) % self._step
        if self._step > 1:
            # By all permutations, of which it is one, 3 deviations from 9 or more others are more than 2.
            far = standardized(*np.nonzero(permuted > (expected + 2 * deviation)[:, None]))
            self._tail.append(far[far > _TAIL])

    def significance(self) -> Significance:
        """Return what became of all tests."""
        pvalue = np.ones(len(self._z))
        if len(pvalue):
            # In ascending order, places are found with fewer jumps through memory.
            order = np.flatnonzero(self._usable)
            order = order[np.argsort(self._z[order])]
            z = self._z[order].astype(np.float32)
            pooled = np.concatenate(self._pooled)
            larger = _at_least(z, pooled) * self._step
            if self._step > 1:
                larger = np.where(z > _TAIL, _at_least(z, np.concatenate(self._tail)), larger)
            pvalue[order] = (1 + larger) / (1 + len(pooled) * self._step)
        return Significance(self._expected, self._z, pvalue, false_discovery_control(pvalue) if len(pvalue) else pvalue)


def _at_least(value: NDArray[np.float32], pooled: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return for each value how many of the pooled are as large; the pooled are sorted in place."""
    pooled.sort()
    return len(pooled) - np.searchsorted(pooled, value, side="left")


def significance(true: NDArray[np.floating], permuted: NDArray[np.floating]) -> Significance:
    """Compare statistics ``(n_tests,)`` with their permutations ``(n_tests, n_permutations)``, see :class:`Pool`."""
    pool = Pool(*permuted.shape)
    pool.add(slice(0, len(true)), true, permuted)
    return pool.significance()


def drawn(steps: Sequence[T], what: str, *, verbose: bool) -> Iterable[T]:
    """Go through steps, with a progress bar if ``verbose``."""
    from scvi.utils import track

    counted: Iterable[T] = track(steps, description=what, disable=not verbose)
    return counted


class GroupTests(NamedTuple):
    """Of each pair of groups that has edges."""

    pair: NDArray[np.int64]
    """Source group x number of groups + destination group, in ascending order."""
    influence: NDArray[np.float64]
    """Mean over edges."""
    n_edges: NDArray[np.int64]
    result: Significance


def group_tests(
    influence: sparse.csr_matrix,
    codes: NDArray[np.int64],
    library: NDArray[np.int64],
    n_groups: int,
    *,
    n_permutations: int,
    min_edges: int,
    random_state: int,
    verbose: bool,
) -> GroupTests:
    """Test whether the influence of one group on another is larger than with permuted group labels.

    Parameters
    ----------
    influence
        ``(n, n)``, row = destination.
    codes, library, n_groups, n_permutations, random_state, verbose
        As in :func:`fimp_sc.tl._statistics._gene_tests.gene_tests`; ``library`` has the samples of the nodes.
    min_edges
        Pairs with fewer edges are not tested and get NaN, as do those that have none in one of the permutations.
    """
    source, destination = influence.indices, np.repeat(np.arange(len(codes)), np.diff(influence.indptr))

    def joined(codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        kept = (codes[source] >= 0) & (codes[destination] >= 0)
        return codes[source[kept]] * n_groups + codes[destination[kept]], influence.data[kept]

    edges, length = joined(codes)
    pair, place, n_edges = np.unique(edges, return_inverse=True, return_counts=True)
    mean = np.bincount(place, length, minlength=len(pair)) / n_edges
    enough = np.flatnonzero(n_edges >= min_edges)
    out = [np.full(len(pair), np.nan) for _ in Significance._fields]
    if len(enough):
        rng, rows = np.random.default_rng(random_state), rows_of(np.where(codes >= 0, library, -1))
        permuted = np.empty((len(enough), n_permutations))
        for i in drawn(range(n_permutations), "Permutations, influence", verbose=verbose):
            edges, length = joined(codes[shuffled(rows, len(codes), rng)])
            place = np.minimum(np.searchsorted(pair[enough], edges), len(enough) - 1)
            same = pair[enough][place] == edges
            counts = np.bincount(place[same], minlength=len(enough))
            total = np.bincount(place[same], length[same], minlength=len(enough))
            permuted[:, i] = total / np.where(counts, counts, np.nan)
        tested = np.isfinite(permuted).all(1)
        for whole, part in zip(out, significance(mean[enough[tested]], permuted[tested]), strict=True):
            whole[enough[tested]] = part
    return GroupTests(pair, mean, n_edges, Significance(*out))
