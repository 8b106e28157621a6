"""Attention as an operation of torch: its compiler sees no break, and folders of engines can be left out."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fimp_sc.nn import CrossNodeAttention, TransformerLayer, attention_backend, cross_node_attention
from fimp_sc.nn.ops._attend import attend

GRAPH = torch.tensor([0, 3, 3, 4, 9, 11]), torch.tensor([0, 3, 6, 2, 1, 2, 3, 4, 5, 6, 0])
ENGINES = pytest.mark.parametrize("backend", ["numba", "chunked"])


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()


def heads(n_tokens: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(n, n_tokens, 2, 4) for n in (5, 7, 7)]
    return [torch.randn(x, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_() for x in shapes]


def results(function, inputs: list[Tensor], *args, **kwargs) -> list[Tensor]:
    out = function(*args, **kwargs)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, up)]


def assert_equal(found: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("backend", ["numba", "chunked", "auto", "dense"])
@pytest.mark.parametrize("n_tokens", [3, 33])
def test_the_public_function_compiles_without_a_break(backend: str, n_tokens: int) -> None:
    inputs, weight = heads(n_tokens), torch.rand(11, dtype=torch.float64).requires_grad_()
    how = {"edge_weight": weight, "backend": backend}
    compiled = torch.compile(cross_node_attention, backend="aot_eager", fullgraph=True)
    found = results(compiled, [*inputs, weight], *inputs, *GRAPH, **how)
    assert_equal(found, results(cross_node_attention, [*inputs, weight], *inputs, *GRAPH, **how), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_tokens", [4, 40])
def test_a_layer_compiles_without_a_break_and_takes_other_sizes(n_tokens: int) -> None:
    layer = TransformerLayer(16, 2, d_feedforward=32, dropout=0.0)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for n_nodes, more in ((7, 0), (9, 0), (11, 1), (12, 2)):
        x = torch.randn(n_nodes, n_tokens + more, 16, generator=generator).requires_grad_()
        graph = torch.arange(n_nodes + 1) * 2, torch.randint(n_nodes, (2 * n_nodes,), generator=generator)
        given = x, torch.zeros(x.shape[:2], dtype=torch.bool), *graph
        inputs = [x, *layer.parameters()]
        assert_equal(results(compiled, inputs, *given), results(layer, inputs, *given))


def test_a_compiled_function_has_the_backend_of_its_block() -> None:
    inputs, seen = heads(), []
    with attention_backend("dense"):
        compiled = torch.compile(
            cross_node_attention, fullgraph=True, backend=lambda graph, _: seen.append(graph) or graph
        )
        compiled(*inputs, *GRAPH)
    assert not any("attend" in str(node.target) for node in seen[0].graph.nodes)


@ENGINES
@pytest.mark.parametrize("projected", [False, True])
def test_the_operation_is_what_it_says(backend: str, projected: bool) -> None:
    """No alias, no input changed, and shapes and layouts as its fake has them."""
    weight, padding = torch.rand(11).requires_grad_(), torch.zeros(7, 3, dtype=torch.bool)
    padding[2, 1:] = True
    graph = weight, *GRAPH, padding
    if projected:
        tokens, matrices, biases = (torch.randn(x).requires_grad_() for x in ((7, 3, 8), (3, 2, 4, 8), (3, 2, 4)))
        opcheck(attend, (None, tokens, None, matrices, biases, *graph, 2, backend, None))
        own = torch.randn(5, 2, 8).requires_grad_()
        opcheck(attend, (own, tokens, None, matrices, biases, *graph, 2, backend, None))
    else:
        opcheck(attend, (*heads(dtype=torch.float32), None, None, *graph, 3, backend, 2))


WITHOUT = """
    import sys
    import warnings

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == {left_out!r} or name.startswith("fimp_sc.nn.ops.{left_out}"):
                raise ModuleNotFoundError(f"No module named {{name!r}}")

    sys.meta_path.insert(0, Blocker())
    import torch
    from fimp_sc.nn import cross_node_attention
    from fimp_sc.nn._network import FIMPNetwork
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 40, 8, generator=generator) for _ in range(3))
    graph = torch.tensor([0, 2, 3, 3]), torch.tensor([0, 1, 2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = cross_node_attention(q, k, v, *graph)
        torch.testing.assert_close(found, cross_node_attention(q, k, v, *graph, backend="dense"))
    try:
        cross_node_attention(q, k, v, *graph, backend={left_out!r})
        error = ""
    except (ImportError, ValueError) as refused:
        error = str(refused)
    FIMPNetwork(5, 8, 1, 2)
    print([str(x.message) for x in caught if "fimp_sc" in x.filename or "attention" in str(x.message)])
    print(error)
    print(sorted(x for x in sys.modules if x.split(".")[0] == {left_out!r} or "nn.ops.{left_out}" in x))
"""


@pytest.mark.parametrize("left_out", ["numba", "triton"])
def test_everything_works_without_an_engine(left_out: str) -> None:
    code = textwrap.dedent(WITHOUT.format(left_out=left_out))
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warned, error, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    if left_out == "numba":
        assert "backend='numba') is not used" in warned
        assert "backend='chunked') are used instead" in warned
        assert "No module named" in error
    else:
        assert warned == "[]"
        assert "cannot run: its kernels are not installed" in error


def test_a_layer_without_edges_compiles() -> None:
    layer = CrossNodeAttention(8, 2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    given = torch.randn(3, 4, 8), torch.zeros(3, 4, dtype=torch.bool)
    none = torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    assert not compiled(*given, *none).any()
