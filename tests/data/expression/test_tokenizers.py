"""Tokens of FIMP-base and of scGPT, against the definition gene by gene."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from fimp_sc.data import BinnedTokenizer, BlockDataset, CenteredTokenizer, Destinations
from fimp_sc.data.expression._binning import bin_values, content_key
from fimp_sc.data.expression._tokenizers import choose_tokens

N, G, BINS = 12, 30, 7
ALL = torch.ones(1, G, dtype=torch.bool), torch.zeros(N, dtype=torch.int64)


def expression(*, ties=False, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 5, (N, G)) if ties else rng.permutation(N * G).reshape(N, G) / 50 + 0.1
    values = values * (rng.random((N, G)) < 0.6)
    values[3] = 0  # a cell without any molecule
    return values.astype(np.float32)


def masks() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(4, G, generator=generator) < 0.7
    visible[0] = True
    return visible, torch.arange(N) % 4


def make_source(**kwargs) -> BinnedTokenizer:
    rng = np.random.default_rng(3)
    known = torch.from_numpy(rng.random(G) < 0.75)
    rank = torch.from_numpy(rng.permutation(G))
    return BinnedTokenizer(**{"gene_rank": rank, "known": known, "n_bins": BINS, "random_state": 0, **kwargs})


def run(source, values, visible=None, pattern=None, *, n_tokens=G) -> list[dict[int, float]]:
    """Return the value of each token of each cell, by gene."""
    visible, pattern = ALL if visible is None else (visible, pattern)
    profile = torch.full(values.shape, torch.nan)
    pattern = pattern[: len(values)]
    parts = source(sparse.csr_matrix(values), profile, visible, pattern, n_tokens)
    assert [part.dtype for part in parts] == [torch.int64, torch.float32, torch.bool]
    assert parts[0].shape == parts[1].shape == parts[2].shape
    assert (parts[1][parts[2]] == 0).all()
    cells = []
    for gene, value, padding in zip(*parts, strict=True):
        shown = gene[~padding].tolist()
        assert len(shown) == len(set(shown))
        cells.append(dict(zip(shown, value[~padding].tolist(), strict=True)))
    return cells


def naive_bins(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Bins of distinct values: edges are quantiles of the expressed ones among ``among``."""
    shown = among[among > 0]
    if not len(shown):
        return np.where(values > 0, BINS - 1, 0)
    return np.digitize(values, np.quantile(shown, np.linspace(0, 1, BINS - 1))) * (values > 0)


@pytest.mark.parametrize("n_tokens", [G, 5])
def test_tokens_are_known_visible_expressed_genes_and_bins_of_these(n_tokens: int) -> None:
    source, values, (visible, pattern) = make_source(), expression(), masks()
    known = source.known.numpy()
    lengths = set()
    for cell, tokens in enumerate(run(source, values, visible, pattern, n_tokens=n_tokens)):
        shown = np.flatnonzero(known & visible[pattern[cell]].numpy() & (values[cell] > 0))
        highest = shown[np.argsort(-values[cell, shown])][:n_tokens]
        assert list(tokens) == highest.tolist()
        # Bins of all that is shown, not only of what becomes tokens.
        bins = naive_bins(values[cell, highest], values[cell, shown])
        np.testing.assert_array_equal(list(tokens.values()), bins)
        lengths.add(len(tokens))
    assert 0 in lengths
    assert max(lengths) == min(n_tokens, max(lengths))


def test_equal_values_have_the_bins_that_cell_and_gene_draw() -> None:
    gene = np.random.default_rng(7).integers(2**64, size=G, dtype=np.uint64)
    source, values = make_source(random_state=5, gene_key=gene), expression(ties=True)
    found = run(source, values)
    for cell, tokens in enumerate(found):
        shown = np.flatnonzero(source.known.numpy() & (values[cell] > 0))
        key = content_key(sparse.csr_matrix(np.where(source.known.numpy(), values[cell], 0.0)[None]), gene)
        bins = bin_values(values[cell, shown], [0, len(shown)], BINS, cell=key, gene=gene[shown], random_state=5)
        assert tokens == dict(zip(shown.tolist(), bins.tolist(), strict=True))
    assert found != run(dataclasses.replace(source, random_state=6), values)
    assert found[::-1] == run(source, values[::-1].copy()), "the place in the object does not matter"


