"""Scores and controls of the benchmark of H&E patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import nn

pytest.importorskip("torch_geometric")


@pytest.fixture
def he(load_script):
    return load_script("he")


def spots(he, n=40):
    rng = np.random.default_rng(0)
    section = np.repeat(["a", "b"], n // 2)
    graph = sp.block_diag([sp.random(n // 2, n // 2, 0.2, random_state=i) for i in range(2)], format="csr")
    pixels = rng.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8)
    return he.Spots(pixels, rng.random((n, 2)), section, graph, rng.normal(size=(n, 3)).astype(np.float32))


def test_correlation_is_that_of_numpy(he):
    a, b = np.random.default_rng(0).normal(size=(2, 30, 4))
    b[:, 3] = 1.0
    expected = [np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(3)]
    np.testing.assert_allclose(he.correlation(a, b), [*expected, 0.0], atol=1e-12)


def test_random_edges_keep_degree_and_section(he, load_script):
    posed, run = spots(he), load_script("_harness").Run(1, True, Path())
    made = he.random_edges(posed, run)
    np.testing.assert_array_equal(np.diff(made.indptr), np.diff(posed.graph.indptr))
    rows, columns = made.nonzero()
    assert (posed.section[rows] == posed.section[columns]).all()
    assert (rows != columns).all()
    assert (made != posed.graph).nnz > 50


def test_shuffled_weights_are_the_same_numbers(he):
    network = nn.Sequential(nn.Linear(9, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    before = [weight.detach().clone() for weight in network.parameters()]
    he.change_weights(network, "shuffled", 0)
    for old, new in zip(before, network.parameters(), strict=True):
        torch.testing.assert_close(old.flatten().sort()[0], new.detach().flatten().sort()[0], rtol=0, atol=0)
    assert not torch.equal(before[0], network[0].weight)


def test_ridge_finds_a_linear_map_and_does_not_see_the_section_that_is_left_out(he, load_script):
    posed, run = spots(he, 60), load_script("_harness").Run(0, True, Path())
    rng = np.random.default_rng(2)
    x, weight = rng.normal(size=(60, 5)), rng.normal(size=(5, 3))
    section = np.repeat(["a", "b", "c"], 20)
    truth = (x @ weight).astype(np.float32)
    shown = np.where((section == "c")[:, None], np.nan, truth).astype(np.float32)
    posed = he.Spots(posed.pixels, posed.places, section, posed.graph, shown)
    predicted = he.ridge(posed, run, lambda *inputs: x).values
    assert he.correlation(truth[40:], predicted[40:]).min() > 0.95
