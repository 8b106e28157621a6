"""Batches: what is in them, and that blocks change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import DataLoader

from fimp_sc.data import (
    Batch,
    BlockDataset,
    BlockSampler,
    Destinations,
    GraphData,
    NodeGraph,
    SequenceReader,
    SequenceShape,
    block_loader,
)

CUTS = ("batch_size", "tiles_per_batch", "shuffle", "random_state")


def make_sampler(data: GraphData, indices=None, **kwargs) -> BlockSampler:
    indices = np.arange(len(data.library)) if indices is None else indices
    return BlockSampler(data, indices, **{"batch_size": 16, **kwargs})


def make_dataset(data: GraphData, **kwargs) -> BlockDataset:
    return BlockDataset(data, **{"n_layers": 2, "n_tokens": 8, **kwargs})


def make_loader(data: GraphData, indices=None, num_workers=0, **kwargs) -> DataLoader[Batch]:
    cuts = {key: kwargs.pop(key) for key in CUTS if key in kwargs}
    return block_loader(make_dataset(data, **kwargs), make_sampler(data, indices, **cuts), num_workers=num_workers)


def destinations(batch: Batch) -> np.ndarray:
    return batch["nodes"][: batch["n_nodes"][-1]].numpy()


def visible_in(batch: Batch) -> torch.Tensor:
    """Which genes are visible in each node of the batch."""
    return batch["visible"][batch["pattern"]]


def assert_equal(left: Batch, right: Batch) -> None:
    assert left.keys() == right.keys()
    for key in left:
        if isinstance(left[key], dict):
            assert_equal(left[key], right[key])
        elif isinstance(left[key], list):
            assert len(left[key]) == len(right[key]), key
            assert all(np.array_equal(a, b) for a, b in zip(left[key], right[key], strict=True)), key
        else:
            assert torch.equal(left[key], right[key]), key


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 16, 1000])
def test_every_destination_is_served_once_in_blocks_of_one_library(graph_data, batch_size, shuffle) -> None:
    wanted = np.arange(0, 90, 2)
    loader = make_loader(graph_data, wanted, batch_size=batch_size, shuffle=shuffle)
    for _ in range(2):
        batches = [destinations(batch) for batch in loader]
        assert len(batches) == len(loader)
        assert max(map(len, batches)) <= batch_size
        np.testing.assert_array_equal(np.sort(np.concatenate(batches)), wanted)
        assert all(len(set(graph_data.library[batch])) == 1 for batch in batches)


@pytest.mark.parametrize("parts", [1, 2, 3, 50])
def test_parts_gather_several_compact_blocks(graph_data, parts: int) -> None:
    loader = make_loader(graph_data, batch_size=12, tiles_per_batch=parts, shuffle=True)
    for _ in range(2):
        batches = [destinations(batch) for batch in loader]
        assert len(batches) == len(loader)
        # A part has at least one cell, also where there are more parts than cells in a batch.
        assert max(map(len, batches)) <= max(12, parts)
        np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(90))


def test_contents_of_a_batch(graph_data) -> None:
    expression = graph_data.expression.rows(np.arange(90))
    center = graph_data.expression.center[graph_data.library]
    for batch in make_loader(graph_data, mask_ratio=(0.2, 0.5), gene_mask_ratio=0.3):
        nodes, n_dst = batch["nodes"].numpy(), batch["n_nodes"][-1]
        n, f, g = len(nodes), batch["feature_id"].shape[1], 25
        for key, shape, dtype in (
            ("feature_id", (n, f), torch.int64), ("value", (n, f), torch.float32), ("padding", (n, f), torch.bool),
            ("profile", (n, g), torch.float32), ("target", (n_dst, g), torch.float32), ("pattern", (n,), torch.int64),
            ("visible", (len(batch["visible"]), g), torch.bool), ("target_mask", (n_dst, g), torch.bool),
            ("label", (n_dst,), torch.int64), ("nodes", (n,), torch.int64),
        ):  # fmt: skip
            assert batch[key].shape == shape, key
            assert batch[key].dtype == dtype, key
        centered = expression[nodes] - center[nodes]
        visible = visible_in(batch).numpy()
        np.testing.assert_allclose(batch["profile"], np.where(visible, centered, 0), atol=1e-6)
        np.testing.assert_allclose(batch["target"], centered[:n_dst], atol=1e-6)
        np.testing.assert_array_equal(batch["target_mask"], ~visible[:n_dst])
        np.testing.assert_array_equal(batch["label"], graph_data.label[nodes[:n_dst]])
        feature, padding = batch["feature_id"].numpy(), batch["padding"].numpy()
        row = np.arange(n)[:, None]
        np.testing.assert_allclose(batch["value"], np.where(padding, 0, centered[row, feature]), atol=1e-6)
        assert (visible[row, feature] | padding).all(), "a hidden gene is no token"


def test_halo_is_that_of_the_graph(graph_data) -> None:
    for batch in make_loader(graph_data, n_layers=3):
        block = graph_data.graph.block(destinations(batch), 3, graph_data.rank)
        np.testing.assert_array_equal(batch["nodes"], block.nodes)
        assert batch["n_nodes"] == block.n_nodes
        assert len(batch["indptr"]) == len(batch["indices"]) == 3


def test_same_seed_same_epochs_and_other_seed_other_epochs(graph_data) -> None:
    def epochs(seed: int) -> list[list[int]]:
        loader = make_loader(graph_data, shuffle=True, mask_ratio=(0.2, 0.5), random_state=seed)
        return [[int(visible_in(batch).sum()) for batch in loader] for _ in range(3)]

    assert epochs(0) == epochs(0)
    assert epochs(0) != epochs(1)
    first, second, third = epochs(0)
    assert first != second != third


def test_cuts_move_and_blocks_are_shuffled_every_epoch(graph_data) -> None:
    loader = make_loader(graph_data, shuffle=True)
    first, second = ([frozenset(destinations(batch).tolist()) for batch in loader] for _ in range(2))
    assert set(first) != set(second)
    fixed = make_loader(graph_data)
    a, b = ([destinations(batch).tolist() for batch in fixed] for _ in range(2))
    assert a == b


def test_masks_do_not_draw_from_the_global_random_state(graph_data) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(make_loader(graph_data, shuffle=True, mask_ratio=(0.2, 0.5)))
    assert (torch.get_rng_state() == before[0]).all()
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


def test_without_masking_everything_observed_is_visible(graph_data) -> None:
    for batch in make_loader(graph_data):
        assert visible_in(batch).all()
        assert not batch["target_mask"].any()


def test_only_a_share_of_the_cells_is_masked(graph_data) -> None:
    def masked(mask_cells: float) -> np.ndarray:
        loader = make_loader(graph_data, mask_ratio=(0.5, 0.5), mask_cells=mask_cells, shuffle=True)
        return np.concatenate([(~visible_in(batch)).any(1).numpy() for _ in range(5) for batch in loader])

    def targets(mask_cells: float) -> int:
        loader = make_loader(graph_data, mask_ratio=(0.5, 0.5), gene_mask_ratio=0.5, mask_cells=mask_cells)
        return sum(int(batch["target_mask"].sum()) for batch in loader)

    # Half of 25 genes: a masked cell without a hidden gene does not occur.
    assert masked(1.0).all()
    assert not masked(0.0).any()
    some = masked(0.3)
    assert abs(some.mean() - 0.3) < 4 * (0.3 * 0.7 / len(some)) ** 0.5
    assert targets(0.0) == 0, "nor are genes hidden in whole blocks"
    assert 0 < targets(0.5) < targets(1.0)


def test_cells_that_are_not_masked_are_as_without_masking(graph_data) -> None:
    loaders = make_loader(graph_data, mask_ratio=(0.5, 0.5), mask_cells=0.5), make_loader(graph_data)
    for half, whole in zip(*loaders, strict=True):
        np.testing.assert_array_equal(half["nodes"], whole["nodes"])
        untouched = visible_in(half).all(1)
        assert untouched.any()
        assert not untouched.all()
        assert (half["profile"][untouched] == whole["profile"][untouched]).all()
        n_dst = half["n_nodes"][-1]
        np.testing.assert_array_equal(half["target_mask"].any(1), ~untouched[:n_dst])


@pytest.mark.parametrize("masked", [False, True])
def test_hidden_entries_reach_no_batch(graph_data_factory, masked: bool) -> None:
    """Other values at the hidden entries: tokens, values, profile and visibility stay the same."""
    masks = {"mask_ratio": (0.2, 0.5), "gene_mask_ratio": 0.3, "mask_cells": 0.7} if masked else {}
    rng = np.random.default_rng(0)
    expression = np.log1p(rng.poisson(1.0, (90, 25))).astype(np.float32)
    hidden = rng.random((90, 25)) < 0.3
    other = np.where(hidden, 7.0, expression).astype(np.float32)
    a = graph_data_factory(expression=expression, hidden=hidden)
    b = graph_data_factory(expression=expression, matrix=other, hidden=hidden)
    for left, right in zip(make_loader(a, **masks), make_loader(b, **masks), strict=True):
        for key in ("feature_id", "padding", "value", "profile", "visible", "pattern", "target_mask"):
            assert (left[key] == right[key]).all(), key
        hidden_here = torch.from_numpy(hidden[left["nodes"].numpy()])
        if not masked:
            assert (visible_in(left) == ~hidden_here).all()
            assert not left["target_mask"].any(), "what is hidden from outside is no training target"


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_masks_come_on_top_of_hidden_entries(graph_data_factory, batch_size: int, alone: bool) -> None:
    """Also in a batch of a single cell."""
    hidden = np.random.default_rng(0).random((90, 25)) < 0.3
    hidden[:, 3] = True
    data = graph_data_factory(hidden=hidden)
    if alone:
        data.graph = NodeGraph(0 * data.graph.csr, self_loops=False)
    n_targets = 0
    for batch in make_loader(data, batch_size=batch_size, mask_ratio=(0.2, 0.5), gene_mask_ratio=0.3):
        hidden_here = torch.from_numpy(hidden[batch["nodes"].numpy()])
        visible, n_dst = visible_in(batch), batch["n_nodes"][-1]
        assert not (visible & hidden_here).any()
        assert (batch["target_mask"] == (~hidden_here & ~visible)[:n_dst]).all()
        assert (batch["profile"][~visible] == 0).all()
        assert visible.gather(1, batch["feature_id"])[~batch["padding"]].all()
        n_targets += int(batch["target_mask"].sum())
    share = n_targets / (~hidden).sum()
    assert 0.3 < share < 0.6, "a third by cell, and 0.15 of the rest by gene"


def test_genes_that_are_not_measured_are_neither_visible_nor_targets(graph_data) -> None:
    graph_data.expression.measured = (np.arange(25) != 7)[None]
    for masks in ({}, {"mask_ratio": (0.2, 0.5), "gene_mask_ratio": 0.3}):
        for batch in make_loader(graph_data, **masks):
            assert not visible_in(batch)[:, 7].any()
            assert not batch["target_mask"][:, 7].any()
            assert (batch["profile"][:, 7] == 0).all()
            assert not ((batch["feature_id"] == 7) & ~batch["padding"]).any()


def test_a_batch_depends_on_its_destinations_and_seed_alone(graph_data) -> None:
    dataset = make_dataset(graph_data, mask_ratio=(0.2, 0.5), gene_mask_ratio=0.3)
    nodes = np.array([7, 3, 60])
    first = dataset[Destinations(nodes, 1)]
    other = dataset[Destinations(nodes, 2)]
    assert_equal(dataset[Destinations(nodes, 1)], first)
    assert (visible_in(other) != visible_in(first)).any()


def test_every_batch_has_masks_of_its_own(graph_data) -> None:
    for sampler in (make_sampler(graph_data), make_sampler(graph_data, shuffle=True)):
        seeds = [item.seed for _ in range(2) for item in sampler]
        assert len(set(seeds)) == len(seeds) // (1 if sampler.shuffle else 2)


def test_destinations_of_a_block_follow_the_curve(graph_data) -> None:
    for item in make_sampler(graph_data, shuffle=True):
        assert (np.diff(graph_data.rank[item.nodes]) > 0).all()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_batches_of_workers_are_those_of_this_process(graph_data) -> None:
    kwargs = {"batch_size": 32, "shuffle": True, "mask_ratio": (0.2, 0.5), "gene_mask_ratio": 0.3}
    loaders = make_loader(graph_data, **kwargs), make_loader(graph_data, num_workers=1, **kwargs)
    for _ in range(2):
        for here, there in zip(*loaders, strict=True):
            assert_equal(here, there)


@pytest.mark.parametrize("n_batches", [6, 7])
@pytest.mark.parametrize("shuffle", [True, False])
def test_devices_share_the_blocks_of_each_epoch(graph_data, shuffle: bool, n_batches: int) -> None:
    """As Lightning wraps a sampler for training and validation on two devices, which have a process each."""
    indices = np.flatnonzero(graph_data.library == 1)[: 8 * n_batches]
    kwargs = {"batch_size": 8, "shuffle": shuffle, "random_state": 3}
    alone = make_sampler(graph_data, indices, **kwargs)
    assert len(alone) == n_batches
    ranks = [
        DistributedSamplerWrapper(make_sampler(graph_data, indices, **kwargs), 2, rank, shuffle=shuffle)
        for rank in (0, 1)
    ]
    loaders = [block_loader(make_dataset(graph_data), rank) for rank in ranks]
    cuts = set()
    for epoch in range(3):
        for rank in ranks:
            rank.set_epoch(epoch)
        blocks = [[frozenset(destinations(batch).tolist()) for batch in loader] for loader in loaders]
        assert len(blocks[0]) == len(blocks[1]) == -(-n_batches // 2)
        expected = {frozenset(item.nodes.tolist()) for item in alone}
        assert len(expected) == n_batches
        assert set(blocks[0] + blocks[1]) == expected, "one cut for both, and no block left out"
        cuts.add(frozenset(expected))
    assert (len(cuts) > 1) == shuffle


def test_no_destinations_no_batches(graph_data) -> None:
    for shuffle in (True, False):
        loader = make_loader(graph_data, np.array([], dtype=np.int64), shuffle=shuffle)
        assert len(loader) == 0
        assert list(loader) == []


# Sequences ------------------------------------------------------------------------------------------------------------


def signals(n=90) -> np.ndarray:
    rng = np.random.default_rng(5)
    return (rng.normal(size=(n, 4, 3)) * rng.uniform(1, 9, (n, 1, 1)) + 20).astype(np.float32)


@pytest.fixture
def joint_data(graph_data_factory) -> GraphData:
    """Expression, signals that every fifth node lacks, and images, of which some patches are hidden."""
    data = graph_data_factory()
    rng = np.random.default_rng(6)
    images = rng.normal(size=(90, 5, 2)).astype(np.float32)
    data.sequences = {
        "bold": SequenceReader(
            lambda nodes: signals()[nodes], SequenceShape(4, 3, 2), 90, by_node=True, coordinates=data.coordinates,
            absent=np.arange(90) % 5 == 0,
        ),
        "image": SequenceReader(
            lambda nodes: images[nodes], SequenceShape(5, 2), 90, hidden=rng.random((90, 5)) < 0.3
        ),
    }  # fmt: skip
    return data


@pytest.mark.parametrize("masks", [{}, {"mask_ratio": (0.3, 0.6)}, {"mask_ratio": (0.3, 0.6), "mask_cells": 0.0}])
def test_sequences_of_a_batch_are_those_of_its_nodes(joint_data, masks) -> None:
    dataset = make_dataset(joint_data, **masks)
    for item in make_sampler(joint_data):
        batch = dataset[item]
        nodes, n_dst = batch["nodes"].numpy(), len(item.nodes)
        np.testing.assert_array_equal(nodes[:n_dst], item.nodes)
        assert len(nodes) > n_dst
        assert set(batch["sequences"]) == {"bold", "image"}
        for name, source in joint_data.sequences.items():
            made = batch["sequences"][name]
            f, p = source.shape.n_tokens, source.shape.token_size
            for key, shape in (
                ("value", (len(nodes), f, p)), ("masked", (len(nodes), f)), ("padding", (len(nodes), f)),
                ("coordinates", (len(nodes), source.shape.n_coordinates)), ("mean", (n_dst, 1, 1)),
                ("std", (n_dst, 1, 1)), ("target", (n_dst, f, p)), ("target_mask", (n_dst, f)),
            ):  # fmt: skip
                assert made[key].shape == shape, (name, key)
            assert made["target_mask"].any() == (bool(masks) and "mask_cells" not in masks)
        signal = batch["sequences"]["bold"]
        back = signal["target"] * signal["std"] + signal["mean"]
        there = item.nodes % 5 > 0
        np.testing.assert_allclose(back[there], signals()[item.nodes[there]], rtol=1e-4)
        np.testing.assert_array_equal(signal["padding"].all(1), nodes % 5 == 0)
        np.testing.assert_allclose(signal["coordinates"], joint_data.coordinates[nodes], rtol=1e-6)


def test_expression_is_the_same_with_sequences_beside_it(joint_data) -> None:
    masks = {"mask_ratio": (0.3, 0.6), "gene_mask_ratio": 0.3, "mask_cells": 0.7}
    item = Destinations(np.array([7, 3, 60]), 1)
    both = dict(make_dataset(joint_data, **masks)[item])
    sequences = both.pop("sequences")
    joint_data.sequences, known = {}, joint_data.sequences
    alone = make_dataset(joint_data, **masks)[item]
    assert_equal(both, alone)
    joint_data.expression, joint_data.sequences = None, known
    of_sequences = make_dataset(joint_data, **masks)[item]
    assert set(of_sequences) == {"nodes", "n_nodes", "indptr", "indices", "label", "sequences"}
    assert_equal(of_sequences["sequences"], sequences)


def test_masks_of_sequences_come_from_the_seed(joint_data) -> None:
    dataset = make_dataset(joint_data, mask_ratio=(0.3, 0.6))
    nodes = np.array([7, 3, 61])
    first, again, other = (dataset[Destinations(nodes, seed)]["sequences"] for seed in (1, 1, 2))
    assert_equal(first, again)
    for name in first:
        assert not torch.equal(first[name]["masked"], other[name]["masked"])


@pytest.mark.parametrize("batch_size", [1, 16, 90])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_messages_of_sequences_are_those_in_the_whole_graph(joint_data, batch_size: int, n_layers: int) -> None:
    """Every layer adds up the sources of a node; in the whole graph that is a power of its matrix."""
    everything = np.arange(90)
    adjacency = joint_data.graph.csr.toarray().astype(np.float64)
    whole = {
        name: np.linalg.matrix_power(adjacency, n_layers)
        @ source.fields(everything, 90)["value"].reshape(90, -1).double().numpy()
        for name, source in joint_data.sequences.items()
    }
    served = 0
    for batch in make_loader(joint_data, n_layers=n_layers, batch_size=batch_size):
        for name, expected in whole.items():
            h = batch["sequences"][name]["value"].flatten(1).double()
            for layer in range(n_layers):
                h = h[: batch["n_nodes"][layer]]
                indptr, indices = batch["indptr"][layer], batch["indices"][layer]
                h = torch.stack([h[sources].sum(0) for sources in indices.tensor_split(indptr[1:-1])])
            np.testing.assert_allclose(h, expected[destinations(batch)], rtol=1e-5, atol=1e-4)
        served += len(destinations(batch))
    assert served == 90


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_sequences_of_workers_are_those_of_this_process(joint_data) -> None:
    kwargs = {"batch_size": 32, "shuffle": True, "mask_ratio": (0.2, 0.5)}
    loaders = make_loader(joint_data, **kwargs), make_loader(joint_data, num_workers=1, **kwargs)
    for here, there in zip(*loaders, strict=True):
        assert_equal(here, there)
