from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import false_discovery_control, kstest, norm
from sklearn.neighbors import kneighbors_graph

from fimp_sc.data import NodeGraph
from fimp_sc.tl._statistics._significance import (
    centered,
    gene_tests,
    group_tests,
    plan_tests,
    rows_of,
    shuffled,
    significance,
)


@pytest.fixture(scope="module")
def null() -> tuple[np.ndarray, np.ndarray]:
    """Statistics of 2,000 tests of unlike mean and scale, and 50 permutations of each from the same distribution."""
    rng = np.random.default_rng(0)
    scale, mean = rng.uniform(0.1, 10, (2, 2000, 1))
    drawn = mean + scale * rng.normal(size=(2000, 51))
    return drawn[:, 0], drawn[:, 1:]


def test_pvalues_are_uniform_where_there_is_nothing(null) -> None:
    result = significance(*null)
    assert kstest(result.pvalue, "uniform").pvalue > 0.01
    assert 0.03 < (result.pvalue < 0.05).mean() < 0.07
    assert result.fdr.min() > 0.05
    assert result.pvalue.min() > 0


def test_rates_are_those_of_benjamini_and_hochberg(null) -> None:
    true, permuted = null
    true = true + np.where(np.arange(len(true)) % 20, 0, 5 * permuted.std(1))
    result = significance(true, permuted)
    np.testing.assert_allclose(result.fdr, false_discovery_control(result.pvalue))
    # By hand: p times number of tests by rank, made monotonous from the largest.
    order = np.argsort(result.pvalue)
    stepped = result.pvalue[order] * len(true) / np.arange(1, len(true) + 1)
    np.testing.assert_allclose(result.fdr[order], np.minimum.accumulate(stepped[::-1])[::-1].clip(max=1))
    found = result.fdr <= 0.05
    assert found[::20].mean() > 0.9
    assert found[np.arange(len(true)) % 20 > 0].sum() < 0.12 * found.sum()


def test_pvalues_follow_their_definition() -> None:
    rng = np.random.default_rng(1)
    true, permuted = rng.normal(size=4), rng.normal(size=(4, 6))
    result = significance(true, permuted)
    np.testing.assert_allclose(result.expected, permuted.mean(1))
    np.testing.assert_allclose(result.z, (true - permuted.mean(1)) / permuted.std(1, ddof=1))
    pooled = []
    for row in permuted:
        for i, one in enumerate(row):
            others = np.delete(row, i)
            pooled.append((one - others.mean()) / others.std(ddof=1))
    expected = [(1 + sum(other >= z for other in pooled)) / 25 for z in result.z]
    np.testing.assert_allclose(result.pvalue, expected)


def test_more_permutations_of_other_tests_tell_small_pvalues_apart(null) -> None:
    true, permuted = null[0].copy(), null[1]
    true[0] = permuted[0].mean() + 4 * permuted[0].std(ddof=1)
    # Standardized by 49 others, a normal number has heavier tails than the normal distribution.
    assert norm.sf(4) / 2 < significance(true, permuted).pvalue[0] < 20 * norm.sf(4)


def test_permutations_that_do_not_vary_tell_nothing() -> None:
    rng = np.random.default_rng(2)
    permuted = rng.normal(size=(3, 20))
    permuted[1] = 7
    true = np.array([0.0, 7.0, 1.0])
    result = significance(true, permuted)
    assert (result.z[1], result.pvalue[1], result.fdr[1], result.expected[1]) == (0, 1, 1, 7)
    # The others are as if it were not there, but for its being one more test.
    others = significance(true[[0, 2]], permuted[[0, 2]])
    np.testing.assert_array_equal(result.pvalue[[0, 2]], others.pvalue)
    np.testing.assert_allclose(result.fdr, false_discovery_control(result.pvalue))
    alone = significance(np.ones(1), np.ones((1, 20)))
    assert (alone.z, alone.pvalue, alone.fdr) == (0, 1, 1)
    assert not len(significance(np.zeros(0), np.zeros((0, 20))).pvalue)


