"""`spatial_tiles`: sizes, coverage, libraries, seeds and compactness; and the curve along which nodes are ranked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from fimp_sc.data import curve_rank, spatial_tiles


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    block_size=st.integers(1, 30),
    n_dims=st.integers(1, 3),
    ties=st.booleans(),
    seed=st.one_of(st.none(), st.integers(0, 99)),
)
@settings(max_examples=60, deadline=None)
def test_sizes_coverage_and_libraries(sizes, block_size, n_dims, ties, seed) -> None:
    rng = np.random.default_rng(0)
    n = sum(sizes)
    coordinates = rng.integers(0, 3, (n, n_dims)) if ties else rng.random((n, n_dims))
    library = rng.permutation(np.repeat([f"s{i}" for i in range(len(sizes))], sizes))
    block = spatial_tiles(coordinates, block_size, library=library, random_state=seed)
    assert block.shape == (n,)
    assert block.dtype == np.int64
    count = np.bincount(block)
    assert (count > 0).all(), "numbers without gaps"
    assert count.max() <= block_size
    assert len(count) == sum(-(-size // block_size) for size in sizes)
    for name, size in zip(*np.unique(library, return_counts=True), strict=True):
        mine = count[np.unique(block[library == name])]
        assert mine.sum() == size, "a block holds cells of one library only"
        assert np.ptp(mine) <= max(2, 0.35 * block_size), "nearly equal sizes"
    np.testing.assert_array_equal(block, spatial_tiles(coordinates, block_size, library=library, random_state=seed))


def test_seeds_decide_the_cut() -> None:
    points = np.random.default_rng(0).random((200, 2))
    cuts = [spatial_tiles(points, 25, random_state=seed) for seed in (0, 0, 1)]
    together = [cut[:, None] == cut[None] for cut in cuts]
    assert (together[0] == together[1]).all()
    assert (together[0] != together[2]).any()
    generator = np.random.default_rng(3)
    first, second = (spatial_tiles(points, 25, random_state=generator) for _ in range(2))
    assert (first != second).any(), "a generator moves on"


def test_blocks_are_compact() -> None:
    points = np.random.default_rng(0).random((900, 2))
    block = spatial_tiles(points, 100, random_state=0)
    spread = np.mean([points[block == b].var(axis=0).sum() for b in range(block.max() + 1)])
    # Nine squares of a unit square have 1/9 of its variance; strips have half of it and random blocks all.
    assert spread < 2 * points.var(axis=0).sum() / 9


def test_blocks_on_a_line_are_intervals() -> None:
    points = np.random.default_rng(0).permutation(20).astype(float)
    block = spatial_tiles(points, 5)
    for b in range(4):
        mine = np.sort(points[block == b])
        np.testing.assert_array_equal(mine, np.arange(mine[0], mine[0] + 5))


def test_the_input_is_not_changed() -> None:
    points = np.random.default_rng(0).random((30, 2))
    before = points.copy()
    spatial_tiles(points, 7, random_state=0)
    np.testing.assert_array_equal(points, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, found 0"),
        ({"block_size": 5, "library": ["a", "b"]}, "library has 2 entries for 9 coordinates"),
    ],
)
def test_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spatial_tiles(np.zeros((9, 2)), **arguments)


@given(
    n=st.integers(1, 60),
    n_dims=st.integers(1, 3),
    n_places=st.sampled_from([1, 3, 1000]),
    scale=st.sampled_from([1e-9, 1.0, 1e9]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_ranks_are_a_permutation(n, n_dims, n_places, scale, seed) -> None:
    points = scale * np.random.default_rng(seed).integers(-n_places, n_places, (n, n_dims)).astype(float)
    before = points.copy()
    rank = curve_rank(points)
    assert rank.dtype == np.int64
    np.testing.assert_array_equal(np.sort(rank), np.arange(n))
    np.testing.assert_array_equal(points, before)


@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_on_a_line_the_curve_sorts(n_dims: int) -> None:
    """Also on a line along any one of several axes."""
    line = np.random.default_rng(0).permutation(500) - 250.0
    for axis in range(n_dims):
        points = np.full((500, n_dims), 7.0)
        points[:, axis] = line
        np.testing.assert_array_equal(curve_rank(points), line + 250)


def test_one_dimension_is_sorted_at_any_resolution() -> None:
    points = np.random.default_rng(0).permutation(100) * 1e-12 + np.repeat([0.0, 1e6], 50)
    np.testing.assert_array_equal(curve_rank(points[:, None]), np.argsort(np.argsort(points, kind="stable")))


@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_nodes_at_one_place_keep_their_order(n_dims: int) -> None:
    np.testing.assert_array_equal(curve_rank(np.full((20, n_dims), 3.5)), np.arange(20))


@pytest.mark.parametrize("n_dims", [1, 2, 3])
def test_names_order_nodes_at_one_place(n_dims: int) -> None:
    rng = np.random.default_rng(0)
    points = rng.integers(0, 3, (200, n_dims)).astype(float)
    names = np.array([f"cell_{i}" for i in range(200)])
    rank = curve_rank(points, names)
    np.testing.assert_array_equal(np.sort(rank), np.arange(200))
    moved = rng.permutation(200)
    np.testing.assert_array_equal(curve_rank(points[moved], names[moved]), rank[moved])
    assert (curve_rank(points[moved]) != rank[moved]).any()
    # Each place still is one stretch of the curve, in the order that places have without names.
    path, plain = points[np.argsort(rank)], points[np.argsort(curve_rank(points))]
    np.testing.assert_array_equal(path, plain)


@pytest.mark.parametrize("n_dims", [2, 3])
def test_near_in_space_is_near_on_the_curve(n_dims: int) -> None:
    points = np.random.default_rng(0).random((3000, n_dims)) * [10.0, 1.0, 0.1][:n_dims]
    scaled = points / points.max(0)
    rank, nearest = curve_rank(points), cKDTree(scaled).query(scaled, 2)[1][:, 1]
    apart = np.abs(rank - rank[nearest])
    # Of two random nodes: 1000 on average.
    assert apart.mean() < 100
    assert np.median(apart) < 10


@pytest.mark.parametrize("n_dims", [2, 3])
def test_consecutive_nodes_of_a_grid_fill_squares_within_squares(n_dims: int) -> None:
    grid = np.stack(np.meshgrid(*[np.arange(8.0)] * n_dims), axis=-1).reshape(-1, n_dims)
    grid = np.random.default_rng(0).permutation(grid)
    path = grid[np.argsort(curve_rank(grid))].reshape(-1, n_dims)
    for side in (2, 4):
        for square in path.reshape(-1, side**n_dims, n_dims):
            assert (np.ptp(square, axis=0) == side - 1).all()
            assert (square.min(0) % side == 0).all()


def test_units_of_the_axes_do_not_matter() -> None:
    points = np.random.default_rng(0).random((300, 3))
    np.testing.assert_array_equal(curve_rank(points * [4.0, 0.5, 1024.0]), curve_rank(points))
