"""Bins and their edges against NumPy, cell by cell."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse

from fimp_sc.data.expression import _binning
from fimp_sc.data.expression._binning import bin_edges, bin_values, content_key, unbin

cells = st.lists(
    st.one_of(
        # Counts, with many ties, and values of which no two are the same.
        st.lists(st.integers(1, 6).map(float), max_size=70),
        st.lists(st.floats(2**-10, 2.0**10, width=32), max_size=70),
    ),
    max_size=6,
)


def flat(rows: list[list[float]], dtype: type = np.float32) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    value = np.array([x for row in rows for x in row], dtype=dtype)
    return value, np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)


@given(
    rows=cells,
    n_bins=st.integers(3, 60),
    dtype=st.sampled_from([np.float32, np.float64, np.int64]),
    at_once=st.sampled_from([1, 40, 2**20]),
)
@settings(max_examples=200, deadline=None)
def test_edges_and_bins_are_those_of_numpy(rows, n_bins, dtype, at_once) -> None:
    if dtype is np.int64:
        rows = [[np.ceil(x) for x in row] for row in rows]
    value, indptr = flat(rows, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_binning, "_ENTRIES", at_once)
        edges = bin_edges(value, indptr, n_bins)
        middle = bin_values(value, indptr, n_bins, ties="middle")
        spread = bin_values(value, indptr, n_bins, cell=np.arange(len(rows)), gene=np.arange(len(value)))
    assert edges.shape == (len(rows), n_bins - 1)
    for i in range(len(rows)):
        mine = slice(indptr[i], indptr[i + 1])
        x = value[mine]
        if not len(x):
            assert not edges[i].any()
            continue
        quantiles = np.quantile(x, np.linspace(0, 1, n_bins - 1))
        np.testing.assert_array_equal(edges[i], quantiles)
        left, right = np.digitize(x, quantiles), np.digitize(x, quantiles, right=True)
        np.testing.assert_array_equal(middle[mine], np.ceil(0.5 * (right - left) + left))
        assert (spread[mine] <= left).all()
        assert (spread[mine] > np.minimum(right, left - 1)).all()
        assert spread[mine].min() >= 1
        assert spread[mine].max() <= n_bins - 1


def test_equal_values_fill_their_bins_evenly() -> None:
    n = 40_000
    value = np.ones(n)
    bins = bin_values(value, np.array([0, n // 2, n]), 51, cell=np.array([3, 4]), gene=np.tile(np.arange(n // 2), 2))
    counts = np.bincount(bins.astype(int), minlength=51)[1:]
    # All 50 edges are 1. Each bin expects 800; 5 standard deviations.
    assert len(counts) == 50
    assert (abs(counts - n / 50) < 5 * np.sqrt(n / 50)).all()
    # Neither cells nor neighboring genes go together.
    first, second = bins[: n // 2], bins[n // 2 :]
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(n / 2)
    assert abs(np.corrcoef(bins[1:], bins[:-1])[0, 1]) < 5 / np.sqrt(n)


def test_bins_depend_on_seed_cell_and_gene_but_not_on_the_batch() -> None:
    rng = np.random.default_rng(0)
    rows = [list(rng.geometric(0.5, size).astype(float)) for size in (200, 150, 300)]
    genes = [rng.permutation(1000)[: len(row)] for row in rows]

    def bins(order: list[int], seed: int = 0) -> list[NDArray[np.float32]]:
        value, indptr = flat([rows[i] for i in order])
        gene = np.concatenate([genes[i] for i in order])
        out = bin_values(value, indptr, 51, cell=np.array(order), gene=gene, random_state=seed)
        return [out[a:b] for a, b in pairwise(indptr)]

    whole, turned = bins([0, 1, 2]), bins([2, 0])
    np.testing.assert_array_equal(whole[0], turned[1])
    np.testing.assert_array_equal(whole[2], turned[0])
    # The order of a cell's genes does not matter either.
    back = bin_values(rows[0][::-1], [0, 200], 51, cell=[0], gene=genes[0][::-1])
    np.testing.assert_array_equal(back[::-1], whole[0])
    assert (whole[0] != bins([0], seed=1)[0]).mean() > 0.5


def test_stored_zeros_are_absent() -> None:
    value, indptr = flat([[0, 2, 0, 5, 3], [0, 0], [4, 1]])
    dense, dense_indptr = flat([[2, 5, 3], [], [4, 1]])
    np.testing.assert_array_equal(bin_edges(value, indptr, 6), bin_edges(dense, dense_indptr, 6))
    bins = bin_values(value, indptr, 6, ties="middle")
    np.testing.assert_array_equal(bins[value > 0], bin_values(dense, dense_indptr, 6, ties="middle"))
    assert not bins[value == 0].any()


@given(rows=cells, n_bins=st.integers(3, 60), ties=st.sampled_from(["spread", "middle"]))
@settings(max_examples=100, deadline=None)
def test_values_come_back_as_the_edge_below(rows, n_bins, ties) -> None:
    value, indptr = flat(rows)
    edges = bin_edges(value, indptr, n_bins)
    cell, gene = np.arange(len(rows)), np.arange(len(value))
    bins = bin_values(value, indptr, n_bins, ties=ties, cell=cell, gene=gene, edges=edges)
    for i in range(len(rows)):
        x, b = value[indptr[i] : indptr[i + 1]], bins[indptr[i] : indptr[i + 1]]
        out = unbin(torch.from_numpy(b)[None], torch.from_numpy(edges[i : i + 1]))[0].numpy()
        if len(x):
            spacing = np.append(np.diff(edges[i]), 0.0)[b.astype(int) - 1]
        tied = np.isin(x, edges[i])
        np.testing.assert_array_equal(out[tied], x[tied])
        assert ((out <= x) & (x - out <= spacing if len(x) else True)).all()


def test_between_bins_values_are_interpolated() -> None:
    edges = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    bins = torch.tensor([[-3, 0, 0.5, 1, 2.25, 3, 9], [0, 1, 2, 3, 4, 5, 6]], requires_grad=True)
    out = unbin(bins, edges)
    assert out.tolist() == [[0, 0, 0.5, 1, 3, 6, 6], [0] * 7]
    (slope,) = torch.autograd.grad(out[0].sum(), bins)
    assert slope[0, [2, 4]].tolist() == [1, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_bins": 2, "ties": "middle"}, "n_bins must be 3 or more"),
        ({"n_bins": 5, "ties": "none"}, "'spread' or 'middle'"),
        ({"n_bins": 5}, "pass cell= and gene="),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bin_values([1.0, 2.0], [0, 2], **options)


def test_content_key_tells_sets_of_entries_apart() -> None:
    rng = np.random.default_rng(0)
    cells = sparse.csr_matrix((rng.random((60, 9)) < 0.4) * rng.random((60, 9)))
    gene = rng.integers(2**64, size=9, dtype=np.uint64)
    keys = content_key(cells, gene)
    sets = [tuple(row.indices) for row in cells]
    assert len(set(keys.tolist())) == len(set(sets)) > 20
    assert all(keys[i] == keys[j] for i in range(60) for j in range(60) if sets[i] == sets[j])
    np.testing.assert_array_equal(content_key(cells * 3.0, gene), keys)
    np.testing.assert_array_equal(content_key(cells[::-1], gene), keys[::-1])
    np.testing.assert_array_equal(content_key(cells[:, ::-1].tocsr(), gene[::-1]), keys)
    assert content_key(sparse.csr_matrix((2, 9)), gene).tolist() == [0, 0]
