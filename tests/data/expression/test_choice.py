"""Which genes become tokens, and which genes are hidden."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch import Tensor

from fimp_sc.data import choose_tokens, hide_genes


def choose(expression, observed, n_tokens: int, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Choose with a pattern of its own for every cell."""
    return choose_tokens(
        sparse.csr_matrix(np.asarray(expression)),
        torch.as_tensor(observed),
        torch.arange(len(observed)),
        n_tokens,
        rank,
    )


def with_zeros(dense: np.ndarray, stored: np.ndarray) -> sparse.csr_matrix:
    """CSR with the values of `dense` that stores also zeros, where `stored`."""
    row, col = np.nonzero(stored | (dense != 0))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(dense)))])
    return sparse.csr_matrix((dense[row, col], col, indptr), shape=dense.shape)


@given(
    n_genes=st.integers(1, 30),
    n_tokens=st.one_of(st.integers(1, 35), st.integers(1, 4)),
    n_nodes=st.integers(0, 8),
    n_patterns=st.integers(1, 4),
    share_visible=st.sampled_from([0.0, 0.4, 1.0]),
    share_stored=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=120, deadline=None)
def test_the_highest_visible_values_are_chosen(
    n_genes, n_tokens, n_nodes, n_patterns, share_visible, share_stored, seed
) -> None:
    rng = np.random.default_rng(seed)
    expression = np.log1p(rng.poisson(0.8, (n_nodes, n_genes))).astype(np.float32)
    visible = rng.random((n_patterns, n_genes)) < share_visible
    pattern, rank = rng.integers(0, n_patterns, n_nodes), rng.permutation(n_genes)
    feature_id, padding = choose_tokens(
        with_zeros(expression, rng.random(expression.shape) < share_stored),
        torch.from_numpy(visible),
        torch.from_numpy(pattern),
        n_tokens,
        torch.from_numpy(rank),
    )
    assert feature_id.shape == padding.shape
    assert feature_id.dtype == torch.int64
    assert padding.dtype == torch.bool
    assert 1 <= feature_id.shape[1] <= min(n_tokens, n_genes)
    fits = n_genes <= n_tokens
    longest = 0
    for i in range(n_nodes):
        allowed = visible[pattern[i]] & (np.full(n_genes, fits) | (expression[i] > 0))
        # The definition: by value, equal values by rank.
        expected = sorted(np.flatnonzero(allowed), key=lambda g: (-expression[i, g], -rank[g]))[:n_tokens]
        assert feature_id[i][~padding[i]].tolist() == expected
        longest = max(longest, len(expected))
    assert feature_id.shape[1] == max(longest, 1), "no trailing columns of padding"
    assert ((feature_id >= 0) & (feature_id < n_genes)).all(), "padding names a gene too"


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-30])
def test_values_come_before_ranks_however_small_they_are(scale: float) -> None:
    rng = np.random.default_rng(0)
    expression = (rng.gamma(1.0, scale, (20, 500))).astype(np.float32)
    chosen, padding = choose(expression, np.ones((20, 500), dtype=bool), 50, torch.from_numpy(rng.permutation(500)))
    assert not padding.any()
    for found, values in zip(chosen, expression, strict=True):
        assert found.tolist() == np.argsort(-values)[:50].tolist()


def test_zeros_are_tokens_only_where_the_panel_fits() -> None:
    expression = torch.tensor([[0.0, 2.0, 0.0, 1.0]])
    observed, rank = torch.ones(1, 4, dtype=torch.bool), torch.arange(4)
    feature_id, padding = choose(expression, observed, 4, rank)
    assert feature_id.tolist() == [[1, 3, 2, 0]]
    assert not padding.any()
    feature_id, padding = choose(expression, observed, 3, rank)
    assert feature_id.tolist() == [[1, 3]]
    assert not padding.any()


def test_ties_favor_no_gene_by_its_position() -> None:
    expression, observed = torch.ones(1, 200), torch.ones(1, 200, dtype=torch.bool)
    times = torch.zeros(200)
    for seed in range(300):
        rank = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        times[choose(expression, observed, 20, rank)[0]] += 1
    # 300 draws with chance 0.1: mean 30, standard deviation 5.2; the two halves of the list 3,000 each.
    assert times.min() > 5
    assert times.max() < 60
    assert abs(float(times[:100].sum()) - 3000) < 200


