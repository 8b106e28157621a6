"""Permutation tests of pairs of genes over the edges of pairs of groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from scipy import sparse

from fimp_sc.model.predict._attention import edge_pairs
from fimp_sc.tl._statistics._significance import Pool, Significance, drawn
from fimp_sc.tl._statistics._strata import centered

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from fimp_sc.data import NodeGraph

Edges: TypeAlias = "tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]"

# Below this a sum of squares is rounding.
_LEAST = 1e-12
# Permuted scores that are held at once, and products of values that are.
_SCORES, _PRODUCTS = 1 << 25, 1 << 22
# So many times as fast is a product in a matrix as one by itself.
_DENSE = 16


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
    directed: bool
    """Whether a destination responds to the mean of its sources; else both directions of an edge count together."""
    n_few_edges: int
    """Pairs of groups that are joined by too few edges."""
    n_few_cells: int
    """Tests between the others that too few cells can support."""


def plan_tests(
    graph: NodeGraph,
    codes: NDArray[np.int64],
    n_groups: int,
    expressed: NDArray[np.bool_],
    wanted: NDArray[np.bool_] | None,
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
        ``(g, g)`` bool, destination gene x source gene: the pairs to test, with direction. ``None``: all pairs without
        direction, each once.
    min_edges, min_support
        See :func:`fimp_sc.tl.gene_pairs`.
    """
    destination, source, pair = edge_pairs(graph, codes, n_groups)
    if wanted is None:
        # Of an edge and the one back one is left, from the group that comes first to the other.
        low, high = np.minimum(destination, source), np.maximum(destination, source)
        kept = np.unique(low * len(codes) + high, return_index=True)[1]
        first, second = np.divmod(pair[kept], n_groups)
        pair = np.minimum(first, second) * n_groups + np.maximum(first, second)
    pairs, n_edges = np.unique(pair, return_counts=True)
    enough = n_edges >= min_edges
    n_few_edges = int((~enough).sum())
    pairs, n_edges = pairs[enough], n_edges[enough]
    grouped = np.flatnonzero(codes >= 0)
    member = sparse.csr_matrix((np.ones(len(grouped)), (codes[grouped], grouped)), shape=(n_groups, len(codes)))
    # Fractions of groups instead of edges counted: the choice of tests must not depend on who is next to whom.
    fraction = (member @ expressed) / np.maximum(np.asarray(member.sum(1)), 1)
    every = np.ones((expressed.shape[1],) * 2, dtype=bool) if wanted is None else wanted
    # Within a group the pairs of genes of one half are those of the other.
    half = np.tril(every) if wanted is None else every
    found: list[tuple[NDArray[np.int64], ...]] = [(np.zeros(0, dtype=np.int64),) * 3]
    n_wanted = 0
    for i, (of_group, to_group) in enumerate(zip(*np.divmod(pairs, n_groups), strict=True)):
        asked = half if of_group == to_group else every
        n_wanted += int(asked.sum())
        to, of = np.nonzero(asked & (fraction[to_group][:, None] * fraction[of_group] * n_edges[i] >= min_support))
        found.append((np.full(len(to), i), to, of))
    tests = Tests(*map(np.concatenate, zip(*found, strict=True)))
    return Plan(pairs, n_edges, tests, wanted is not None, n_few_edges, n_wanted - len(tests.pair))


class GeneTests(NamedTuple):
    """Tests of pairs of genes for pairs of groups, in the order of :attr:`Plan.tests`."""

    score: NDArray[np.float64]
    correlation: NDArray[np.float64]
    result: Significance


