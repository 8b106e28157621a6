"""Batches: what is in them, and that blocks change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fimp_sc.data import BlockLoader


def make_loader(data, indices=None, **kwargs) -> BlockLoader:
    indices = np.arange(len(data.library)) if indices is None else indices
    return BlockLoader(data, indices, **{"batch_size": 16, "n_layers": 2, "n_tokens": 8, **kwargs})


def destinations(batch) -> np.ndarray:
    return batch["nodes"][: batch["n_nodes"][-1]].numpy()


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
    loader = make_loader(graph_data, batch_size=12, parts=parts, shuffle=True)
    for _ in range(2):
        batches = [destinations(batch) for batch in loader]
        assert len(batches) == len(loader)
        # A part has at least one cell, also where there are more parts than cells in a batch.
        assert max(map(len, batches)) <= max(12, parts)
        np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(90))


def test_contents_of_a_batch(graph_data) -> None:
    expression = graph_data.source.rows(np.arange(90))
    centre = graph_data.source.center[graph_data.library]
    for batch in make_loader(graph_data, mask_ratio=(0.2, 0.5), gene_mask_ratio=0.3):
        nodes, n_dst = batch["nodes"].numpy(), batch["n_nodes"][-1]
        n, f, g = len(nodes), batch["feature_id"].shape[1], 25
        for key, shape, dtype in (
            ("feature_id", (n, f), torch.int64), ("value", (n, f), torch.float32), ("padding", (n, f), torch.bool),
            ("profile", (n, g), torch.float32), ("visible", (n, g), torch.bool), ("target", (n_dst, g), torch.float32),
            ("target_mask", (n_dst, g), torch.bool), ("label", (n_dst,), torch.int64), ("nodes", (n,), torch.int64),
        ):  # fmt: skip
            assert batch[key].shape == shape, key
            assert batch[key].dtype == dtype, key
        centred = expression[nodes] - centre[nodes]
        visible = batch["visible"].numpy()
        np.testing.assert_allclose(batch["profile"], np.where(visible, centred, 0), atol=1e-6)
        np.testing.assert_allclose(batch["target"], centred[:n_dst], atol=1e-6)
        np.testing.assert_array_equal(batch["target_mask"], ~visible[:n_dst])
        np.testing.assert_array_equal(batch["label"], graph_data.label[nodes[:n_dst]])
        feature, padding = batch["feature_id"].numpy(), batch["padding"].numpy()
        row = np.arange(n)[:, None]
        np.testing.assert_allclose(batch["value"], np.where(padding, 0, centred[row, feature]), atol=1e-6)
        assert (visible[row, feature] | padding).all(), "a hidden gene is no token"


def test_halo_is_that_of_the_graph(graph_data) -> None:
    for batch in make_loader(graph_data, n_layers=3):
        block = graph_data.graph.block(destinations(batch), 3)
        np.testing.assert_array_equal(batch["nodes"], block.nodes)
        assert batch["n_nodes"] == block.n_nodes
        assert len(batch["indptr"]) == len(batch["indices"]) == 3


def test_same_seed_same_epochs_and_other_seed_other_epochs(graph_data) -> None:
    def epochs(seed: int) -> list[list[int]]:
        loader = make_loader(graph_data, shuffle=True, mask_ratio=(0.2, 0.5), random_state=seed)
        return [[int(batch["visible"].sum()) for batch in loader] for _ in range(3)]

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
        assert batch["visible"].all()
        assert not batch["target_mask"].any()


def test_only_a_share_of_the_cells_is_masked(graph_data) -> None:
    def masked(mask_cells: float) -> np.ndarray:
        loader = make_loader(graph_data, mask_ratio=(0.5, 0.5), mask_cells=mask_cells, shuffle=True)
        return np.concatenate([(~batch["visible"]).any(1).numpy() for _ in range(5) for batch in loader])

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
        untouched = half["visible"].all(1)
        assert untouched.any()
        assert not untouched.all()
        assert (half["profile"][untouched] == whole["profile"][untouched]).all()
        n_dst = half["n_nodes"][-1]
        np.testing.assert_array_equal(half["target_mask"].any(1), ~untouched[:n_dst])


def test_hidden_entries_reach_no_batch(graph_data_factory) -> None:
    """Other values at the hidden entries: tokens, values, profile and visibility stay the same."""
    rng = np.random.default_rng(0)
    expression = np.log1p(rng.poisson(1.0, (90, 25))).astype(np.float32)
    hidden = rng.random((90, 25)) < 0.3
    other = np.where(hidden, 7.0, expression).astype(np.float32)
    a = graph_data_factory(expression=expression, hidden=hidden)
    b = graph_data_factory(expression=expression, matrix=other, hidden=hidden)
    for left, right in zip(make_loader(a), make_loader(b), strict=True):
        for key in ("feature_id", "padding", "value", "profile", "visible", "target_mask"):
            assert (left[key] == right[key]).all(), key
        hidden_here = torch.from_numpy(hidden[left["nodes"].numpy()])
        assert (left["visible"] == ~hidden_here).all()
        assert not left["target_mask"].any(), "what is hidden from outside is no training target"


def test_no_destinations_no_batches(graph_data) -> None:
    loader = make_loader(graph_data, np.array([], dtype=np.int64))
    assert len(loader) == 0
    assert list(loader) == []
