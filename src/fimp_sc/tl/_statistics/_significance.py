"""Permutation tests for pairs of groups of cells: of influence, and of genes in neighbors."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
from scipy import sparse
from scipy.stats import false_discovery_control

from fimp_sc.model.predict._attention import edge_pairs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from fimp_sc.data import NodeGraph

Null = Literal["neighbors", "labels"]
Edges: TypeAlias = "tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]"

# Below this a standard deviation is rounding.
_LEAST = 1e-12
# Statistics that are standardized at once.
_TESTS = 4096
# Edges whose products are summed at once.
_EDGES = 1 << 15


class Significance(NamedTuple):
    """Of each test, float64."""

    expected: NDArray[np.float64]
    """Mean of the permutations."""
    z: NDArray[np.float64]
    pvalue: NDArray[np.float64]
    fdr: NDArray[np.float64]


def significance(true: NDArray[np.floating], permuted: NDArray[np.floating]) -> Significance:
    """Compare statistics with their permutations, one-sided: larger than expected.

    Each statistic is standardized by mean and standard deviation of its own permutations. Its p-value is the fraction
    of standardized permutations *of all tests* that are at least as large, where each permutation is standardized by
    the others of its test, and the statistic itself counts as one more: (1 + b) / (1 + n), never 0. 100 permutations of
    1,000 tests thus tell p-values down to 1e-5 apart, which a test by itself could not. That is right on average over
    tests, and for each of them as far as their standardized statistics are distributed alike.

    Permutations that do not vary tell nothing, for instance those of a gene that is constant within groups: z is 0
    and the p-value 1.

    Parameters
    ----------
    true
        ``(n_tests,)``.
    permuted
        ``(n_tests, n_permutations)``, at least 3.
    """
    n = permuted.shape[1]
    expected = permuted.mean(1, dtype=np.float64)
    z, pvalue = np.zeros(len(true)), np.ones(len(true))
    deviation = np.empty(len(true))
    for i in _starts(len(true)):
        deviation[i : i + _TESTS] = permuted[i : i + _TESTS].std(1, ddof=1, dtype=np.float64)
    scale = np.maximum(np.maximum(permuted.max(1), -permuted.min(1)), _LEAST)
    usable = np.flatnonzero(deviation > 1e-6 * scale)
    z[usable] = (true[usable] - expected[usable]) / deviation[usable]
    ordered = np.sort(z[usable])
    # Of permutations that are at least as large as the first i of these and no more.
    reached, n_pooled = np.zeros(len(ordered) + 1, dtype=np.int64), 0
    for i in _starts(len(usable)):
        rows = usable[i : i + _TESTS]
        apart = permuted[rows] - expected[rows, None]
        total = np.square(deviation[rows, None]) * (n - 1)
        # Mean and variance of the others follow from those of all.
        others = (total - np.square(apart) * n / (n - 1)) / (n - 2)
        # One permutation may be all that varies: it tells nothing of how unusual it is.
        varied = others > 1e-12 * total
        pooled = (apart * n / (n - 1))[varied] / np.sqrt(others[varied])
        reached += np.bincount(np.searchsorted(ordered, pooled, side="right"), minlength=len(reached))
        n_pooled += len(pooled)
    larger = n_pooled - np.cumsum(reached)[np.searchsorted(ordered, z[usable], side="left")]
    pvalue[usable] = (1 + larger) / (1 + n_pooled)
    return Significance(expected, z, pvalue, false_discovery_control(pvalue) if len(true) else pvalue)


def _starts(n: int) -> range:
    return range(0, n, _TESTS)


class Tests(NamedTuple):
    """Pairs of genes that are tested between pairs of groups, ``(n_tests,)`` int64 each, sorted in this order."""

    pair: NDArray[np.int64]
    """Position among the pairs of groups that are tested."""
    destination_gene: NDArray[np.int64]
    source_gene: NDArray[np.int64]


class Plan(NamedTuple):
    """The pairs of groups, and the tests of each."""

    pairs: NDArray[np.int64]
    """``(n_pairs,)`` source group x number of groups + destination group of each pair of groups, in ascending order."""
    n_edges: NDArray[np.int64]
    """``(n_pairs,)``"""
    tests: Tests


def plan_tests(
    graph: NodeGraph,
    codes: NDArray[np.int64],
    n_groups: int,
    expressed: NDArray[np.bool_],
    wanted: NDArray[np.bool_],
    *,
    min_edges: int,
    min_support: float,
) -> Plan:
    """Find the pairs of groups with enough edges, and the pairs of genes that enough of their cells express.

    Parameters
    ----------
    graph
        Of all nodes.
    codes
        ``(n,)`` int64 group of each node, -1 for none.
    n_groups
        Number of groups.
    expressed
        ``(n, g)`` where a gene is expressed.
    wanted
        ``(g, g)`` bool, destination gene x source gene: the pairs to test.
    min_edges, min_support
        See :func:`fimp_sc.tl.gene_pairs`.
    """
    pairs, n_edges = np.unique(edge_pairs(graph, codes, n_groups)[2], return_counts=True)
    enough = n_edges >= min_edges
    pairs, n_edges = pairs[enough], n_edges[enough]
    grouped = np.flatnonzero(codes >= 0)
    member = sparse.csr_matrix((np.ones(len(grouped)), (codes[grouped], grouped)), shape=(n_groups, len(codes)))
    # Fractions of groups instead of edges counted: the choice of tests must not depend on who is next to whom.
    fraction = (member @ expressed) / np.maximum(np.asarray(member.sum(1)), 1)
    found: list[tuple[NDArray[np.int64], ...]] = []
    for i, (source, destination) in enumerate(zip(*np.divmod(pairs, n_groups), strict=True)):
        support = fraction[destination][:, None] * fraction[source] * n_edges[i]
        to, of = np.nonzero(wanted & (support >= min_support))
        found.append((np.full(len(to), i), to, of))
    empty = (np.zeros(0, dtype=np.int64),) * 3
    return Plan(pairs, n_edges, Tests(*map(np.concatenate, zip(empty, *found, strict=True))))


class GeneTests(NamedTuple):
    """Tests of pairs of genes for pairs of groups, in the order of :attr:`Plan.tests`."""

    score: NDArray[np.float64]
    result: Significance


def gene_tests(
    value: NDArray[np.float32],
    graph: NodeGraph,
    codes: NDArray[np.int64],
    library: NDArray[np.int64],
    n_groups: int,
    plan: Plan,
    *,
    null: Null,
    n_permutations: int,
    random_state: int,
    verbose: bool,
) -> GeneTests:
    """Test the covariance of genes over the edges of pairs of groups.

    Memory grows with tests x permutations, and with the needs of one pair of groups; not with all pairs of groups.

    Parameters
    ----------
    value
        ``(n, g)`` log-normalized expression.
    graph
        Of all nodes.
    codes, library
        ``(n,)`` int64 group (-1: none) and sample of each node.
    n_groups
        Number of groups.
    plan
        The tests.
    null, n_permutations, random_state, verbose
        See :func:`fimp_sc.tl.gene_pairs`.
    """
    strata = library * n_groups + codes if null == "neighbors" else library
    strata = np.where(codes >= 0, strata, -1)
    value = centered(value, strata)
    edges = _of_pairs(edge_pairs(graph, codes, n_groups), plan.pairs)
    weight = _edge_weights(edges[0], edges[2])
    score, rng, rows = _scores(value, edges, weight, plan), np.random.default_rng(random_state), rows_of(strata)
    permuted = np.empty((len(score), n_permutations), dtype=np.float32)
    for i in drawn(n_permutations, "Permutations, pairs of genes", verbose=verbose):
        place = shuffled(rows, len(strata), rng)
        if null == "neighbors":
            permuted[:, i] = _scores(value, (place[edges[0]], place[edges[1]], edges[2]), weight, plan)
        else:
            other = _of_pairs(edge_pairs(graph, codes[place], n_groups), plan.pairs)
            permuted[:, i] = _scores(value, other, _edge_weights(other[0], other[2]), plan)
    return GeneTests(score, significance(score, permuted))


def _scores(value: NDArray[np.float32], edges: Edges, weight: NDArray[np.float64], plan: Plan) -> NDArray[np.float64]:
    """Return the sum over edges of the products of two genes, divided by the root of the sum of their squares.

    Parameters
    ----------
    value
        ``(n, g)`` centered values.
    edges
        Destination, source and pair of groups of each edge, in ascending order of pairs.
    weight
        ``(n_edges,)`` factor of each edge.
    plan
        The tests; no other genes are multiplied.

    Returns
    -------
    ``(n_tests,)``
    """
    (destination, source, pair), tests, positions = edges, plan.tests, np.arange(len(plan.pairs) + 1)
    total, squares = np.zeros((2, len(tests.pair)))
    ends, bounds = np.searchsorted(pair, positions), np.searchsorted(tests.pair, positions)
    for (start, stop), (low, high) in zip(pairwise(ends.tolist()), pairwise(bounds.tolist()), strict=True):
        if low == high:
            continue
        rows, row = np.unique(tests.destination_gene[low:high], return_inverse=True)
        columns, column = np.unique(tests.source_gene[low:high], return_inverse=True)
        sums = np.zeros((2, len(rows), len(columns)))
        for i in range(start, stop, _EDGES):
            some = slice(i, min(i + _EDGES, stop))
            to = (value[destination[some, None], rows] * weight[some, None]).astype(np.float32)
            of = value[source[some, None], columns]
            sums[0] += to.T @ of
            sums[1] += np.square(to).T @ np.square(of)
        total[low:high], squares[low:high] = sums[:, row, column]
    return total / np.sqrt(np.maximum(squares, _LEAST**2))


def drawn(n_permutations: int, what: str, *, verbose: bool) -> Iterable[int]:
    """Count permutations, with a progress bar if ``verbose``."""
    from scvi.utils import track

    counted: Iterable[int] = track(range(n_permutations), description=what, disable=not verbose)
    return counted


def _of_pairs(edges: Edges, pairs: NDArray[np.int64]) -> Edges:
    """Return the edges of some pairs of groups, which are numbered in their order."""
    to, of, pair = edges
    place = np.minimum(np.searchsorted(pairs, pair), len(pairs) - 1)
    kept = pairs[place] == pair
    return to[kept], of[kept], place[kept]


def _edge_weights(destination: NDArray[np.int64], pair: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return for each edge 1 / number of edges into its destination from its group."""
    # The group of a destination is one, so that a pair of groups tells the group of the source.
    key = pair * (int(destination.max(initial=0)) + 1) + destination
    _, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
    return 1.0 / counts[inverse]


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
        As in :func:`gene_tests`.
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
        for i in drawn(n_permutations, "Permutations, influence", verbose=verbose):
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
