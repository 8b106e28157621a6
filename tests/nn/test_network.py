"""The whole network: blocks equal the full graph, and nothing depends on the order of cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.spatial import Delaunay, cKDTree
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fimp_sc.data import (
    Batch,
    BlockDataset,
    BlockSampler,
    CenteredTokenizer,
    ExpressionReader,
    GraphData,
    NodeGraph,
    block_loader,
)
from fimp_sc.model.module._module import FIMPModule
from fimp_sc.nn import TransformerLayer
from fimp_sc.nn._layers import run_layers
from fimp_sc.nn._network import FIMPNetwork, Network
from fimp_sc.nn._read_attention import recorded_influence

N, GENES, LAYERS, TOKENS = 60, 14, 2, 6
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def points(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).random((N, 2))


def with_weights(graph: sparse.csr_matrix, seed=3) -> sparse.csr_matrix:
    """The same edges, whose weights differ."""
    graph = graph.copy()
    graph.data = np.random.default_rng(seed).uniform(0.2, 5.0, len(graph.data))
    return graph


def knn() -> sparse.csr_matrix:
    near = cKDTree(points()).query(points(), 5)[1][:, 1:]
    return sparse.csr_matrix((np.ones(near.size), (np.repeat(np.arange(N), 4), near.ravel())), shape=(N, N))


def delaunay() -> sparse.csr_matrix:
    corners = Delaunay(points()).simplices
    row, col = corners[:, [0, 1, 2]].ravel(), corners[:, [1, 2, 0]].ravel()
    matrix = sparse.csr_matrix((np.ones(row.size), (row, col)), shape=(N, N))
    return sparse.csr_matrix(matrix + matrix.T)


def directed() -> sparse.csr_matrix:
    """Long edges that only go one way, sinks, and cells without neighbors."""
    matrix = sparse.random(N, N, density=0.03, format="lil", random_state=0)
    matrix[:8] = 0
    return matrix.tocsr()


GRAPHS = {"knn": knn, "delaunay": delaunay, "directed": directed}


def make_data(
    graph: sparse.csr_matrix, *, self_loops: bool, order=None, matrix=None, weighted: bool = False
) -> GraphData:
    order = np.arange(N) if order is None else order
    rng = np.random.default_rng(1)
    expression = np.log1p(rng.poisson(0.7, (N, GENES))).astype(np.float32)
    matrix = expression[order] if matrix is None else matrix
    batch = rng.integers(0, 2, N)
    statistics = ExpressionReader(expression, np.arange(GENES), "log", None).gene_statistics(np.arange(N))
    return GraphData(
        expression=ExpressionReader(matrix, np.arange(GENES), "log", statistics, batch=batch[order]),
        graph=NodeGraph(graph[order][:, order], self_loops=self_loops, weighted=weighted),
        coordinates=points()[order],
        library=np.zeros(N, dtype=np.int64),
        label=np.full(N, -1),
        tokenizer=CenteredTokenizer(torch.from_numpy(rng.permutation(GENES))),
    )


def make_loader(data: GraphData, indices=None, batch_size=N, n_layers=LAYERS) -> DataLoader[Batch]:
    sampler = BlockSampler(data, np.arange(N) if indices is None else indices, batch_size=batch_size)
    return block_loader(BlockDataset(data, n_layers=n_layers, n_tokens=TOKENS), sampler)


def make_network(layer="practical", reduce="mean") -> FIMPNetwork:
    torch.manual_seed(0)
    network = FIMPNetwork(GENES, 8, LAYERS, 2, layer=layer, reduce=reduce).eval()
    with torch.no_grad():  # away from the smooth start, where mistakes could cancel
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network


@torch.no_grad()
def embed(network, data, indices=None, batch_size=10_000) -> np.ndarray:
    out = np.full((N, 8), np.nan, dtype=np.float32)
    for batch in make_loader(data, indices, batch_size):
        part = network(batch)
        assert part.shape == (batch["n_nodes"][-1], 8)
        out[batch["nodes"][: len(part)].numpy()] = part.numpy()
    return out


@pytest.mark.parametrize("layer", ["practical", "paper"])
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("graph", GRAPHS)
def test_blocks_of_any_size_equal_the_full_graph(graph: str, self_loops: bool, layer: str) -> None:
    data, network = make_data(GRAPHS[graph](), self_loops=self_loops), make_network(layer)
    full = embed(network, data)
    assert np.isfinite(full).all()
    for batch_size in (1, 7, 30):
        np.testing.assert_allclose(embed(network, data, batch_size=batch_size), full, **TOLERANCE)
    some = np.array([3, 50, 17, 4])
    part = embed(network, data, some, batch_size=2)
    np.testing.assert_allclose(part[some], full[some], **TOLERANCE)
    assert np.isnan(np.delete(part, some, axis=0)).all()


@pytest.mark.parametrize("layer", ["practical", "paper"])
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("graph", GRAPHS)
def test_blocks_of_any_size_equal_the_full_graph_with_weights(graph: str, self_loops: bool, layer: str) -> None:
    network = make_network(layer)
    data = make_data(with_weights(GRAPHS[graph]()), self_loops=self_loops, weighted=True)
    full = embed(network, data)
    for batch_size in (1, 7, 30):
        np.testing.assert_allclose(embed(network, data, batch_size=batch_size), full, **TOLERANCE)
    plain = embed(network, make_data(GRAPHS[graph](), self_loops=self_loops))
    connected = data.graph.degree > 1
    assert (np.abs(full - plain).max(1)[connected] > 1e-4).all(), "weights count wherever there are two neighbors"
    alike = make_data(7.3 * (GRAPHS[graph]() != 0), self_loops=self_loops, weighted=True)
    np.testing.assert_allclose(embed(network, alike), plain, **TOLERANCE)


@given(
    seed=st.integers(0, 1000),
    batch_size=st.integers(1, 40),
    self_loops=st.booleans(),
    reduce=st.sampled_from(["mean", "sum"]),
)
@settings(max_examples=15, deadline=None)
def test_order_of_cells_does_not_matter(seed, batch_size, self_loops, reduce) -> None:
    order = np.random.default_rng(seed).permutation(N)
    network = make_network(reduce=reduce)
    reference = embed(network, make_data(directed(), self_loops=self_loops))
    moved = embed(network, make_data(directed(), self_loops=self_loops, order=order), batch_size=batch_size)
    np.testing.assert_allclose(moved, reference[order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", ["practical", "paper"])
def test_a_cell_sees_exactly_its_neighborhood_of_as_many_hops_as_layers(layer: str) -> None:
    """Change one cell: exactly the cells that reach it within two hops may change, and do."""
    matrix = make_data(directed(), self_loops=True).expression.rows(np.arange(N))
    data, network = make_data(directed(), self_loops=True, matrix=matrix), make_network(layer)
    before = embed(network, data)
    step = (data.graph.csr.toarray() > 0).astype(int)
    reach = np.linalg.matrix_power(step, LAYERS) > 0
    changed = int(reach.sum(0).argmax())
    matrix[changed] += 1.0  # seen by the source, which made its centers before and reads where the values are
    after = embed(network, data)
    moved = np.abs(after - before).max(1) > 1e-6
    assert 1 < reach[:, changed].sum() < N
    np.testing.assert_array_equal(moved, reach[:, changed])


def test_cells_without_neighbors_keep_their_own_description() -> None:
    network = make_network()
    alone = sparse.csr_matrix((N, N))
    with_loops = embed(network, make_data(alone, self_loops=True))
    without = embed(network, make_data(alone, self_loops=False))
    assert np.isfinite(with_loops).all()
    assert np.isfinite(without).all()
    assert np.abs(with_loops - without).max() > 1e-3, "a self-loop lets a cell's own genes interact"
    assert len(np.unique(without.round(5), axis=0)) > N // 2


def embed_at_the_start(graph: str, n_layers: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings of an untrained network; whitened scores, sources as rows that sum to 1, and the vector that marks."""
    torch.manual_seed(0)
    network, data = FIMPNetwork(GENES, 64, n_layers, 4).eval(), make_data(GRAPHS[graph](), self_loops=True)
    centered = data.expression.rows(np.arange(N)) - data.expression.center[data.expression.batch]
    _, size, directions = np.linalg.svd(centered, full_matrices=False)
    loading = directions[:k].T / size[:k] * N**0.5
    network.embedding.start_from(loading)
    batch = next(iter(make_loader(data, n_layers=n_layers)))
    with torch.no_grad():
        embedding = network(batch).numpy()[np.argsort(batch["nodes"].numpy())]
    adjacency = data.graph.csr.toarray()
    mark = network.embedding.summary.detach().numpy()
    return embedding, centered @ loading, adjacency / adjacency.sum(1, keepdims=True), mark


