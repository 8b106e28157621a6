"""Cross-node attention in parts of the graph: any device, any floating dtype, memory of the order of the nodes.

The forward pass keeps its inputs only; the backward pass computes the attention weights again. Both go through one
head and a bounded number of edges at a time, in batched products whose inner dimension runs over several neighbours
of a node, so that the sum over neighbours is part of the product.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Iterator

# Scores of one head held at once. 1 MB of fp32 for each thread stays in the cache of a CPU core; accelerators want
# large products.
_SCORES_PER_THREAD = 1 << 18
_SCORES_ACCELERATOR = 1 << 26
# The exponential of this, times the number of tokens, is far inside fp32, and so is its inverse.
_SAFE_SCORE = 60.0
# Above this batch size CUDA's batched products have failed.
_MAX_BATCH = 65_535


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
        scores = _SCORES_PER_THREAD * torch.get_num_threads() if query.device.type == "cpu" else _SCORES_ACCELERATOR
        chunk_size = scores // max(key.shape[2] * max(query.shape[2], query.shape[3]), 1)
    # One transfer to the host for all that the loops depend on.
    degree, order = indptr.diff().sort(descending=True, stable=True)
    some = degree.new_zeros(1) if padding is None else padding.any().view(1).to(degree.dtype)
    *degrees, padded = torch.cat((degree, some)).tolist()
    graph = _Graph(order, indptr[:-1].index_select(0, order), indices, degrees, max(min(chunk_size, _MAX_BATCH), 1))
    return _ChunkedAttention.apply(query, key, value, weight, padding if padded else None, graph)


class _Graph(NamedTuple):
    """Destinations sorted by descending degree."""

    order: Tensor
    start: Tensor  # first edge of each
    indices: Tensor
    degree: list[int]
    chunk_size: int

    def parts(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield ``(begin, end, edges, sources)``: equally many edges for each of the destinations ``begin:end``."""
        begin = 0
        while begin < len(self.degree) and self.degree[begin] > 0:
            stop = end = min(begin + max(self.chunk_size // self.degree[begin], 1), len(self.degree))
            slot = 0
            while slot < self.degree[begin]:
                while self.degree[end - 1] <= slot:
                    end -= 1
                width = max(min(self.degree[end - 1] - slot, self.chunk_size // (end - begin)), 1)
                slots = torch.arange(slot, slot + width, device=self.start.device)
                edges = (self.start[begin:end, None] + slots).flatten()
                yield begin, end, edges, self.indices.index_select(0, edges)
                slot += width
            begin = stop


class _Buffers:
    """Memory that chunks and heads use one after another: fresh pages for each would cost more than the products."""

    def __init__(self, like: Tensor) -> None:
        self.device, self.dtype, self.kept = like.device, _compute_dtype(like), dict[str, Tensor]()

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        size = math.prod(shape)
        if name not in self.kept or self.kept[name].numel() < size:
            self.kept[name] = torch.empty(size, dtype=dtype or self.dtype, device=self.device)
        return self.kept[name][:size].view(shape)

    def head(self, name: str, x: Tensor, head: int, order: Tensor | None = None) -> Tensor:
        """Copy one head, ``(nodes, tokens, head_dim)``, in the dtype of the products."""
        one = x[:, head] if order is None else x[:, head].index_select(0, order)
        return self(name, *one.shape).copy_(one)

    def gather(self, name: str, nodes: Tensor, sources: Tensor, n: int, factor: Tensor | None = None) -> Tensor:
        """Return ``(n, neighbours x tokens, head_dim)``: the sources of each of ``n`` destinations in a row."""
        rows = torch.index_select(nodes, 0, sources, out=self(name, len(sources), *nodes.shape[1:]))
        if factor is not None:
            rows.mul_(factor[:, None, None])
        return rows.view(n, -1, nodes.shape[-1])

    def attention(self, q: Tensor, keys: Tensor, bias: Tensor | None, sources: Tensor, *, small: bool) -> Tensor:
        """Return ``(n, tokens, neighbours, source tokens)``, one softmax for each neighbour."""
        n, tokens = q.shape[:2]
        scores = self("scores", n, tokens, keys.shape[1])
        if bias is None:
            torch.bmm(q, keys.mT, out=scores)
        else:
            torch.baddbmm(bias.index_select(0, sources).view(n, 1, -1), q, keys.mT, out=scores)
        segments = scores.view(n, tokens, len(sources) // n, -1)
        if scores.device.type != "cpu":
            return torch.softmax(segments, -1)
        # In place, and faster than torch's function on CPUs.
        if not small:
            segments.sub_(segments.amax(-1, keepdim=True))
        total = segments.exp_().sum(-1, keepdim=True)
        # Without the shift by the largest score a source with padding only has no weight at all.
        return segments.mul_(total.clamp_(min=1e-30).reciprocal_())


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, padding: Tensor | None, graph: _Graph
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, weight, padding)
        ctx.graph = graph
        bias, parts, buffers = _bias(padding, query), list(graph.parts()), _Buffers(query)
        out = _like(query)
        for head in range(query.shape[1]):
            q = buffers.head("q", query, head, graph.order).mul_(query.shape[-1] ** -0.5)
            k, v = buffers.head("k", key, head), buffers.head("v", value, head)
            small = _small(q, k)
            total = buffers("total", *q.shape, dtype=weight.dtype).zero_()
            for begin, end, edges, sources in parts:
                keys = buffers.gather("keys", k, sources, end - begin)
                attention = buffers.attention(q[begin:end], keys, bias, sources, small=small)
                values = buffers.gather("values", v, sources, end - begin, weight.index_select(0, edges))
                _add_product(total[begin:end], attention.flatten(2), values)
            _write(out, head, total, graph.order)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        with _without_autocast(grad_outputs[0].device.type):
            return _backward(ctx, grad_outputs[0])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, weight, padding = ctx.saved_tensors
    graph, scale = ctx.graph, query.shape[-1] ** -0.5
    need_query, need_key, need_value, need_weight = ctx.needs_input_grad[:4]
    bias, parts, buffers = _bias(padding, query), list(graph.parts()), _Buffers(query)
    d_query = _like(query) if need_query else None
    d_key = _like(key) if need_key else None
    d_value = _like(value) if need_value else None
    d_weight = torch.zeros_like(weight) if need_weight else None
    for head in range(query.shape[1]):
        q, up = buffers.head("q", query, head, graph.order).mul_(scale), buffers.head("up", grad, head, graph.order)
        k, v = buffers.head("k", key, head), buffers.head("v", value, head)
        small = _small(q, k)
        dq, dk, dv = (
            buffers(name, *x.shape, dtype=weight.dtype).zero_() for name, x in (("dq", q), ("dk", k), ("dv", v))
        )
        for begin, end, edges, sources in parts:
            n, factor = end - begin, weight.index_select(0, edges)
            keys = buffers.gather("keys", k, sources, n)
            attention = buffers.attention(q[begin:end], keys, bias, sources, small=small)
            per_edge = (len(edges), *k.shape[1:])
            if need_value or need_weight:
                received = buffers("received", *keys.shape)
                torch.bmm(attention.flatten(2).mT, up[begin:end], out=received)
                received = received.view(per_edge).to(weight.dtype)
                if d_weight is not None:
                    # <message, gradient> = <value, attentionᵀ gradient>: the message itself is not needed.
                    d_weight.index_add_(0, edges, (received * v.index_select(0, sources)).flatten(1).sum(1))
                dv.index_add_(0, sources, received.mul_(factor[:, None, None]))
            if need_query or need_key:
                values = buffers.gather("values", v, sources, n, factor)
                d_attention = buffers("d_attention", *attention.flatten(2).shape)
                torch.bmm(up[begin:end], values.mT, out=d_attention)
                d_scores = torch._softmax_backward_data(
                    d_attention.view_as(attention),
                    attention,
                    -1,
                    attention.dtype,
                    grad_input=buffers("d_scores", *attention.shape),
                ).flatten(2)
                _add_product(dq[begin:end], d_scores, keys)
                sent = torch.bmm(d_scores.mT, q[begin:end], out=buffers("received", *keys.shape))
                dk.index_add_(0, sources, sent.view(per_edge).to(weight.dtype))
        if d_query is not None:
            _write(d_query, head, dq.mul_(scale), graph.order)
        if d_key is not None:
            d_key[:, head] = dk
        if d_value is not None:
            d_value[:, head] = dv
    return d_query, d_key, d_value, d_weight, None, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    # CPUs multiply halves many times slower than singles.
    return torch.float32 if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _like(x: Tensor) -> Tensor:
    # Heads next to each other in memory, as the projections before and after want them.
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _write(out: Tensor, head: int, rows: Tensor, order: Tensor) -> None:
    out[:, head].index_copy_(0, order, rows.to(out.dtype))


def _small(q: Tensor, k: Tensor) -> bool:
    """Tell whether no score can be so large that it must be shifted before it is exponentiated."""
    if q.device.type != "cpu" or not q.numel() or not k.numel():
        return False
    return float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) <= _SAFE_SCORE


def _bias(padding: Tensor | None, query: Tensor) -> Tensor | None:
    if padding is None:
        return None
    # Finite, so that a source with padding only gives a uniform softmax instead of NaN.
    dtype = _compute_dtype(query)
    return torch.zeros_like(padding, dtype=dtype).masked_fill_(padding, torch.finfo(dtype).min / 2)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
