"""Graphs of PyTorch Geometric: there and back again, and the direction of edges against its own message passing."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from torch_geometric.data import Data, HeteroData
from torch_geometric.nn import SimpleConv

from fimp_sc._errors import MissingKeyError
from fimp_sc.data import describe_modality
from fimp_sc.data._modality import quiet_mudata
from fimp_sc.pp import features, fmri, from_pyg, images, to_pyg

N = 12


def toy_data(*, weighted=True, seed=0):
    """Return a directed graph, sorted by destination, with self-loops and an edge of weight 0."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(N, N, generator=generator) < 0.3
    destination, source = dense.nonzero().T
    data = Data(
        x=torch.randn(N, 5, generator=generator),
        edge_index=torch.stack([source, destination]),
        y=torch.arange(N) % 3,
        pos=torch.randn(N, 2, generator=generator),
        train_mask=torch.arange(N) < 6,
        tokens=torch.randn(N, 2, 3, generator=generator, dtype=torch.float64),
    )
    if weighted:
        data.edge_weight = torch.rand(data.num_edges, generator=generator)
        data.edge_weight[3] = 0
    return data


def assert_same(a, b):
    assert set(a.keys()) == set(b.keys())
    for key in a.keys():  # noqa: SIM118 (a graph iterates over pairs)
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("weighted", [True, False])
def test_there_and_back_again(weighted, tmp_path):
    import mudata

    data = toy_data(weighted=weighted)
    mdata = from_pyg(data)
    assert_same(to_pyg(mdata), data)
    assert_same(to_pyg(mdata["feature"]), data)
    with quiet_mudata():
        mudata.write_h5mu(tmp_path / "graph.h5mu", mdata)
        back = mudata.read_h5mu(tmp_path / "graph.h5mu")
    assert_same(to_pyg(back, "feature"), data)
    assert describe_modality(back)["n_features"] == 5


def test_order_of_edges_does_not_matter():
    data = toy_data()
    order = torch.randperm(data.num_edges, generator=torch.Generator().manual_seed(1))
    shuffled = data.clone()
    shuffled.edge_index, shuffled.edge_weight = data.edge_index[:, order], data.edge_weight[order]
    assert_same(to_pyg(from_pyg(shuffled)), data)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_features_keep_their_type(dtype):
    data = toy_data()
    data.x = (data.x * 10).to(dtype)
    assert_same(to_pyg(from_pyg(data)), data)


def test_rows_are_destinations():
    data = Data(x=torch.eye(3), edge_index=torch.tensor([[2], [0]]))  # from node 2 to node 0
    graph = from_pyg(data)["feature"].obsp["spatial_connectivities"]
    assert graph.toarray().tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_messages_flow_as_in_the_matrix():
    values = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
    weights = np.random.default_rng(1).random((N, N)).astype(np.float32)
    weights[weights < 0.6] = 0
    data = to_pyg(features(values, weights))
    passed = SimpleConv(aggr="sum")(data.x, data.edge_index, data.edge_weight)
    np.testing.assert_allclose(passed.numpy(), weights @ values, rtol=1e-5, atol=1e-6)


def test_labels_of_any_column():
    labels = pd.DataFrame(
        {"kind": pd.Categorical(["b", None, "a"] * 4, categories=["b", "a"]), "age": np.linspace(0, 1, N)}
    )
    mdata = features(np.ones((N, 2)) * np.arange(N)[:, None], np.ones((N, N)), labels=labels)
    assert to_pyg(mdata, labels_key="kind").y.tolist() == [0, -1, 1] * 4
    assert to_pyg(mdata, labels_key="age").y.tolist() == labels["age"].tolist()
    assert "y" not in to_pyg(mdata)
    assert "edge_weight" not in to_pyg(mdata)
    with pytest.raises(MissingKeyError, match=r"Did you mean 'kind'\?"):
        to_pyg(mdata, labels_key="kinds")