@pytest.mark.parametrize(("n_layers", "graph"), [(1, "knn"), (2, "directed"), (3, "delaunay")])
def test_start_holds_the_components_of_the_cell_itself(n_layers: int, graph: str) -> None:
    embedding, own, *_ = embed_at_the_start(graph, n_layers, 10)
    # Up to the noise of the initialization.
    np.testing.assert_allclose(embedding[:, :10], own, atol=0.25)
    assert np.sqrt(np.mean((embedding[:, :10] - own) ** 2)) < 0.08
    assert np.abs(embedding[:, 10:40]).max() < 0.3, "5 in 8 columns are kept for them"


@pytest.mark.parametrize("graph", GRAPHS)
def test_start_holds_beside_them_the_components_of_the_mean_over_neighbors(graph: str) -> None:
    k = 10
    embedding, own, averaging, mark = embed_at_the_start(graph, 1, k)
    received = embedding[:, 40 : 40 + k]
    # A message passes the norm, which also sees the vector that marks summary tokens.
    summary = np.pad(own, ((0, 0), (0, 64 - k))) + mark
    normed = (summary - summary.mean(1, keepdims=True)) / summary.std(1, keepdims=True)
    expected = 2**0.5 * averaging @ normed[:, :k]
    received, expected = received - received.mean(0), expected - expected.mean(0)
    # Attention to the other tokens takes a share off the message.
    size = (received * expected).sum() / (expected**2).sum()
    assert 0.65 < size <= 1.02
    assert np.sqrt(np.mean((received - size * expected) ** 2)) < 0.25 * expected.std()
    # What differs between cells is the mean over the neighbors, component by component, and of about its size.
    mean = averaging @ own
    similarity = np.corrcoef(received.T, mean.T)[:k, k:]
    assert np.diagonal(similarity).min() > 0.8
    assert np.median(np.diagonal(similarity)) > 0.95
    assert (similarity.argmax(1) == np.arange(k)).all()
    slope = [np.polyfit(mean[:, i], received[:, i], 1)[0] for i in range(k)]
    assert 0.6 < min(slope) < max(slope) < 1.4
    assert np.abs(embedding[:, 56:]).max() < 0.25, "the rest is free"


