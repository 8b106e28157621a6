"""Cross-node attention: every backend against a loop over edges, torch's own attention and its own invariances."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fimp_sc.nn import CrossNodeAttention, attention_backend, cross_node_attention
from fimp_sc.nn.ops import _attend

HYPOTHESIS = settings(max_examples=25, deadline=None)
TOLERANCE = {"rtol": 1e-10, "atol": 1e-11}
# The kernels of the triton backend have tests of their own.
BACKENDS = ["numba", "chunked", "dense"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


class Graph(NamedTuple):
    indptr: Tensor
    indices: Tensor

    def sources(self, node: int) -> list[int]:
        return self.indices[self.indptr[node] : self.indptr[node + 1]].tolist()


def graph_from(rows: list[list[int]]) -> Graph:
    degree = torch.tensor([0, *map(len, rows)], dtype=torch.int64)
    return Graph(degree.cumsum(0), torch.tensor([j for row in rows for j in row], dtype=torch.int64))


@st.composite
def problems(draw: st.DrawFn) -> dict:
    n_dst, n_src = draw(st.integers(1, 9)), draw(st.integers(1, 14))
    rows = []
    for _ in range(n_dst):
        sources = st.lists(st.integers(0, n_src - 1), max_size=min(12, n_src), unique=True)
        rows.append(draw(sources))
    heads, dim = draw(st.sampled_from([(1, 1), (1, 4), (2, 3), (3, 2), (4, 1)]))
    f_dst, f_src = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    graph = graph_from(rows)
    padding = None
    if draw(st.booleans()):
        padding = torch.rand(n_src, f_src, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    return {
        "query": normal(n_dst, heads, f_dst, dim),
        "key": normal(n_src, heads, f_src, dim),
        "value": normal(n_src, heads, f_src, dim),
        "graph": graph,
        "edge_weight": normal(len(graph.indices)) if draw(st.booleans()) else None,
        "padding": padding,
        "reduce": draw(st.sampled_from(["mean", "sum"])),
        "chunk_size": draw(st.sampled_from([None, 1, 2, 5, 17])),
        "up": torch.randn(n_dst, heads, f_dst, dim, generator=generator, dtype=torch.float64),
    }


def naive(query, key, value, graph, edge_weight=None, padding=None, reduce="mean") -> Tensor:
    """The definition, edge by edge and head by head."""
    rows = []
    for i in range(len(query)):
        begin, end = int(graph.indptr[i]), int(graph.indptr[i + 1])
        total = torch.zeros_like(query[i])
        for e in range(begin, end):
            j = int(graph.indices[e])
            seen = torch.ones(key.shape[2], dtype=torch.bool) if padding is None else ~padding[j]
            if not seen.any():
                continue
            heads = []
            for h in range(query.shape[1]):
                scores = query[i, h] @ key[j, h, seen].T / math.sqrt(query.shape[3])
                heads.append(torch.softmax(scores, -1) @ value[j, h, seen])
            total = total + torch.stack(heads) * (1.0 if edge_weight is None else edge_weight[e])
        rows.append(total / max(end - begin, 1) if reduce == "mean" else total)
    return torch.stack(rows)


def gradients(out: Tensor, up: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    # Unused inputs (a graph without edges) have no gradient in the loop and a zero one in the engine.
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(out, inputs, up, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@every_backend
@given(problem=problems())
@HYPOTHESIS
def test_equals_the_loop_over_edges_with_all_gradients(backend: str, problem: dict) -> None:
    tensors = [problem["query"], problem["key"], problem["value"]]
    inputs = [*tensors, *([problem["edge_weight"]] if problem["edge_weight"] is not None else [])]
    out = cross_node_attention(
        *tensors,
        problem["graph"].indptr,
        problem["graph"].indices,
        edge_weight=problem["edge_weight"],
        key_padding_mask=problem["padding"],
        reduce=problem["reduce"],
        backend=backend,
        chunk_size=problem["chunk_size"],
    )
    expected = naive(*tensors, problem["graph"], problem["edge_weight"], problem["padding"], problem["reduce"])
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected, **TOLERANCE)
    for ours, theirs in zip(
        gradients(out, problem["up"], inputs), gradients(expected, problem["up"], inputs), strict=True
    ):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


def torch_attention(layer: CrossNodeAttention, d_model: int) -> nn.MultiheadAttention:
    """torch's own attention with the same weights."""
    reference = nn.MultiheadAttention(d_model, layer.n_heads, batch_first=True, dtype=torch.float64)
    projections = (layer.query, layer.key, layer.value)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        reference.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        reference.out_proj.weight.copy_(layer.output.weight)
        reference.out_proj.bias.copy_(layer.output.bias)
    return reference


