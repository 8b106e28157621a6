"""Masks, baselines and simulated data of the benchmarks of fMRI, images and features against known values."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

pytest.importorskip("torch_geometric")


@pytest.fixture
def signals(load_script):
    return load_script("_signals")


@pytest.fixture
def networks(load_script):
    return load_script("_graph_networks")


def related(n_recordings: int, n_segments: int = 8, seed: int = 0) -> np.ndarray:
    """Signals (recording, 3, time) of which the first is twice the second less the third."""
    x = np.random.default_rng(seed).normal(size=(n_recordings, 3, 20 * n_segments)).astype(np.float32)
    x[:, 0] = 2 * x[:, 1] - x[:, 2]
    return x


def tries(signals, x: np.ndarray, seed: int = 1) -> list:
    rng = np.random.default_rng(seed)
    return [(one, signals.points(signals.hide((3, x.shape[-1] // 20), 0.25, rng))) for one in x]


STAR = sp.csr_matrix(np.array([[0, 1, 1], [1, 0, 0], [1, 0, 0]], dtype=np.float32))


def test_edges_run_from_column_to_row_in_every_copy(networks):
    graph = sp.csr_matrix(np.array([[0, 1], [0, 0]]))  # from node 1 to node 0
    assert networks.edge_index(graph, copies=2).tolist() == [[1, 3], [0, 2]]


def test_fit_keeps_the_weights_of_the_best_epoch(networks):
    import torch

    model = torch.nn.Linear(1, 1, bias=False)
    seen = []

    def validate():
        seen.append(model.weight.item())
        return [3.0, 1.0, 2.0, 2.0, 2.0][len(seen) - 1]

    best = networks.fit(model, lambda: [model.weight.sum()], validate, lr=0.1, epochs=5, patience=2)
    assert best == 1
    assert len(seen) == 4
    assert model.weight.item() == seen[1]


@pytest.mark.parametrize("kind", ["MLP", "GCN", "GraphSAGE", "GAT"])
def test_classify_reads_no_other_labels(networks, kind):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    x = labels[:, None] + 0.1 * rng.normal(size=(60, 3))
    graph = sp.csr_matrix(np.kron(np.ones((30, 30)), np.eye(2)) - np.eye(60))  # each class by itself
    train, validation = np.arange(60) < 20, (np.arange(60) >= 20) & (np.arange(60) < 30)
    known = np.where(train | validation, labels, 0)
    predicted = networks.classify(kind, x, graph, known, train, validation, seed=0, epochs=30)
    assert (predicted == labels).all()


def test_standardise_sees_only_what_is_shown(signals):
    got = signals.standardise(np.array([[1.0, 3.0, 100.0]]), np.array([[False, False, True]]))
    np.testing.assert_allclose(got, [[-1, 1, 98]])  # mean 2, standard deviation 1


def test_every_region_hides_as_many_segments(signals):
    hidden = signals.hide((50, 10), 0.2, np.random.default_rng(0))
    assert (hidden.sum(1) == 2).all()
    assert len({tuple(row) for row in hidden}) > 20
    assert signals.points(hidden[:1]).sum() == 40


def test_interpolation_by_hand(signals):
    hidden = np.array([[True, False, True, True, False, True]])
    got = signals.interpolate(np.array([[9.0, 1.0, 9.0, 9.0, 4.0, 9.0]]), hidden)
    np.testing.assert_allclose(got, [[1, 1, 2, 3, 4, 4]])


def test_neighbours_mean_is_of_those_that_show_the_moment(signals):
    x = np.array([[0.0, 0, 0], [2, 2, 2], [4, 4, 4]])
    hidden = np.array([[True, True, True], [False, True, True], [False, False, True]])
    np.testing.assert_allclose(signals.neighbour_mean(x, hidden, STAR)[0], [3, 4, 0])


def test_r2_and_mse_by_hand(signals):
    assert signals.score(np.array([1.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx({"r2": 0.5, "mse": 0.5})


def test_ridge_finds_a_linear_relation_where_all_neighbours_show(signals):
    parts = tries(signals, related(2, seed=5))
    for _, gap in parts:
        gap[1:] = False
    got = signals.ridge(related(4, n_segments=20), parts, STAR, 0.1, seed=0, own=False)
    x, gap = parts[1]
    assert signals.score(x[0, gap[0]], got[0, gap[0]])["r2"] > 0.9  # neighbours were hidden in training


def test_baselines_do_not_see_hidden_values_of_the_test(signals):
    train, parts = related(2), tries(signals, related(2, seed=5))
    x, gap = parts[1]
    other = [parts[0], (np.where(gap, 99, x).astype(np.float32), gap)]
    first = dict(signals.baselines(train, parts, STAR, 0.25, 0, quick=True))
    second = dict(signals.baselines(train, other, STAR, 0.25, 0, quick=True))
    assert len(first) == 16
    for method, predict in first.items():
        np.testing.assert_array_equal(predict()[gap], second[method]()[gap], err_msg=method)


@pytest.mark.parametrize("kind", ["GIN", "GPS"])
def test_parts_of_a_graph_do_not_see_each_other(load_script, kind):
    import torch

    networks = load_script("_graph_networks")
    torch.manual_seed(0)
    model = networks.GraphNetwork(kind, 3, 2, hidden=8).eval()
    x, edges = torch.randn(2 * STAR.shape[0], 3), networks.edge_index(STAR, 2)
    parts = torch.arange(2).repeat_interleave(STAR.shape[0])
    moved = torch.cat([x[: STAR.shape[0]], x[STAR.shape[0] :] + 1])
    with torch.no_grad():
        one, other = model(x, edges, parts), model(moved, edges, parts)
    torch.testing.assert_close(one[: STAR.shape[0]], other[: STAR.shape[0]])
    assert not torch.allclose(one[STAR.shape[0] :], other[STAR.shape[0] :])


def test_structural_graph_keeps_the_strongest_of_each_row(load_script):
    weights = np.random.default_rng(0).random((2, 12, 12))
    got = load_script("fmri").join(weights, sparse=False)
    mean = weights.mean(0) - 9 * np.eye(12)
    assert (got.sum(1) == 6).all()
    assert all(set(np.flatnonzero(got[i])) == set(np.argsort(mean[i])[-6:]) for i in range(12))


def test_pieces_follow_one_another(load_script):
    got = load_script("fmri").pieces(np.arange(12).reshape(2, 6), 3)
    assert got.tolist() == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]


def test_the_town_uses_every_digit_once_and_in_districts(load_script):
    from sklearn.datasets import load_digits
    from sklearn.neighbors import NearestNeighbors

    images = load_script("images")
    pixels, labels, places = images.town(0)
    assert pixels.shape == (1797, 8, 8)
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(load_digits().target))
    near = NearestNeighbors(n_neighbors=7).fit(places / images.DEGREES).kneighbors(return_distance=False)[:, 1:]
    assert 0.7 < (labels[near] == labels[:, None]).mean() < 0.8
    parts = np.array(images.split(places, 0))
    assert (parts.sum(0) == 1).all()
    np.testing.assert_allclose(parts.mean(1), [0.6, 0.2, 0.2], atol=0.03)


def test_the_citation_graph_is_what_it_says(load_script):
    features = load_script("features")
    words, links, labels = features.cite(0)
    assert words.shape == (2708, 1433)
    assert (links != links.T).nnz == 0
    assert links.diagonal().sum() == 0
    assert links.sum(1).min() >= 1
    row, col = links.nonzero()
    assert (labels[row] == labels[col]).mean() == pytest.approx(0.81, abs=0.02)
    assert words.sum(1).mean() == pytest.approx(18, abs=1)
    train, validation, test = features.split(labels, 0)
    assert np.bincount(labels[train]).tolist() == [20] * 7
    assert (validation.sum(), test.sum()) == (500, 1000)
    assert not (train & validation | train & test | validation & test).any()