@pytest.mark.parametrize("ties", [False, True])
def test_scaling_and_logarithm_do_not_matter(ties: bool) -> None:
    source, values, mask = make_source(), expression(ties=ties), masks()
    expected = run(source, values, *mask, n_tokens=9)
    scale = np.random.default_rng(0).uniform(0.2, 30, (N, 1)).astype(np.float32)
    assert run(source, values * scale, *mask, n_tokens=9) == expected
    assert run(source, np.log1p(values), *mask, n_tokens=9) == expected


def test_other_cells_of_a_batch_do_not_matter() -> None:
    source, values, (visible, pattern) = make_source(), expression(ties=True), masks()
    whole = run(source, values, visible, pattern, n_tokens=6)
    for part in ([4], [7, 0], [3, 11, 5, 2]):
        some = run(source, values[part], visible, pattern[part], n_tokens=6)
        assert some == [whole[i] for i in part]


def test_values_of_hidden_and_unknown_genes_do_not_matter() -> None:
    source, values, (visible, pattern) = make_source(), expression(), masks()
    shown = visible[pattern].numpy() & source.known.numpy()
    spoilt = np.where(shown, values, 1000 * np.random.default_rng(1).random((N, G))).astype(np.float32)
    assert run(source, spoilt, visible, pattern) == run(source, values, visible, pattern)


def test_edges_are_quantiles_of_what_is_shown() -> None:
    source, values, (visible, pattern) = make_source(), expression(), masks()
    edges = source.edges(sparse.csr_matrix(values), visible, pattern)
    assert edges.shape == (N, BINS - 1)
    for cell in range(N):
        shown = values[cell, visible[pattern[cell]].numpy() & source.known.numpy()]
        shown = shown[shown > 0]
        expected = np.quantile(shown, np.linspace(0, 1, BINS - 1)) if len(shown) else np.zeros(BINS - 1)
        np.testing.assert_allclose(edges[cell], expected, rtol=1e-6)


# Queries --------------------------------------------------------------------------------------------------------------


