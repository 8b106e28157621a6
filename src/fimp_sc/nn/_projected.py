"""Cross-node attention that projects tokens itself: queries, keys and values of one head exist at a time.

The forward pass keeps the tokens, which whatever made them keeps as well; the backward pass projects them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fimp_sc.nn._by_head import attend, attend_backward
from fimp_sc.nn._chunks import Buffers, without_autocast

if TYPE_CHECKING:
    from fimp_sc.nn._engines import Engine


def projected_attention(
    queries: Tensor | int,
    tokens: Tensor,
    maps: tuple[Tensor, ...],
    n_heads: int,
    n_destinations: int,
    weight: Tensor,
    engine: Engine,
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
    weight, engine
        As in :func:`~fimp_sc.nn._given.given_attention`.

    Returns
    -------
    ``(n_destinations, n_queries, d_model)``, head after head.
    """
    own, n_queries = (None, queries) if isinstance(queries, int) else (queries, queries.shape[1])
    return _ProjectedAttention.apply(tokens, own, *maps, weight, engine, n_heads, (n_destinations, n_queries))


class _Projected:
    """Heads that linear maps make of tokens.

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
        engine: Engine,
        buffers: Buffers,
        needed: tuple[bool, ...] = (False,) * 8,
    ) -> None:
        self.n_heads, self._maps, self._order, self._buffers = n_heads, maps, engine.order, buffers
        self._width = tokens.shape[2] // n_heads
        self._scale = self._width**-0.5
        self._tokens = tokens
        self._own = tokens[: shape[0], : shape[1]] if own is None else own
        self.d_tokens = torch.zeros_like(tokens, memory_format=torch.contiguous_format) if needed[0] else None
        self.d_own = None
        if own is None and self.d_tokens is not None:
            self.d_own = self.d_tokens[: shape[0], : shape[1]]
        elif needed[1]:
            self.d_own = torch.zeros_like(self._own, memory_format=torch.contiguous_format)
        self.d_maps = [torch.empty_like(x) if need else None for x, need in zip(maps, needed[2:], strict=True)]

    def query(self, head: int) -> Tensor:
        if self._order is None:
            return self._project("q", self._own, 0, head).mul_(self._scale)
        # Sums over edges use this buffer afterwards.
        rows = self._project("total", self._own, 0, head).mul_(self._scale)
        return torch.index_select(rows, 0, self._order, out=self._buffers("q", *rows.shape))

    def key(self, head: int) -> Tensor:
        return self._project("k", self._tokens, 1, head)

    def value(self, head: int) -> Tensor:
        return self._project("v", self._tokens, 2, head)

    def add_query(self, head: int, gradient: Tensor) -> None:
        if self._order is not None:
            gradient = self._buffers("q", *gradient.shape).index_copy_(0, self._order, gradient)
        self._collect(gradient.mul_(self._scale), self._own, self.d_own, 0, head)

    def add_key(self, head: int, gradient: Tensor) -> None:
        self._collect(gradient, self._tokens, self.d_tokens, 1, head)

    def add_value(self, head: int, gradient: Tensor) -> None:
        self._collect(gradient, self._tokens, self.d_tokens, 2, head)

    def _part(self, head: int) -> slice:
        return slice(head * self._width, (head + 1) * self._width)

    def _project(self, name: str, tokens: Tensor, which: int, head: int) -> Tensor:
        matrix, bias = (self._maps[2 * which + i][self._part(head)] for i in range(2))
        made = self._buffers(name, *tokens.shape[:2], self._width)
        torch.addmm(bias, tokens.reshape(-1, tokens.shape[2]), matrix.T, out=made.view(-1, self._width))
        return made

    def _collect(self, gradient: Tensor, tokens: Tensor, d_tokens: Tensor | None, which: int, head: int) -> None:
        part, rows = self._part(head), gradient.view(-1, self._width)
        matrix, (d_matrix, d_bias) = self._maps[2 * which], self.d_maps[2 * which : 2 * which + 2]
        if d_matrix is not None:
            torch.mm(rows.T, tokens.reshape(-1, tokens.shape[2]), out=d_matrix[part])
        if d_bias is not None:
            torch.sum(rows, 0, out=d_bias[part])
        if d_tokens is None:
            return
        if d_tokens.is_contiguous():
            d_tokens.view(-1, d_tokens.shape[2]).addmm_(rows, matrix[part])
        else:
            d_tokens.add_(torch.mm(rows, matrix[part]).view(d_tokens.shape))


class _ProjectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, own: Tensor | None, *rest: Any) -> Tensor:
        *maps, weight, engine, n_heads, shape = rest
        ctx.save_for_backward(tokens, own, *maps, weight)
        ctx.engine, ctx.n_heads, ctx.shape = engine, n_heads, shape
        buffers = Buffers(tokens)
        heads = _Projected(tokens, own, tuple(maps), n_heads, shape, engine, buffers)
        out = tokens.new_empty(*shape, tokens.shape[2])
        attend(heads, engine, weight, buffers, _by_head(out, n_heads))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tokens, own, *maps, weight = ctx.saved_tensors
        buffers, needed = Buffers(tokens), ctx.needs_input_grad
        grad = _by_head(grad_outputs[0], ctx.n_heads)
        with without_autocast(tokens.device.type):
            heads = _Projected(tokens, own, tuple(maps), ctx.n_heads, ctx.shape, ctx.engine, buffers, needed[:8])
            wanted = any(needed[:6]), needed[0] or any(needed[6:8]), needed[8]
            d_weight = attend_backward(heads, ctx.engine, weight, buffers, grad, wanted)
        d_own = None if own is None else heads.d_own
        return heads.d_tokens, d_own, *heads.d_maps, d_weight, None, None, None


def _by_head(x: Tensor, n_heads: int) -> Tensor:
    """View ``(nodes, tokens, width)`` as ``(nodes, heads, tokens, head_dim)``."""
    return x.unflatten(2, (n_heads, -1)).transpose(1, 2)
