"""The scores, the class rule and the baselines of the benchmarks against hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp


@pytest.fixture
def common(load_script):
    return load_script("_common")


@pytest.fixture
def baselines(load_script):
    return load_script("_baselines")


def test_r2_around_grand_mean_and_gene_mean(common):
    # grand mean 2: SST 2; gene means 0.5 and 2.5: SST 0.25 + 0.25 + 0.25 + 0.25; squared errors 0.25 * 2
    truth, predicted = [1.0, 2.0, 2.0, 3.0], [1.5, 2.0, 2.0, 2.5]
    scores = common.expression_scores(truth, predicted, [1.5, 1.5, 2.5, 2.5])
    assert scores == pytest.approx({"r2": 0.75, "r2_gene": 0.5, "mse": 0.125})


def test_gene_mean_scores_zero_per_gene(common):
    gene_mean = np.array([0.5, 0.5, 3.0, 3.0])
    assert common.expression_scores([0.0, 2.0, 3.0, 5.0], gene_mean, gene_mean)["r2_gene"] == 0


def test_macro_f1_covers_classes_of_the_test_set_only(common):
    # a: precision 1, recall 1/2, F1 2/3; b: F1 1; c is predicted once but absent from the test set
    scores = common.label_scores(["a", "a", "b", "b"], ["a", "c", "b", "b"])
    assert scores == pytest.approx({"accuracy": 0.75, "macro_f1": (2 / 3 + 1) / 2})


def test_a_class_never_predicted_counts_as_zero(common):
    # a: precision 1/2, recall 1, F1 2/3; b: 0
    assert common.label_scores(["a", "b"], ["a", "a"])["macro_f1"] == pytest.approx(1 / 3)


def test_class_rule(common):
    labels = np.array(["a"] * 6 + ["b"] * 5 + ["Unknown"])
    held_out = np.zeros(12, bool)
    held_out[[0, 6]] = True  # leaves five training cells of a, four of b
    for_training, train, test = common.split_labels(labels, held_out)
    assert np.flatnonzero(train).tolist() == [1, 2, 3, 4, 5]
    assert np.flatnonzero(test).tolist() == [0]
    assert for_training.tolist() == ["Unknown"] + ["a"] * 5 + ["Unknown"] * 6


def test_folds_keep_blocks_whole(common):
    blocks = np.repeat(np.arange(10), 7)
    fold = common.folds(blocks, 5, seed=0)
    assert all(len(np.unique(fold[blocks == b])) == 1 for b in range(10))
    assert np.bincount(fold).tolist() == [14] * 5


def test_what_is_hidden_does_not_show_in_the_scale(common):
    rng = np.random.default_rng(0)
    counts, visible = rng.poisson(4.0, (30, 8)), rng.random((30, 8)) < 0.6
    values = common.log_normalize(counts, 32.0).toarray()
    linear = np.expm1(values)
    share = linear.sum(0) / linear.sum()
    got = common.as_seen(values, visible)
    total = np.where(visible, np.expm1(got), 0).sum(1)
    np.testing.assert_allclose(total, 32.0 * (visible @ share), rtol=1e-4)
    there = visible & (linear > 0)
    ratio = np.where(there, np.expm1(got) / np.where(there, linear, 1), np.nan)
    np.testing.assert_allclose(np.nanmin(ratio, 1), np.nanmax(ratio, 1), rtol=1e-4)


def test_log_normalize(common):
    got = common.log_normalize(np.array([[1.0, 3.0], [0.0, 2.0]]), target=4.0).toarray()
    np.testing.assert_allclose(got, np.log1p([[1.0, 3.0], [0.0, 4.0]]), rtol=1e-6)


def test_neighbors_stay_in_their_section(common):
    xy = np.array([[0.0, 0], [0, 1], [0, 3], [0, 0.1], [0, 1.1], [0, 3.1]])
    graph = common.neighbors(xy, 1, np.array([0, 0, 0, 1, 1, 1]))
    assert graph.indices.tolist() == [1, 0, 1, 4, 3, 4]


def test_neighbor_mean_skips_hidden_entries(baselines):
    x = sp.csr_matrix(np.array([[0.0, 0.0], [4.0, 0.0], [2.0, 0.0]]))
    hidden = sp.csr_matrix(np.array([[False, False], [False, True], [False, True]]))
    graph = sp.csr_matrix(np.array([[0.0, 1.0, 1.0]]))
    got = baselines.neighbor_mean(x, hidden, graph, mean=np.array([9.0, 7.0]))
    np.testing.assert_allclose(got, [[3.0, 7.0]])  # no neighbor shows the second gene


def test_pca_baselines_ignore_hidden_values_and_recover_low_rank_data(baselines):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2)) @ rng.normal(size=(2, 12)) + 1
    pca = baselines.fit_pca(sp.csr_matrix(x), 2)
    visible = np.ones(x.shape, bool)
    visible[:, 3] = False
    other = np.where(visible, x, -99.0)
    for method in (baselines.reconstruct_filled, lambda *a: baselines.reconstruct_visible(*a, prior=True)):
        np.testing.assert_allclose(method(pca, x, visible), method(pca, other, visible))
    got = baselines.reconstruct_visible(pca, other, visible, prior=True)
    np.testing.assert_allclose(got[:, 3], x[:, 3], atol=1e-3)
