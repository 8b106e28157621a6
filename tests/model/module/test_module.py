"""Losses and the start as a linear smoother of principal components, against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from module_toys import GENES, make_batch, make_module
from scipy import sparse
from scipy.optimize import lsq_linear
from torch import nn

from fimp_sc._draws import uniform
from fimp_sc.data import GeneStatistics
from fimp_sc.model import FIMPModule
from fimp_sc.model.module._linear_smoother import linear_smoother


@pytest.mark.parametrize("training", [True, False])
def test_loss_equals_numpy(training: bool) -> None:
    """Classes are weighed in training; in validation they are not."""
    module, batch = make_module(label_weight=0.3, dropout=0.0).train(training), make_batch()
    nn.init.normal_(module.label_head.score.weight)
    nn.init.normal_(module.label_head.score.bias)
    module.value_variance.fill_(1.7)
    module.class_weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    inference, generative, losses = module(batch)
    assert inference["embedding"].shape == (4, 8)
    value = generative["value"].detach().numpy()
    mask = batch["target_mask"].numpy()
    masked = np.mean((value - batch["target"].numpy())[mask] ** 2) / 1.7
    logits = generative["logits"].detach().numpy().astype(float)
    assert np.ptp(logits) > 0.5
    log_probability = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    weight = [0.5, 1.0, 2.0] if training else [1.0, 1.0, 1.0]
    label = -sum(weight[c] * log_probability[i, c] for i, c in ((0, 2), (2, 0), (3, 2))) / 3
    assert losses.extra_metrics["masked_loss"].item() == pytest.approx(masked, rel=1e-4)
    assert losses.extra_metrics["label_loss"].item() == pytest.approx(label, rel=1e-4)
    assert losses.loss.item() == pytest.approx(masked + 0.3 * label, rel=1e-4)
    assert losses.n_obs_minibatch == 4


def test_batch_without_labels_or_hidden_entries_costs_nothing_and_is_finite() -> None:
    module, batch = make_module(), make_batch()
    batch["label"][:] = -1
    batch["target_mask"][:] = False
    losses = module(batch)[2]
    assert losses.loss.item() == 0
    losses.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_without_classes_there_is_no_label_head() -> None:
    module = make_module(0)
    _, generative, losses = module(make_batch())
    assert "logits" not in generative
    assert set(losses.extra_metrics) == {"masked_loss"}


def test_values_that_are_visible_are_no_part_of_the_loss() -> None:
    module, batch = make_module(), make_batch()
    before = module(batch)[2].extra_metrics["masked_loss"].item()
    batch["target"][~batch["target_mask"]] += 100.0
    assert module(batch)[2].extra_metrics["masked_loss"].item() == before


def cells(n=200, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal((n, 2)) @ np.random.default_rng(9).standard_normal((2, GENES))
    return np.abs(signal + 0.3 * rng.standard_normal((n, GENES))).astype(np.float32)


def start(module: FIMPModule, train, validation=None, around=None, near=None, **kwargs) -> None:
    near = sparse.csr_matrix((len(train), len(train)), dtype=np.float32) if near is None else near
    statistics = GeneStatistics(train.mean(0), np.full(GENES, 1 / GENES, dtype=np.float32), 100.0)
    validation = train[:0] if validation is None else validation
    around = validation if around is None else around
    parts = (sparse.csr_matrix(part) for part in (train, validation, around))
    train, *others = parts
    module.set_statistics(statistics, train)
    module.start_as_smoother(train, near, *others, statistics.mean, **kwargs)


def half_scaled_pca(train: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Square root of each gene's deviation, and directions and deviations of the components of genes divided by it."""
    gene_scale = np.sqrt(train.astype(float).std(0))
    _, size, directions = np.linalg.svd((train - train.mean(0)) / gene_scale, full_matrices=False)
    return gene_scale, directions[:k], size[:k] / np.sqrt(len(train) - 1)


