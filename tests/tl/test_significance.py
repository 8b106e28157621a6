from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import false_discovery_control, kstest, norm
from sklearn.neighbors import kneighbors_graph

from fimp_sc.tl._statistics._significance import group_tests, significance
from fimp_sc.tl._statistics._strata import centered, rows_of, shuffled


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


def test_of_very_many_permutations_some_stand_for_all_but_not_in_the_tail(null, monkeypatch) -> None:
    true, permuted = null[0].copy(), null[1]
    far = np.arange(0, 2000, 40)
    true[far] = permuted[far].mean(1) + np.linspace(3.1, 6, len(far)) * permuted[far].std(1, ddof=1)
    whole = significance(true, permuted)
    monkeypatch.setattr("fimp_sc.tl._statistics._significance._POOLED", 20_000)
    monkeypatch.setattr("fimp_sc.tl._statistics._significance._TESTS", 77)
    some = significance(true, permuted)
    np.testing.assert_allclose(some.z, whole.z, rtol=1e-12)
    np.testing.assert_allclose(some.pvalue[far], whole.pvalue[far], rtol=1e-3)
    assert some.pvalue[far].min() < 1 / 90_000
    np.testing.assert_allclose(some.pvalue, whole.pvalue, atol=0.015)
    assert kstest(np.delete(some.pvalue, far), "uniform").pvalue > 0.01


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
