"""Inference: block by block, layer by layer and on the workers of Dask, always with the result of the whole graph."""

from __future__ import annotations

import tempfile
from pathlib import Path

import dask
import numpy as np
import pytest
import torch
from dask.core import flatten
from dask.local import get_sync
from scipy import sparse
from scipy.spatial import cKDTree
from torch import Tensor

from fimp_sc.data import (
    Batch,
    BlockDataset,
    BlockSampler,
    CenteredTokenizer,
    Destinations,
    ExpressionReader,
    GraphData,
    NodeGraph,
)
from fimp_sc.model.module._module import FIMPModule
from fimp_sc.model.predict import _inference as inference
from fimp_sc.model.predict._inference import infer

N, GENES, LAYERS, TOKENS, LATENT = 90, 16, 3, 8, 8
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def nearest(points: np.ndarray, k: int) -> sparse.csr_matrix:
    near = cKDTree(points).query(points, k + 1)[1][:, 1:]
    n = len(points)
    return sparse.csr_matrix((np.ones(near.size), (np.repeat(np.arange(n), k), near.ravel())), shape=(n, n))


def positions(n: int = N) -> np.ndarray:
    return np.random.default_rng(0).random((n, 2))


def spatial(n: int = N) -> sparse.csr_matrix:
    return nearest(positions(n), 4)


def expression_like(n: int = N) -> sparse.csr_matrix:
    """Neighbors that have nothing to do with positions."""
    return nearest(np.random.default_rng(1).random((n, 10)), 10)


def directed(n: int = N) -> sparse.csr_matrix:
    """Long edges that only go one way, sinks, and cells without neighbors."""
    matrix = sparse.random(n, n, density=0.02, format="lil", random_state=0)
    matrix[:8] = 0
    return matrix.tocsr()


def grid(side: int) -> tuple[np.ndarray, sparse.csr_matrix]:
    """Positions and edges of a square grid."""
    points = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2).astype(float)
    pairs = cKDTree(points).query_pairs(1.1, output_type="ndarray")
    row, col = np.concatenate([pairs, pairs[:, ::-1]]).T
    return points, sparse.csr_matrix((np.ones(len(row)), (row, col)), shape=(side**2,) * 2)


GRAPHS = {"spatial": spatial, "expression_like": expression_like, "directed": directed}


def make_data(graph: sparse.csr_matrix, *, self_loops=True, points=None, hidden=None, weighted=False) -> GraphData:
    n, rng = graph.shape[0], np.random.default_rng(2)
    expression = np.log1p(rng.poisson(0.5, (n, GENES))).astype(np.float32)
    expression[:3] = 0.0
    statistics = ExpressionReader(expression, np.arange(GENES), "log", None).gene_statistics(np.arange(n))
    return GraphData(
        expression=ExpressionReader(
            sparse.csr_matrix(expression), np.arange(GENES), "log", statistics, rng.integers(0, 2, n), hidden
        ),
        graph=NodeGraph(graph, self_loops=self_loops, weighted=weighted),
        coordinates=positions(n) if points is None else points,
        library=np.sort(rng.integers(0, 2, n)) if points is None else np.zeros(n, dtype=np.int64),
        label=np.full(n, -1),
        tokenizer=CenteredTokenizer(torch.from_numpy(rng.permutation(GENES))),
    )


