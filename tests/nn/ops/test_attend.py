"""Both backends for CPUs against the dense one: large graphs, precisions, autocast, unneeded gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fimp_sc.nn import CrossNodeAttention, attention_backend, cross_node_attention
from fimp_sc.nn.ops import _chunked

if TYPE_CHECKING:
    from collections.abc import Iterator

HYPOTHESIS = settings(max_examples=25, deadline=None)
BACKENDS = ["numba", "chunked"]
both_backends = pytest.mark.parametrize("backend", BACKENDS)
HALVES = [torch.float16, torch.bfloat16]


def random_graph(degree: list[int], n_src: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    indptr = torch.tensor([0, *degree]).cumsum(0)
    return indptr, torch.randint(n_src, (int(indptr[-1]),), generator=generator)


def run(inputs: dict[str, Tensor], up: Tensor, **kwargs) -> dict[str, Tensor]:
    """Result and gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = cross_node_attention(**leaves, **kwargs)
    grads = torch.autograd.grad(out, list(leaves.values()), up.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Errors relative to the largest entry of all gradients: what is summed up in one of them may cancel."""
    largest = max(float(x.double().abs().max()) for x in expected.values() if x.numel())
    for name, x in found.items():
        error = float((x.double() - expected[name].double()).abs().max()) if x.numel() else 0.0
        assert error <= tolerance * (largest + 0.1), f"{name}: {error:.3g} > {tolerance * (largest + 0.1):.3g}"


@both_backends
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@given(
    degree=st.lists(st.one_of(st.integers(0, 8), st.integers(0, 100)), min_size=1, max_size=8),
    n_src=st.integers(1, 20),
    tokens=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    heads_dim=st.sampled_from([(1, 8), (2, 4), (4, 3)]),
    weighted=st.booleans(),
    padded=st.sampled_from([None, 0.0, 0.3, 0.9]),
    reduce=st.sampled_from(["mean", "sum"]),
    chunk_size=st.sampled_from([None, 1, 3, 20, 64]),
    seed=st.integers(0, 2**31),
)
@HYPOTHESIS
def test_equals_dense(
    backend, dtype, tolerance, degree, n_src, tokens, heads_dim, weighted, padded, reduce, chunk_size, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, dim = heads_dim
    indptr, indices = random_graph(degree, n_src, generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {
        "query": normal(len(degree), heads, tokens[0], dim),
        "key": normal(n_src, heads, tokens[1], dim),
        "value": normal(n_src, heads, tokens[1], dim),
    }
    if weighted:
        inputs["edge_weight"] = normal(len(indices))
    mask = None if padded is None else torch.rand(n_src, tokens[1], generator=generator) < padded
    up = normal(*inputs["query"].shape)
    graph = {"indptr": indptr, "indices": indices, "key_padding_mask": mask, "reduce": reduce}
    found = run(inputs, up, **graph, backend=backend, chunk_size=chunk_size)
    assert all(x.dtype == dtype for x in found.values())
    expected = run({name: x.double() for name, x in inputs.items()}, up, **graph, backend="dense")
    assert_near(found, expected, tolerance)


def inputs_in(dtype: torch.dtype, n_dst=6, n_src=9, tokens=5, scale=1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (n_dst, 2, tokens, 8), "key": (n_src, 2, tokens, 8), "value": (n_src, 2, tokens, 8)}
    return {name: (torch.randn(*shape, generator=generator) * scale).to(dtype) for name, shape in shapes.items()}


@pytest.fixture(params=["numba", "chunked", "chunked, halves"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Products of halves as on CPUs, made of singles, and as on accelerators."""
    if request.param == "chunked, halves":
        monkeypatch.setattr(_chunked, "compute_dtype", lambda x: x.dtype)
    with attention_backend(request.param.split(",")[0]):
        yield request.param


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_near_singles(dtype: torch.dtype, products: str) -> None:
    generator = torch.Generator().manual_seed(1)
    indptr, indices = random_graph([3, 0, 40, 7, 7, 1], 9, generator)
    inputs = inputs_in(dtype)
    up = torch.randn(inputs["query"].shape, generator=generator).to(dtype)
    padding = torch.zeros(9, 5, dtype=torch.bool)
    padding[4, 2:] = True
    graph = {"indptr": indptr, "indices": indices, "key_padding_mask": padding}
    weight = torch.rand(len(indices), generator=generator)
    found = run({**inputs, "edge_weight": weight}, up, **graph, chunk_size=8)
    assert found["out"].dtype == found["query"].dtype == found["key"].dtype == found["value"].dtype == dtype
    assert found["edge_weight"].dtype == torch.float32
    singles = {name: x.float() for name, x in inputs.items()}
    expected = run({**singles, "edge_weight": weight}, up, **graph, backend="dense")
    # Rounding of the results alone, or of each product as well.
    assert_near(found, expected, torch.finfo(dtype).eps * (4 if products == "chunked, halves" else 1))


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_over_edges_are_in_single_precision(dtype: torch.dtype, products: str) -> None:
    # Adding ones, bfloat16 stops at 256 and float16 at 2048.
    n = 300 if dtype == torch.bfloat16 else 2500
    stuck = torch.zeros((), dtype=dtype)
    for _ in range(n):
        stuck += 1
    assert stuck < n * 0.9

    one = torch.ones(1, 1, 1, 4, dtype=dtype)
    many, each = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    gathered = run(
        {"query": one, "key": one.repeat(n, 1, 1, 1), "value": one.repeat(n, 1, 1, 1)}, one,
        indptr=torch.tensor([0, n]), indices=many, reduce="sum", chunk_size=1,
    )  # fmt: skip
    spread = run(
        {"query": one.repeat(n, 1, 1, 1), "key": one, "value": one}, one.repeat(n, 1, 1, 1),
        indptr=torch.arange(n + 1), indices=each, reduce="sum", chunk_size=1,
    )  # fmt: skip
    for total in (gathered["out"], spread["value"]):
        torch.testing.assert_close(total, torch.full_like(total, n))


@both_backends
def test_autocast_changes_neither_dtype_nor_result(backend: str) -> None:
    indptr, indices = random_graph([3, 0, 4, 2, 1, 6], 9, torch.Generator().manual_seed(1))
    inputs = inputs_in(torch.float32)
    up = torch.ones_like(inputs["query"])
    graph = {"indptr": indptr, "indices": indices, "backend": backend}
    expected = run(inputs, up, **graph)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(inputs, up, **graph)
    for name, x in found.items():
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, expected[name], rtol=0, atol=1e-5)


