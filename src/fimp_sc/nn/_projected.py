"""Cross-node attention that projects tokens itself: queries, keys and values of one head exist at a time.

The forward pass keeps the tokens, which whatever made them keeps as well; the backward pass projects them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fimp_sc.nn._by_head import attend, attend_backward
from fimp_sc.nn._chunks import Buffers, without_autocast
from fimp_sc.nn._threads import shares

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from fimp_sc.nn._numba import CompiledLoops

# Tokens that are projected together.
_ROWS = 512


def projected_attention(
    queries: Tensor | int,
    tokens: Tensor,
    maps: tuple[Tensor, ...],
    n_heads: int,
    n_destinations: int,
    weight: Tensor,
    loops: CompiledLoops,
) -> Tensor:
    """Attend with queries, keys and values that linear maps make of tokens.

    Parameters
    ----------
    queries
        ``(n_destinations, n_queries, d_model)`` tokens of the destinations; or how many of the first tokens of the
        first nodes, which the destinations then are.
    tokens
        ``(n_sources, n_tokens, d_model)`` of a dtype that products are made in.
    maps
        Weights ``(d_model, d_model)`` and biases ``(d_model,)`` of queries, keys and values: six tensors.
    n_heads
        Heads.
    n_destinations
        Destinations.
    weight
        ``(n_edges,)`` factor of each message, in the dtype of the tokens. Differentiable.
    loops
        What attends over the graph.

    Returns
    -------
    ``(n_destinations, n_queries, d_model)``, head after head.
    """
    own, n_queries = (None, queries) if isinstance(queries, int) else (queries, queries.shape[1])
    return _ProjectedAttention.apply(tokens, own, *maps, weight, loops, n_heads, (n_destinations, n_queries))


class _Projected:
    """Heads that linear maps make of tokens, some nodes at a time.

    Parameters
    ----------
    shape
        Numbers of destinations and of their queries.
    needed
        Whether gradients are wanted: of the tokens, of the tokens of the destinations, and of the six maps.
    """

    def __init__(
        self,
        tokens: Tensor,
        own: Tensor | None,
        maps: tuple[Tensor, ...],
        n_heads: int,
        shape: tuple[int, int],
        loops: CompiledLoops,
        buffers: Buffers,
        needed: tuple[bool, ...] = (False,) * 8,
    ) -> None:
        self.n_heads, self._loops, self._buffers = n_heads, loops, buffers
        self._maps = [x.detach().numpy() for x in maps]
        self._width = tokens.shape[2] // n_heads
        self._scale = self._width**-0.5
        queries = tokens[: shape[0], : shape[1]] if own is None else own
        self._tokens, self._own = tokens.detach().numpy(), queries.detach().numpy()
        self.d_tokens = torch.zeros_like(tokens, memory_format=torch.contiguous_format) if needed[0] else None
        self.d_own = None
        if own is None and self.d_tokens is not None:
            self.d_own = self.d_tokens[: shape[0], : shape[1]]
        elif needed[1]:
            self.d_own = torch.zeros_like(queries, memory_format=torch.contiguous_format)
        self.d_maps = [torch.empty_like(x) if need else None for x, need in zip(maps, needed[2:], strict=True)]

    def query(self, head: int) -> Tensor:
        return self._project("q", self._own, 0, head, self._scale)

    def key(self, head: int) -> Tensor:
        return self._project("k", self._tokens, 1, head)

    def value(self, head: int) -> Tensor:
        return self._project("v", self._tokens, 2, head)

    def add_query(self, head: int, gradient: Tensor) -> None:
        self._collect(gradient, self._own, self.d_own, 0, head, self._scale)

    def add_key(self, head: int, gradient: Tensor) -> None:
        self._collect(gradient, self._tokens, self.d_tokens, 1, head)

    def add_value(self, head: int, gradient: Tensor) -> None:
        self._collect(gradient, self._tokens, self.d_tokens, 2, head)

    def _map(self, which: int, head: int, scale: float) -> tuple[NDArray, NDArray]:
        part = slice(head * self._width, (head + 1) * self._width)
        matrix, bias = (x[part] for x in self._maps[2 * which : 2 * which + 2])
        return matrix * matrix.dtype.type(scale), bias * bias.dtype.type(scale)

    def _project(self, name: str, tokens: NDArray, which: int, head: int, scale: float = 1.0) -> Tensor:
        matrix, bias = self._map(which, head, scale)
        made = self._buffers(name, *tokens.shape[:2], self._width)
        out = made.numpy()

        def some(nodes: slice) -> None:
            for part in _blocks(nodes, tokens.shape[1]):
                rows = out[part].reshape(-1, self._width)
                np.matmul(tokens[part].reshape(-1, tokens.shape[2]), matrix.T, out=rows)
                rows += bias

        self._loops.run(some, shares(len(tokens), _least(tokens)))
        return made

    def _collect(
        self, gradient: Tensor, tokens: NDArray, d_tokens: Tensor | None, which: int, head: int, scale: float = 1.0
    ) -> None:
        d_matrix, d_bias = self.d_maps[2 * which : 2 * which + 2]
        if d_tokens is None and d_matrix is None and d_bias is None:
            return
        matrix, _ = self._map(which, head, scale)
        up, d_rows = gradient.numpy(), None if d_tokens is None else d_tokens.numpy()

        def some(nodes: slice) -> tuple[NDArray, NDArray]:
            of_matrix, of_bias = np.zeros_like(matrix), np.zeros_like(matrix[:, 0])
            # Fresh pages for each block would cost more than the products.
            memory = np.empty((max(_ROWS, tokens.shape[1]), tokens.shape[2]), matrix.dtype)
            for part in _blocks(nodes, tokens.shape[1]):
                rows = up[part].reshape(-1, self._width)
                if d_matrix is not None:
                    of_matrix += rows.T @ tokens[part].reshape(-1, tokens.shape[2])
                if d_bias is not None:
                    of_bias += np.ones(len(rows), rows.dtype) @ rows
                if d_rows is not None:
                    d_rows[part] += np.matmul(rows, matrix, out=memory[: len(rows)]).reshape(d_rows[part].shape)
            return of_matrix, of_bias

        found = self._loops.run(some, shares(len(tokens), _least(tokens)))
        mine = slice(head * self._width, (head + 1) * self._width)
        for d_map, sums in zip((d_matrix, d_bias), zip(*found, strict=True), strict=True):
            if d_map is not None:
                d_map[mine] = torch.from_numpy(sum(sums) * matrix.dtype.type(scale))


def _least(tokens: NDArray) -> int:
    """Return how many nodes are worth a thread."""
    return max(_ROWS // tokens.shape[1], 1)


def _blocks(nodes: slice, n_tokens: int) -> Iterator[slice]:
    """Yield parts of nodes whose tokens stay in the cache."""
    step = max(_ROWS // n_tokens, 1)
    for begin in range(nodes.start, nodes.stop, step):
        yield slice(begin, min(begin + step, nodes.stop))


class _ProjectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, own: Tensor | None, *rest: Any) -> Tensor:
        *maps, weight, loops, n_heads, shape = rest
        ctx.save_for_backward(tokens, own, *maps, weight)
        ctx.loops, ctx.n_heads, ctx.shape = loops, n_heads, shape
        buffers = Buffers(tokens)
        heads = _Projected(tokens, own, tuple(maps), n_heads, shape, loops, buffers)
        out = tokens.new_empty(*shape, tokens.shape[2])
        attend(heads, loops, weight, buffers, _by_head(out, n_heads))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tokens, own, *maps, weight = ctx.saved_tensors
        buffers, needed = Buffers(tokens), ctx.needs_input_grad
        grad = _by_head(grad_outputs[0], ctx.n_heads)
        with without_autocast(tokens.device.type):
            heads = _Projected(tokens, own, tuple(maps), ctx.n_heads, ctx.shape, ctx.loops, buffers, needed[:8])
            wanted = any(needed[:6]), needed[0] or any(needed[6:8]), needed[8]
            d_weight = attend_backward(heads, ctx.loops, weight, buffers, grad, wanted)
        d_own = None if own is None else heads.d_own
        return heads.d_tokens, d_own, *heads.d_maps, d_weight, None, None, None


def _by_head(x: Tensor, n_heads: int) -> Tensor:
    """View ``(nodes, tokens, width)`` as ``(nodes, heads, tokens, head_dim)``."""
    return x.unflatten(2, (n_heads, -1)).transpose(1, 2)
