"""The fused kernels against a loop over edges in float64: on a GPU, or in Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fimp_sc.nn.ops import _selftest
from fimp_sc.nn.ops._api import cross_node_attention, dense_attention
from fimp_sc.nn.ops._attend import attend

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Error relative to the largest entry of the truth; a few times what was found.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def load() -> ModuleType:
    """A second copy of the module and its kernels: how these run is decided when they are executed."""
    names = ("fimp_sc.nn.ops.triton._kernels", "fimp_sc.nn.ops.triton._function")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            spec = importlib.util.find_spec(name)
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def interpreted() -> tuple[ModuleType, list[tuple]]:
    """The module for Triton's interpreter, and what to exchange in Triton while it runs."""
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0" and VERSION < (3, 7):
        pytest.skip("the interpreter of triton before 3.7 does not work with numpy 2.4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # Triton's own functions were made for one mode too, when whoever came first imported it.
        exchange = [
            (namespace, name, triton.jit(function.fn))
            for namespace in (tl.standard, tl)
            for name, function in vars(namespace).items()
            if isinstance(function, triton.JITFunction)
        ]
        return load(), exchange


@pytest.fixture
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if ON_GPU:
        return importlib.import_module("fimp_sc.nn.ops.triton._function")
    module, exchange = request.getfixturevalue("interpreted")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for namespace, name, function in exchange:
        monkeypatch.setattr(namespace, name, function)
    monkeypatch.setitem(sys.modules, "fimp_sc.nn.ops.triton._function", module)
    return module


def fused(query, key, value, indptr, indices, weight, padding=None) -> Tensor:
    """Attention by the kernels, as the operation of torch that has gradients."""
    return attend(query, key, value, None, None, weight, indptr, indices, padding, query.shape[2], "triton", None)


@pytest.fixture
def small_tiles(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 tokens, so that a few tokens make several tiles."""
    monkeypatch.setattr(engine, "_tiles", lambda *_: (16, 16, 4, 2))


class Problem(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    indptr: Tensor
    indices: Tensor
    weight: Tensor
    padding: Tensor | None
    up: Tensor


def problem(
    rows: list[list[int]],
    n_src: int,
    heads: int = 2,
    tokens: int = 5,
    source_tokens: int = 7,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    padded: float | None = None,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(nodes: int, tokens: int) -> Tensor:
        # The layout of the modules: heads are slices of the last dimension.
        x = torch.randn(nodes, tokens, heads * dim, generator=generator)
        return x.to(DEVICE, dtype).unflatten(2, (heads, dim)).transpose(1, 2)

    degree = torch.tensor([0, *map(len, rows)])
    indices = torch.tensor([j for row in rows for j in row], dtype=torch.int64)
    weight = torch.rand(len(indices), generator=generator) / degree.diff().clamp(min=1).repeat_interleave(degree[1:])
    padding = None
    if padded is not None:
        padding = torch.rand(n_src, source_tokens, generator=generator) < padded
        padding[0] = True
        padding = padding.to(DEVICE)
    return Problem(
        normal(len(rows), tokens),
        normal(n_src, source_tokens),
        normal(n_src, source_tokens),
        degree.cumsum(0).to(DEVICE),
        indices.to(DEVICE),
        weight.to(DEVICE),
        padding,
        normal(len(rows), tokens),
    )


# No source, a self-loop, one source, a source twice, many, all of a source's tokens padded (0).
ROWS = [[], [1], [0], [2, 2, 3], [4, 1, 5, 0, 3, 2, 5, 1], [], [3, 0]]
N_SRC = 7


def naive(query, key, value, indptr, indices, weight, padding) -> Tensor:
    """The definition, edge by edge."""
    out = []
    for i in range(len(query)):
        total = torch.zeros_like(query[i])
        for e in range(int(indptr[i]), int(indptr[i + 1])):
            j = int(indices[e])
            seen = slice(None) if padding is None else ~padding[j]
            k, v = key[j][:, seen], value[j][:, seen]
            if k.shape[1] == 0:
                continue
            total = total + weight[e] * torch.softmax(query[i] @ k.mT / math.sqrt(query.shape[-1]), -1) @ v
        out.append(total)
    return torch.stack(out)


def run(function, p: Problem, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The result and the gradients of queries, keys, values and weights."""
    inputs = [p.query, p.key, p.value, p.weight]
    inputs = [(x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_() for x in inputs]
    q, k, v, w = inputs
    out = function(q, k, v, p.indptr, p.indices, w, p.padding)
    if not out.requires_grad:
        return [out, *map(torch.zeros_like, inputs)]
    grads = torch.autograd.grad(out, inputs, p.up.to(out.dtype), allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True))]


def check(engine: ModuleType, p: Problem) -> list[Tensor]:
    found, expected = run(fused, p), run(naive, p, torch.float64)
    for ours, theirs, like in zip(found, expected, (p.query, p.query, p.key, p.value, p.weight), strict=True):
        assert ours.dtype == like.dtype
        assert ours.shape == like.shape
        assert torch.isfinite(ours).all()
        largest = theirs.abs().amax().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours.double(), theirs, rtol=0.0, atol=TOLERANCE[p.query.dtype] * max(largest, 1.0))
    return found


