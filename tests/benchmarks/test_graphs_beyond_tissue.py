"""Masks, baselines and simulated data of the benchmarks of fMRI, images and features against known values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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


@pytest.fixture
def nodes(load_script):
    return load_script("_nodes")


@pytest.fixture
def run(load_script):
    return load_script("_harness").Run(0, True, Path(), "cpu")


def related(n_recordings: int, n_segments: int = 8, seed: int = 0) -> np.ndarray:
    """Signals (recording, 3, time) of which the first is twice the second less the third."""
    x = np.random.default_rng(seed).normal(size=(n_recordings, 3, 20 * n_segments)).astype(np.float32)
    x[:, 0] = 2 * x[:, 1] - x[:, 2]
    return x


def hidden_segments(signals, n_segments: int = 8, **changed):
    """The problem of a recording of `related` signals."""
    rng, train = np.random.default_rng(1), related(4, n_segments)
    gaps = [signals.points(signals.hide((3, 8), 0.25, rng)) for _ in range(2)]
    checked, truth = related(2, seed=5)
    shown = np.where(gaps[1], 0, truth)
    given = (train, checked, (checked, gaps[0]), (shown, gaps[1]), STAR, {}, 2.0, 0.25, 0)
    return replace(signals.Signals(*given), **changed), truth


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

    training = networks.fit(model, lambda: [model.weight.sum()], validate, lr=0.1, epochs=5, patience=2)
    assert training.best == 1
    assert training.epochs == len(seen) == 4
    assert model.weight.item() == seen[1]


@pytest.fixture
def two_classes(nodes):
    """60 nodes whose features tell their class, each of which is joined to all others of it; and the classes."""
    rng = np.random.default_rng(0)
    truth = np.arange(60) % 2
    x = (truth[:, None] + 0.1 * rng.normal(size=(60, 3))).astype(np.float32)
    graph = sp.csr_matrix(np.kron(np.ones((30, 30)), np.eye(2)) - np.eye(60))
    train, validation = np.arange(60) < 20, (np.arange(60) >= 20) & (np.arange(60) < 30)
    labels = np.where(train | validation, truth, -1)

    def build(order):
        import fimp_sc

        return fimp_sc.pp.features(x, graph[order][:, order], labels=nodes.known(labels))

    return nodes.Nodes(x, graph, labels, train, validation, build), truth


@pytest.mark.parametrize("kind", ["MLP", "GCN", "GraphSAGE", "GAT", "GraphSAGE, smoothed"])
def test_networks_learn_classes_from_the_known_ones(nodes, run, two_classes, kind):
    problem, truth = two_classes
    fit = nodes.groups({}, "shuffled", hidden=16)["networks"][kind](problem, replace(run, quick=False))
    assert fit.note.startswith("share of means") == ("smoothed" in kind)
    assert (fit.values == truth).all()
    assert fit.epochs > 4 * 2
    assert fit.parameters > 0


def test_fimp_learns_classes_from_the_known_ones(nodes, run, two_classes):
    problem, truth = two_classes
    method = nodes.groups({}, "shuffled")["fimp"]["FIMP"]
    fit = method(problem, replace(run, quick=False))
    assert nodes.scores(truth, problem.labels < 0)(fit.values)["accuracy"] > 0.9


def test_the_control_deals_out_the_places(nodes, run, two_classes):
    problem, _ = two_classes
    orders = []

    def build(order):
        orders.append(order)
        return problem.build(order)

    methods = nodes.groups({}, "shuffled")
    for group, name in (("fimp", "FIMP"), ("controls", "shuffled")):
        methods[group][name](replace(problem, build=build), run)
    assert (orders[0] == np.arange(60)).all()
    assert sorted(orders[1]) == list(range(60))
    assert (orders[1] != np.arange(60)).sum() > 40


def test_the_most_accurate_classifier_is_that_of_the_validation_nodes(nodes, two_classes):
    from sklearn.dummy import DummyClassifier

    problem, _ = two_classes
    labels = np.where(problem.validation, 1, problem.labels)
    constant = [DummyClassifier(strategy="constant", constant=c) for c in (0, 1)]
    assert (nodes.most_accurate(replace(problem, labels=labels), problem.x, constant) == 1).all()


def test_standardize_sees_only_what_is_shown(signals):
    got = signals.standardize(np.array([[1.0, 3.0, 100.0]]), np.array([[False, False, True]]))
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


def test_neighbors_mean_is_of_those_that_show_the_moment(signals):
    x = np.array([[0.0, 0, 0], [2, 2, 2], [4, 4, 4]])
    hidden = np.array([[True, True, True], [False, True, True], [False, False, True]])
    np.testing.assert_allclose(signals.neighbor_mean(x, hidden, STAR)[0], [3, 4, 0])


def test_r2_and_mse_by_hand(signals):
    assert signals.score(np.array([1.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx({"r2": 0.5, "mse": 0.5})


def test_ridge_finds_a_linear_relation_where_all_neighbors_show(signals, run):
    problem, truth = hidden_segments(signals, n_segments=20)
    for _, gap in (problem.validation, problem.test):
        gap[1:] = False
    problem = replace(problem, test=(np.where(problem.test[1], 0, truth), problem.test[1]), ratio=0.1)
    gap = problem.test[1]
    got = signals.ridge(problem, run).values
    assert signals.score(truth[0, gap[0]], got[0, gap[0]])["r2"] > 0.9  # neighbors were hidden in training


@pytest.fixture
def brain(load_script, monkeypatch):
    """`fmri.py` with 4 recordings of 8 regions, each of them in pairs that do the same."""
    fmri = load_script("fmri")
    rng = np.random.default_rng(0)
    bold = rng.normal(size=(4, 4, 160)).repeat(2, axis=1) + 0.1 * rng.normal(size=(4, 8, 160))
    xyz = rng.normal(size=(8, 3)).repeat(1, axis=0)
    monkeypatch.setattr(fmri, "read", lambda name, folder: (bold, rng.random((4, 8, 8)), xyz, 2.0))
    return fmri, bold


@pytest.mark.parametrize("data", ["hcp, structural, 0.5", "lemon, coordinates, 0.5"])
def test_problems_do_not_hold_what_is_hidden(brain, run, data):
    fmri, bold = brain
    problem, score = fmri.problem(data, run, 1)
    assert problem.recording == (1 if data.startswith("hcp") else 3)
    shown, gap = problem.test
    assert gap.mean() == 0.5
    assert (shown[gap] == 0).all()
    whole = fmri.standardize(bold[problem.recording], gap)
    np.testing.assert_array_equal(shown[~gap], whole[~gap])
    assert score(whole)["mse"] == 0
    assert len(problem.train) == 2
    assert (problem.graph.getnnz(axis=1) >= 6).all()


def test_every_method_fills_in_hidden_signals(brain, run):
    fmri, _ = brain
    problem, score = fmri.problem("hcp, structural, 0.5", run, 1)
    for group in fmri.GROUPS.values():
        for name, method in group.items():
            values = method(problem, run).values
            assert values.shape == problem.test[0].shape, name
            assert np.isfinite(score(values)["r2"]), name


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