def test_start_of_two_layers_counts_the_wider_neighborhood_most() -> None:
    k = 8
    embedding, own, averaging, _ = embed_at_the_start("delaunay", 2, k)
    fitted = []
    for i in range(k):
        reads = np.stack([averaging @ own[:, i], averaging @ averaging @ own[:, i], np.ones(N)], axis=1)
        weights, *_ = np.linalg.lstsq(reads, embedding[:, 40 + i], rcond=None)
        fitted.append((*weights[:2], np.corrcoef(reads @ weights, embedding[:, 40 + i])[0, 1]))
    near, wide, similarity = np.array(fitted).T
    assert np.median(similarity) > 0.85
    assert (near > 0).all()
    assert np.median(wide / near) > 1.5
    assert 1.0 < np.median(near + wide) < 2.5
    assert np.abs(embedding[:, 56:]).max() < 0.6, "the rest is free"


def test_at_the_start_cells_without_neighbors_have_nothing_in_the_columns_of_the_neighborhood() -> None:
    torch.manual_seed(0)
    network, data = FIMPNetwork(GENES, 64, 1, 4).eval(), make_data(sparse.csr_matrix((N, N)), self_loops=False)
    batch = next(iter(make_loader(data, n_layers=1)))
    network.embedding.start_from(np.eye(GENES))
    with torch.no_grad():
        embedding = network(batch).numpy()
    np.testing.assert_allclose(embedding[:, :GENES], batch["profile"].numpy(), atol=0.1)
    assert np.abs(embedding[:, GENES:]).max() < 0.1


