"""`NodeGraph`: edges as given, and halos that are exactly the in-neighborhood."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from fimp_sc.data import NodeGraph


def random_matrix(n: int, density: float, seed: int) -> sparse.csr_matrix:
    return sparse.random(n, n, density=density, format="csr", random_state=seed)


@pytest.mark.parametrize("kind", ["csr_matrix", "csc_matrix", "coo_matrix", "csr_array"])
@pytest.mark.parametrize("self_loops", [True, False])
def test_edges_are_the_non_zero_entries(kind: str, self_loops: bool) -> None:
    dense = random_matrix(9, 0.4, 0).toarray()
    dense[2, 2], dense[3, 4], dense[4] = 0.5, 0.0, 0.0
    stored = sparse.csr_matrix(dense + 1)
    stored.data -= 1  # zeros that are stored are no edges
    matrix = getattr(sparse, kind)(stored)
    graph = NodeGraph(matrix, self_loops=self_loops)
    expected = (dense != 0).astype(np.float32)
    np.fill_diagonal(expected, float(self_loops))
    np.testing.assert_array_equal(graph.csr.toarray(), expected)
    np.fill_diagonal(expected, 0)
    np.testing.assert_array_equal(graph.degree, expected.sum(1), err_msg="self-loops make nobody a neighbor")


def test_the_matrix_of_the_user_is_not_changed() -> None:
    matrix = random_matrix(9, 0.4, 0).astype(np.float32)
    before = matrix.copy()
    NodeGraph(matrix, self_loops=True).block([0], 2)
    np.testing.assert_array_equal(matrix.toarray(), before.toarray())
    np.testing.assert_array_equal(matrix.data, before.data)


def messy(dense: np.ndarray, seed: int) -> sparse.csr_matrix:
    """CSR that stores values twice, zeros, self-loops and columns in any order, with the entries of `dense`."""
    rng = np.random.default_rng(seed)
    row, col = np.nonzero((dense != 0) | (rng.random(dense.shape) < 0.2))
    value = dense[row, col]
    twice = rng.random(len(row)) < 0.4
    row, col = np.append(row, row[twice]), np.append(col, col[twice])
    value = np.append(value, value[twice] * (rng.random(int(twice.sum())) < 0.5))  # again, or a zero
    order = np.lexsort((rng.random(len(row)), row))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(dense)))])
    return sparse.csr_matrix((value[order], col[order], indptr), shape=dense.shape)


@given(
    n=st.integers(1, 15),
    density=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 1000),
    self_loops=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_matrices_in_no_canonical_form_give_the_same_graph_and_are_not_changed(n, density, seed, self_loops) -> None:
    dense = random_matrix(n, density, seed).toarray()
    dense[seed % n, seed % n] = 0.5
    matrix = messy(dense, seed)
    before = [part.copy() for part in (matrix.data, matrix.indices, matrix.indptr)]
    graph = NodeGraph(matrix, self_loops=self_loops)
    expected = (dense != 0).astype(np.float32)
    np.fill_diagonal(expected, float(self_loops))
    assert graph.csr.has_canonical_format
    np.testing.assert_array_equal(graph.csr.toarray(), expected)
    assert graph.csr.nnz == expected.sum(), "zeros are not stored"
    np.fill_diagonal(expected, 0)
    np.testing.assert_array_equal(graph.degree, expected.sum(1))
    for part, old in zip((matrix.data, matrix.indices, matrix.indptr), before, strict=True):
        np.testing.assert_array_equal(part, old)


@given(
    n=st.integers(2, 40),
    density=st.sampled_from([0.0, 0.03, 0.1, 0.3]),
    seed=st.integers(0, 1000),
    n_layers=st.integers(0, 4),
    self_loops=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_block_equals_a_breadth_first_search(n, density, seed, n_layers, self_loops, data) -> None:
    dense = random_matrix(n, density, seed).toarray() != 0
    np.fill_diagonal(dense, self_loops)
    destinations = data.draw(st.lists(st.integers(0, n - 1), max_size=n, unique=True))
    block = NodeGraph(messy(dense.astype(float), seed), self_loops=self_loops).block(destinations, n_layers)
    sources = [set(np.flatnonzero(row).tolist()) for row in dense]

    hops, reached = [destinations], set(destinations)
    for _ in range(n_layers):
        hops.append(sorted(set().union(*(sources[node] for node in reached)) - reached))
        reached.update(hops[-1])
    start = 0
    for hop, stop in zip(hops, block.n_nodes[::-1], strict=True):
        assert sorted(block.nodes[start:stop].tolist()) == sorted(hop)
        start = stop
    assert block.nodes[: len(destinations)].tolist() == destinations, "in the order asked for"
    assert start == len(block.nodes)
    for layer in range(n_layers):
        indptr, indices = block.indptr[layer], block.indices[layer]
        assert block.nodes.dtype == indptr.dtype == indices.dtype == np.int64
        rows = np.split(block.nodes[indices], indptr[1:-1]) if block.n_nodes[layer + 1] else []
        assert len(indptr) == len(rows) + 1 == block.n_nodes[layer + 1] + 1
        for node, row in zip(block.nodes, rows, strict=False):
            assert sorted(row.tolist()) == sorted(sources[node])


@given(
    n=st.integers(2, 25),
    density=st.sampled_from([0.0, 0.03, 0.1, 0.3]),
    seed=st.integers(0, 1000),
    n_layers=st.integers(0, 4),
    self_loops=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_halo_is_exactly_the_in_neighborhood(n, density, seed, n_layers, self_loops, data) -> None:
    graph = NodeGraph(random_matrix(n, density, seed), self_loops=self_loops)
    destinations = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
    block = graph.block(destinations, n_layers)
    adjacency = graph.csr.toarray().astype(np.int64)
    step = ((adjacency + np.eye(n, dtype=np.int64)) > 0).astype(np.int64)

    assert len(block.indptr) == len(block.indices) == n_layers
    assert len(block.n_nodes) == n_layers + 1
    assert block.n_nodes[-1] == len(destinations)
    assert block.n_nodes[0] == len(block.nodes) == len(set(block.nodes.tolist()))
    np.testing.assert_array_equal(block.nodes[: len(destinations)], destinations)
    for layer in range(n_layers + 1):
        hops = n_layers - layer
        reach = np.linalg.matrix_power(step, hops)[destinations].sum(0) > 0
        assert set(block.nodes[: block.n_nodes[layer]].tolist()) == set(np.flatnonzero(reach).tolist())
    for layer in range(n_layers):
        indptr, indices = block.indptr[layer], block.indices[layer]
        assert len(indptr) == block.n_nodes[layer + 1] + 1
        assert indices.size == 0 or indices.max() < block.n_nodes[layer]
        for row in range(block.n_nodes[layer + 1]):
            sources = block.nodes[indices[indptr[row] : indptr[row + 1]]]
            np.testing.assert_array_equal(np.sort(sources), np.flatnonzero(adjacency[block.nodes[row]]))


@given(
    n=st.integers(1, 12),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 1000),
    self_loops=st.booleans(),
    scale=st.sampled_from([1e-300, 1.0, 1e305]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_weights_say_how_much_more_one_neighbor_counts(n, density, seed, self_loops, scale, data) -> None:
    """Against dense rows: weighted means, once with the node as a neighbor of mean weight."""
    matrix = messy(random_matrix(n, density, seed).toarray() * scale, seed)
    graph, dense = NodeGraph(matrix, self_loops=self_loops, weighted=True), matrix.toarray()
    np.fill_diagonal(dense, 0.0)
    degree = (dense != 0).sum(1)
    total = np.where(degree > 0, dense.sum(1), 1.0)
    others = dense * (degree / total)[:, None]
    np.testing.assert_allclose(graph.csr.toarray(), others + self_loops * np.eye(n), rtol=1e-5)
    np.testing.assert_array_equal(graph.degree, degree)
    nodes = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))

    block = graph.block(nodes, 2)
    for indptr, indices, weight in zip(block.indptr, block.indices, block.edge_weight, strict=True):
        assert weight.dtype == np.float32
        for row, node in enumerate(block.nodes[: len(indptr) - 1]):
            edges = slice(indptr[row], indptr[row + 1])
            np.testing.assert_array_equal(weight[edges], graph.csr[node].toarray()[0, block.nodes[indices[edges]]])

    around, mean = graph.surroundings(nodes)
    np.testing.assert_allclose(
        mean.toarray(), ((others + np.eye(n)) / (degree + 1)[:, None])[np.ix_(nodes, around)], rtol=1e-5, atol=1e-7
    )
    averaging = graph.averaging(nodes, 1).toarray()
    alone = (degree == 0)[nodes]
    np.testing.assert_allclose(averaging[~alone], (dense / total[:, None])[nodes][~alone], rtol=1e-5, atol=1e-7)
    inner = dense[np.ix_(nodes, nodes)]
    within = inner.sum(1, keepdims=True)
    np.testing.assert_allclose(
        graph.among(nodes).toarray(), inner / np.where(within > 0, within, 1.0), rtol=1e-5, atol=1e-7
    )


def test_a_weight_too_small_for_single_precision_is_still_an_edge() -> None:
    matrix = sparse.csr_matrix(([1.0, 1e-300], ([0, 0], [1, 2])), shape=(3, 3))
    for self_loops in (False, True):
        graph = NodeGraph(matrix, self_loops=self_loops, weighted=True)
        assert graph.csr[0].nnz == 2 + self_loops
        assert graph.csr[0, 1] == pytest.approx(2.0)


def test_row_is_the_destination() -> None:
    matrix = sparse.csr_matrix(([1.0], ([0], [1])), shape=(3, 3))
    graph = NodeGraph(matrix, self_loops=False)
    np.testing.assert_array_equal(graph.block([0], 1).nodes, [0, 1])
    np.testing.assert_array_equal(graph.block([1], 1).nodes, [1])


@given(
    n=st.integers(1, 12),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 1000),
    self_loops=st.booleans(),
    hops=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_averaging_is_the_mean_over_neighbors_again_and_again(n, density, seed, self_loops, hops, data) -> None:
    matrix = random_matrix(n, density, seed)
    graph = NodeGraph(matrix, self_loops=self_loops)
    before = graph.csr.toarray()
    destinations = data.draw(st.lists(st.integers(0, n - 1), max_size=n, unique=True))
    averaging = graph.averaging(destinations, hops)
    assert isinstance(averaging, sparse.csr_matrix)
    assert averaging.shape == (len(destinations), n)
    assert averaging.dtype == np.float32
    adjacency = matrix.toarray() != 0
    np.fill_diagonal(adjacency, self_loops)
    sources = [np.flatnonzero(row) for row in adjacency]

    def walk(node: int, weight: float, left: int, reached: np.ndarray) -> np.ndarray:
        """Spread the weight evenly over the sources, and so on."""
        if not left:
            reached[node] += weight
        for source in sources[node] if left else ():
            walk(source, weight / len(sources[node]), left - 1, reached)
        return reached

    for row, node in enumerate(destinations):
        expected = walk(node, 1.0, hops, np.zeros(n))
        expected[node] = 0.0
        if expected.sum() == 0:
            expected[node] = 1.0
        np.testing.assert_allclose(averaging[row].toarray()[0], expected / expected.sum(), rtol=1e-4, atol=1e-6)
        if hops == 1:
            others = sources[node][sources[node] != node]
            assert set(averaging[row].indices) == set(others if len(others) else [node])
    np.testing.assert_array_equal(graph.csr.toarray(), before)


small_graphs = given(
    n=st.integers(1, 12),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 1000),
    self_loops=st.booleans(),
    data=st.data(),
)


@small_graphs
@settings(max_examples=40, deadline=None)
def test_surroundings_are_means_over_nodes_and_their_neighbors(n, density, seed, self_loops, data) -> None:
    matrix = random_matrix(n, density, seed)
    graph = NodeGraph(matrix, self_loops=self_loops)
    before = graph.csr.toarray()
    destinations = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n + 3))
    nodes, mean = graph.surroundings(destinations)
    joined = matrix.toarray() != 0
    np.fill_diagonal(joined, True)
    np.testing.assert_array_equal(nodes, np.flatnonzero(joined[destinations].any(0)))
    expected = joined[destinations] / joined[destinations].sum(1, keepdims=True)
    np.testing.assert_allclose(mean.toarray(), expected[:, nodes], rtol=1e-6)
    assert mean.dtype == np.float32
    np.testing.assert_array_equal(graph.csr.toarray(), before)


@small_graphs
@settings(max_examples=40, deadline=None)
def test_among_is_the_mean_over_those_neighbors_that_are_there(n, density, seed, self_loops, data) -> None:
    matrix = random_matrix(n, density, seed)
    nodes = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
    among = NodeGraph(matrix, self_loops=self_loops).among(nodes)
    joined = (matrix.toarray() != 0)[np.ix_(nodes, nodes)]
    np.fill_diagonal(joined, False)
    np.testing.assert_allclose(among.toarray(), joined / np.maximum(joined.sum(1, keepdims=True), 1), rtol=1e-6)
    assert (among.dtype, among.nnz) == (np.float32, joined.sum())


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_order_finds_the_line_behind_a_shuffled_path(index_dtype: type) -> None:
    n = 30
    names = np.random.default_rng(0).permutation(n)
    row, col = names[:-1], names[1:]
    matrix = sparse.csr_matrix((np.ones(n - 1), (row, col)), shape=(n, n))
    matrix = sparse.csr_matrix(matrix + matrix.T)
    matrix.indices, matrix.indptr = matrix.indices.astype(index_dtype), matrix.indptr.astype(index_dtype)
    rank = NodeGraph(matrix, self_loops=True).order()
    np.testing.assert_array_equal(np.sort(rank), np.arange(n))
    assert (np.abs(rank[row] - rank[col]) == 1).all()


def test_names_decide_where_the_graph_leaves_the_order_open() -> None:
    """Rings, all alike: which comes first, where it begins and in which direction it runs."""
    ring = sparse.csr_matrix(np.roll(np.eye(8), 1, axis=1))
    matrix = sparse.block_diag([ring + ring.T] * 5, format="csr")
    names = np.array([f"node_{i}" for i in range(40)])
    rank = NodeGraph(matrix, self_loops=True).order(names)
    differs = False
    for seed in range(5):
        moved = np.random.default_rng(seed).permutation(40)
        graph = NodeGraph(matrix[moved][:, moved], self_loops=True)
        np.testing.assert_array_equal(graph.order(names[moved]), rank[moved])
        differs |= bool((graph.order() != rank[moved]).any())
    assert differs


def test_hops_are_in_the_order_of_ranks() -> None:
    rng = np.random.default_rng(0)
    graph = NodeGraph(sparse.random(40, 40, 0.08, random_state=0), self_loops=True)
    rank, destinations = rng.permutation(40), [7, 3, 21]
    plain, block = graph.block(destinations, 2), graph.block(destinations, 2, rank)
    assert block.n_nodes == plain.n_nodes
    assert block.nodes[:3].tolist() == destinations
    for start, stop in zip(block.n_nodes[::-1][:-1], block.n_nodes[::-1][1:], strict=True):
        hop = block.nodes[start:stop]
        assert hop.tolist() == sorted(plain.nodes[start:stop], key=lambda node: rank[node])
        assert (np.diff(rank[hop]) > 0).all()
    assert len(block.nodes) > 10
    dense = graph.csr.toarray()
    for indptr, indices, n in zip(block.indptr, block.indices, block.n_nodes[1:], strict=True):
        assert len(indptr) == n + 1
        for i, node in enumerate(block.nodes[:n]):
            read = block.nodes[indices[indptr[i] : indptr[i + 1]]]
            assert sorted(read) == np.flatnonzero(dense[node]).tolist(), "edges are those of the graph"
