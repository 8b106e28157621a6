from __future__ import annotations

import tracemalloc
from itertools import permutations, product

import numpy as np
import pytest
from scipy import sparse
from sklearn.neighbors import kneighbors_graph

from fimp_sc.data import NodeGraph
from fimp_sc.tl._statistics import _gene_tests
from fimp_sc.tl._statistics._gene_tests import gene_tests, plan_tests
from fimp_sc.tl._statistics._surroundings import alike, surroundings

LEAST = {"min_edges": 30, "min_support": 10}
HOW = {"n_permutations": 40, "random_state": 0, "verbose": False}


class Simulated:
    """Cells of four groups in two samples whose expression depends on their group, and on nobody next to them."""

    def __init__(self, seed: int, n: int = 600, n_genes: int = 10, n_groups: int = 4) -> None:
        rng = np.random.default_rng(seed)
        self.n_groups, self.library = n_groups, np.repeat([0, 1], n // 2)
        self.codes = rng.choice(n_groups, n, p=rng.dirichlet(np.full(n_groups, 5)))
        self.places = rng.random((n, 2)) + 3 * self.library[:, None]
        self.graph = NodeGraph(kneighbors_graph(self.places, 6), self_loops=False)
        rate = np.exp(rng.uniform(-2, 1.5, n_genes) + 0.5 * rng.normal(size=(n_groups, n_genes)))
        value = np.log1p(rng.negative_binomial(1, 1 / (1 + rate[self.codes]))).astype(np.float32)
        self.value, self.expressed = value, value > 0

    @property
    def strata(self) -> np.ndarray:
        return np.where(self.codes >= 0, self.library * self.n_groups + self.codes, -1)

    def plan(self, wanted=None, **least):
        return plan_tests(self.graph, self.codes, self.n_groups, self.expressed, wanted, **{**LEAST, **least})

    def compared(self) -> sparse.csr_array:
        return alike(self.places, surroundings(self.value, self.graph, self.strata), self.strata)

    def test(self, plan=None, **how):
        plan = self.plan() if plan is None else plan
        return gene_tests(self.value, self.graph, self.codes, self.strata, self.n_groups, plan, **{**HOW, **how})


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("directed", [True, False])
def test_pvalues_are_uniform_in_tissues_where_nobody_speaks(directed, conditional) -> None:
    pvalues, within, n_found = [], [], 0
    for seed in range(8 if not directed else 4):
        tissue = Simulated(seed)
        plan = tissue.plan(np.ones((10, 10), dtype=bool) if directed else None)
        result = tissue.test(plan, compared=tissue.compared() if conditional else None, random_state=seed).result
        source, destination = np.divmod(plan.pairs[plan.tests.pair], 4)
        pvalues.append(result.pvalue)
        within.append(result.pvalue[source == destination])
        n_found += result.fdr.min() < 0.05
    assert n_found <= 1
    for pvalue in map(np.concatenate, (pvalues, within)):
        assert len(pvalue) > 1000
        assert pvalue.min() > 0
        for level in (0.05, 0.2, 0.5):
            fraction = (pvalue <= level).mean()
            if conditional:
                # Differences to cells nearby vary less over edges than after cells swapped places: never too many.
                assert 0.4 * level < fraction < 1.1 * level
            else:
                assert fraction == pytest.approx(level, rel=0.25, abs=0.005)


def test_differences_to_shared_cells_are_accounted_for(monkeypatch) -> None:
    """Else tests within a group, where neighbors are compared with each other, would not be uniform."""
    tissue = Simulated(0)
    wanted = np.eye(10, dtype=bool)  # a gene with itself, where a cell's own noise counts
    plan = tissue.plan(wanted)
    within = np.equal(*np.divmod(plan.pairs[plan.tests.pair], 4))
    z = tissue.test(plan, compared=tissue.compared()).result.z[within]
    monkeypatch.setattr(_gene_tests, "_shared", lambda *_: 0.0)
    biased = tissue.test(plan, compared=tissue.compared()).result.z[within]
    assert abs(z.mean()) < 0.4
    assert biased.mean() < z.mean() - 0.4


def test_permutations_are_those_of_all_there_are() -> None:
    """Against every permutation of four destinations and three sources, in two samples."""
    rng = np.random.default_rng(0)
    codes = np.array([0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1])
    strata = codes + 2 * np.repeat([0, 1], [7, 4])
    edge = np.zeros((11, 11))
    for i, j in [(3, 0), (3, 1), (4, 1), (5, 2), (6, 0), (6, 2), (9, 7), (10, 7), (10, 8), (0, 3), (1, 5), (8, 9)]:
        edge[i, j] = 1
    value = rng.random((11, 2)).astype(np.float32)
    x = value - np.stack([value[strata == s].mean(0) for s in strata])
    weight = edge * (codes[:, None] == 1) * (codes == 0)
    weight /= np.maximum(weight.sum(1, keepdims=True), 1)

    def orders(stratum: int) -> list[tuple[np.ndarray, np.ndarray]]:
        rows = np.flatnonzero(strata == stratum)
        return [(rows, np.array(order)) for order in permutations(rows)]

    scores = []
    for moves in product(*(orders(stratum) for stratum in range(4))):
        place = np.arange(11)
        for rows, order in moves:
            place[rows] = order
        to, of = x[place, 0], x[place, 1]
        scores.append(to @ weight @ of / np.sqrt(to**2 @ weight**2 @ of**2))
    scores = np.array(scores)
    graph = NodeGraph(sparse.csr_matrix(edge), self_loops=False)
    wanted = np.array([[False, True], [False, False]])
    plan = plan_tests(graph, codes, 2, value > 0, wanted, min_edges=9, min_support=0)
    np.testing.assert_array_equal(plan.pairs, [1])
    found = gene_tests(value, graph, codes, strata, 2, plan, n_permutations=4000, random_state=0, verbose=False)
    assert len(scores) == 24 * 6 * 2 * 2
    truth = x[:, 0] @ weight @ x[:, 1] / np.sqrt(x[:, 0] ** 2 @ weight**2 @ x[:, 1] ** 2)
    assert found.score[0] == pytest.approx(truth, rel=1e-4)
    assert found.result.expected[0] == pytest.approx(scores.mean(), abs=4 * scores.std() / np.sqrt(4000))
    assert found.result.z[0] == pytest.approx((truth - scores.mean()) / scores.std(), abs=0.08)
    # Permutations that are as large as what is found are as frequent as among all.
    assert found.result.pvalue[0] == pytest.approx((scores >= truth - 1e-6).mean(), abs=0.03)


@pytest.mark.parametrize("directed", [True, False])
def test_what_is_planned_has_edges_and_cells_enough(directed) -> None:
    tissue = Simulated(0)
    wanted = np.random.default_rng(1).random((10, 10)) < 0.5 if directed else None
    plan, n_edges = tissue.plan(wanted), np.zeros((4, 4))
    edge = tissue.graph.csr.toarray() > 0
    fraction = [tissue.expressed[tissue.codes == group].mean(0) for group in range(4)]
    expected, n_few = {}, 0
    for s, d in product(range(4), range(4)):
        between = edge & (tissue.codes[:, None] == d) & (tissue.codes == s)
        if not directed:
            if s > d:
                continue
            back = edge & (tissue.codes[:, None] == s) & (tissue.codes == d)
            between = np.triu(between | back.T) if s == d else between | back.T
        n_edges[s, d] = between.sum()
        for of, to in product(range(10), range(10)):
            if (wanted is None and (s < d or of <= to)) or (wanted is not None and wanted[to, of]):
                enough = n_edges[s, d] * fraction[s][of] * fraction[d][to] >= 10
                n_few += n_edges[s, d] >= 30 and not enough
                if n_edges[s, d] >= 30 and enough:
                    expected[s, d, of, to] = n_edges[s, d]
    pair, to, of = plan.tests
    keys = zip(*np.divmod(plan.pairs[pair], 4), of, to, strict=True)
    assert dict(zip([tuple(map(int, key)) for key in keys], plan.n_edges[pair], strict=True)) == expected
    assert plan.n_few_edges == ((n_edges > 0) & (n_edges < 30)).sum()
    assert plan.n_few_cells == n_few > 0
    assert expected


def test_both_directions_of_an_edge_count_together() -> None:
    """Genes and groups in another order: the same tests, from the other end."""
    tissue = Simulated(1)
    one, plan = tissue.test(), tissue.plan()
    source, destination = np.divmod(plan.pairs[plan.tests.pair], 4)
    ends = [
        frozenset([(int(s), int(of)), (int(d), int(to))])
        for s, d, to, of in zip(source, destination, *plan.tests[1:], strict=True)
    ]
    assert len(set(ends)) == len(ends)
    tissue.codes = 3 - tissue.codes
    tissue.value, tissue.expressed = tissue.value[:, ::-1].copy(), tissue.expressed[:, ::-1]
    other, turned = tissue.test(), tissue.plan()
    source, destination = np.divmod(turned.pairs[turned.tests.pair], 4)
    place = {
        frozenset([(3 - int(s), 9 - int(of)), (3 - int(d), 9 - int(to))]): i
        for i, (s, d, to, of) in enumerate(zip(source, destination, *turned.tests[1:], strict=True))
    }
    assert set(ends) == set(place)
    same = [place[end] for end in ends]
    np.testing.assert_allclose(one.score, other.score[same], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.correlation, other.correlation[same], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("conditional", [True, False])
def test_fewer_tests_are_those_among_all(conditional) -> None:
    """Scores and their permutations do not depend on what else is tested, nor on how products are summed."""
    tissue, how = Simulated(1, n=200, n_genes=40), {"n_permutations": 5}
    how["compared"] = tissue.compared() if conditional else None
    every = tissue.plan(np.ones((40, 40), dtype=bool), min_edges=1, min_support=0)
    few = tissue.plan(np.eye(40, dtype=bool), min_edges=1, min_support=0)
    all_keys, keys = (
        (plan.pairs[plan.tests.pair] * 1600 + plan.tests.destination_gene * 40 + plan.tests.source_gene).tolist()
        for plan in (every, few)
    )
    chosen = [all_keys.index(key) for key in keys]
    whole, part = (tissue.test(plan, **how) for plan in (every, few))
    np.testing.assert_allclose(part.score, whole.score[chosen], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(part.result.expected, whole.result.expected[chosen], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(part.result.z, whole.result.z[chosen], rtol=1e-3, atol=1e-3)


def test_pieces_make_no_difference(monkeypatch) -> None:
    tissue = Simulated(2, n=200)
    one = tissue.test(compared=tissue.compared())
    monkeypatch.setattr(_gene_tests, "_SCORES", 40 * 7)
    monkeypatch.setattr(_gene_tests, "_PRODUCTS", 50)
    monkeypatch.setattr(_gene_tests, "_DENSE", 0)
    monkeypatch.setattr(_gene_tests, "_CELLS", 7)
    other = tissue.test(compared=tissue.compared())
    np.testing.assert_allclose(one.score, other.score, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.result.z, other.result.z, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(one.result.pvalue, other.result.pvalue, rtol=0.02, atol=1e-3)


def test_memory_is_that_of_what_is_tested() -> None:
    """All pairs of 60 groups times all pairs of 60 genes would take 104 MB for each number."""
    tissue = Simulated(3, n=2000, n_genes=60, n_groups=60)
    plan = tissue.plan(min_edges=10, min_support=4)
    assert 1000 < len(plan.tests.pair) < 100_000
    tracemalloc.start()
    tissue.test(plan, n_permutations=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


@pytest.mark.parametrize("conditional", [True, False])
def test_a_gene_that_is_constant_within_groups_has_pvalue_one(conditional) -> None:
    tissue = Simulated(4)
    tissue.value[:, 0] = np.array([1.3, 0.7, 2.9, 4.1], dtype=np.float32)[tissue.codes]
    tissue.expressed[:, 0] = True
    plan = tissue.plan()
    found = tissue.test(plan, compared=tissue.compared() if conditional else None)
    constant = (plan.tests.destination_gene == 0) | (plan.tests.source_gene == 0)
    assert 50 < constant.sum() < len(constant)
    assert (found.result.pvalue[constant] == 1).all()
    assert (found.result.z[constant] == 0).all()
    assert (found.correlation[constant] == 0).all()
    assert (found.result.pvalue[~constant] < 1).mean() > 0.9


@pytest.mark.parametrize("conditional", [True, False])
def test_a_group_of_one_cell_has_pvalue_one(conditional) -> None:
    tissue = Simulated(5)
    hub = int(tissue.graph.degree.argmax())
    tissue.codes[hub] = 4
    tissue.n_groups = 5
    plan = tissue.plan(min_edges=2, min_support=1)
    result = tissue.test(plan, compared=tissue.compared() if conditional else None).result
    source, destination = np.divmod(plan.pairs[plan.tests.pair], 5)
    alone = (source == 4) | (destination == 4)
    assert 10 < alone.sum() < len(alone)
    assert (result.pvalue[alone] == 1).all()
    assert np.isfinite(result.pvalue).all()