@every_backend
@given(
    rows=st.lists(st.lists(st.integers(0, 10), max_size=11, unique=True), min_size=1, max_size=6),
    n_queries=st.integers(1, 4),
    n_tokens=st.integers(1, 5),
    d_model_heads=st.sampled_from([(4, 1), (6, 2), (6, 3), (8, 4)]),
    seed=st.integers(0, 2**31),
    padded=st.booleans(),
)
@HYPOTHESIS
def test_layer_equals_multihead_attention_per_edge(
    backend, rows, n_queries, n_tokens, d_model_heads, seed, padded
) -> None:
    d_model, heads = d_model_heads
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = CrossNodeAttention(d_model, heads).double()
        for linear in (layer.query, layer.key, layer.value, layer.output):
            nn.init.normal_(linear.bias)
    reference = torch_attention(layer, d_model)
    graph = graph_from(rows)
    queries = torch.randn(len(rows), n_queries, d_model, generator=generator, dtype=torch.float64).requires_grad_()
    tokens = torch.randn(11, n_tokens, d_model, generator=generator, dtype=torch.float64).requires_grad_()
    padding = torch.rand(11, n_tokens, generator=generator) < (0.4 if padded else 0.0)
    padding[:, 0] = False  # torch's layer has no answer where everything is padding

    with attention_backend(backend):
        out = layer(tokens, padding, graph.indptr, graph.indices, own=queries)
    expected = []
    for i in range(len(rows)):
        messages = [
            reference(queries[i : i + 1], tokens[j : j + 1], tokens[j : j + 1], key_padding_mask=padding[j : j + 1],
                      need_weights=False)[0][0]
            for j in graph.sources(i)
        ]  # fmt: skip
        expected.append(torch.stack(messages).mean(0) if messages else torch.zeros_like(queries[i]))
    expected = torch.stack(expected)
    torch.testing.assert_close(out, expected, **TOLERANCE)

    up = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    inputs = [queries, tokens]
    ours = gradients(out, up, [*inputs, *layer.parameters()])
    theirs = gradients(expected, up, [*inputs, *reference.parameters()])
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    weights = dict(zip((n for n, _ in layer.named_parameters()), ours[2:], strict=True))
    stacked = dict(zip((n for n, _ in reference.named_parameters()), theirs[2:], strict=True))
    for kind, prefix in (("weight", "in_proj_weight"), ("bias", "in_proj_bias")):
        together = torch.cat([weights[f"{part}.{kind}"] for part in ("query", "key", "value")])
        torch.testing.assert_close(together, stacked[prefix], **TOLERANCE)
        torch.testing.assert_close(weights[f"output.{kind}"], stacked[f"out_proj.{kind}"], **TOLERANCE)


def random_inputs(n_dst=5, n_src=7, f=3, heads=2, dim=4, dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(n, heads, f, dim, generator=generator, dtype=dtype).requires_grad_() for n in (n_dst, n_src, n_src)
    )


