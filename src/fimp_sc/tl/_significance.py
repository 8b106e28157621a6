"""Is attention between two types of cells more than chance would have it? Permutations, and what follows from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
from scipy.stats import false_discovery_control

from fimp_sc.model._attention import edge_pairs
from fimp_sc.model._gene_pairs import pair_products, pair_sums

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fimp_sc.data import NodeGraph
    from fimp_sc.model._gene_pairs import GeneTokens, PairSums

Null = Literal["neighbours", "labels"]
Edges: TypeAlias = "tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]"
Statistic = Literal["covariance", "content", "attention"]

# Below this a standard deviation is rounding.
_LEAST = 1e-12


class Significance(NamedTuple):
    """Of each test, float64."""

    expected: NDArray[np.float64]
    """Mean of the permutations."""
    z: NDArray[np.float64]
    pvalue: NDArray[np.float64]
    fdr: NDArray[np.float64]


def significance(true: NDArray[np.floating], permuted: NDArray[np.floating]) -> Significance:
    """Compare statistics with their permutations, one-sided: larger than expected.

    Each statistic is standardised by mean and standard deviation of its own permutations. Its p-value is the share of
    standardised permutations *of all tests* that are at least as large, where each permutation is standardised by the
    others of its test. 100 permutations of 1,000 tests thus tell p-values down to 1e-5 apart, which a test by
    itself could not. That is right on average over tests, and for each of them as far as their standardised
    statistics are distributed alike.

    Parameters
    ----------
    true
        ``(n_tests,)``. Tests whose permutations do not vary get NaN.
    permuted
        ``(n_tests, n_permutations)``, at least 3.
    """
    n = permuted.shape[1]
    expected = permuted.mean(1, dtype=np.float64)
    z = np.full(len(true), np.nan)
    pvalue, fdr = z.copy(), z.copy()
    scale = np.abs(permuted).max(1, initial=_LEAST)
    deviation = (permuted - expected[:, None]).astype(np.float64)
    total = np.square(deviation).sum(1)
    usable = np.sqrt(total / (n - 1)) > 1e-6 * scale
    if not usable.any():
        return Significance(expected, z, pvalue, fdr)
    deviation, total = deviation[usable], total[usable]
    z[usable] = (true[usable] - expected[usable]) / np.sqrt(total / (n - 1))
    # Mean and variance of the others follow from those of all.
    others = (total[:, None] - np.square(deviation) * n / (n - 1)) / (n - 2)
    # One permutation may be all that varies: it tells nothing of how unusual it is.
    varied = others > 1e-12 * total[:, None]
    pooled = np.sort((deviation * n / (n - 1))[varied] / np.sqrt(others[varied]))
    larger = len(pooled) - np.searchsorted(pooled, z[usable], side="left")
    pvalue[usable] = (1 + larger) / (1 + len(pooled))
    fdr[usable] = false_discovery_control(pvalue[usable])
    return Significance(expected, z, pvalue, fdr)


class GeneTests(NamedTuple):
    """Tests of pairs of genes for pairs of groups."""

    pair: NDArray[np.int64]
    """``(n_tests,)`` source group x number of groups + destination group."""
    source_gene: NDArray[np.int64]
    destination_gene: NDArray[np.int64]
    attention: NDArray[np.float64]
    score: NDArray[np.float64]
    n_edges: NDArray[np.int64]
    result: Significance


def gene_tests(
    tokens: GeneTokens,
    graph: NodeGraph,
    codes: NDArray[np.int64],
    library: NDArray[np.int64],
    n_groups: int,
    wanted: NDArray[np.bool_],
    *,
    null: Null,
    statistic: Statistic,
    n_permutations: int,
    min_edges: int,
    min_support: float,
    random_state: int,
    batch_size: int | None,
) -> GeneTests:
    """Test every pair of genes of every pair of groups; parameters as in :func:`fimp_sc.tl.attention`.

    Parameters
    ----------
    tokens, graph
        Of all nodes.
    codes, library
        ``(n,)`` int64 group (-1: none) and sample of each node.
    n_groups
        Number of groups.
    wanted
        ``(g, g)`` bool, destination gene x source gene: which pairs to test.
    null, statistic, n_permutations, min_edges, min_support, random_state, batch_size
        See :func:`fimp_sc.tl.attention`.
    """
    edges = edge_pairs(graph, codes, n_groups)
    n_edges = np.bincount(edges[2], minlength=n_groups**2)
    strata = library * n_groups + codes if null == "neighbours" else library
    strata = np.where(codes >= 0, strata, -1)
    value = centred(tokens.value, strata) if statistic != "attention" else None

    def sums(edges: Edges, place: NDArray[np.int64] | None = None) -> PairSums:
        to, of, pair = edges
        share = _share(to, pair)
        if place is not None:
            to, of = place[to], place[of]
        if value is not None and statistic == "covariance":
            return pair_products(value, to, of, pair, n_groups**2, share)
        weight = None if value is None else share
        return pair_sums(tokens, value, to, of, pair, n_groups**2, weight=weight, batch_size=batch_size)

    true = sums(edges)
    present = np.stack([tokens.present()[codes == code].mean(0) for code in range(n_groups)])
    # Shares of groups instead of edges counted: what is tested must not depend on who is next to whom.
    support = present[None, :, :, None] * present[:, None, None, :] * n_edges.reshape(n_groups, n_groups, 1, 1)
    tested = (support.reshape(true.first.shape) >= min_support) & (n_edges >= min_edges)[:, None, None]
    tested &= wanted
    score = _score(true, n_edges, tested, statistic)
    rng = np.random.default_rng(random_state)
    permuted = np.empty((len(score), n_permutations), dtype=np.float32)
    for i in range(n_permutations):
        place = shuffled(strata, rng)
        if null == "neighbours":
            now, counts = sums(edges, place), n_edges
        else:
            other = edge_pairs(graph, codes[place], n_groups)
            now, counts = sums(other), np.bincount(other[2], minlength=n_groups**2)
        permuted[:, i] = _score(now, counts, tested, statistic)
    where, destination_gene, source_gene = np.nonzero(tested)
    plain = true if statistic == "attention" else pair_sums(tokens, None, *edges, n_groups**2, batch_size=batch_size)
    mean = plain.first[tested] / n_edges[where]
    result = significance(score, permuted)
    return GeneTests(where, source_gene, destination_gene, mean, score, n_edges[where], result)


def _share(destination: NDArray[np.int64], pair: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return for each edge 1 / number of edges into its destination from its group."""
    # The group of a destination is one, so that a pair of groups tells the group of the source.
    key = pair * (int(destination.max(initial=0)) + 1) + destination
    _, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
    return 1.0 / counts[inverse]


