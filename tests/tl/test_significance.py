from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import false_discovery_control, kstest, norm

from fimp_sc.tl._significance import centred, group_tests, shuffled, significance


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
    # Standardised by 49 others, a normal number has heavier tails than the normal distribution.
    assert norm.sf(4) / 2 < significance(true, permuted).pvalue[0] < 20 * norm.sf(4)


def test_permutations_that_do_not_vary_have_no_pvalue() -> None:
    rng = np.random.default_rng(2)
    permuted = rng.normal(size=(3, 20))
    permuted[1] = 7
    result = significance(np.array([0.0, 8.0, 1.0]), permuted)
    assert np.isnan(result.pvalue).tolist() == [False, True, False]
    assert np.isnan(result.fdr).tolist() == [False, True, False]
    alone = significance(np.array([1.0]), np.ones((1, 20)))
    assert np.isnan(alone.z).all()


def test_nodes_change_places_within_their_stratum() -> None:
    strata = np.array([0, 1, 0, 1, -1, 0, 1, -1, 0] * 5)
    place = shuffled(strata, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(place), np.arange(45))
    np.testing.assert_array_equal(strata[place], strata)
    np.testing.assert_array_equal(place[strata < 0], np.flatnonzero(strata < 0))
    assert (place != np.arange(45)).sum() > 20


def test_values_are_centred_within_their_stratum() -> None:
    value = np.random.default_rng(0).random((10, 3)).astype(np.float32)
    strata = np.array([0, 0, 0, 2, 2, 2, 2, -1, -1, 5])
    out = centred(value, strata)
    for stratum in (0, 2, 5):
        np.testing.assert_allclose(out[strata == stratum].sum(0), 0, atol=1e-6)
    np.testing.assert_allclose(out[0] - out[1], value[0] - value[1], atol=1e-6)
    assert (out[strata < 0] == 0).all()


def test_groups_that_differ_are_found_and_small_ones_not_tested() -> None:
    rng = np.random.default_rng(0)
    codes, library = rng.integers(0, 2, 300), np.repeat([0, 1], 150)
    strength = codes + 0.3 * rng.normal(size=300)

    def influence(codes):
        return np.array([strength[codes == 0].mean(), strength[codes == 1].mean(), np.nan]), np.array([150, 150, 3])

    mean, n_edges, result = group_tests(influence, codes, library, n_permutations=50, min_edges=30, random_state=0)
    assert n_edges.tolist() == [150, 150, 3]
    np.testing.assert_allclose(mean[:2], [0, 1], atol=0.2)
    assert result.fdr[1] < 0.05 < result.fdr[0]
    np.testing.assert_allclose(result.expected[:2], 0.5, atol=0.1)
    assert np.isnan(result.z[2])