def test_signals_and_images_become_graphs_too():
    rng = np.random.default_rng(0)
    bold, points = rng.normal(size=(2, 6, 30)).astype(np.float32), rng.normal(size=(6, 3))
    data = to_pyg(fmri(bold, coordinates=points, n_neighbors=2))
    assert torch.equal(data.x, torch.from_numpy(bold.reshape(12, 30)))
    assert data.pos.shape == (12, 3)
    assert data.num_edges == 24
    pixels = rng.integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    data = to_pyg(images(pixels, adjacency=np.ones((5, 5))), "image")
    np.testing.assert_allclose(data.x.numpy(), pixels.reshape(5, -1) / 255, rtol=1e-6)


def test_nothing_shares_memory():
    data = toy_data()
    mdata = from_pyg(data)
    expected = toy_data()
    for key in data.keys():  # noqa: SIM118
        data[key].zero_()
    again = to_pyg(mdata)
    assert_same(again, expected)
    for key in again.keys():  # noqa: SIM118
        again[key].zero_()
    assert_same(to_pyg(mdata), expected)


def test_what_does_not_belong_to_nodes_is_named(caplog):
    data = toy_data()
    data.edge_attr = torch.ones(data.num_edges, 2)
    data.title = "a graph"
    with caplog.at_level(logging.WARNING, logger="fimp_sc"):
        mdata = from_pyg(data)
    assert "Not carried over, since they do not belong to single nodes: edge_attr, title." in caplog.text
    assert_same(to_pyg(mdata), toy_data())


def changed(**values):
    data = toy_data()
    for key, value in values.items():
        data[key] = value
    return data


def edges(*pairs):
    return {"edge_index": torch.tensor(pairs).T, "edge_weight": None}


WRONG = [
    (HeteroData(), TypeError, "found HeteroData"),
    (changed(x=None), ValueError, "data.x is None"),
    (changed(x=torch.ones(N)), ValueError, r"shape \(12,\)"),
    (changed(x=torch.full((N, 2), torch.nan)), ValueError, "24 NaN or infinite"),
    (changed(edge_index=None), ValueError, "edge_index is None: it must"),
    (changed(edge_index=None, adj_t=torch.eye(N)), ValueError, "found adj_t"),
    (changed(**edges((0, 12))), ValueError, "do not exist: data.x has 12 nodes"),
    (changed(**edges((0, 1), (2, 1), (0, 1))), ValueError, "repeats 1 edges"),
    (changed(**edges((1, 1), (2, 2))), ValueError, "no edges between different nodes"),
    (changed(edge_weight=torch.ones(3)), ValueError, r"edge_weight has the shape \(3,\)"),
    (changed(edge_weight=-torch.ones(toy_data().num_edges)), ValueError, "not negative"),
]


@pytest.mark.parametrize(("data", "error", "message"), WRONG)
def test_wrong_input_is_explained(data, error, message):
    with pytest.raises(error, match=message):
        from_pyg(data)


def test_a_modality_without_graph_or_values_is_explained():
    mdata = from_pyg(toy_data())
    with pytest.raises(MissingKeyError, match=r"'other' is not in mdata.mod .*found there: 'feature'"):
        to_pyg(mdata, "other")
    with pytest.raises(MissingKeyError, match="Name the graph with connectivities_key="):
        to_pyg(mdata, connectivities_key="nothing")
    mdata["feature"].X = None
    with pytest.raises(ValueError, match=r"mdata\[.feature.\]\.X is None"):
        to_pyg(mdata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.obsm.update(spatial=np.full((a.n_obs, 2), "a")),
            r"mdata\['feature'\]\.obsm\['spatial'\] must hold",
        ),
        (
            lambda a: a.obsp.update(spatial_connectivities=np.full((a.n_obs, a.n_obs), "a")),
            r"mdata\['feature'\]\.obsp\['spatial_connectivities'\] must be a matrix of numbers",
        ),
        (lambda a: setattr(a, "X", np.full(a.shape, "a")), r"mdata\['feature'\]\.X must hold numbers"),
    ],
)
def test_what_is_no_number_is_named(change, message) -> None:
    mdata = from_pyg(Data(x=torch.eye(3), edge_index=torch.tensor([[0, 1, 2], [1, 2, 0]])))
    change(mdata["feature"])
    with pytest.raises(TypeError, match=message):
        to_pyg(mdata)