def _score(sums: PairSums, n_edges: NDArray[np.int64], tested: NDArray[np.bool_], statistic: str) -> NDArray:
    if statistic == "attention":
        return (sums.first / np.maximum(n_edges, 1)[:, None, None])[tested]
    return sums.first[tested] / np.sqrt(np.maximum(sums.second[tested], _LEAST**2))


def group_tests(
    influence: Callable[[NDArray[np.int64]], tuple[NDArray[np.float64], NDArray[np.int64]]],
    codes: NDArray[np.int64],
    library: NDArray[np.int64],
    *,
    n_permutations: int,
    min_edges: int,
    random_state: int,
) -> tuple[NDArray[np.float64], NDArray[np.int64], Significance]:
    """Test whether the influence of one group on another is larger than with labels dealt out at random.

    Parameters
    ----------
    influence
        From ``(n,)`` groups to mean influence, NaN without edges, and number of edges of each pair of groups.
    codes, library, n_permutations, min_edges, random_state
        As in :func:`gene_tests`. Pairs with fewer edges get NaN.
    """
    mean, n_edges = influence(codes)
    rng = np.random.default_rng(random_state)
    strata = np.where(codes >= 0, library, -1)
    permuted = np.stack([influence(codes[shuffled(strata, rng)])[0] for _ in range(n_permutations)], axis=1)
    tested = (n_edges >= min_edges) & np.isfinite(permuted).all(1)
    parts = significance(mean[tested], permuted[tested])
    out = [np.full(len(mean), np.nan) for _ in parts]
    for whole, part in zip(out, parts, strict=True):
        whole[tested] = part
    return mean, n_edges, Significance(*out)


def shuffled(strata: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return which node takes the place of each, among the nodes of its stratum; those of -1 stay."""
    place = np.arange(len(strata))
    for stratum in np.unique(strata[strata >= 0]):
        rows = np.flatnonzero(strata == stratum)
        place[rows] = rng.permutation(rows)
    return place


def centred(value: NDArray[np.float32], strata: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return values minus the mean of their stratum; 0 for those of -1."""
    out = np.zeros_like(value)
    for stratum in np.unique(strata[strata >= 0]):
        rows = strata == stratum
        out[rows] = value[rows] - value[rows].mean(0)
    return out