def test_many_tests_are_looked_at_some_at_a_time(null, monkeypatch) -> None:
    whole = significance(*null)
    monkeypatch.setattr("fimp_sc.tl._statistics._significance._TESTS", 7)
    for one, other in zip(whole, significance(*null), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_nodes_change_places_within_their_stratum() -> None:
    strata = np.array([0, 1, 0, 1, -1, 0, 1, -1, 0] * 5)
    rows = rows_of(strata)
    assert [sorted(part) for part in rows] == [np.flatnonzero(strata == i).tolist() for i in (0, 1)]
    place = shuffled(rows, 45, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(place), np.arange(45))
    np.testing.assert_array_equal(strata[place], strata)
    np.testing.assert_array_equal(place[strata < 0], np.flatnonzero(strata < 0))
    assert (place != np.arange(45)).sum() > 20


def test_values_are_centered_within_their_stratum() -> None:
    value = np.random.default_rng(0).random((10, 3)).astype(np.float32)
    strata = np.array([0, 0, 0, 2, 2, 2, 2, -1, -1, 5])
    out = centered(value, strata)
    for stratum in (0, 2, 5):
        np.testing.assert_allclose(out[strata == stratum].sum(0), 0, atol=1e-6)
    np.testing.assert_allclose(out[0] - out[1], value[0] - value[1], atol=1e-6)
    assert (out[strata < 0] == 0).all()


def test_what_is_constant_within_a_stratum_is_zero() -> None:
    """Not what rounding leaves of it, which would be tested like any gene."""
    strata = np.repeat([0, 1], 20_000)
    value = np.where(strata[:, None], 2.3, 0.7).astype(np.float32)
    assert (centered(value, strata) == 0).all()


def test_groups_that_differ_are_found_and_small_ones_not_tested() -> None:
    rng = np.random.default_rng(0)
    codes = np.concatenate([rng.integers(0, 2, 297), np.full(3, 2)])
    library = np.repeat([0, 1], 150)
    graph = sparse.csr_matrix(kneighbors_graph(rng.random((300, 2)), 5))
    source, destination = graph.indices, np.repeat(np.arange(300), 5)
    graph.data = (codes[source] + 0.3 * rng.normal(size=1500)).astype(np.float32)
    how = {"n_permutations": 50, "min_edges": 30, "random_state": 0, "verbose": False}
    tests = group_tests(graph, codes, library, 3, **how)
    found = dict(zip(tests.pair.tolist(), range(len(tests.pair)), strict=True))
    for pair, i in found.items():
        edges = (codes[source] == pair // 3) & (codes[destination] == pair % 3)
        assert tests.n_edges[i] == edges.sum()
        assert tests.influence[i] == pytest.approx(graph.data[edges].mean(), rel=1e-6)
    result = tests.result
    for pair in (3, 4):
        assert result.fdr[found[pair]] < 0.05 < result.fdr[found[pair - 3]]
        assert result.expected[found[pair]] == pytest.approx(graph.data.mean(), abs=0.1)
    np.testing.assert_array_equal(np.isnan(result.pvalue), tests.n_edges < 30)
    assert np.isnan(result.pvalue).any()


def test_pairs_of_groups_without_edges_in_a_permutation_are_not_tested() -> None:
    """Mean influence over no edges is no number: these two cells are seldom neighbors again."""
    n, codes = 60, np.zeros(60, dtype=np.int64)
    codes[:2] = 1
    graph = sparse.csr_matrix((np.ones(2, np.float32), ([0, 1], [1, 0])), shape=(n, n))
    graph += sparse.csr_matrix(np.eye(n, k=5, dtype=np.float32))
    tests = group_tests(
        graph, codes, np.zeros(n, dtype=np.int64), 2, n_permutations=10, min_edges=2, random_state=0, verbose=False
    )
    assert dict(zip(tests.pair.tolist(), np.isnan(tests.result.pvalue).tolist(), strict=True))[3]


class Simulated:
    """Cells of four groups in two samples whose expression depends on their group, and on nobody next to them."""

    def __init__(self, seed: int, n: int = 600, n_genes: int = 10, n_groups: int = 4, *, markers: bool = True) -> None:
        rng = np.random.default_rng(seed)
        self.n_groups, self.library = n_groups, np.repeat([0, 1], n // 2)
        self.codes = rng.choice(n_groups, n, p=rng.dirichlet(np.full(n_groups, 5)))
        graph = kneighbors_graph(rng.random((n, 2)) + 3 * self.library[:, None], 6)
        self.graph = NodeGraph(graph + graph.T, self_loops=False)
        rate = np.exp(rng.uniform(-2, 1.5, n_genes) + 0.5 * markers * rng.normal(size=(n_groups, n_genes)))
        value = np.log1p(rng.negative_binomial(1, 1 / (1 + rate[self.codes]))).astype(np.float32)
        self.value, self.expressed = value, value > 0

    def plan(self, wanted=True, **least):
        shape = (self.expressed.shape[1],) * 2
        return plan_tests(
            self.graph, self.codes, self.n_groups, self.expressed, np.broadcast_to(wanted, shape), **{**LEAST, **least}
        )

    def test(self, plan=None, **how):
        return gene_tests(
            self.value, self.graph, self.codes, self.library, self.n_groups, plan or self.plan(), **{**HOW, **how}
        )


LEAST = {"min_edges": 30, "min_support": 10}
HOW = {"null": "neighbors", "n_permutations": 40, "random_state": 0, "verbose": False}


@pytest.mark.parametrize(("null", "markers"), [("neighbors", True), ("labels", False)])
def test_pvalues_are_uniform_in_tissues_where_nobody_speaks(null, markers) -> None:
    found = [Simulated(seed, markers=markers).test(null=null, random_state=seed).result for seed in range(5)]
    pvalue = np.concatenate([result.pvalue for result in found])
    assert len(pvalue) > 2000
    assert pvalue.min() > 0
    assert sum(result.fdr.min() < 0.05 for result in found) <= 1
    for level in (0.01, 0.05, 0.2, 0.5):
        assert (pvalue <= level).mean() == pytest.approx(level, rel=0.25, abs=0.005)


def test_permuted_groups_find_markers() -> None:
    pvalue = Simulated(0).test(null="labels").result.pvalue
    assert (pvalue <= 0.05).mean() > 0.1


def test_what_is_planned_has_edges_and_cells_enough() -> None:
    tissue = Simulated(0)
    wanted = np.random.default_rng(1).random((10, 10)) < 0.5
    plan, n_edges = tissue.plan(wanted), np.zeros((4, 4))
    coo = tissue.graph.csr.tocoo()
    np.add.at(n_edges, (tissue.codes[coo.col], tissue.codes[coo.row]), 1)
    fraction = [tissue.expressed[tissue.codes == group].mean(0) for group in range(4)]
    expected = {
        (s, d, of, to): n_edges[s, d]
        for s in range(4) for d in range(4) for of in range(10) for to in range(10)
        if wanted[to, of] and n_edges[s, d] >= 30 and n_edges[s, d] * fraction[s][of] * fraction[d][to] >= 10
    }  # fmt: skip
    pair, to, of = plan.tests
    keys = zip(*np.divmod(plan.pairs[pair], 4), of, to, strict=True)
    assert dict(zip([tuple(map(int, key)) for key in keys], plan.n_edges[pair], strict=True)) == expected
    assert 0 < len(expected) < 16 * wanted.sum()


def test_fewer_tests_are_those_among_all() -> None:
    """Scores and what is drawn do not depend on what else is tested."""
    tissue, how = Simulated(1, n=200), {"n_permutations": 5}
    every = tissue.plan(min_edges=1, min_support=0)
    few = tissue.plan(np.eye(10, dtype=bool), min_edges=50, min_support=0)
    assert len(few.pairs) < len(every.pairs)
    all_keys, keys = (
        (plan.pairs[plan.tests.pair] * 100 + plan.tests.destination_gene * 10 + plan.tests.source_gene).tolist()
        for plan in (every, few)
    )
    chosen = [all_keys.index(key) for key in keys]
    whole, part = (tissue.test(plan, **how) for plan in (every, few))
    np.testing.assert_allclose(part.score, whole.score[chosen], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(part.result.expected, whole.result.expected[chosen], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(part.result.z, whole.result.z[chosen], rtol=1e-3, atol=1e-3)


def test_edges_are_summed_some_at_a_time(monkeypatch) -> None:
    tissue = Simulated(2, n=200)
    one = tissue.test()
    monkeypatch.setattr("fimp_sc.tl._statistics._significance._EDGES", 7)
    np.testing.assert_allclose(one.score, tissue.test().score, rtol=1e-4, atol=1e-5)


def test_memory_is_that_of_what_is_tested() -> None:
    """All pairs of 120 groups times all pairs of 60 genes would take 830 MB."""
    tissue = Simulated(3, n=2000, n_genes=60, n_groups=120)
    plan = tissue.plan(min_edges=10, min_support=1)
    assert 1000 < len(plan.tests.pair) < 100_000
    tracemalloc.start()
    tissue.test(plan, n_permutations=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def test_a_gene_that_is_constant_within_groups_has_pvalue_one() -> None:
    tissue = Simulated(4)
    tissue.value[:, 0] = np.array([1.3, 0.7, 2.9, 4.1], dtype=np.float32)[tissue.codes]
    tissue.expressed[:, 0] = True
    plan = tissue.plan()
    result = tissue.test(plan).result
    constant = (plan.tests.destination_gene == 0) | (plan.tests.source_gene == 0)
    assert 50 < constant.sum() < len(constant)
    assert (result.pvalue[constant] == 1).all()
    assert (result.z[constant] == 0).all()
    assert (result.pvalue[~constant] < 1).mean() > 0.9


def test_a_group_of_one_cell_has_pvalue_one() -> None:
    tissue = Simulated(5)
    hub = int(tissue.graph.degree.argmax())
    tissue.codes[hub] = 4
    tissue.n_groups = 5
    plan = tissue.plan(min_edges=2, min_support=1)
    result = tissue.test(plan).result
    source, destination = np.divmod(plan.pairs[plan.tests.pair], 5)
    alone = (source == 4) | (destination == 4)
    assert 10 < alone.sum() < len(alone)
    assert (result.pvalue[alone] == 1).all()
    assert np.isfinite(result.pvalue).all()
