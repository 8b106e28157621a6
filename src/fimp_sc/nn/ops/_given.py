"""Cross-node attention between queries, keys and values that are given, with memory of the order of the nodes.

The forward pass keeps its inputs only; the backward pass computes the attention weights again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fimp_sc.nn.ops._by_head import attend, attend_backward, like_heads, write_head
from fimp_sc.nn.ops._chunked import Buffers, without_autocast

if TYPE_CHECKING:
    from torch import Tensor

    from fimp_sc.nn.ops._engine import Engine


def given_attention(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, engine: Engine) -> Tensor:
    """Attend, and compute the attention weights again in the backward pass.

    Parameters
    ----------
    query
        ``(n_destinations, heads, tokens, head_dim)``.
    key, value
        ``(n_sources, heads, source_tokens, head_dim)``.
    weight
        ``(n_edges,)`` factor of each message, in the dtype that sums over edges use. Differentiable.
    engine
        What attends over the graph.

    Returns
    -------
    Tensor of the shape and dtype of ``query``.
    """
    return _GivenAttention.apply(query, key, value, weight, engine)


class _Given:
    """Heads that are there already.

    Parameters
    ----------
    tensors
        Queries, keys and values, ``(nodes, heads, tokens, head_dim)``.
    needed
        Of which of them the gradients are wanted.
    """

    def __init__(
        self, tensors: tuple[Tensor, ...], engine: Engine, buffers: Buffers, needed: tuple[bool, ...] = (False,) * 3
    ) -> None:
        (self._query, self._key, self._value), self._order, self._buffers = tensors, engine.order, buffers
        self.n_heads, self._scale = self._query.shape[1], self._query.shape[-1] ** -0.5
        self.gradients = [like_heads(x) if need else None for x, need in zip(tensors, needed, strict=True)]

    def load(self, head: int) -> tuple[Tensor, Tensor, Tensor]:
        query = self._buffers.head("q", self._query, head, self._order).mul_(self._scale)
        return query, self._buffers.head("k", self._key, head), self._buffers.head("v", self._value, head)

    def collect(self, head: int, gradients: tuple[Tensor, Tensor, Tensor]) -> None:
        query, *others = zip(self.gradients, gradients, strict=True)
        if query[0] is not None:
            write_head(query[0], head, query[1].mul_(self._scale), self._order)
        for total, gradient in others:
            if total is not None:
                total[:, head] = gradient


class _GivenAttention(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, engine: Engine) -> Tensor:
        ctx.save_for_backward(query, key, value, weight)
        ctx.engine = engine
        buffers, out = Buffers(query), like_heads(query)
        attend(_Given((query, key, value), engine, buffers), engine, weight, buffers, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weight = ctx.saved_tensors
        buffers, needed = Buffers(query), ctx.needs_input_grad
        with without_autocast(query.device.type):
            heads = _Given((query, key, value), ctx.engine, buffers, needed[:3])
            wanted = needed[0] or needed[1], needed[2], needed[3]
            d_weight = attend_backward(heads, ctx.engine, weight, buffers, grad_outputs[0], wanted)
        return *heads.gradients, d_weight, None