def test_layer_under_autocast() -> None:
    generator = torch.Generator().manual_seed(1)
    indptr, indices = random_graph([3, 0, 4, 2, 1, 6], 9, generator)
    layer = CrossNodeAttention(16, 2)
    tokens = torch.randn(9, 5, 16, generator=generator).requires_grad_()
    padding = torch.zeros(9, 5, dtype=torch.bool)
    plain = layer(tokens, padding, indptr, indices)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(tokens, padding, indptr, indices)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain, rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert tokens.grad.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@both_backends
@pytest.mark.parametrize("needed", ["query", "key", "value", "edge_weight"])
def test_one_gradient_alone_is_the_same(needed: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    indptr, indices = random_graph([3, 0, 4, 2, 1, 6], 9, generator)
    inputs = {**inputs_in(torch.float64), "edge_weight": torch.rand(16, generator=generator, dtype=torch.float64)}
    graph = {"indptr": indptr, "indices": indices, "backend": backend}
    expected = run(inputs, torch.ones_like(inputs["query"]), **graph)[needed]
    inputs[needed].requires_grad_()
    cross_node_attention(**inputs, **graph).sum().backward()
    torch.testing.assert_close(inputs[needed].grad, expected, rtol=1e-10, atol=1e-12)


@both_backends
def test_large_scores_do_not_overflow(backend: str) -> None:
    indptr, indices = random_graph([3, 0, 4, 2, 1, 6], 9, torch.Generator().manual_seed(1))
    inputs = inputs_in(torch.float32, scale=100.0)
    found = run(inputs, torch.ones_like(inputs["query"]), indptr=indptr, indices=indices, backend=backend)
    assert all(torch.isfinite(x).all() for x in found.values())


def test_second_derivatives_are_refused() -> None:
    inputs = {name: x.requires_grad_() for name, x in inputs_in(torch.float32).items()}
    indptr, indices = random_graph([3, 0, 4, 2, 1, 6], 9, torch.Generator().manual_seed(1))
    out = cross_node_attention(**inputs, indptr=indptr, indices=indices)
    (first,) = torch.autograd.grad(out.square().sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
