"""Random numbers by name: distributions, and independence of place and company."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fimp_sc._draws import combined, name_key, normal, uniform


def test_names_have_keys_of_their_own_that_stay() -> None:
    names = [f"cell_{i}" for i in range(100_000)]
    keys = name_key(names)
    assert keys.dtype == np.uint64
    assert len(np.unique(keys)) == len(names)
    order = np.random.default_rng(0).permutation(len(names))[:1000]
    np.testing.assert_array_equal(name_key(np.array(names)[order]), keys[order])
    np.testing.assert_array_equal(name_key([1, 2]), name_key(["1", "2"]))
    assert name_key([]).shape == (0,)
    # Written down, so that another version of a library that changes them is noticed.
    assert name_key(["GAPDH", "Gapdh"]).tolist() == [1676122259321217221, 121985174316679061]


@pytest.mark.parametrize("keys", ["places", "names"])
@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
def test_numbers_are_uniform_and_independent_of_each_other(keys: str, seed: int) -> None:
    rows, columns = np.arange(64), np.arange(2000)
    if keys == "names":
        columns = name_key([f"gene{i}" for i in columns])
    u = uniform(seed, rows, columns)
    assert (u.dtype, u.shape) == (np.float32, (64, 2000))
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.ravel()[::7], "uniform").pvalue > 1e-3
    # Correlations of n independent pairs have a standard deviation of n ** -0.5.
    for table in (u, u[:, :64], u.T[:64]):
        others = np.corrcoef(table)[np.triu_indices(len(table), 1)]
        assert np.abs(others).max() < 5.5 * table.shape[1] ** -0.5
    other = uniform(seed + 1, rows, columns)
    assert abs(np.corrcoef(u.ravel(), other.ravel())[0, 1]) < 5 * u.size**-0.5
    # As masks: of entries hidden in one row those hidden in another are the same share.
    both = np.array([(u[i] < 0.3) & (u[i + 1] < 0.3) for i in range(63)]).mean()
    assert both == pytest.approx(0.09, abs=5 * (0.09 * 0.91 / (63 * 2000)) ** 0.5)


def test_a_number_depends_on_its_seed_row_and_column_alone() -> None:
    rng = np.random.default_rng(0)
    rows, columns = (rng.integers(2**64, size=n, dtype=np.uint64) for n in (30, 40))
    whole = uniform(5, rows, columns)
    some, others = rng.permutation(30)[:7], rng.permutation(40)[:9]
    np.testing.assert_array_equal(uniform(5, rows[some], columns[others]), whole[np.ix_(some, others)])
    for changed in (
        uniform(6, rows, columns),
        uniform(5, rows + np.uint64(1), columns),
        uniform(5, rows, columns[::-1]),
    ):
        assert (changed != whole).mean() > 0.99


def test_normal_numbers_have_the_normal_distribution() -> None:
    z = normal(3, np.arange(1000), np.arange(64))
    assert z.dtype == np.float32
    assert np.isfinite(z).all()
    assert stats.kstest(z.ravel()[::3], "norm").pvalue > 1e-3
    np.testing.assert_array_equal(normal(3, np.arange(5), np.arange(8)), z[:5, :8])


def test_the_largest_number_is_drawn_as_a_finite_one() -> None:
    row, columns = np.array([8956]), np.arange(512)
    assert uniform(0, row, columns).max() == 1 - 2**-24
    assert 5 < normal(0, row, columns).max() < 6


def test_combined_keys_differ_by_both_parts() -> None:
    keys = np.array([combined(seed, np.arange(500)) for seed in range(20)])
    assert len(np.unique(keys)) == keys.size
    # Each bit is set in half of them.
    bits = (keys.ravel()[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 * keys.size**-0.5