def gene_tests(
    value: NDArray[np.float32],
    graph: NodeGraph,
    codes: NDArray[np.int64],
    strata: NDArray[np.int64],
    n_groups: int,
    plan: Plan,
    *,
    compared: sparse.csr_array | None = None,
    n_permutations: int,
    random_state: int,
    verbose: bool,
) -> GeneTests:
    """Test the covariance of genes over the edges of pairs of groups.

    Memory grows with the number of tests, and with cells x genes; neither with permutations nor with all pairs of
    groups.

    Parameters
    ----------
    value
        ``(n, g)`` log-normalized expression.
    graph
        Of all nodes.
    codes
        ``(n,)`` int64 group of each node, -1 for none.
    strata
        ``(n,)`` int64: cells of one number swap places; all of them are of one group. -1 for none.
    n_groups
        Number of groups.
    plan
        The tests.
    compared
        ``(n, n)`` weights of the cells, of the same stratum, whose mean is subtracted; ``None`` for none.
    n_permutations, random_state, verbose
        See :func:`fimp_sc.tl.gene_pairs`.
    """
    value = centered(value, strata)
    if compared is not None:
        value = centered(value - compared @ value, strata)
    edges = edge_pairs(graph, codes, n_groups)
    tests, pool = plan.tests, Pool(len(plan.tests.pair), n_permutations)
    score, correlation = np.empty((2, len(tests.pair)))
    # Cells of one stratum come together.
    order = np.argsort(strata, kind="stable")
    members = [order[codes[order] == group] for group in range(n_groups)]
    chunks = list(_chunks(plan, n_permutations))
    for chunk in drawn(chunks, "Pairs of genes", verbose=verbose):
        i = int(tests.pair[chunk.start])
        of_group, to_group = map(int, divmod(int(plan.pairs[i]), n_groups))
        rows, columns = members[to_group], members[of_group]
        weight = _weights(edges, int(plan.pairs[i]), n_groups, rows, columns, len(codes), directed=plan.directed)
        sums = _Sums(value, rows, columns, tests.destination_gene[chunk], tests.source_gene[chunk])
        total, squares = sums.over(weight)
        if compared is not None and of_group == to_group:
            total = total - sums.within(weight, _shared(weight, compared, rows))
        correlation[chunk] = total / np.sqrt(np.maximum(sums.scale(weight), _LEAST**2))
        score[chunk] = total / np.sqrt(np.maximum(squares, _LEAST**2))
        # All chunks of a pair of groups see the same permutations.
        rng = np.random.default_rng([random_state, i])
        permuted = np.empty((n_permutations, len(total)), dtype=np.float32)
        for one in permuted:
            to = _swapped(strata[rows], rng)
            of = to if of_group == to_group else _swapped(strata[columns], rng)
            moved = sparse.csr_array((weight.data, (to[weight.row], of[weight.col])), shape=weight.shape)
            total, squares = sums.over(moved)
            one[:] = total / np.sqrt(np.maximum(squares, _LEAST**2))
        pool.add(chunk, score[chunk], permuted.T)
    return GeneTests(score, correlation, pool.significance())


