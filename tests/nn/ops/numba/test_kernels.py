"""Compiled loops for CPUs: threads, tiles of queries, and numbers that are large, absent or not finite."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from fimp_sc.nn import attention_backend, cross_node_attention
from fimp_sc.nn.ops._api import token_attention
from fimp_sc.nn.ops.numba import _kernels as kernels

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES = ("_vectors", "_products", "_softmax")
CHANGES = {
    "_vectors": "\n# other\n",
    "_products": "\n# other\n",
    "_softmax": "\n\n@numba.njit(nogil=True)\ndef exponentials(scores, top, share):\n    scores[:] = 7\n",
}
NAMES = ("query", "key", "value", "edge_weight")


@pytest.fixture(params=[1, 2, 5])
def n_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def problem(n_dst=40, n_src=50, f_dst=4, f_src=6, dtype=torch.float64, scale=1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Queries, keys, values and weights, and a graph of 0 to 19 sources for each destination."""
    generator = torch.Generator().manual_seed(3)
    degree = torch.arange(n_dst) * 7 % 20
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), degree.cumsum(0)))
    indices = torch.randint(n_src, (int(indptr[-1]),), generator=generator)
    shapes = (n_dst, 2, f_dst, 4), (n_src, 2, f_src, 4), (n_src, 2, f_src, 4), (len(indices),)
    inputs = [(torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in inputs], [indptr, indices]


def attend(inputs: list[Tensor], graph: list[Tensor], backend: str = "numba", **kwargs) -> dict[str, Tensor]:
    """Result and gradients."""
    *heads, weight = inputs
    out = cross_node_attention(*heads, *graph, edge_weight=weight, backend=backend, **kwargs)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(out.dtype)
    return {"out": out.detach(), **dict(zip(NAMES, torch.autograd.grad(out, inputs, up), strict=True))}


def test_any_number_of_threads(n_threads: int) -> None:
    inputs, graph = problem()
    found, again = attend(inputs, graph), attend(inputs, graph)
    for name, expected in attend(inputs, graph, "dense").items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-11)
        assert torch.equal(found[name], again[name])  # to the bit


def test_tokens_in_any_number_of_threads(n_threads: int) -> None:
    graph = problem(n_dst=50)[1]
    generator = torch.Generator().manual_seed(5)
    # More tokens than are projected together.
    tokens = torch.randn(50, 100, 8, generator=generator, dtype=torch.float64).requires_grad_()
    maps = tuple(torch.nn.Linear(8, 8).double() for _ in range(3))
    inputs = [tokens, *(p for part in maps for p in part.parameters())]
    results = []
    for backend in ("numba", "dense"):
        with attention_backend(backend):
            out = token_attention(tokens, maps, 2, *graph, n_queries=3)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_more_scores_than_are_held_at_once() -> None:
    n_queries, n_tokens = 37, kernels._SCORES // 32 + 5  # tiles of 32 and 5 queries
    inputs, graph = problem(3, 2, n_queries, n_tokens)
    found = attend(inputs, graph)
    for name, expected in attend(inputs, graph, "dense").items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 3.0, 30.0])
def test_padding_may_hold_anything_finite(dtype: torch.dtype, scale: float) -> None:
    inputs, graph = problem(dtype=dtype, scale=scale)
    padding = torch.zeros(50, 6, dtype=torch.bool)
    padding[::3, 2:] = True
    padding[7] = True  # a source without tokens
    plain = attend(inputs, graph, key_padding_mask=padding)
    with torch.no_grad():
        for x in inputs[1:3]:
            x.transpose(1, 2)[padding] = 1e15
    found = attend(inputs, graph, key_padding_mask=padding)
    for name, x in found.items():
        assert torch.isfinite(x).all()
        torch.testing.assert_close(x, plain[name], rtol=2e-3 if dtype == torch.float32 else 1e-9, atol=scale**2 * 1e-4)
    for name in ("key", "value"):
        assert (found[name].transpose(1, 2)[padding] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_is_not_hidden(bad: float, where: int) -> None:
    inputs, graph = problem(dtype=torch.float32)
    node = 3 if where == 0 else int(graph[1][0])
    with torch.no_grad():
        inputs[where][node, 0, 1, 2] = bad
    expected, found = attend(inputs, graph, "dense"), attend(inputs, graph)
    assert expected["out"].isnan().any() or expected["out"].isinf().any()
    for name, x in expected.items():
        assert found[name].isfinite().logical_not().any() == x.isfinite().logical_not().any()
    rows = expected["out"].isfinite().flatten(1).all(1)
    torch.testing.assert_close(found["out"][rows], expected["out"][rows], rtol=1e-4, atol=1e-5)


def test_several_calls_at_once() -> None:
    inputs, graph = problem()
    expected = attend(inputs, graph)
    with ThreadPoolExecutor(4) as pool:  # as several tiles of a section are
        results = list(pool.map(lambda _: attend(inputs, graph), range(12)))
    for found in results:
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("indptr", "indices", "error", "message"),
    [
        ([0, 1, 2], [0, 50], IndexError, "one of 50 sources, found 0 to 50"),
        ([0, 1, 2], [-1, 3], IndexError, "found -1 to 3"),
        ([0, 1, 3], [0, 1], ValueError, "rise from 0 to the number of edges, 2"),
        ([0, 3, 2], [0, 1], ValueError, "rise from 0"),
        ([1, 1, 2], [0, 1], ValueError, "rise from 0"),
    ],
)
def test_rows_that_are_no_graph_are_refused(indptr: list[int], indices: list[int], error, message: str) -> None:
    inputs, _ = problem(n_dst=2)
    with pytest.raises(error, match=message):
        cross_node_attention(*inputs[:3], torch.tensor(indptr), torch.tensor(indices), reduce="sum", backend="numba")


def test_kernels_kept_for_later_are_those_of_what_they_use(tmp_path) -> None:
    for name in (*MODULES, "_kernels"):
        text = (Path(kernels.__file__).parent / f"{name}.py").read_text()
        for used in MODULES:
            text = text.replace(f"from fimp_sc.nn.ops.numba.{used}", f"from {used}")
        (tmp_path / f"{name}.py").write_text(text.replace("from fimp_sc.nn.ops.numba import", "import"))
    code = """
        import numpy as np
        from _kernels import _attention
        query, key, padded = np.ones((4, 3), np.float32), np.eye(2, 4, dtype=np.float32), np.array([False, True])
        attention, top, share = np.empty((2, 3), np.float32), *np.empty((2, 3), np.float32)
        _attention(query, key, padded, attention, top, share)
        print(attention.sum(), sum(_attention.stats.cache_hits.values()))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}

    def run() -> str:
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    assert [run(), run()] == ["3.0 0\n", "3.0 1\n"]
    for name, change in CHANGES.items():
        path = tmp_path / f"{name}.py"
        before = path.read_text()
        path.write_text(before + change)
        assert run().endswith(" 0\n")
        path.write_text(before)
    path = tmp_path / "_softmax.py"
    path.write_text(path.read_text() + CHANGES["_softmax"])
    assert run() == "42.0 1\n"