def test_without_validation_the_start_reconstructs_like_pca() -> None:
    module, train = make_module(), cells()
    start(module, train)
    assert (module.network.n_own, module.network.n_neighborhood) == (5, 2)
    centered = train - train.mean(0)
    scores = torch.from_numpy(centered) @ module.network.embedding.loading
    value = module.value_head(scores).detach().numpy()
    gene_scale, directions, _ = half_scaled_pca(train, 5)
    np.testing.assert_allclose(value, centered / gene_scale @ directions.T @ directions * gene_scale, atol=1e-4)
    assert (module.value_head.loading[:, 5:] == 0).all(), "nothing is known of the neighbors"
    np.testing.assert_allclose(module.gene_mean, train.mean(0), rtol=1e-5)
    assert float(module.target_sum) == 100.0
    assert float(module.value_variance) == pytest.approx(np.mean(centered**2), rel=1e-3)


def test_scores_start_between_plain_and_whitened_ones() -> None:
    module, train = make_module(), cells()
    start(module, train)
    scores = (train - train.mean(0)) @ module.network.embedding.loading.detach().numpy()
    assert (scores[:, 5:] == 0).all()
    _, _, spread = half_scaled_pca(train, 5)
    deviations = scores[:, :5].std(0, ddof=1)
    np.testing.assert_allclose(deviations, np.sqrt(spread) / np.sqrt(spread).mean(), rtol=1e-3)
    # The label head sees all components alike, in either group of columns.
    scale = module.label_head.scale.numpy()
    np.testing.assert_allclose(scale[:5] * deviations, 1.0, rtol=1e-3)
    np.testing.assert_allclose(scale[5:7] * deviations[:2], 1.0, rtol=1e-3)
    assert scale[7] == 1


def make_smoother_problem(seed: int, n=40, genes=8, k=4) -> dict:
    """Own and neighbors' scores that agree, contradict each other, or mislead, on any scale."""
    rng = np.random.default_rng(seed)
    cells = rng.standard_normal((n, genes))
    around = rng.choice([0.1, 1.0, 3.0]) * rng.standard_normal((n, genes)) + rng.choice([-1.0, -0.1, 0.0, 0.5]) * cells
    encode = rng.standard_normal((genes, k))
    decode = np.linalg.pinv(encode).T if seed % 2 else rng.standard_normal((genes, k))
    return {
        "cells": cells,
        "around": around,
        "mean": 0.1 * rng.standard_normal(genes),
        "encode": encode,
        "decode": decode,
    }


def hidden_entries(values: np.ndarray, random_state: int) -> np.ndarray:
    return uniform(random_state, *map(np.arange, values.shape)) < 0.15


def fit_by_brute_force(cells, around, mean, encode, decode, n_neighborhood, random_state) -> tuple[list, list]:
    """Least squares within bounds over the list of all hidden entries, one component at a time."""
    centered = cells - mean
    hidden = hidden_entries(centered, random_state)
    row, gene = np.nonzero(hidden)
    scores = np.where(hidden, 0.0, centered) @ encode / 0.85, (around - mean) @ encode
    own, neighbors = [], []
    for k in range(encode.shape[1]):
        read = scores if k < n_neighborhood else scores[:1]
        told = np.stack([part[row, k] * decode[gene, k] for part in read], axis=1)
        factors = lsq_linear(told, centered[row, gene], (0.0, [1.0, 2.0][: len(read)]), method="bvls", tol=1e-14).x
        own.append(factors[0])
        neighbors.extend(factors[1:])
    return own, neighbors