def test_ranks_order_equal_values_of_a_large_panel_whatever_else_is_in_the_batch() -> None:
    rng = np.random.default_rng(0)
    expression = np.log1p(30.0 * rng.poisson(0.3, (3, 20_000))).astype(np.float32)
    rank = rng.permutation(20_000)
    together, _ = choose(expression, np.ones(expression.shape, dtype=bool), 200, torch.from_numpy(rank))
    for i in range(3):
        expected = np.lexsort((-rank, -expression[i]))[:200]
        assert together[i].tolist() == expected.tolist()
        alone, _ = choose(expression[[i]], np.ones((1, 20_000), dtype=bool), 200, torch.from_numpy(rank))
        assert (alone[0] == together[i]).all()


def test_the_expression_is_not_changed() -> None:
    expression = with_zeros(np.array([[0.0, 2.0, 0.0, 1.0]], dtype=np.float32), np.ones((1, 4), dtype=bool))
    choose_tokens(expression, torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, dtype=torch.int64), 2, torch.arange(4))
    assert expression.data.tolist() == [0.0, 2.0, 0.0, 1.0]
    assert expression.indices.tolist() == [0, 1, 2, 3]


def test_order_of_the_stored_values_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    dense = np.log1p(rng.poisson(1.0, (6, 40))).astype(np.float32)
    matrix = sparse.csr_matrix(dense)
    turned = sparse.csr_matrix(dense[:, ::-1])
    turned.indices = 39 - turned.indices  # the same matrix, with descending columns
    assert not turned.has_sorted_indices
    visible, pattern = torch.from_numpy(rng.random((2, 40)) < 0.6), torch.tensor([0, 1, 1, 0, 0, 1])
    rank = torch.from_numpy(rng.permutation(40))
    a, b = (choose_tokens(m, visible, pattern, 10, rank) for m in (matrix, turned))
    assert (a[1] == b[1]).all()
    assert (a[0] == b[0])[~a[1]].all()


def test_changing_what_is_not_observed_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    expression = torch.rand(6, 40, generator=generator)
    observed = torch.rand(6, 40, generator=generator) < 0.5
    other = torch.where(observed, expression, 99.0)
    rank = torch.randperm(40, generator=generator)
    a, b = choose(expression, observed, 10, rank), choose(other, observed, 10, rank)
    assert (a[0] == b[0]).all()
    assert (a[1] == b[1]).all()


def hide(measured: Tensor, n_nodes=100, ratio=(0.0, 0.4), seed=0, **kwargs) -> tuple[Tensor, Tensor]:
    return hide_genes(measured, n_nodes, ratio, seed=seed, **kwargs)


def panel(n_genes: int) -> Tensor:
    return torch.ones(n_genes, dtype=torch.bool)


@given(
    seed=st.integers(0, 1000),
    n_nodes=st.integers(0, 9),
    gene_ratio=st.sampled_from([0.0, 0.5, 0.99]),
    mask_cells=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=30, deadline=None)
def test_only_what_is_measured_stays_visible(seed: int, n_nodes: int, gene_ratio: float, mask_cells: float) -> None:
    measured = torch.rand(13, generator=torch.Generator().manual_seed(seed)) < 0.6
    asked = {"n_nodes": n_nodes, "gene_ratio": gene_ratio, "mask_cells": mask_cells, "seed": seed}
    visible, pattern = hide(measured, **asked)
    assert visible.dtype == torch.bool
    assert visible.shape[1] == 13
    assert pattern.dtype == torch.int64
    assert pattern.shape == (n_nodes,)
    assert ((pattern >= 0) & (pattern < len(visible))).all()
    assert not (visible & ~measured).any()
    assert mask_cells > 0 or (visible[pattern] == measured).all(), "no cell and no block is masked"


