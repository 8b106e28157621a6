"""Which genes become tokens, and which entries are hidden."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fimp_sc.data import choose_tokens, hide_entries

NEAR = 1e-4  # ranks order values that are closer than this


@given(
    n_genes=st.integers(1, 30),
    n_tokens=st.integers(1, 35),
    n_nodes=st.integers(1, 8),
    share_observed=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_the_highest_observed_values_are_chosen(n_genes, n_tokens, n_nodes, share_observed, seed) -> None:
    rng = np.random.default_rng(seed)
    expression = np.log1p(rng.poisson(0.8, (n_nodes, n_genes))).astype(np.float32)
    observed = rng.random((n_nodes, n_genes)) < share_observed
    rank = rng.permutation(n_genes)
    feature_id, padding = choose_tokens(
        torch.from_numpy(expression), torch.from_numpy(observed), n_tokens, torch.from_numpy(rank)
    )
    assert feature_id.shape == padding.shape
    assert feature_id.dtype == torch.int64
    assert padding.dtype == torch.bool
    assert 1 <= feature_id.shape[1] <= min(n_tokens, n_genes)
    fits = n_genes <= n_tokens
    longest = 0
    for i in range(n_nodes):
        allowed = observed[i] & (np.full(n_genes, fits) | (expression[i] > 0))
        # The definition: by value, equal values by rank.
        expected = sorted(np.flatnonzero(allowed), key=lambda g: (-expression[i, g], -rank[g]))[:n_tokens]
        assert feature_id[i][~padding[i]].tolist() == expected
        longest = max(longest, len(expected))
    assert feature_id.shape[1] == max(longest, 1), "no trailing columns of padding"


def test_real_values_are_ordered_up_to_the_documented_distance() -> None:
    rng = np.random.default_rng(0)
    expression = torch.from_numpy(rng.gamma(1.0, 1.0, (20, 500)).astype(np.float32))
    feature_id, padding = choose_tokens(
        expression, torch.ones(20, 500, dtype=torch.bool), 50, torch.from_numpy(rng.permutation(500))
    )
    assert not padding.any()
    chosen = torch.zeros(20, 500, dtype=torch.bool).scatter_(1, feature_id, True)
    lowest = expression.masked_fill(~chosen, torch.inf).min(1).values
    highest = expression.masked_fill(chosen, -torch.inf).max(1).values
    assert (lowest >= highest - NEAR).all()


def test_zeros_are_tokens_only_where_the_panel_fits() -> None:
    expression = torch.tensor([[0.0, 2.0, 0.0, 1.0]])
    observed, rank = torch.ones(1, 4, dtype=torch.bool), torch.arange(4)
    feature_id, padding = choose_tokens(expression, observed, 4, rank)
    assert feature_id.tolist() == [[1, 3, 2, 0]]
    assert not padding.any()
    feature_id, padding = choose_tokens(expression, observed, 3, rank)
    assert feature_id.tolist() == [[1, 3]]
    assert not padding.any()


def test_ties_favour_no_gene_by_its_position() -> None:
    expression, observed = torch.ones(1, 200), torch.ones(1, 200, dtype=torch.bool)
    times = torch.zeros(200)
    for seed in range(300):
        rank = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        times[choose_tokens(expression, observed, 20, rank)[0]] += 1
    # 300 draws with chance 0.1: mean 30, standard deviation 5.2; the two halves of the list 3,000 each.
    assert times.min() > 5
    assert times.max() < 60
    assert abs(float(times[:100].sum()) - 3000) < 200


def test_changing_what_is_not_observed_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    expression = torch.rand(6, 40, generator=generator)
    observed = torch.rand(6, 40, generator=generator) < 0.5
    other = torch.where(observed, expression, 99.0)
    rank = torch.randperm(40, generator=generator)
    a, b = choose_tokens(expression, observed, 10, rank), choose_tokens(other, observed, 10, rank)
    assert (a[0] == b[0]).all()
    assert (a[1] == b[1]).all()


def hide(observed, ratio=(0.0, 0.4), seed=0, **kwargs):
    return hide_entries(observed, ratio, generator=torch.Generator().manual_seed(seed), **kwargs)


@given(
    seed=st.integers(0, 1000),
    gene_ratio=st.sampled_from([0.0, 0.5, 0.99]),
    cell_share=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=30, deadline=None)
def test_only_what_is_observed_stays_visible(seed: int, gene_ratio: float, cell_share: float) -> None:
    observed = torch.rand(9, 13, generator=torch.Generator().manual_seed(seed)) < 0.6
    asked = {"gene_ratio": gene_ratio, "cell_share": cell_share, "seed": seed}
    visible = hide(observed, **asked)
    assert not (visible & ~observed).any()
    assert (visible == hide(observed, **asked)).all()
    assert cell_share > 0 or (visible == observed).all(), "no cell and no block is masked"


def test_shares_are_those_asked_for() -> None:
    everything = torch.ones(400, 500, dtype=torch.bool)
    assert (hide(everything, ratio=(0.0, 0.0)) == everything).all()
    share = 1 - hide(everything, ratio=(0.1, 0.3)).float().mean(1)
    # 500 genes: the standard deviation of a share is at most 0.021.
    assert share.min() > 0.03
    assert share.max() < 0.4
    assert abs(float(share.mean()) - 0.2) < 0.01
    assert float(share.std()) > 0.04, "each cell draws its own"
    assert (hide(everything, seed=0) != hide(everything, seed=1)).any()


def test_hidden_genes_are_hidden_in_all_cells_of_the_block() -> None:
    everything = torch.ones(50, 400, dtype=torch.bool)
    gone = []
    for seed in range(40):
        visible = hide(everything, ratio=(0.0, 0.2), gene_ratio=0.6, seed=seed)
        gone.append(float((~visible.any(0)).float().mean()))
    assert max(gone) < 0.7
    assert min(gone) < 0.1
    assert abs(np.mean(gone) - 0.3) < 0.12


@pytest.mark.parametrize("cell_share", [0.2, 0.5, 1.0])
def test_share_of_cells_that_have_hidden_entries(cell_share: float) -> None:
    """500 genes, at least 10 % hidden where a cell is masked: a masked cell has hidden entries for certain."""
    everything = torch.ones(2000, 500, dtype=torch.bool)
    share = 1 - hide(everything, ratio=(0.1, 0.3), cell_share=cell_share).float().mean(1)
    masked = share > 0
    error = (cell_share * (1 - cell_share) / 2000) ** 0.5
    assert abs(float(masked.float().mean()) - cell_share) <= 4 * error
    assert abs(float(share[masked].mean()) - 0.2) < 0.01, "a masked cell is masked as much as without the choice"
    assert share[masked].min() > 0.03


def test_share_of_blocks_that_have_hidden_genes() -> None:
    everything = torch.ones(20, 300, dtype=torch.bool)
    share = []
    for seed in range(200):
        visible = hide(everything, ratio=(0.0, 0.0), gene_ratio=0.6, cell_share=0.3, seed=seed)
        assert (visible == visible[:1]).all(), "hidden genes are hidden in all cells, masked or not"
        share.append(float((~visible[0]).float().mean()))
    hidden = np.array(share) > 0
    # 200 draws with chance 0.3: standard deviation 0.032. A share from 0 to 0.6 has mean 0.3.
    assert abs(hidden.mean() - 0.3) < 0.11
    assert abs(np.array(share)[hidden].mean() - 0.3) < 0.1


def test_hiding_is_independent_of_the_value() -> None:
    """Hide 20 % of skewed values: the hidden ones must be a fair sample, zeros included."""
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.poisson(0.5, (300, 200)).astype(np.float32))
    hidden = ~hide(torch.ones(300, 200, dtype=torch.bool), ratio=(0.2, 0.2))
    n = int(hidden.sum())
    error = float(values.std()) / n**0.5
    assert abs(float(values[hidden].mean() - values.mean())) < 4 * error
    zero = float((values == 0).float().mean())
    assert abs(float((values[hidden] == 0).float().mean()) - zero) < 4 * (zero * (1 - zero) / n) ** 0.5
