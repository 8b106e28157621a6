"""Cross-node attention in parts of the graph: any device, any floating dtype, memory of the order of the nodes.

The forward pass keeps its inputs only; the backward pass computes the attention weights again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fimp_sc.nn._chunks import (
    Buffers,
    Graph,
    attend,
    attend_backward,
    best_chunk_size,
    like_heads,
    sorted_graph,
    without_autocast,
    write_head,
)


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indptr: Tensor,
    indices: Tensor,
    weight: Tensor,
    padding: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Attend in chunks of edges and recompute the attention weights in the backward pass.

    Parameters
    ----------
    query
        ``(n_destinations, heads, tokens, head_dim)``.
    key, value
        ``(n_sources, heads, source_tokens, head_dim)``.
    indptr, indices
        Compressed sparse rows over the destinations.
    weight
        ``(n_edges,)`` factor of each message, in the dtype that sums over edges use. Differentiable.
    padding
        ``(n_sources, source_tokens)`` bool, True where a source token is padding.
    chunk_size
        Edges handled at once; by default as many as the cache likes.

    Returns
    -------
    Tensor of the shape and dtype of ``query``.
    """
    if chunk_size is None:
        chunk_size = best_chunk_size(query.device.type, query.shape[2], key.shape[2], query.shape[3])
    graph, padding = sorted_graph(indptr, indices, padding, chunk_size)
    return _ChunkedAttention.apply(query, key, value, weight, padding, graph)


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
        self, tensors: tuple[Tensor, ...], graph: Graph, buffers: Buffers, needed: tuple[bool, ...] = (False,) * 3
    ) -> None:
        (self._query, self._key, self._value), self._order, self._buffers = tensors, graph.order, buffers
        self.n_heads, self._scale = self._query.shape[1], self._query.shape[-1] ** -0.5
        self.gradients = [like_heads(x) if need else None for x, need in zip(tensors, needed, strict=True)]

    def query(self, head: int) -> Tensor:
        return self._buffers.head("q", self._query, head, self._order).mul_(self._scale)

    def key(self, head: int) -> Tensor:
        return self._buffers.head("k", self._key, head)

    def value(self, head: int) -> Tensor:
        return self._buffers.head("v", self._value, head)

    def add_query(self, head: int, gradient: Tensor) -> None:
        if self.gradients[0] is not None:
            write_head(self.gradients[0], head, gradient.mul_(self._scale), self._order)

    def add_key(self, head: int, gradient: Tensor) -> None:
        if self.gradients[1] is not None:
            self.gradients[1][:, head] = gradient

    def add_value(self, head: int, gradient: Tensor) -> None:
        if self.gradients[2] is not None:
            self.gradients[2][:, head] = gradient


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, padding: Tensor | None, graph: Graph
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, weight, padding)
        ctx.graph = graph
        buffers, out = Buffers(query), like_heads(query)
        attend(_Given((query, key, value), graph, buffers), weight, padding, graph, buffers, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weight, padding = ctx.saved_tensors
        buffers, needed = Buffers(query), ctx.needs_input_grad
        with without_autocast(query.device.type):
            heads = _Given((query, key, value), ctx.graph, buffers, needed[:3])
            wanted = needed[0] or needed[1], needed[2], needed[3]
            d_weight = attend_backward(heads, weight, padding, ctx.graph, buffers, grad_outputs[0], wanted)
        return *heads.gradients, d_weight, None, None
