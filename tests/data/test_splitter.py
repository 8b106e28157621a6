"""Train and validation cells: shares, whole blocks, seeds; and the loaders of each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from fimp_sc.data import BlockSplitter, split_by_blocks


@given(
    n=st.integers(1, 400),
    n_libraries=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.6, 0.95]),
    seed=st.integers(0, 50),
)
@settings(max_examples=40, deadline=None)
def test_every_cell_is_in_one_part_and_shares_are_kept(n, n_libraries, share, seed) -> None:
    rng = np.random.default_rng(seed)
    coordinates, library = rng.random((n, 2)), rng.integers(0, n_libraries, n)
    train, validation = split_by_blocks(coordinates, library, share, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(n))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()
    # Whole blocks, at most one too few.
    assert len(validation) <= round(share * n)
    assert len(validation) > round(share * n) - max(n // 20, 1)
    again = split_by_blocks(coordinates, library, share, seed)
    np.testing.assert_array_equal(again[1], validation)


def test_other_seeds_hold_out_other_cells() -> None:
    coordinates, library = np.random.default_rng(0).random((300, 2)), np.zeros(300, dtype=int)
    a, b = (split_by_blocks(coordinates, library, 0.2, seed)[1] for seed in (0, 1))
    assert set(a) != set(b)


def test_on_a_grid_the_same_cells_are_held_out_in_any_order() -> None:
    """Many cells of a grid lie level, and which of them go to a block must not depend on which comes first."""
    grid = np.stack(np.meshgrid(np.arange(15.0), np.arange(20.0)), axis=-1).reshape(-1, 2)
    library, rank = np.repeat([0, 1], 150), np.random.default_rng(0).permutation(300)
    held = np.zeros(300, dtype=bool)
    held[split_by_blocks(grid, library, 0.3, 0, rank)[1]] = True
    for seed in range(5):
        moved = np.random.default_rng(seed).permutation(300)
        again = split_by_blocks(grid[moved], library[moved], 0.3, 0, rank[moved])
        np.testing.assert_array_equal(again[1], np.flatnonzero(held[moved]))
        assert (np.diff(again[0]) > 0).all()


def test_validation_cells_lie_together() -> None:
    coordinates = np.random.default_rng(0).random((2000, 2))
    validation = np.zeros(2000, dtype=bool)
    validation[split_by_blocks(coordinates, np.zeros(2000, dtype=int), 0.2, 0)[1]] = True
    neighbors = cKDTree(coordinates).query(coordinates, 7)[1][:, 1:]
    together = validation[neighbors[validation]].mean()
    assert together > 0.6, "a random split has 0.2"


@pytest.mark.parametrize("share", [-0.1, 1.0, 2])
def test_shares_out_of_range_are_an_error(share: float) -> None:
    with pytest.raises(ValueError, match=r"validation_size must be in \[0, 1\)"):
        split_by_blocks(np.zeros((5, 2)), np.zeros(5, dtype=int), share, 0)


@pytest.fixture
def splitter(graph_data):
    n = len(graph_data.library)
    parts = np.arange(0, n, 2), np.arange(1, n, 2)
    return BlockSplitter(
        graph_data, *parts, batch_size=16, n_layers=1, n_tokens=8, mask_ratio=(0.3, 0.3), gene_mask_ratio=0.9
    )


def masks(loader) -> list[np.ndarray]:
    return [batch["visible"][batch["pattern"]].numpy() for batch in loader]


def test_loaders_serve_each_cell_of_their_part_once(splitter) -> None:
    for loader, expected in (
        (splitter.train_dataloader(), splitter.train_idx),
        (splitter.val_dataloader(), splitter.val_idx),
    ):
        served = np.concatenate([batch["nodes"][: batch["n_nodes"][-1]].numpy() for batch in loader])
        np.testing.assert_array_equal(np.sort(served), expected)
    assert splitter.n_train == len(splitter.train_idx)
    assert splitter.n_val == len(splitter.val_idx)


def test_validation_is_the_same_in_every_epoch_and_training_is_not(splitter) -> None:
    validation, train = splitter.val_dataloader(), splitter.train_dataloader()
    for a, b in zip(masks(validation), masks(validation), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(masks(splitter.val_dataloader()), masks(validation), strict=True):
        np.testing.assert_array_equal(a, b)
    first, second = masks(train), masks(train)
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(first, second, strict=True))


def test_validation_hides_no_whole_genes(splitter) -> None:
    assert all(mask.any(0).all() for mask in masks(splitter.val_dataloader()))
    assert any((~mask.any(0)).any() for mask in masks(splitter.train_dataloader()))


def test_without_validation_cells_there_is_no_loader(graph_data) -> None:
    splitter = BlockSplitter(
        graph_data, np.arange(5), np.arange(0), batch_size=16, n_layers=1, n_tokens=8, mask_ratio=(0.3, 0.3)
    )
    assert splitter.val_dataloader() == []