def test_linear_smoother_is_least_squares_within_bounds_component_by_component() -> None:
    kinds = set()
    for seed in range(150):
        problem = make_smoother_problem(seed, n=530 if seed == 0 else 40)
        expected = fit_by_brute_force(**problem, n_neighborhood=3, random_state=seed)
        problem |= {name: sparse.csr_matrix(problem[name]) for name in ("cells", "around")}
        own, neighbors, *_ = linear_smoother(**problem, n_neighborhood=3, random_state=seed)
        assert (own.shape, neighbors.shape) == ((4,), (3,))
        np.testing.assert_allclose(own, expected[0], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(neighbors, expected[1], rtol=1e-3, atol=1e-5)
        places = zip((own[:3] > 0) + 1 * (own[:3] == 1), (neighbors > 0) + 1 * (neighbors == 2), strict=True)
        kinds |= {(int(i), int(j)) for i, j in places}
    assert len(kinds) >= 7, "factors at both bounds and between, in most combinations"


def test_value_head_starts_reading_as_strongly_as_the_linear_smoother_says() -> None:
    rng = np.random.default_rng(4)
    train, validation = cells(), cells(300, seed=1)
    around = (0.7 * validation + 1.5 * rng.standard_normal(validation.shape)).astype(np.float32)
    plain, fitted = make_module(), make_module()
    start(plain, train)
    start(fitted, train, validation, around, random_state=3)
    encode = plain.network.embedding.loading.detach().numpy().astype(float)[:, :5]
    decode = plain.value_head.loading.detach().numpy().astype(float)[:, :5]
    np.testing.assert_allclose(fitted.network.embedding.loading[:, :5].detach(), encode, rtol=1e-3, atol=1e-4)
    own, neighbors = fit_by_brute_force(validation, around, train.mean(0), encode, decode, 2, 3)
    loading = fitted.value_head.loading.detach().numpy()
    np.testing.assert_allclose(loading[:, :5], decode * own, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(loading[:, 5:7], decode[:, :2] * neighbors, rtol=1e-3, atol=1e-4)
    assert (loading[:, 7:] == 0).all()
    assert min(own[0], neighbors[0]) > 0.1, "both are informative here"


@pytest.mark.parametrize(("noise", "neighbors", "alike"), [(1.5, True, True), (1.5, False, False), (0.1, True, False)])
def test_start_asks_neighbors_where_single_cells_are_mostly_noise(noise: float, neighbors: bool, alike: bool) -> None:
    """Neighbors are alike in one direction, single cells vary most in another; noise is the same in all genes."""
    n, rng = 800, np.random.default_rng(5)
    shared, private = np.linalg.qr(rng.standard_normal((GENES, 2)))[0].T
    near = sparse.csr_matrix((np.eye(n, k=1) + np.eye(n, k=-1)).astype(np.float32) / 2)
    wave = np.sin(np.arange(2 * n) / 30)

    def made(part: np.ndarray) -> np.ndarray:
        values = np.outer(1.5 * part, shared) + np.outer(1.2 * rng.standard_normal(n), private)
        return (values + noise * rng.standard_normal((n, GENES)) + 9.0).astype(np.float32)

    train, validation = made(wave[:n]), made(wave[n:])
    around = near @ validation
    module = make_module()
    start(module, train, validation, around, near=near if neighbors else None)
    gene_scale = np.sqrt(train.astype(float).std(0))
    first = module.network.embedding.loading.detach().numpy()[:, 0] * gene_scale
    first /= np.linalg.norm(first)
    toward = np.abs([first @ part for part in (shared / gene_scale, private / gene_scale)])
    assert (toward[0] > toward[1]) == alike


def test_components_of_noise_start_smaller_than_those_of_signal() -> None:
    plain, shrunk = make_module(), make_module()
    start(plain, cells())
    # Neighbors that say nothing: what is known comes from the cell itself.
    start(shrunk, cells(), cells(400, seed=1), np.tile(cells().mean(0), (400, 1)))
    with torch.no_grad():
        factor = shrunk.value_head.loading[:, :5].norm(dim=0) / plain.value_head.loading[:, :5].norm(dim=0)
    assert (factor <= 1.1).all()
    assert factor[0] > 0.6
    assert factor[4] < 0.5 * factor[0]
    assert shrunk.value_head.loading[:, 5:].abs().max() < 1e-6


def count_by_brute_force(slope: np.ndarray, weight: np.ndarray) -> int:
    """Components above 0.05 of the closest sequence that never rises, by its min-max formula."""
    n = len(slope)
    mean = [
        [np.average(slope[i : j + 1], weights=weight[i : j + 1]) if j >= i else 0.0 for j in range(n)] for i in range(n)
    ]
    return sum(max(min(mean[i][j] for i in range(k + 1)) for j in range(k, n)) > 0.05 for k in range(n))


def test_components_that_tell_something_are_counted() -> None:
    found = set()
    for seed in range(100):
        problem = make_smoother_problem(seed)
        encode, decode, centered = problem["encode"], problem["decode"], problem["cells"] - problem["mean"]
        hidden = hidden_entries(centered, seed)
        row, gene = np.nonzero(hidden)
        scores = (np.where(hidden, 0.0, centered) @ encode / 0.85)[row] * decode[gene]
        square = (scores**2).sum(0)
        expected = count_by_brute_force(scores.T @ centered[row, gene] / square, square)
        problem |= {name: sparse.csr_matrix(problem[name]) for name in ("cells", "around")}
        fit = linear_smoother(**problem, n_neighborhood=3, random_state=seed)
        assert fit.n_telling == expected
        first = scores[:, :3]
        assert fit.signal == pytest.approx((first.T @ centered[row, gene]).sum() / (first**2).sum(), rel=1e-3, abs=1e-4)
        found.add(expected)
    assert len(found) >= 4


@pytest.mark.parametrize("drop", [False, True])
def test_components_of_noise_are_left_out_of_the_summary_on_demand(drop: bool) -> None:
    module = make_module()
    # Components of other cells tell nothing of these.
    strangers = cells(400, seed=1)[:, ::-1]
    start(module, cells(), strangers, strangers, drop_noise=drop)
    told = (module.network.embedding.loading[:, :5].abs().sum(0) > 0).numpy()
    read = (module.value_head.loading[:, :5].abs().sum(0) > 0).numpy()
    assert told[:2].all(), "the neighbors' mean is read from these"
    assert told.all() != drop
    assert not read[~told].any()


def test_wider_than_the_data_leaves_the_rest_zero() -> None:
    module, train = make_module(), cells(4)
    start(module, train, cells(50, seed=1))
    assert (module.network.embedding.loading[:, 3:] == 0).all()
    assert (module.network.embedding.loading[:, :3].abs().sum(0) > 0).all()
    assert (module.value_head.loading[:, 3:5] == 0).all()
    assert torch.isfinite(module.value_head.loading).all()


def test_class_balance() -> None:
    counts = np.array([1, 10, 100])
    alike, half, balanced = make_module(), make_module(), make_module()
    for module, balance in ((alike, 0.0), (half, 0.5), (balanced, 1.0)):
        module.set_class_weight(counts, balance)
        # On average over the training cells the label loss weighs as much as without weights.
        assert float((module.class_weight * torch.from_numpy(counts)).sum()) / 111 == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(alike.class_weight, 1.0, rtol=1e-6)
    weighed = balanced.class_weight.numpy() * counts
    np.testing.assert_allclose(weighed, weighed[0], rtol=1e-4)
    weighed = half.class_weight.numpy() * np.sqrt(counts)
    np.testing.assert_allclose(weighed, weighed[0], rtol=1e-4)


def test_order_of_equal_values_is_a_seeded_permutation() -> None:
    a, b, c = (make_module(random_state=seed).gene_rank for seed in (0, 0, 1))
    assert sorted(a.tolist()) == list(range(GENES))
    assert (a == b).all()
    assert (a != c).any()
    key = np.random.default_rng(0).integers(2**64, size=GENES, dtype=np.uint64)
    rank = make_module(gene_key=key).gene_rank
    order = np.random.default_rng(1).permutation(GENES)
    assert (make_module(gene_key=key[order]).gene_rank == rank[order]).all()


def test_sampling_is_refused() -> None:
    with pytest.raises(TypeError, match="get_expression"):
        make_module().sample()


def test_heads_read_the_embedding() -> None:
    module, batch = make_module(), make_batch()
    nn.init.normal_(module.value_head.bias)
    z = module.inference(batch)["embedding"]
    some = torch.tensor([3, 1])
    torch.testing.assert_close(module.generative(z, some)["value"], module.generative(z)["value"][:, some])
