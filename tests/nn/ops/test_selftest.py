"""Compiled backends are tried before they are chosen, and left alone where they fail or are wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fimp_sc.nn import CrossNodeAttention, cross_node_attention
from fimp_sc.nn.ops import _selftest
from fimp_sc.nn.ops._selftest import Kind, works
from fimp_sc.nn.ops.numba import _engine as _numba

KIND = Kind("numba", torch.device("cpu"), torch.float32, 2, 5, 7, 8, True)
GRAPH = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 2])


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_selftest, "_tried", {})


def tokens(n_nodes: int = 3) -> Tensor:
    """Enough of them for compiled loops."""
    return torch.randn(n_nodes, 2, 40, 8, generator=torch.Generator().manual_seed(0))


def changed(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention whose messages are ``change(messages, key)``, but for those of the definition."""

    def attention(query: Tensor, key: Tensor, *args: Any, backend: str, **how: Any) -> Tensor:
        out = cross_node_attention(query, key, *args, backend="dense", **how)
        return out if backend == "dense" else change(out, key)

    return attention


def broken(*_: Any) -> Tensor:
    raise RuntimeError("Failed to find C compiler.\nPlease specify it.")


@pytest.mark.parametrize("backend", ["numba", "chunked"])
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backends_work(backend: str, backward: bool, dtype: torch.dtype) -> None:
    assert works(KIND._replace(backend=backend, dtype=dtype, backward=backward), cross_node_attention)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (broken, r"RuntimeError: Failed to find C compiler\. Please specify it\."),
        (lambda out, key: 1.1 * out, r"off by 0\.1 of the largest"),
        (lambda out, key: out * float("nan"), "off by nan"),
        (lambda out, key: out + (key.sum() - key.sum().detach()), "off by"),  # gradients alone
        (lambda out, key: out + (0.0 * key).abs().sqrt().sum(), "off by nan"),
    ],
)
def test_what_fails_or_is_wrong_is_said_once_and_not_used(change: Callable[..., Tensor], reason: str) -> None:
    with pytest.warns(UserWarning, match=rf"backend='numba'\) is not used on 'cpu': .*{reason}.*backend='chunked'"):
        assert not works(KIND, changed(change))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not works(KIND, changed(change))


def test_nothing_but_rounding_is_no_difference() -> None:
    one_token = KIND._replace(n_tokens=1)
    assert works(one_token, changed(lambda out, key: out + 1e-7 * (key.sum() - key.sum().detach())))


def test_gradients_are_not_looked_at_where_there_are_none() -> None:
    wrong = changed(lambda out, key: out + (key.sum() - key.sum().detach()))
    assert works(KIND._replace(backward=False), wrong)


def test_memory_that_is_full_is_no_fault_of_a_backend() -> None:
    def full(*_: Any) -> Tensor:
        raise torch.cuda.OutOfMemoryError("full")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        works(KIND, changed(full))


def test_auto_goes_on_without_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tokens(2), tokens(), tokens()
    expected = cross_node_attention(*inputs, *GRAPH, backend="dense")
    monkeypatch.setattr(_numba.CompiledLoops, "forward", broken)
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        torch.testing.assert_close(cross_node_attention(*inputs, *GRAPH), expected)
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):
        cross_node_attention(*inputs, *GRAPH, backend="numba")


@pytest.mark.parametrize("recomputed", [True, False])
def test_a_layer_that_is_computed_again_in_backward_is_not_disturbed(recomputed: bool) -> None:
    attention = CrossNodeAttention(16, 2)
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    graph = torch.zeros(3, 40, dtype=torch.bool), *GRAPH
    out = checkpoint(attention, x, *graph, use_reentrant=False) if recomputed else attention(x, *graph)
    assert _selftest._tried
    (found,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(attention(x, *graph).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_random_numbers_stay_as_they_are() -> None:
    before = torch.get_rng_state()
    assert works(KIND, cross_node_attention)
    assert torch.equal(torch.get_rng_state(), before)


def test_tried_once_for_inference_and_once_for_training() -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        cross_node_attention(tokens(2), tokens(), tokens(), *GRAPH)
    cross_node_attention(tokens(2), tokens(), tokens(), *GRAPH)
    cross_node_attention(tokens(2), tokens(), tokens(), *GRAPH)
    assert {kind.backward: ok for kind, ok in _selftest._tried.items()} == {False: True, True: True}
    assert len(_selftest._tried) == 2
