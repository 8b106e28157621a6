"""Compact spatial blocks: the unit of mini-batches and of honest train/validation splits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc._draws import name_key

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# Of each coordinate on the space-filling curve: three of them fit into 63 bits.
_CURVE_BITS = 21


def spatial_tiles(
    coordinates: ArrayLike,
    block_size: int,
    *,
    library: ArrayLike | None = None,
    random_state: int | np.random.Generator | None = None,
) -> NDArray[np.int64]:
    """Cut nodes into compact blocks of nearly equal size with a k-d tree.

    Parameters
    ----------
    coordinates
        ``(n_nodes, n_dims)`` positions; any number of dimensions from 1, any unit. Of nodes with one coordinate in
        common those that come first are cut off first.
    block_size
        Largest number of nodes in a block. Each library gets ``ceil(nodes / block_size)`` blocks.
    library
        ``(n_nodes,)`` sample of each node. No block crosses samples.
    random_state
        With a seed or generator, the axes are rotated at random, so that every call cuts elsewhere. ``None`` cuts
        along the axes as they are.

    Returns
    -------
    ``(n_nodes,)`` int64, the block of each node, from 0 without gaps.

    Raises
    ------
    ValueError
        When ``block_size`` is below 1 or lengths differ.
    """
    points = np.asarray(coordinates, dtype=np.float64)
    points = points[:, None] if points.ndim == 1 else points
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, found {block_size}")
    groups = np.zeros(len(points), dtype=np.int64)
    if library is not None:
        if len(np.asarray(library)) != len(points):
            raise ValueError(f"library has {len(np.asarray(library))} entries for {len(points)} coordinates")
        groups = np.unique(np.asarray(library).astype(str), return_inverse=True)[1]
    if random_state is not None and points.shape[1] > 1:
        rng = np.random.default_rng(random_state)
        points = points @ np.linalg.qr(rng.standard_normal((points.shape[1],) * 2))[0]

    block = np.empty(len(points), dtype=np.int64)
    n_blocks = 0
    for group in np.unique(groups):
        nodes = np.flatnonzero(groups == group)
        n_tiles = -(-len(nodes) // block_size)
        for tile in _bisect(points, nodes, n_tiles):
            block[tile] = n_blocks
            n_blocks += 1
    return block


def _bisect(points: NDArray[np.float64], nodes: NDArray[np.int64], n_tiles: int) -> list[NDArray[np.int64]]:
    if n_tiles <= 1:
        return [nodes]
    axis = int(np.ptp(points[nodes], axis=0).argmax())
    ordered = nodes[np.argsort(points[nodes, axis], kind="stable")]
    n_left = n_tiles // 2
    cut = round(len(nodes) * n_left / n_tiles)
    return _bisect(points, ordered[:cut], n_left) + _bisect(points, ordered[cut:], n_tiles - n_left)


def curve_rank(coordinates: ArrayLike, names: ArrayLike | None = None) -> NDArray[np.int64]:
    """Return the place of each node along a Z-order curve through space: near on the curve is near in space.

    Parameters
    ----------
    coordinates
        ``(n_nodes, n_dims)`` positions, 1 to 3 dimensions.
    names
        ``(n_nodes,)`` names, which decide about nodes at one place; by default their order does.

    Returns
    -------
    ``(n_nodes,)`` int64 permutation.
    """
    points = np.asarray(coordinates, dtype=np.float64)
    n_dims = points.shape[1]
    low, span = points.min(0), np.ptp(points, axis=0)
    code: NDArray[Any] = points[:, 0]
    if n_dims > 1:
        cells = ((points - low) / np.where(span > 0, span, 1.0) * (2**_CURVE_BITS - 1)).astype(np.int64)
        code = np.zeros(len(points), dtype=np.int64)
        for bit in range(_CURVE_BITS):
            for axis in range(n_dims):
                code |= ((cells[:, axis] >> bit) & 1) << (bit * n_dims + axis)
    order = np.argsort(code, kind="stable")
    if names is not None and not np.diff(code[order]).all():
        order = np.lexsort((name_key(names), code))
    rank = np.empty(len(points), dtype=np.int64)
    rank[order] = np.arange(len(points))
    return rank