GRAPH = graph_from([[0, 3, 6], [], [2], [1, 2, 3, 4, 5], [6, 0]])


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gradcheck(reduce: str) -> None:
    weight = torch.rand(len(GRAPH.indices), dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    padding = torch.zeros(7, 3, dtype=torch.bool)
    padding[2, 1:], padding[6] = True, True

    def engine(query, key, value, weight):
        return cross_node_attention(
            query, key, value, *GRAPH, edge_weight=weight, key_padding_mask=padding, reduce=reduce, chunk_size=2
        )

    assert torch.autograd.gradcheck(engine, (*random_inputs(dim=2), weight.requires_grad_()))


@given(order=st.permutations(range(7)), seed=st.integers(0, 100))
@HYPOTHESIS
def test_order_of_nodes_and_of_neighbors_does_not_matter(order: list[int], seed: int) -> None:
    query, key, value = random_inputs(n_dst=7, seed=seed)
    rows = [[0, 3, 6], [], [2], [1, 2, 3, 4, 5], [6, 0], [5], [4, 3, 2, 1]]
    weights = {(i, j): 1.0 + 0.1 * i + 0.01 * j for i, row in enumerate(rows) for j in row}
    new = {old: position for position, old in enumerate(order)}
    permuted = [sorted((new[j] for j in rows[i]), key=lambda j: (j * 5) % 7) for i in order]

    def engine(rows, q, k, v, weight):
        edges = [weight(i, j) for i, row in enumerate(rows) for j in row]
        return cross_node_attention(q, k, v, *graph_from(rows), edge_weight=torch.tensor(edges, dtype=q.dtype))

    out = engine(rows, query, key, value, lambda i, j: weights[i, j])
    index = torch.tensor(order)
    moved = engine(permuted, query[index], key[index], value[index], lambda i, j: weights[order[i], order[j]])
    torch.testing.assert_close(moved, out[index], **TOLERANCE)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
def test_chunk_size_does_not_change_values_or_gradients(chunk_size: int) -> None:
    inputs = random_inputs()
    up = torch.ones_like(inputs[0])
    whole = cross_node_attention(*inputs, *GRAPH)
    chunked = cross_node_attention(*inputs, *GRAPH, chunk_size=chunk_size)
    torch.testing.assert_close(chunked, whole, **TOLERANCE)
    for a, b in zip(gradients(chunked, up, list(inputs)), gradients(whole, up, list(inputs)), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@every_backend
def test_isolated_nodes_receive_exactly_zero_also_behind_the_output_bias(backend: str) -> None:
    layer = CrossNodeAttention(8, 2)
    nn.init.constant_(layer.output.bias, 3.0)
    nn.init.constant_(layer.value.bias, 2.0)
    with attention_backend(backend):
        out = layer(torch.randn(7, 3, 8), torch.zeros(7, 3, dtype=torch.bool), *GRAPH)
    assert (out[1] == 0).all()
    assert (out[[0, 2, 3, 4]] != 0).all()


@every_backend
@pytest.mark.parametrize("n_dst", [0, 3])
def test_graph_without_edges(n_dst: int, backend: str) -> None:
    query, key, value = random_inputs(n_dst=n_dst)
    out = cross_node_attention(query, key, value, *graph_from([[]] * n_dst), backend=backend)
    assert out.shape == query.shape
    assert (out == 0).all()
    out.sum().backward()
    assert all((x.grad == 0).all() for x in (query, key, value))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_source_of_padding_only_sends_zeros_and_no_nan(dtype: torch.dtype, backend: str) -> None:
    query, key, value = random_inputs(dtype=dtype)
    padding = torch.zeros(7, 3, dtype=torch.bool)
    padding[2] = True
    out = cross_node_attention(query, key, value, *GRAPH, key_padding_mask=padding, reduce="sum", backend=backend)
    assert (out[2] == 0).all()
    assert (out[3] != 0).all()
    out.square().sum().backward()
    for tensor in (query, key, value):
        assert torch.isfinite(tensor.grad).all()
    assert (key.grad[2] == 0).all()
    assert (value.grad[2] == 0).all()


@every_backend
def test_padded_tokens_have_no_influence_and_no_gradient(backend: str) -> None:
    query, key, value = random_inputs()
    padding = torch.zeros(7, 3, dtype=torch.bool)
    padding[:, 2] = True
    out = cross_node_attention(query, key, value, *GRAPH, key_padding_mask=padding, backend=backend)
    shorter = cross_node_attention(query, key[:, :, :2], value[:, :, :2], *GRAPH)
    torch.testing.assert_close(out, shorter, **TOLERANCE)
    out.sum().backward()
    assert (key.grad[:, :, 2] == 0).all()
    assert (value.grad[:, :, 2] == 0).all()


class LargestTensor(TorchDispatchMode):
    """Remember the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def memory(backend: str, degree: int) -> tuple[int, int]:
    """Numbers in the largest tensor made in forward and backward pass, and in all that the forward pass keeps."""
    n_nodes, tokens, heads, dim = 48, 10, 2, 4
    graph = graph_from([[(i + step) % n_nodes for step in range(degree)] for i in range(n_nodes)])
    inputs = random_inputs(n_nodes, n_nodes, tokens, heads, dim)
    weight = torch.rand(n_nodes * degree, dtype=torch.float64).requires_grad_()
    padding = torch.zeros(n_nodes, tokens, dtype=torch.bool)
    padding[3, 4:] = True
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with LargestTensor() as largest, saved_tensors_hooks(pack, lambda tensor: tensor):
        out = cross_node_attention(
            *inputs, *graph, edge_weight=weight, key_padding_mask=padding, backend=backend, chunk_size=16
        )
        out.sum().backward()
    if backend != "dense":
        # The mode sees an operation of torch as a whole: its passes are run again.
        tensors = [x.detach() for x in inputs]
        given = (*tensors, None, None, weight.detach(), *graph, padding, tokens, backend, 16)
        with largest:
            _attend.compute(*given)
            _attend.compute_backward(tensors[0], *given, [True, True, True, False, False, True])
    return largest.numel, sum(saved)


NODES = 48 * 10 * 2 * 4  # numbers in one tensor of one width per token


@pytest.mark.parametrize("backend", ["numba", "chunked"])
@pytest.mark.parametrize("degree", [4, 32])
def test_memory_grows_with_nodes_not_with_edges(degree: int, backend: str) -> None:
    largest, saved = memory(backend, degree)
    assert NODES <= largest <= 1.5 * NODES  # at least: the mode did see the passes
    # Inputs, padding, row pointers and a few numbers for each edge: nothing is kept where no hook sees it.
    assert saved <= 3 * NODES + 48 * (10 + 4 * degree) + 49


def test_memory_test_sees_the_layout_per_edge() -> None:
    largest, saved = memory("dense", 32)
    assert largest >= 32 * NODES
    assert saved >= 3 * 32 * NODES
