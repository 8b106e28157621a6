"""The oracle's score is that of an oracle."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

N_CELLS, N_GENES = 400, 200


def simulated(apart: float, seed: int = 0):
    """Counts (cell, gene) and their rates: three types of cells, the more different the larger `apart`."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(N_GENES, 0.5)) * np.exp(apart * rng.normal(size=(3, N_GENES)))
    share = (share / share.sum(1, keepdims=True))[rng.integers(3, size=N_CELLS)]
    rates = share * rng.integers(300, 600, N_CELLS)[:, None]
    return sp.csr_matrix(rng.poisson(rates).astype(float)), rates


def expected(common, counts, rates, test, hidden) -> float:
    """Score of predictions that are the mean of many draws at the true rates."""
    total = common.totals(counts)
    target = float(np.median(total[~test]))
    draws = np.random.default_rng(9).poisson(rates[test], (200, *rates[test].shape))
    best = np.log1p(draws * target / total[test][:, None]).mean(0)
    full = common.log_normalize(counts, target)
    mean = np.asarray(full[~test].mean(0)).ravel()
    truth = full[test].toarray()
    return common.expression_scores(truth[hidden], best[hidden], np.tile(mean, (len(truth), 1))[hidden])["r2_gene"]


@pytest.fixture
def ceiling(load_script):
    return load_script("noise_ceiling")


@pytest.mark.parametrize("apart", [0.0, 0.3, 1.0])
def test_known_rates_give_the_score_of_who_knows_them(ceiling, load_script, apart):
    counts, rates = simulated(apart)
    rng = np.random.default_rng(1)
    test = rng.random(N_CELLS) < 0.4
    hidden = rng.random((test.sum(), N_GENES)) < 0.5
    wanted = expected(load_script("_common"), counts, rates, test, hidden)
    assert ceiling.ceiling(counts, rates, test, hidden, 0) == pytest.approx(wanted, abs=0.02)


def test_estimated_rates_bracket_the_truth(ceiling, load_script):
    counts, rates = simulated(1.0)
    test = np.random.default_rng(1).random(N_CELLS) < 0.4
    hidden = np.ones((test.sum(), N_GENES), bool)
    target = float(np.median(load_script("_common").totals(counts[~test])))
    scores = [
        ceiling.ceiling(counts, used, test, hidden, 0)
        for used in (ceiling.mean_rates(counts, ~test), rates, ceiling.near_rates(counts, target))
    ]
    assert scores[0] < scores[1] < scores[2] + 0.01
    assert scores[2] == pytest.approx(scores[1], abs=0.05)


def test_rates_have_the_totals_of_the_cells(ceiling):
    counts, _ = simulated(0.5)
    total = np.asarray(counts.sum(1)).ravel()
    for rates in (ceiling.mean_rates(counts, np.arange(N_CELLS) < 300), ceiling.near_rates(counts, 400.0)):
        np.testing.assert_allclose(rates.sum(1), total)