def make_module(n_layers=LAYERS, layer="practical") -> FIMPModule:
    torch.manual_seed(0)
    module = FIMPModule(GENES, 3, n_latent=LATENT, n_layers=n_layers, n_heads=2, layer=layer).eval()
    with torch.no_grad():  # away from the smooth start, where mistakes could cancel
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def embedding(module: FIMPModule, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
    return outputs["embedding"]


def classes(module: FIMPModule, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
    return module.generative(outputs["embedding"])["logits"].softmax(-1)


def run(module: FIMPModule, data: GraphData, nodes=None, read=embedding, **kwargs) -> np.ndarray:
    nodes = np.arange(len(data.library)) if nodes is None else nodes
    how = {"n_layers": len(module.network.layers), "n_tokens": TOKENS, "batch_size": 20, **kwargs}
    out = infer(module, data, nodes, read, **how)
    assert out.dtype == np.float32
    return out


@torch.no_grad()
def whole_graph(module: FIMPModule, data: GraphData) -> np.ndarray:
    """All cells as the destinations of one block."""
    n, n_layers = len(data.library), len(module.network.layers)
    batch = BlockDataset(data, n_layers=n_layers, n_tokens=TOKENS)[Destinations(np.arange(n), 0)]
    assert batch["n_nodes"] == [n] * (n_layers + 1)
    return module.network(batch).numpy()


@pytest.mark.parametrize(("layer", "self_loops"), [("practical", True), ("practical", False), ("paper", False)])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_and_layers_equal_the_whole_graph(weighted: bool, graph: str, self_loops: bool, layer: str) -> None:
    edges, module = GRAPHS[graph](), make_module(layer=layer)
    edges.data = np.random.default_rng(4).uniform(0.2, 5.0, len(edges.data))
    data = make_data(edges, self_loops=self_loops, weighted=weighted)
    expected = whole_graph(module, data)
    assert np.isfinite(expected).all()
    assert len(np.unique(expected.round(3), axis=0)) > N - 10, "cells differ"
    for strategy, batch_sizes in (("blocks", (1, 7, N)), ("layers", (1, 7, N)), ("auto", (20, None))):
        for batch_size in batch_sizes:
            found = run(module, data, strategy=strategy, batch_size=batch_size)
            np.testing.assert_allclose(found, expected, **TOLERANCE)


@pytest.mark.parametrize("strategy", ["blocks", "layers", "auto"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_some_nodes_in_any_order(graph: str, strategy: str) -> None:
    data, module = make_data(GRAPHS[graph](), self_loops=graph == "spatial"), make_module()
    expected = whole_graph(module, data)
    shuffled = np.random.default_rng(0).permutation(N)
    for nodes in (shuffled, shuffled[:13], np.array([77, 2, 89]), np.array([5])):
        for batch_size in (1, 7, N):
            found = run(module, data, nodes, strategy=strategy, batch_size=batch_size)
            np.testing.assert_allclose(found, expected[nodes], **TOLERANCE)


@pytest.mark.parametrize("n_layers", [1, 2, 4])
def test_any_number_of_layers(n_layers: int) -> None:
    data, module = make_data(spatial()), make_module(n_layers)
    expected, some = whole_graph(module, data), np.array([9, 80, 3])
    for strategy in ("blocks", "layers", "auto"):
        np.testing.assert_allclose(run(module, data, strategy=strategy), expected, **TOLERANCE)
        np.testing.assert_allclose(run(module, data, some, strategy=strategy), expected[some], **TOLERANCE)


def test_hidden_entries_are_seen_by_neither() -> None:
    hidden = np.random.default_rng(3).random((N, GENES)) < 0.4
    data, module = make_data(spatial(), hidden=hidden), make_module()
    expected = whole_graph(module, data)
    assert np.abs(expected - whole_graph(module, make_data(spatial()))).max() > 0.01
    for strategy in ("blocks", "layers"):
        np.testing.assert_allclose(run(module, data, strategy=strategy), expected, **TOLERANCE)


@pytest.mark.parametrize("strategy", ["blocks", "layers"])
def test_what_is_read_decides_the_columns(strategy: str) -> None:
    data, module = make_data(spatial()), make_module()
    with torch.no_grad():
        expected = classes(module, {"embedding": torch.from_numpy(whole_graph(module, data))}, {}).numpy()
    found = run(module, data, read=classes, strategy=strategy)
    assert found.shape == (N, 3)
    np.testing.assert_allclose(found, expected, **TOLERANCE)


def taken(monkeypatch: pytest.MonkeyPatch, data: GraphData, **kwargs) -> bool:
    """Whether "auto" computes layer by layer; the result must be right either way."""
    by_layer, used = inference._by_layer, []

    def note(*args):
        used.append(True)
        return by_layer(*args)

    module = make_module(kwargs.pop("layers", LAYERS))
    with monkeypatch.context() as patch:
        patch.setattr(inference, "_by_layer", note)
        found = run(module, data, strategy="auto", **kwargs)
    np.testing.assert_allclose(found, whole_graph(module, data)[kwargs.get("nodes", slice(None))], **TOLERANCE)
    return bool(used)


def test_auto_computes_layers_where_halos_are_large_and_blocks_where_they_are_small(monkeypatch) -> None:
    random = make_data(expression_like(400), points=positions(400))
    points, edges = grid(20)
    regular = make_data(edges, points=points)
    assert taken(monkeypatch, random, batch_size=50)
    assert not taken(monkeypatch, regular, batch_size=200)
    assert taken(monkeypatch, regular, batch_size=4), "blocks that are nearly all halo"
    assert not taken(monkeypatch, random, batch_size=400), "a block of all cells has no halo"
    assert not taken(monkeypatch, random, batch_size=50, layers=1), "there is nothing to keep"
    assert not taken(monkeypatch, random, batch_size=50, nodes=np.array([3, 8])), "layers would update as many nodes"


def test_layers_pay_counts_the_nodes_that_are_updated() -> None:
    """On a ring, blocks of b cells update b + 2, b + 4, ... cells, layers all cells once."""
    n = 120
    ring = sparse.csr_matrix((np.ones(n), (np.arange(n), np.roll(np.arange(n), 1))), shape=(n, n))
    angle = 2 * np.pi * np.arange(n) / n
    data = make_data(ring + ring.T, points=np.stack([np.cos(angle), np.sin(angle)], axis=1))
    data.coordinates = np.arange(n, dtype=float)[:, None]
    # Three layers: 3 b + 6 updates for b cells are more than 1.5 times 3 b below b = 4.
    for batch_size, pays in ((2, True), (3, True), (5, False), (30, False)):
        sampler = BlockSampler(data, np.arange(n), batch_size=batch_size)
        assert inference._layers_pay(data, sampler, 3) == pays


@pytest.mark.parametrize("self_loops", [True, False])
def test_layers_update_only_what_is_needed(self_loops: bool) -> None:
    points, edges = grid(9)
    data = make_data(edges, points=points, self_loops=self_loops)
    center = 40
    distance = np.abs(points - points[center]).sum(1)
    for nodes, hop in zip(inference._needed(data, np.array([center]), 3), (2, 1, 0), strict=True):
        np.testing.assert_array_equal(nodes, np.flatnonzero(distance <= hop))
    assert all(len(nodes) == 81 for nodes in inference._needed(data, np.arange(81)[::-1], 3))


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_dask_gives_the_plain_result(scheduler: str) -> None:
    data, module = make_data(spatial()), make_module()
    nodes = np.random.default_rng(0).permutation(N)[:50]
    expected = run(module, data, nodes, read=classes, strategy="blocks")
    with dask.config.set(scheduler=scheduler, num_workers=2):
        for strategy in ("blocks", "auto"):
            found = run(module, data, nodes, read=classes, strategy=strategy, distribute=True)
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_dask_computes_in_other_processes() -> None:
    data, module = make_data(spatial()), make_module()
    expected = run(module, data, strategy="blocks")
    with dask.config.set(scheduler="processes", num_workers=1):
        # A function of this file, which other processes cannot import, travels with the task.
        found = run(module, data, read=lambda module, outputs, batch: 2 * outputs["embedding"], distribute=True)
    np.testing.assert_allclose(found, 2 * expected, rtol=1e-5, atol=1e-6)


def test_every_block_is_a_task_of_its_own() -> None:
    data, module, asked = make_data(spatial()), make_module(), []

    def scheduler(graph, keys, **kwargs):
        asked.append(list(flatten(keys)))
        return get_sync(graph, keys, **kwargs)

    with dask.config.set(scheduler=scheduler):
        run(module, data, distribute=True, batch_size=20)
    (keys,) = asked
    assert len(set(keys)) == len(keys) == len(BlockSampler(data, np.arange(N), batch_size=20)) > 4


@pytest.mark.parametrize("with_hidden", [False, True])
@pytest.mark.parametrize("strategy", ["blocks", "layers"])
def test_arrays_that_cannot_be_written_to_are_enough(strategy: str, with_hidden: bool) -> None:
    """As workers may receive them."""
    hidden = np.random.default_rng(3).random((N, GENES)) < 0.4 if with_hidden else None
    data, module = make_data(spatial(), hidden=hidden), make_module()
    expected = run(module, data, strategy=strategy)
    csr, source = data.graph.csr, data.expression
    arrays = [csr.data, csr.indices, csr.indptr, data.coordinates, data.library, data.label, data.rank]
    arrays += [source.measured, source.batch, source.center, source.factor]
    for array in arrays:
        array.flags.writeable = False
    torch.set_warn_always(True)
    try:
        found = run(module, data, strategy=strategy)
    finally:
        torch.set_warn_always(False)
    np.testing.assert_array_equal(found, expected)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder in which temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("graph", GRAPHS)
def test_tokens_in_files_give_the_same_result_and_no_file_stays(
    graph: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "_LARGEST_IN_MEMORY", 0)
    data, module = make_data(GRAPHS[graph]()), make_module()
    seen = set()

    def read(module: FIMPModule, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        seen.update(path.name for path in temporary.rglob("*.npy"))
        return outputs["embedding"]

    for nodes in (np.arange(N), np.array([77, 2, 89])):
        found = run(module, data, nodes, read, strategy="layers")
        np.testing.assert_allclose(found, whole_graph(module, data)[nodes], **TOLERANCE)
    assert seen == {"0.npy", "1.npy"}, "the last layer keeps nothing"
    assert list(temporary.iterdir()) == []


def test_small_tokens_stay_in_memory(temporary: Path) -> None:
    data, module = make_data(spatial()), make_module()

    def read(module: FIMPModule, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        assert not list(temporary.rglob("*.npy"))
        return outputs["embedding"]

    run(module, data, read=read, strategy="layers")
    assert list(temporary.iterdir()) == []


def test_no_file_stays_after_an_error(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_LARGEST_IN_MEMORY", 0)

    def fail(module: FIMPModule, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        run(make_module(), make_data(spatial()), read=fail, strategy="layers")
    assert list(temporary.iterdir()) == []
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("strategy", ["blocks", "layers"])
def test_gradients_and_random_numbers_are_left_alone(strategy: str) -> None:
    module, before = make_module(), torch.get_rng_state()
    run(module, make_data(spatial()), strategy=strategy)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())
    assert (torch.get_rng_state() == before).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"strategy": "nodes"}, "strategy must be 'auto', 'blocks' or 'layers', found 'nodes'"),
        ({"strategy": "layers", "distribute": True}, "strategy='layers' cannot be distributed"),
    ],
)
def test_errors(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_module(), make_data(spatial()), **kwargs)


@pytest.mark.parametrize("kwargs", [{"strategy": "blocks"}, {"strategy": "layers"}, {}, {"distribute": True}])
def test_no_nodes_are_an_error(kwargs: dict) -> None:
    with pytest.raises(ValueError, match="indices is empty"):
        run(make_module(), make_data(spatial()), np.array([], dtype=np.int64), **kwargs)