@pytest.mark.parametrize("dim", [16, 24, 64])
@pytest.mark.parametrize("padded", [None, 0.4])
def test_equals_the_loop_over_edges_with_all_gradients(engine, dim, padded) -> None:
    out, d_query, d_key, d_value, _ = check(engine, problem(ROWS, N_SRC, dim=dim, padded=padded))
    for isolated in (0, 5):
        assert not out[isolated].any()
        assert not d_query[isolated].any()
    assert not d_key[6].any()
    assert not d_value[6].any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("tokens", "source_tokens", "padded"),
    [(33, 40, None), (33, 40, 0.4), (17, 50, 0.95), (16, 17, None), (1, 35, 0.4), (20, 1, None), (20, 1, 0.4)],
)
def test_several_tiles(engine, tokens, source_tokens, padded) -> None:
    rows = [[0, 1], [], [2, 1, 1]]
    out, *_ = check(engine, problem(rows, 3, heads=1, tokens=tokens, source_tokens=source_tokens, padded=padded))
    assert out.shape[2] == tokens
    assert not out[1].any(), "a node without sources"


NEEDS_BFLOAT16 = pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter cannot multiply bfloat16")


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_BFLOAT16)])
@pytest.mark.parametrize("padded", [None, 0.4])
def test_half_precision(engine, dtype, padded) -> None:
    check(engine, problem(ROWS, N_SRC, dtype=dtype, padded=padded))


def test_weights_of_another_dtype(engine) -> None:
    p = problem(ROWS, N_SRC, heads=1, dtype=torch.float16)
    check(engine, p._replace(weight=p.weight.half()))


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 6),
    source_tokens=st.integers(1, 6),
    dim=st.sampled_from([1, 3, 16, 20]),
    padded=st.sampled_from([None, 0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_random_graphs(engine, rows, heads, tokens, source_tokens, dim, padded, seed) -> None:
    check(engine, problem(rows, 5, heads, tokens, source_tokens, dim, padded=padded, seed=seed))


def test_two_runs_agree_bit_by_bit(engine) -> None:
    p = problem(ROWS, N_SRC, heads=1, padded=0.3)
    for once, twice in zip(run(fused, p), run(fused, p), strict=True):
        assert torch.equal(once, twice)


def test_order_of_destinations_does_not_matter(engine) -> None:
    p = problem(ROWS, N_SRC, heads=1)
    order = [3, 6, 0, 4, 5, 2, 1]
    edges = [e for i in order for e in range(int(p.indptr[i]), int(p.indptr[i + 1]))]
    moved = p._replace(
        query=p.query[order],
        up=p.up[order],
        indptr=torch.cat([p.indptr[:1], p.indptr.diff()[order].cumsum(0)]),
        indices=p.indices[edges],
        weight=p.weight[edges],
    )
    here, there = run(fused, p), run(fused, moved)
    assert torch.equal(here[0][order], there[0])
    assert torch.equal(here[1][order], there[1])
    assert torch.equal(here[4][edges], there[4])


def test_what_padding_holds_is_never_read(engine) -> None:
    p = problem(ROWS, N_SRC, heads=1, padded=0.4)
    hole = p.padding[:, None, :, None]
    spoiled = p._replace(key=p.key.masked_fill(hole, math.nan), value=p.value.masked_fill(hole, math.inf))
    for clean, dirty in zip(run(fused, p), run(fused, spoiled), strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("layout", ["contiguous", "last stride", "slice", "broadcast"])
def test_layouts(engine, layout) -> None:
    change = {
        "contiguous": Tensor.contiguous,
        "last stride": lambda x: x.mT.contiguous().mT,
        "slice": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        "broadcast": lambda x: x[:1, :, :1].expand_as(x),
    }[layout]
    p = problem(ROWS, N_SRC, heads=1)
    p = p._replace(**{name: change(getattr(p, name)) for name in ("query", "key", "value", "up")})
    check(engine, p)


def test_result_has_the_layout_of_the_query(engine) -> None:
    p = problem(ROWS, N_SRC)
    out = fused(*p[:7])
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("needed", ["query", "key", "value", "weight"])
def test_one_gradient_alone(engine, needed) -> None:
    p = problem(ROWS[:4], N_SRC)
    place = ("query", "key", "value", "weight").index(needed)
    inputs = {name: getattr(p, name).detach() for name in ("query", "key", "value", "weight")}
    inputs[needed].requires_grad_()
    out = fused(**inputs, indptr=p.indptr, indices=p.indices)
    (found,) = torch.autograd.grad(out, inputs[needed], p.up)
    assert torch.equal(found, run(fused, p)[1 + place])


@pytest.mark.parametrize(
    ("rows", "n_src", "tokens", "source_tokens"), [([[], []], 3, 2, 2), ([], 3, 2, 2), ([[0], [1, 1]], 2, 2, 0)]
)
@pytest.mark.parametrize("padded", [None, 0.5])
def test_nothing_to_attend_to(engine, rows, n_src, tokens, source_tokens, padded) -> None:
    p = problem(rows, n_src, tokens=tokens, source_tokens=source_tokens, padded=padded)
    for x in run(fused, p):
        assert not x.any()


def test_memory_kept_for_backward_is_the_inputs(engine) -> None:
    p = problem(ROWS, N_SRC, padded=0.2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fused(p.query.requires_grad_(), *p[1:7])
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in p[:7]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"dim": 129}, "head_dim must be 1 to 128, found 129"),
        ({"dim": 0}, "head_dim must be 1 to 128, found 0"),
    ],
)
def test_unsupported_tensors(engine, change, message) -> None:
    p = problem([[0]], 1, **change)
    assert message in unsupported(engine, p.query)
    with pytest.raises(ValueError, match=re.escape(message) + ".*or 'chunked'"):
        cross_node_attention(*p[:5], backend="triton")


