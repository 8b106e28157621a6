"""Cross-node attention: which backend runs, what it receives, and what is refused before it runs."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fimp_sc.nn import CrossNodeAttention, attention_backend, cross_node_attention
from fimp_sc.nn.ops import _api

# Five nodes with 3, 0, 1, 5 and 2 of seven sources.
GRAPH = torch.tensor([0, 3, 3, 4, 9, 11]), torch.tensor([0, 3, 6, 2, 1, 2, 3, 4, 5, 6, 0])


def random_inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 2, 3, 4, generator=generator, dtype=torch.float64) for n in (5, 7, 7)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(5, 6, 4)}, "nodes, heads, tokens, head_dim"),
        ({"value": torch.zeros(7, 2, 5, 4)}, "of one shape"),
        ({"query": torch.zeros(5, 3, 3, 4)}, "differ in heads or head_dim"),
        ({"query": torch.zeros(5, 2, 3, 5)}, "differ in heads or head_dim"),
        ({"query": torch.zeros(6, 2, 3, 4)}, "expected 7, found"),
        ({"edge_weight": torch.ones(3)}, "one entry per edge"),
        ({"key_padding_mask": torch.zeros(7, 4, dtype=torch.bool)}, "n_sources, source_tokens"),
        ({"reduce": "max"}, "'mean' or 'sum', found 'max'"),
        ({"value": torch.zeros(7, 2, 3, 4, dtype=torch.float64)}, "must have one dtype"),
        ({"backend": "flash"}, "'auto', 'triton', 'numba', 'chunked', 'dense', found 'flash'"),
    ],
)
def test_wrong_shapes_are_named(change: dict, message: str) -> None:
    right = {"query": torch.zeros(5, 2, 3, 4), "key": torch.zeros(7, 2, 3, 4), "value": torch.zeros(7, 2, 3, 4)}
    cross_node_attention(**right, indptr=GRAPH[0], indices=GRAPH[1])
    with pytest.raises(ValueError, match=message):
        cross_node_attention(**{**right, **change}, indptr=GRAPH[0], indices=GRAPH[1])


def test_width_must_be_a_multiple_of_heads() -> None:
    with pytest.raises(ValueError, match="10 is not a multiple of 4"):
        CrossNodeAttention(10, 4)


def fake_triton(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> list:
    calls = []

    def forward(query, *args):
        calls.append(args)
        return query.clone()

    module = SimpleNamespace(unsupported=lambda device, dtype, head_dim: reason, forward=forward)
    monkeypatch.setitem(sys.modules, "fimp_sc.nn.ops.triton._function", module)
    return calls


def test_triton_where_it_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_triton(monkeypatch, "no such device")
    with pytest.raises(ValueError, match=r"no such device\. Use backend='auto' or 'chunked'"):
        cross_node_attention(*random_inputs(), *GRAPH, backend="triton")


@pytest.mark.parametrize(
    ("reason", "works", "expected"),
    [(None, True, "triton"), (None, False, "chunked"), ("too wide", True, "chunked")],
)
def test_auto_prefers_triton_on_cuda_where_it_works(
    monkeypatch, reason: str | None, works: bool, expected: str
) -> None:
    fake_triton(monkeypatch, reason)
    tried = []
    monkeypatch.setattr(_api, "works", lambda kind, attention: tried.append(kind) or works)
    on = torch.device("cuda"), torch.bfloat16, (4, 1200, 64, 32)
    assert _api.resolve("auto", *on) == expected
    # 1,200 tokens leave half of a last tile of 128, as 560 do.
    kind = ("triton", *on[:2], 4, 560, 64, 32, True)
    assert tried == ([kind] if reason is None else [])
    assert reason is not None or _api.resolve("triton", *on) == "triton"


@pytest.mark.parametrize(
    ("dtype", "tokens", "expected"),
    [
        (torch.float32, (32, 32), "numba"),
        (torch.bfloat16, (400, 50), "numba"),
        (torch.float32, (1, 200), "chunked"),
        (torch.float32, (16, 16), "chunked"),
        (torch.float64, (200, 200), "chunked"),
    ],
)
def test_auto_on_cpus(dtype: torch.dtype, tokens: tuple[int, int], expected: str) -> None:
    on = torch.device("cpu"), dtype, (4, *tokens, 16)
    assert _api.resolve("auto", *on) == expected
    for backend in ("numba", "chunked", "dense"):
        assert _api.resolve(backend, *on) == backend


def test_numba_where_it_cannot_run_says_so() -> None:
    elsewhere = torch.device("meta"), torch.float32, (4, 200, 200, 16)
    with pytest.raises(ValueError, match=r"CPUs only, found 'meta'\. Use backend='auto' or 'chunked'"):
        _api.resolve("numba", *elsewhere)
    assert _api.resolve("auto", *elsewhere) == "chunked"


def test_triton_receives_one_factor_per_edge_and_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_triton(monkeypatch, None)
    padding = torch.zeros(7, 3, dtype=torch.bool)
    cross_node_attention(*random_inputs(), *GRAPH, key_padding_mask=padding, backend="triton")
    _, _, weight, _, _, mask = calls[0]
    torch.testing.assert_close(weight, torch.tensor([1 / 3] * 3 + [1.0] + [1 / 5] * 5 + [1 / 2] * 2).double())
    assert torch.equal(mask, padding)


def test_backend_of_a_block_yields_to_the_argument_and_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, used = random_inputs(), []
    monkeypatch.setattr(_api, "dense_attention", lambda *args: used.append("dense"))
    monkeypatch.setattr(_api, "attend", lambda *args: used.append(args[-2]))
    with attention_backend("dense"):
        cross_node_attention(*inputs, *GRAPH)
        cross_node_attention(*inputs, *GRAPH, backend="chunked")
        with attention_backend("chunked"):
            cross_node_attention(*inputs, *GRAPH)
        cross_node_attention(*inputs, *GRAPH)
    cross_node_attention(*inputs, *GRAPH)
    assert used == ["dense", "chunked", "chunked", "dense", "chunked"]
    with pytest.raises(ValueError, match="found 'flash'"), attention_backend("flash"):
        pass
