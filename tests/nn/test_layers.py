"""Layers against torch's own encoder layer and against the paper's formula."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import sparse
from torch import Tensor, nn

from fimp_sc.data import NodeGraph
from fimp_sc.nn import PaperLayer, TransformerLayer
from fimp_sc.nn._layers import run_layers

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def tokens_and_padding(n=6, f=5, d=8, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    padding = torch.rand(n, f, generator=generator) < 0.4
    padding[:, 0] = False
    return torch.randn(n, f, d, generator=generator, dtype=torch.float64).requires_grad_(), padding


def self_loops(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n + 1), torch.arange(n)


def random_graph(n=6, seed=0, self_loops=False):
    matrix = sparse.random(n, n, density=0.4, format="csr", random_state=seed)
    csr = NodeGraph(matrix, self_loops=self_loops).csr
    return torch.from_numpy(csr.indptr).long(), torch.from_numpy(csr.indices).long()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_on_self_loops_equals_the_encoder_layer_of_torch(norm_first: bool, activation: str) -> None:
    torch.manual_seed(0)
    layer = TransformerLayer(
        8, 2, d_feedforward=16, norm_first=norm_first, activation=activation, dropout=0.0, eps=1e-3
    ).double()
    reference = nn.TransformerEncoderLayer(
        8, 2, 16, 0.0, activation, 1e-3, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    pairs = [
        (layer.attention.output, reference.self_attn.out_proj),
        (layer.expand, reference.linear1),
        (layer.contract, reference.linear2),
        (layer.attention_norm, reference.norm1),
        (layer.feedforward_norm, reference.norm2),
    ]
    projections = [layer.attention.query, layer.attention.key, layer.attention.value]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        for ours, theirs in pairs:
            theirs.weight.copy_(ours.weight)
            theirs.bias.copy_(ours.bias)
        reference.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        reference.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    tokens, padding = tokens_and_padding()

    out = layer(tokens, padding, *self_loops(len(tokens)))
    expected = reference(tokens, src_key_padding_mask=padding)
    torch.testing.assert_close(out, expected, **TOLERANCE)

    up = torch.randn_like(out)
    ours = torch.autograd.grad(out, [tokens, *(p.weight for p, _ in pairs)], up)
    theirs = torch.autograd.grad(expected, [tokens, *(p.weight for _, p in pairs)], up)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_paper_layer_equals_its_formula(reduce: str) -> None:
    torch.manual_seed(0)
    n, f, d, heads = 6, 5, 8, 2
    layer = PaperLayer(d, heads, reduce=reduce).double()
    tokens, padding = tokens_and_padding(n, f, d)
    indptr, indices = torch.tensor([0, 2, 2, 3, 7, 8, 11]), torch.tensor([1, 4, 2, 0, 5, 1, 4, 3, 5, 0, 2])
    expected = []
    for i in range(n):
        total = torch.zeros(f, d, dtype=torch.float64)
        sources = indices[indptr[i] : indptr[i + 1]].tolist()
        for j in sources:
            seen = ~padding[j]
            q, k, v = (
                linear(x).unflatten(1, (heads, -1)).transpose(0, 1)
                for linear, x in (
                    (layer.attention.query, tokens[i]),
                    (layer.attention.key, tokens[j][seen]),
                    (layer.attention.value, tokens[j][seen]),
                )
            )
            message = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(d / heads), -1) @ v
            total = total + message.transpose(0, 1).flatten(1)
        mean = total / max(len(sources), 1) if reduce == "mean" else total
        expected.append((tokens[i] + mean) @ layer.combine.weight.T + layer.combine.bias)
    torch.testing.assert_close(layer(tokens, padding, indptr, indices), torch.stack(expected), **TOLERANCE)


def make_layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "paper":
        return PaperLayer(8, 2).double()
    return TransformerLayer(8, 2, d_feedforward=16, norm_first=kind == "pre", dropout=0.0).double()


@pytest.mark.parametrize("n_queries", [1, 3])
@pytest.mark.parametrize("kind", ["paper", "pre", "post"])
def test_n_queries_is_a_slice_of_the_full_result(kind: str, n_queries: int) -> None:
    layer = make_layer(kind)
    tokens, padding = tokens_and_padding()
    graph = random_graph(self_loops=True)
    full = layer(tokens, padding, *graph)
    torch.testing.assert_close(layer(tokens, padding, *graph, n_queries=n_queries), full[:, :n_queries], **TOLERANCE)


@pytest.mark.parametrize("kind", ["paper", "pre", "post"])
def test_only_destinations_are_returned(kind: str) -> None:
    layer = make_layer(kind)
    tokens, padding = tokens_and_padding()
    indptr, indices = random_graph(self_loops=True)
    full = layer(tokens, padding, indptr, indices)
    first = layer(tokens, padding, indptr[:4], indices[: indptr[3]])
    torch.testing.assert_close(first, full[:3], **TOLERANCE)


def test_isolated_nodes_are_only_changed_by_the_feedforward_part() -> None:
    layer = make_layer("pre")
    nn.init.constant_(layer.attention.output.bias, 5.0)
    tokens, padding = tokens_and_padding()
    out = layer(tokens, padding, torch.zeros(7, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    hidden = nn.functional.gelu(layer.expand(layer.feedforward_norm(tokens)))
    torch.testing.assert_close(out, tokens + layer.contract(hidden), **TOLERANCE)


@pytest.mark.parametrize("read", [slice(6), slice(20, 26)])
@pytest.mark.parametrize("focus", [0.0, 8.0])
def test_start_is_the_mean_over_neighbors_of_some_columns_in_columns_of_their_own(focus: float, read: slice) -> None:
    """Without noise exactly so: of the counterparts where attention is strict, of all tokens where there is none."""
    torch.manual_seed(0)
    layer = TransformerLayer(32, 4, d_feedforward=64, dropout=0.0)
    layer.start_as_neighbor_mean(read, slice(20, 26), 1.5, focus=focus, noise=0.0)
    # Kinds that differ in every head: orthogonal there, and centered as the norm centers them.
    kinds = 3.0 * torch.eye(8)[torch.stack([torch.randperm(8) for _ in range(4)], 1)[:5]].flatten(1)
    # Nodes hold the same kinds in orders of their own, with small differences and of different size.
    order = torch.stack([torch.randperm(5) for _ in range(4)])
    size = torch.tensor([1.0, 2.0, 0.5, 3.0])[:, None, None]
    tokens = size * (kinds[order] + 0.1 * torch.randn(4, 5, 32))
    edges = {0: [1, 2, 3], 1: [0], 2: [], 3: [2, 1]}
    indptr, indices = torch.tensor([0, 3, 4, 4, 6]), torch.tensor([1, 2, 3, 0, 2, 1])
    with torch.no_grad():
        out = layer(tokens, torch.zeros(4, 5, dtype=torch.bool), indptr, indices)
    normed = (tokens - tokens.mean(2, keepdim=True)) / tokens.std(2, correction=0, keepdim=True)
    expected = tokens.clone()
    for i, sources in edges.items():
        for t in range(5):
            for j in sources:
                received = normed[j].mean(0) if focus == 0 else normed[j, order[j] == order[i, t]][0]
                expected[i, t, 20:26] += 1.5 * received[read] / len(sources)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_noise_is_the_share_of_the_random_initialization_that_remains() -> None:
    torch.manual_seed(0)
    layer = TransformerLayer(16, 2, d_feedforward=32)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    layer.start_as_neighbor_mean(slice(1, 4), slice(9, 12), 0.7, focus=1.4, noise=0.1)
    expected = {name: before[name] for name in before if name.startswith("expand") or "norm" in name}
    for name in ("attention.query", "attention.key", "attention.value", "attention.output", "contract"):
        expected[f"{name}.weight"] = 0.1 * before[f"{name}.weight"]
        expected[f"{name}.bias"] = torch.zeros_like(before[f"{name}.bias"])
    for i in range(16):
        expected["attention.query.weight"][i, i] += 1.4
        expected["attention.key.weight"][i, i] += 1.4
    for i in range(3):
        expected["attention.value.weight"][9 + i, 1 + i] += 1.0
        expected["attention.output.weight"][9 + i, 9 + i] += 0.7
    assert set(expected) == set(before)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], msg=name)


def test_run_layers_on_a_block_equals_all_layers_on_the_whole_graph() -> None:
    layers = nn.ModuleList([make_layer("pre"), make_layer("paper"), make_layer("post")])
    tokens, padding = tokens_and_padding(n=14)
    graph = NodeGraph(sparse.random(14, 14, density=0.12, format="csr", random_state=3), self_loops=True)
    full = tokens
    for layer in layers:
        full = layer(full, padding, *(torch.from_numpy(x).long() for x in (graph.csr.indptr, graph.csr.indices)))
    destinations = [9, 2]
    block = graph.block(destinations, 3)
    assert len(block.nodes) < 14
    batch = {
        "indptr": [torch.from_numpy(x) for x in block.indptr],
        "indices": [torch.from_numpy(x) for x in block.indices],
    }
    nodes = torch.from_numpy(block.nodes)
    out = run_layers(layers, tokens[nodes], padding[nodes], batch, n_queries=None)
    torch.testing.assert_close(out, full[destinations], **TOLERANCE)
    first = run_layers(layers, tokens[nodes], padding[nodes], batch, n_queries=2)
    torch.testing.assert_close(first, full[destinations][:, :2], **TOLERANCE)
