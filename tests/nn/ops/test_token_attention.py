"""Attention that projects tokens head by head against maps that are applied first, and the dense backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fimp_sc.nn import attention_backend
from fimp_sc.nn._foundation import LowRankLinear
from fimp_sc.nn.ops import _api
from fimp_sc.nn.ops._api import token_attention

if TYPE_CHECKING:
    from collections.abc import Iterator


def make_maps(width: int, seed: int = 0) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tuple(nn.Linear(width, width).double() for _ in range(3))


def random_graph(degree: list[int], n_src: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    indptr = torch.tensor([0, *degree]).cumsum(0)
    return indptr, torch.randint(n_src, (int(indptr[-1]),), generator=generator)


def result_and_gradients(inputs: list[Tensor], call, up_seed: int = 5) -> list[Tensor]:
    out = call()
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(up_seed), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, up)]


@given(
    degree=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    more=st.integers(0, 4),
    n_tokens=st.integers(1, 5),
    n_queries=st.sampled_from([None, 1, 2, 9]),
    width_heads=st.sampled_from([(4, 1), (6, 2), (6, 3), (8, 4)]),
    apart=st.booleans(),
    padded=st.booleans(),
    weighted=st.booleans(),
    reduce=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_dense_backend(
    degree, more, n_tokens, n_queries, width_heads, apart, padded, weighted, reduce, seed
) -> None:
    width, heads = width_heads
    generator = torch.Generator().manual_seed(seed)
    n_src = len(degree) + more
    indptr, indices = random_graph(degree, n_src, generator)
    maps = make_maps(width)
    tokens = torch.randn(n_src, n_tokens, width, generator=generator, dtype=torch.float64).requires_grad_()
    inputs = [tokens, *(p for part in maps for p in part.parameters())]
    own = None
    if apart:
        own = torch.randn(len(degree), 3, width, generator=generator, dtype=torch.float64).requires_grad_()
        inputs.append(own)
    weight = None
    if weighted:
        weight = torch.rand(len(indices), generator=generator, dtype=torch.float64).requires_grad_()
        inputs.append(weight)
    padding = torch.rand(n_src, n_tokens, generator=generator) < (0.4 if padded else 0.0)

    def call() -> Tensor:
        how = {"own": own, "n_queries": n_queries, "key_padding_mask": padding, "reduce": reduce}
        return token_attention(tokens, maps, heads, indptr, indices, edge_weight=weight, **how)

    with attention_backend("dense"):
        expected = result_and_gradients(inputs, call)
    for backend in ("numba", "chunked"):
        with attention_backend(backend):
            found = result_and_gradients(inputs, call)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.fixture(params=["numba", "chunked"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Those that project tokens head by head."""
    with attention_backend(request.param):
        yield request.param


GRAPH = random_graph([3, 0, 4, 2], 6, torch.Generator().manual_seed(1))


def block(width: int = 8) -> Tensor:
    return torch.randn(6, 5, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("needed", range(8))
def test_one_gradient_alone_is_the_same(needed: int, backend: str) -> None:
    """Of the tokens, a weight or a bias, or the destinations' own tokens, where all else is frozen."""
    maps, tokens, own = make_maps(8), block(), block()[:4]
    inputs = [tokens, *(p for part in maps for p in part.parameters()), own]

    def call() -> Tensor:
        return token_attention(tokens, maps, 2, *GRAPH, own=own)

    for x in inputs:
        x.requires_grad_()
    expected = result_and_gradients(inputs, call)[1 + needed]
    for i, x in enumerate(inputs):
        x.requires_grad_(i == needed)
    torch.testing.assert_close(result_and_gradients([inputs[needed]], call)[1], expected, rtol=1e-12, atol=1e-12)


def test_tokens_that_are_not_contiguous(backend: str) -> None:
    maps, tokens = make_maps(8), block()
    strided = tokens.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    plain = tokens.clone().requires_grad_()
    first, second = (
        result_and_gradients([x], lambda x=x: token_attention(x, maps, 2, *GRAPH)) for x in (strided, plain)
    )
    assert not strided.is_contiguous()
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["plain", "low rank", "autocast", "half"])
def test_only_plain_maps_are_applied_head_by_head(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    attend = _api.attend
    monkeypatch.setattr(_api, "attend", lambda *x: calls.append(x[3] is not None) or attend(*x))
    maps, tokens = [part.float() for part in make_maps(8)], block().float()
    expected = token_attention(tokens, tuple(maps), 2, *GRAPH)
    assert calls == [True]
    if kind == "low rank":
        maps[0] = LowRankLinear(maps[0], 2)
        nn.init.normal_(maps[0].up)
    if kind == "half":
        maps, tokens = [part.bfloat16() for part in maps], tokens.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found = token_attention(tokens, tuple(maps), 2, *GRAPH)
    assert calls[1:] == [kind == "plain"]
    assert found.dtype == (torch.float32 if kind in ("plain", "low rank") else torch.bfloat16)
    if kind == "low rank":
        assert (found - expected).abs().max() > 1e-2
    else:
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_maps_of_another_precision_are_refused(backend: str) -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        token_attention(block().float(), make_maps(8), 2, *GRAPH)


def test_only_tokens_and_maps_are_kept_for_the_backward_pass(backend: str) -> None:
    maps, tokens, kept = make_maps(8), block().requires_grad_(), []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        token_attention(tokens, maps, 2, *GRAPH)
    large = [x for x in kept if x.numel() >= tokens.numel()]
    assert [x.data_ptr() for x in large] == [tokens.data_ptr()]


@pytest.mark.parametrize("backend", ["numba", "chunked", "dense"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own": block()[:3]}, r"expected 4, found \(5,\)"),
        ({"key_padding_mask": torch.zeros(6, 4, dtype=torch.bool)}, r"\(6, 5\), found \(6, 4\)"),
        ({"reduce": "max"}, "reduce must be 'mean' or 'sum', found 'max'"),
    ],
)
def test_what_does_not_fit_is_named(backend, change, message) -> None:
    with attention_backend(backend), pytest.raises(ValueError, match=message):
        token_attention(block(), make_maps(8), 2, *GRAPH, **change)
