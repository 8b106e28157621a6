"""Expression of a block where some nodes were not measured at all."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import sparse

from fimp_sc.data import BinnedTokenizer, ExpressionReader
from fimp_sc.data.expression._tokenizers import expression_fields

ABSENT = np.arange(90) % 3 == 0
MASKS = {"mask_ratio": (0.2, 0.5), "gene_mask_ratio": 0.3, "mask_cells": 0.9}
NO_MASKS = {"mask_ratio": None, "gene_mask_ratio": 0.0, "mask_cells": 1.0}


def expression() -> np.ndarray:
    values = np.log1p(np.random.default_rng(0).poisson(1.0, (90, 25))).astype(np.float32)
    values[ABSENT] = 0
    return values


def make_data(factory, *, hidden=None, **kwargs):
    """Data of which every third node lacks expression; statistics are those of the others."""
    data = factory(expression=expression())
    genes, nodes = np.arange(25), np.arange(90)
    first = ExpressionReader(expression(), genes, "log", None, absent=ABSENT)
    source = ExpressionReader(
        sparse.csr_matrix(expression()), genes, "log", first.gene_statistics(first.present(nodes)), data.library,
        hidden, ABSENT,
    )  # fmt: skip
    return dataclasses.replace(data, expression=source, **kwargs)


def fields(data, nodes, n_dst, masks, seed=3, n_tokens=30):
    return expression_fields(data.expression, data.tokenizer, nodes, n_dst, n_tokens, **masks, seed=seed)


@pytest.mark.parametrize("masks", [MASKS, NO_MASKS], ids=["masked", "as it is"])
@pytest.mark.parametrize("some_hidden", [False, True])
@pytest.mark.parametrize("nodes", [range(30), range(0, 90, 3), [3], [4], range(1, 90, 3)])
def test_nothing_of_absent_nodes_is_seen_or_a_target(graph_data_factory, nodes, some_hidden, masks) -> None:
    nodes = np.array(nodes)
    hidden = np.random.default_rng(1).random((90, 25)) < 0.3 if some_hidden else np.zeros((90, 25), dtype=bool)
    data = make_data(graph_data_factory, hidden=hidden if some_hidden else None)
    n_dst = max(len(nodes) // 2, 1)
    made = fields(data, nodes, n_dst, masks)
    visible = made["visible"][made["pattern"]].numpy()
    gone = ABSENT[nodes]
    assert not visible[gone].any()
    assert not made["target_mask"][gone[:n_dst]].any()
    assert made["padding"][gone].all()
    assert (made["value"][gone] == 0).all()
    assert (made["profile"][gone] == 0).all()
    # Of the others everything that is not hidden is seen or a target.
    known = ~hidden[nodes] & ~gone[:, None]
    assert not (visible & ~known).any()
    np.testing.assert_array_equal(made["target_mask"], (known & ~visible)[:n_dst])
    if masks is NO_MASKS:
        np.testing.assert_array_equal(visible, known)
    elif not gone.all() and len(nodes) > 10:
        assert made["target_mask"].any()
    there = ~gone
    centered = expression()[nodes] - data.expression.center[data.library[nodes]]
    np.testing.assert_allclose(made["profile"][there], np.where(visible, centered, 0)[there], atol=1e-6)


def test_masks_do_not_depend_on_which_nodes_are_absent(graph_data_factory) -> None:
    """Patterns of genes are drawn and dealt out alike, so that the masks of the others are the same."""
    nodes = np.arange(30)
    some = fields(make_data(graph_data_factory), nodes, 30, MASKS)
    every = fields(graph_data_factory(expression=expression()), nodes, 30, MASKS)
    there = ~ABSENT[nodes]
    first, second = (made["visible"][made["pattern"]][there] for made in (some, every))
    assert torch.equal(first, second)
    assert not first.all()


def test_a_decoder_is_asked_nothing_of_absent_nodes(graph_data_factory) -> None:
    tokens = BinnedTokenizer(torch.arange(25), torch.ones(25, dtype=torch.bool), 7, 0, n_queries=4)
    nodes = np.arange(30)
    made = fields(make_data(graph_data_factory, tokenizer=tokens), nodes, 20, MASKS)
    gone = ABSENT[nodes[:20]]
    assert made["query_padding"][gone].all()
    assert not made["query_padding"][~gone].all()


@pytest.mark.parametrize("binned", [False, True])
def test_masked_counts_change_nothing_that_is_seen(graph_data_factory, binned) -> None:
    """Nor does the scale of a cell: what is masked would show in its total."""
    counts = np.random.default_rng(0).poisson(3.0, (90, 25)).astype(np.float32)
    genes, nodes = np.arange(25), np.arange(40)
    statistics = ExpressionReader(counts, genes, "counts", None).gene_statistics(np.arange(90))
    tokens = {"tokenizer": BinnedTokenizer(torch.arange(25), torch.ones(25, dtype=torch.bool), 7, 0)} if binned else {}

    def made(matrix):
        source = ExpressionReader(sparse.csr_matrix(matrix), genes, "counts", statistics)
        data = dataclasses.replace(graph_data_factory(), expression=source, **tokens)
        return fields(data, nodes, 30, MASKS), source

    first, source = made(counts)
    visible = first["visible"][first["pattern"]].numpy()
    other = counts.copy()
    other[nodes] = np.where(visible, counts[nodes], 40.0 * counts[nodes][:, ::-1])
    second, moved = made(other)
    assert not visible.all()
    for name in ("feature_id", "padding", "visible", "pattern", "target_mask"):
        assert torch.equal(first[name], second[name]), name
    if binned:
        assert torch.equal(first["value"], second["value"])
    a, b = (
        fields["profile"].numpy() + visible * source.center[0] for fields, source in ((first, source), (second, moved))
    )
    np.testing.assert_allclose(a, b, atol=2e-5)
    # What is to be learned stays on the scale of whole cells.
    whole = np.log1p(counts / counts.sum(1, keepdims=True) * np.median(counts.sum(1)))
    np.testing.assert_allclose(first["target"].numpy() + source.center[0], whole[:30], atol=1e-5)