def test_gradient_reaches_every_parameter() -> None:
    for layer in ("practical", "paper"):
        network = make_network(layer).train()
        data = make_data(knn(), self_loops=True)
        batch = next(iter(make_loader(data)))
        (network(batch) * torch.randn(N, 8)).sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            # A constant added to every key cancels in the softmax.
            assert name.endswith("key.bias") or parameter.grad.abs().max() > 1e-7, name


def test_padding_of_other_cells_in_the_block_changes_nothing() -> None:
    """A cell with few tokens gives the same result beside cells with many."""
    network, data = make_network(), make_data(sparse.csr_matrix((N, N)), self_loops=True)
    together = embed(network, data)
    np.testing.assert_allclose(embed(network, data, batch_size=1), together, **TOLERANCE)
    expressed = (data.expression.rows(np.arange(N)) > 0).sum(1)
    assert expressed.min() < TOKENS <= expressed.max(), "numbers of tokens should differ"


class SumsOfGenes(Network):
    """A network of another kind: the summary of a cell is the sum of its gene tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.n_hops = 8, 1
        self.table = nn.Embedding(GENES, 8)
        self.layers = nn.ModuleList([TransformerLayer(8, 2, d_feedforward=8, dropout=0.0)])

    def tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        genes = self.table(batch["feature_id"]) * batch["value"][..., None]
        genes = genes.masked_fill(batch["padding"][..., None], 0.0)
        return torch.cat([genes.sum(1, keepdim=True), genes], 1), nn.functional.pad(batch["padding"], (1, 0))

    def n_queries(self, batch: Batch, *, reconstruct: bool = False) -> int:
        return 1

    def states(self, batch: Batch, n_queries: int | None = None, tokens=None) -> Tensor:
        return run_layers(self.layers, *(tokens or self.tokens(batch)), batch, n_queries)

    def read(self, tokens: Tensor, batch: Batch) -> Tensor:
        return tokens[:, 0]

    def split(self, tokens: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {}

    @property
    def heads(self) -> dict[str, nn.Module]:
        return {}

    def message_layers(self) -> list[nn.Module]:
        return list(self.layers)

    def tokenizer(self, gene_rank, gene_key, random_state) -> CenteredTokenizer:
        return CenteredTokenizer(gene_rank)


def test_a_network_of_another_kind_needs_no_more_than_the_contract() -> None:
    data, network = make_data(knn(), self_loops=True), SumsOfGenes()
    module = FIMPModule(GENES, network=network)
    batch = next(iter(make_loader(data, np.arange(20), n_layers=1)))
    batch["target_mask"] = torch.ones_like(batch["target"], dtype=torch.bool)
    outputs, _, losses = module(batch)
    torch.testing.assert_close(outputs["embedding"], network(batch))
    assert outputs["embedding"].shape == (20, 8)
    losses.loss.backward()
    assert network.table.weight.grad.abs().sum() > 0
    with recorded_influence(network, len(batch["nodes"]), 20) as found:
        network(batch)
    assert [part.shape for part in found] == [(80,)]
    with pytest.raises(TypeError, match="SumsOfGenes has no decoder of bins"):
        module.inference(batch, torch.tensor([0]))
    with pytest.raises(TypeError, match="Only FIMP-base of genes"):
        module.start_from_vectors(np.zeros((GENES, 3)), np.ones(GENES, dtype=bool))