def _chunks(plan: Plan, n_permutations: int) -> Iterator[slice]:
    """Cut the tests of each pair of groups into pieces of whole destination genes."""
    tests = plan.tests
    bounds = np.searchsorted(tests.pair, np.arange(len(plan.pairs) + 1))
    most = max(_SCORES // n_permutations, 1)
    for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        start = low
        while start < high:
            stop = min(start + most, high)
            if stop < high:
                whole = int(np.searchsorted(tests.destination_gene[low:high], tests.destination_gene[stop])) + low
                stop = whole if whole > start else stop
            yield slice(start, stop)
            start = stop


def _weights(
    edges: Edges,
    pair: int,
    n_groups: int,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    n_nodes: int,
    *,
    directed: bool,
) -> sparse.coo_array:
    """Return ``(destinations, sources)`` weights of edges, 1 / number of sources of the destination in that group.

    Without direction, those of the edges back are added.
    """
    place = np.empty(n_nodes, dtype=np.int64)
    of_group, to_group = divmod(pair, n_groups)

    def one_way(pair: int, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> sparse.csr_array:
        start, stop = np.searchsorted(edges[2], [pair, pair + 1])
        place[rows] = np.arange(len(rows))
        to = place[edges[0][start:stop]]
        place[columns] = np.arange(len(columns))
        of = place[edges[1][start:stop]]
        weight = (1.0 / np.bincount(to, minlength=len(rows))[to]).astype(np.float32)
        return sparse.csr_array((weight, (to, of)), shape=(len(rows), len(columns)))

    weight = one_way(pair, rows, columns)
    if not directed:
        weight = weight + one_way(to_group * n_groups + of_group, columns, rows).T.tocsr()
    return weight.tocoo()


def _swapped(strata: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return a permutation within strata, which must be sorted."""
    return np.lexsort((rng.random(len(strata)), strata))


def _shared(weight: sparse.coo_array, compared: sparse.csr_array, rows: NDArray[np.int64]) -> float:
    """Return how much neighbors of one group go together since they are compared with the same cells.

    Values minus the mean of other cells are correlated, also where the values are not: a cell with those that it is
    compared with (negatively), and two cells that are compared with the same ones. It is the same for all genes, as a
    fraction of the covariance within cells.
    """
    difference = sparse.eye_array(compared.shape[0], dtype=np.float32, format="csr") - compared
    difference = difference.tocsr()[rows]
    own = np.asarray(difference.multiply(difference).sum(1)).ravel()
    together = 0.0
    for start in range(0, weight.nnz, _CELLS):
        to, of = weight.row[start : start + _CELLS], weight.col[start : start + _CELLS]
        products = np.asarray(difference[to].multiply(difference[of]).sum(1)).ravel()
        together += float(products @ weight.data[start : start + _CELLS])
    return together / max(float(own @ np.asarray(weight.sum(1)).ravel()), _LEAST)


_CELLS = 1 << 14


class _Sums:
    """Sums over edges of the products of two genes, for the tests of one pair of groups.

    Parameters
    ----------
    value
        ``(n, g)`` values.
    rows, columns
        Destinations and sources.
    to, of
        ``(n_tests,)`` destination gene and source gene.
    """

    def __init__(
        self,
        value: NDArray[np.float32],
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
        to: NDArray[np.int64],
        of: NDArray[np.int64],
    ) -> None:
        genes, self._to = np.unique(to, return_inverse=True)
        others, self._of = np.unique(of, return_inverse=True)
        self._dense = len(to) * _DENSE > len(genes) * len(others)
        self._x, self._y = value[np.ix_(rows, genes)], value[np.ix_(columns, others)]
        self._squares = np.square(self._x), np.square(self._y)

    def over(self, weight: sparse.sparray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the sum of products over edges, and that of their squares, ``(n_tests,)`` each."""
        weight = weight.tocsr()
        squared = sparse.csr_array((np.square(weight.data), weight.indices, weight.indptr), shape=weight.shape)
        return self._products(self._x, weight @ self._y), self._products(self._squares[0], squared @ self._squares[1])

    def scale(self, weight: sparse.sparray) -> NDArray[np.float64]:
        """Return the product of the sums of squares of both genes over edges."""
        to = np.asarray(weight.sum(1)).ravel() @ self._squares[0]
        of = np.asarray(weight.sum(0)).ravel() @ self._squares[1]
        return to[self._to].astype(np.float64) * of[self._of]

    def within(self, weight: sparse.sparray, fraction: float) -> NDArray[np.float64]:
        """Return a fraction of the sum of products within the destinations, each with the weight of its edges."""
        own = np.asarray(weight.sum(1), dtype=np.float32).reshape(-1, 1)
        return fraction * self._products(self._x, own * self._y)

    def _products(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float64]:
        if self._dense:
            return np.asarray((x.T @ y)[self._to, self._of], dtype=np.float64)
        out = np.empty(len(self._to))
        step = max(_PRODUCTS // max(len(x), 1), 1)
        for start in range(0, len(out), step):
            some = slice(start, start + step)
            out[some] = np.einsum("ij,ij->j", x[:, self._to[some]], y[:, self._of[some]])
        return out