def test_the_seed_alone_decides() -> None:
    kwargs = {"gene_ratio": 0.5, "mask_cells": 0.7}
    first, again, other = (hide(panel(50), seed=seed, **kwargs) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        assert (a == b).all()
        assert (a != c).any()


def test_genes_with_keys_are_hidden_alike_in_any_order_and_company() -> None:
    key = np.random.default_rng(0).integers(2**64, size=50, dtype=np.uint64)
    kwargs = {"gene_ratio": 0.5, "mask_cells": 0.7, "seed": 3}
    visible, pattern = hide(panel(50), **kwargs, gene_key=key)
    order = np.random.default_rng(1).permutation(50)[:35]
    other, other_pattern = hide(panel(35), **kwargs, gene_key=key[order])
    assert (other == visible[:, order]).all()
    assert (other_pattern == pattern).all()
    assert (hide(panel(50), **kwargs, gene_key=key[::-1].copy())[0] != visible).any()


def test_without_a_share_nothing_is_hidden_and_with_all_of_it_everything() -> None:
    measured = torch.arange(30) % 3 > 0
    visible, _ = hide(measured, ratio=(0.0, 0.0))
    assert (visible == measured).all()
    visible, pattern = hide(measured, ratio=(1.0, 1.0))
    assert not visible[1:].any()
    assert not visible[pattern].any()


@pytest.mark.parametrize("gene_ratio", [0.0, 0.7])
def test_the_first_pattern_hides_nothing_of_its_own(gene_ratio: float) -> None:
    measured = torch.arange(200) % 5 > 0
    for seed in range(10):
        visible, _ = hide(measured, ratio=(0.3, 0.6), gene_ratio=gene_ratio, seed=seed)
        assert (visible[0] == visible.any(0)).all(), "what other patterns show, it shows"
        assert gene_ratio or (visible[0] == measured).all()


def test_shares_are_those_asked_for() -> None:
    assert hide(panel(500), ratio=(0.0, 0.0))[0].all()
    share = torch.stack([1 - hide(panel(500), ratio=(0.1, 0.3), seed=seed)[0][1:].float().mean(1) for seed in range(8)])
    # 500 genes: the standard deviation of a share is at most 0.021.
    assert share.min() > 0.03
    assert share.max() < 0.4
    assert abs(float(share.mean()) - 0.2) < 0.01
    assert float(share.std(1).min()) > 0.04, "each pattern draws its own"
    assert (hide(panel(500), seed=0)[0] != hide(panel(500), seed=1)[0]).any()


def test_patterns_differ_and_are_dealt_out_evenly() -> None:
    visible, pattern = hide(panel(500), n_nodes=6400, ratio=(0.1, 0.3))
    assert len(visible[1:].unique(dim=0)) == len(visible) - 1 >= 32
    times = pattern.bincount(minlength=len(visible)).double()
    assert times[0] == 0, "every cell has a mask"
    expected = 6400 / (len(visible) - 1)
    assert (abs(times[1:] - expected) < 5 * expected**0.5).all()


def test_hidden_genes_are_hidden_in_all_cells_of_the_block() -> None:
    gone = []
    for seed in range(40):
        visible, pattern = hide(panel(400), 50, ratio=(0.0, 0.2), gene_ratio=0.6, seed=seed)
        gone.append(float((~visible[0]).float().mean()))
        assert not visible[:, ~visible[0]].any()
        assert abs(gone[-1] - float((~visible[pattern].any(0)).float().mean())) < 0.01, "not by chance in all cells"
    assert max(gone) < 0.7
    assert min(gone) < 0.1
    assert abs(np.mean(gone) - 0.3) < 0.12


@pytest.mark.parametrize("mask_cells", [0.2, 0.5, 1.0])
def test_share_of_cells_that_have_hidden_entries(mask_cells: float) -> None:
    """500 genes, at least 10 % hidden where a cell is masked: a masked cell has hidden entries for certain."""
    drawn = [hide(panel(500), 2000, ratio=(0.1, 0.3), mask_cells=mask_cells, seed=seed) for seed in range(10)]
    share = torch.cat([1 - visible.float().mean(1)[pattern] for visible, pattern in drawn])
    masked = share > 0
    error = (mask_cells * (1 - mask_cells) / len(share)) ** 0.5
    assert abs(float(masked.float().mean()) - mask_cells) <= 4 * error
    assert abs(float(share[masked].mean()) - 0.2) < 0.01, "a masked cell is masked as much as without the choice"
    assert share[masked].min() > 0.03


def test_share_of_blocks_that_have_hidden_genes() -> None:
    share = []
    for seed in range(200):
        visible, _ = hide(panel(300), 20, ratio=(0.0, 0.0), gene_ratio=0.6, mask_cells=0.3, seed=seed)
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
    visible, pattern = hide(panel(200), 300, ratio=(0.2, 0.2))
    hidden = ~visible[pattern]
    n = int(hidden.sum())
    error = float(values.std()) / n**0.5
    assert abs(float(values[hidden].mean() - values.mean())) < 4 * error
    zero = float((values == 0).float().mean())
    assert abs(float((values[hidden] == 0).float().mean()) - zero) < 4 * (zero * (1 - zero) / n) ** 0.5