def ask(source: BinnedTokenizer, values: np.ndarray, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    visible, pattern = masks()
    return source.queries(sparse.csr_matrix(values), visible, pattern, ~visible[pattern], seed)


@pytest.mark.parametrize("n_queries", [1, 4, 50])
def test_queries_are_hidden_known_genes_and_their_bins_among_visible_ones(n_queries: int) -> None:
    source, values, (visible, pattern) = make_source(n_queries=n_queries), expression(), masks()
    genes, bins, padding = ask(source, values)
    assert genes.shape == bins.shape == padding.shape == (N, min(n_queries, G))
    assert (genes.dtype, bins.dtype, padding.dtype) == (torch.int64, torch.float32, torch.bool)
    for cell in range(N):
        seen = visible[pattern[cell]].numpy()
        hidden = np.flatnonzero(source.known.numpy() & ~seen)
        asked = genes[cell][~padding[cell]].numpy()
        assert len(asked) == len(set(asked)) == min(n_queries, len(hidden))
        assert set(asked) <= set(hidden)
        among = values[cell, seen & source.known.numpy()]
        np.testing.assert_array_equal(bins[cell][~padding[cell]], naive_bins(values[cell, asked], among))
    assert padding[0].all()  # the first mask hides nothing


def test_queries_are_chosen_whatever_their_value() -> None:
    source, values = make_source(n_queries=4), expression()
    first = ask(source, values)
    other = ask(source, values[::-1] ** 2)
    torch.testing.assert_close(other[0], first[0])
    torch.testing.assert_close(other[2], first[2])
    assert not torch.equal(ask(source, values, seed=1)[0], first[0])
    # Every hidden gene is asked for some time.
    visible, pattern = masks()
    cell = 1
    asked = {gene for seed in range(40) for gene in ask(source, values, seed)[0][cell].tolist()}
    assert asked == set(np.flatnonzero(source.known.numpy() & ~visible[pattern[cell]].numpy()))


def test_batches_ask_where_genes_are_hidden_for_training_only(graph_data) -> None:
    n_genes = graph_data.expression.n_genes
    known = torch.arange(n_genes) % 5 > 0
    tokens = BinnedTokenizer(torch.arange(n_genes), known, BINS, 0, n_queries=6)
    item = Destinations(np.array([40, 3, 77]), 11)
    data = dataclasses.replace(graph_data, tokenizer=tokens)
    batch = BlockDataset(data, n_layers=1, n_tokens=8, mask_ratio=(0.3, 0.6))[item]
    asked = ~batch["query_padding"]
    assert asked.any()
    assert batch["target_mask"].gather(1, batch["query_id"])[asked].all()
    assert known[batch["query_id"]][asked].all()
    rows = data.expression.rows(item.nodes)
    for cell in range(3):
        seen = batch["visible"][batch["pattern"][cell]].numpy() & known.numpy()
        assert set(batch["feature_id"][cell][~batch["padding"][cell]].tolist()) <= set(np.flatnonzero(seen))
        zero = rows[cell][batch["query_id"][cell]] == 0
        assert (batch["query_bin"][cell].numpy()[zero] == 0).all()
        largest = rows[cell][batch["query_id"][cell]] > rows[cell][seen].max()
        assert (batch["query_bin"][cell].numpy()[largest] == BINS - 1).all()
    for silent in (
        BlockDataset(data, n_layers=1, n_tokens=8),
        BlockDataset(graph_data, n_layers=1, n_tokens=8, mask_ratio=(0.3, 0.6)),
        BlockDataset(
            dataclasses.replace(data, tokenizer=dataclasses.replace(tokens, n_queries=0)),
            n_layers=1, n_tokens=8, mask_ratio=(0.3, 0.6),
        ),
    ):  # fmt: skip
        assert not {"query_id", "query_bin", "query_padding"} & set(silent[item])


# FIMP-base ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [G, 5])
def test_centered_tokens_have_the_centered_values_of_the_highest_genes(n_tokens: int) -> None:
    values, (visible, pattern) = expression(ties=True), masks()
    rank = torch.from_numpy(np.random.default_rng(2).permutation(G))
    rows, profile = sparse.csr_matrix(values), torch.from_numpy(values - 0.7) * visible[pattern]
    genes, found, padding = CenteredTokenizer(rank)(rows, profile, visible, pattern, n_tokens)
    chosen, absent = choose_tokens(rows, visible, pattern, n_tokens, rank)
    torch.testing.assert_close((genes, padding), (chosen, absent))
    for cell in range(N):
        for token in range(genes.shape[1]):
            expected = 0.0 if padding[cell, token] else values[cell, genes[cell, token]] - np.float32(0.7)
            assert found[cell, token] == pytest.approx(expected)
    # The whole panel fits: genes that are not expressed are tokens too.
    assert bool(((values[np.arange(N)[:, None], genes.numpy()] == 0) & ~padding.numpy()).any()) == (n_tokens == G)


@pytest.mark.parametrize("n_tokens", [G, 5])
def test_of_real_numbers_those_furthest_from_zero_become_tokens(n_tokens: int) -> None:
    values, (visible, pattern) = expression(), masks()
    values *= np.random.default_rng(4).choice([-1, 1], values.shape).astype(np.float32)
    # The furthest are hidden in some cells, and their values must not count.
    profile = torch.from_numpy(values + 0.3) * visible[pattern]
    genes, found, padding = CenteredTokenizer(torch.arange(G))(
        sparse.csr_matrix(values), profile, visible, pattern, n_tokens
    )
    signs = set()
    for cell in range(N):
        shown = np.flatnonzero(visible[pattern[cell]].numpy() & ((values[cell] != 0) | (n_tokens == G)))
        chosen = genes[cell][~padding[cell]].numpy()
        expected = shown[np.argsort(-np.abs(values[cell, shown]), kind="stable")][:n_tokens]
        far = values[cell, expected] != 0
        assert chosen[: far.sum()].tolist() == expected[far].tolist()
        assert set(chosen) == set(expected)
        np.testing.assert_allclose(found[cell][~padding[cell]], values[cell, chosen] + np.float32(0.3), rtol=1e-6)
        signs |= set(np.sign(values[cell, chosen]))
    assert {-1, 1} <= signs