def unsupported(engine: ModuleType, x: Tensor) -> str | None:
    return engine.unsupported(x.device, x.dtype, x.shape[-1])


def test_mixed_dtypes_are_unsupported(engine) -> None:
    p = problem([[0]], 1)
    assert unsupported(engine, p.query) is None
    for mixed in ((p.query, p.key.half(), p.value.half()), (p.query, p.key, p.value.half())):
        with pytest.raises(ValueError, match=r"one dtype; found torch\.float32"):
            cross_node_attention(*mixed, *p[3:5], backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_BFLOAT16)])
@pytest.mark.parametrize("sizes", [(2, 5, 7, 16), (1, 70, 1, 24)])
def test_passes_the_trial_before_its_first_use(engine, monkeypatch, dtype, sizes) -> None:
    def attention(query, key, value, *graph, backend, edge_weight, key_padding_mask, reduce):
        assert reduce == "sum"
        if backend == "dense":
            return dense_attention(query, key, value, edge_weight, *graph, key_padding_mask)
        return fused(query, key, value, *graph, edge_weight, key_padding_mask)

    monkeypatch.setattr(_selftest, "_tried", {})
    for backward in (True, False):
        assert _selftest.works(_selftest.Kind("triton", torch.device(DEVICE), dtype, *sizes, backward), attention)


@pytest.mark.skipif(ON_GPU, reason="the other tests compile the kernels")
def test_interpreter_refuses_bfloat16(engine) -> None:
    p = problem([[0]], 1, dtype=torch.bfloat16)
    assert "bfloat16" in unsupported(engine, p.query)


def test_compiled_kernels_need_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "CUDA devices, not on 'cpu'" in unsupported(load(), torch.zeros(1, 1, 1, 16))


def test_module_imports_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    module = load()
    x = torch.zeros(1, 1, 1, 16)
    assert unsupported(module, x) == "triton is not installed"
    monkeypatch.setitem(sys.modules, "fimp_sc.nn.ops.triton._function", module)
    with pytest.raises(ValueError, match="triton is not installed"):
        cross_node_attention(x, x, x, torch.tensor([0, 0]), torch.tensor([]), backend="triton")


def test_tf32_only_where_torch_allows_it(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine._options(torch.float32, 64, 64, 64, None)["PRECISION"] == "ieee"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert engine._options(torch.float32, 64, 64, 64, None)["PRECISION"] == "tf32"
        assert engine._options(torch.bfloat16, 64, 64, 64, None)["PRECISION"] == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
