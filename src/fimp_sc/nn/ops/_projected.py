"""Cross-node attention that projects tokens itself: queries, keys and values of one head exist at a time.

The forward pass keeps the tokens, which whatever made them keeps as well; the backward pass projects them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fimp_sc.nn.ops._by_head import attend, attend_backward
from fimp_sc.nn.ops._chunked import Buffers, Map, without_autocast

if TYPE_CHECKING:
    from fimp_sc.nn.ops._engine import Engine


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
        As in :func:`~fimp_sc.nn.ops._given.given_attention`.

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
        self.n_heads, self._maps, self._engine, self._buffers = n_heads, maps, engine, buffers
        self._width = tokens.shape[2] // n_heads
        self._scale = self._width**-0.5
        self._shape, self._tokens, self._own = shape, tokens, own
        self.d_tokens, self.d_own = (
            torch.zeros_like(x, memory_format=torch.contiguous_format) if need and x is not None else None
            for x, need in zip((tokens, own), needed, strict=False)
        )
        self.d_maps = [torch.empty_like(x) if need else None for x, need in zip(maps, needed[2:], strict=True)]

    def load(self, head: int) -> tuple[Tensor, Tensor, Tensor]:
        maps, (n, n_tokens, _), order = self._of(head), self._tokens.shape, self._engine.order
        # Sums over edges use the buffer of what has another order afterwards.
        names, shapes = ("q" if order is None else "total", "k", "v"), (self._shape, (n, n_tokens), (n, n_tokens))
        made = [self._buffers(name, *shape, self._width) for name, shape in zip(names, shapes, strict=True)]
        for tokens, _, which in self._sources():
            self._engine.project(tokens, maps[which], made[which])
        query, key, value = made
        if order is not None:
            query = torch.index_select(query, 0, order, out=self._buffers("q", *query.shape))
        return query, key, value

    def collect(self, head: int, gradients: tuple[Tensor, Tensor, Tensor]) -> None:
        maps, order, (query, *others) = self._of(head), self._engine.order, gradients
        if order is not None:
            query = self._buffers("q", *query.shape).index_copy_(0, order, query)
        parts = [None if x is None else x[self._part(head)] for x in self.d_maps]
        d_maps = list(zip(parts[::2], parts[1::2], strict=True))
        for tokens, d_tokens, which in self._sources():
            self._engine.project_backward([query, *others][which], tokens, maps[which], d_tokens, d_maps[which])
        for x in d_maps[0]:
            if x is not None:
                x.mul_(self._scale)

    def _sources(self) -> list[tuple[Tensor, Tensor | None, slice]]:
        """Return tokens, their gradient, and which of queries, keys and values are made of them."""
        if self._own is None:
            return [(self._tokens, self.d_tokens, slice(0, 3))]
        return [(self._own, self.d_own, slice(0, 1)), (self._tokens, self.d_tokens, slice(1, 3))]

    def _part(self, head: int) -> slice:
        return slice(head * self._width, (head + 1) * self._width)

    def _of(self, head: int) -> list[Map]:
        parts = [x[self._part(head)] for x in self._maps]
        # Scaled maps make scaled queries.
        return [Map(parts[0] * self._scale, parts[1] * self._scale), Map(*parts[2:4]), Map(*parts[4:])]


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
        return heads.d_tokens, heads.d_own, *heads.d_maps, d_weight, None, None, None


def _by_head(x: Tensor, n_heads: int) -> Tensor:
    """View ``(nodes, tokens, width)`` as ``(nodes, heads, tokens, head_dim)``."""
    return x.unflatten(2, (n_heads, -1)).transpose(1, 2)
