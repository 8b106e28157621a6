"""Attention over chunks of a graph, a bounded number of edges at a time, and its gradients: batched products.

Products run over several neighbors of a node in their inner dimension, so that the sum over neighbors is part of the
product.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Scores of one head held at once. 1 MB of fp32 for each thread stays in the cache of a CPU core; accelerators want
# large products.
_SCORES_PER_THREAD = 1 << 18
_SCORES_ACCELERATOR = 1 << 26
# The exponential of this, times the number of tokens, is far inside fp32, and so is its inverse.
_SAFE_SCORE = 60.0
# Above this batch size CUDA's batched products have failed.
_MAX_BATCH = 65_535


class Buffers:
    """Memory that chunks and heads use one after another: fresh pages for each would cost more than the products."""

    def __init__(self, like: Tensor) -> None:
        self.device, self.dtype, self.kept = like.device, compute_dtype(like), dict[str, Tensor]()

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        size = math.prod(shape)
        if name not in self.kept or self.kept[name].numel() < size:
            self.kept[name] = torch.empty(size, dtype=dtype or self.dtype, device=self.device)
        return self.kept[name][:size].view(shape)


def compute_dtype(x: Tensor) -> torch.dtype:
    # CPUs multiply halves many times slower than singles.
    return torch.float32 if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) else x.dtype


class Chunks:
    """An :class:`~fimp_sc.nn.ops._attend.Engine` of batched products, on any device.

    Destinations are gone through by descending degree, so that those of a chunk have equally many edges.

    Parameters
    ----------
    indptr, indices
        Compressed sparse rows over the destinations.
    padding
        ``(n_sources, n_tokens)`` bool, True where a token is padding.
    weight
        ``(n_edges,)`` factor of each message.
    buffers
        Memory to use.
    chunk_size
        Edges handled at once; by default as many as the cache likes.
    """

    def __init__(
        self,
        indptr: Tensor,
        indices: Tensor,
        padding: Tensor | None,
        weight: Tensor,
        buffers: Buffers,
        chunk_size: int | None,
    ) -> None:
        self._indices, self._weight, self._buffers, self._chunk_size = indices, weight, buffers, chunk_size
        # One transfer to the host for all that the loops depend on.
        degree, self._order = indptr.diff().sort(descending=True, stable=True)
        some = degree.new_zeros(1) if padding is None else padding.any().view(1).to(degree.dtype)
        *self._degree, padded = torch.cat((degree, some)).tolist()
        self._start = indptr[:-1].index_select(0, self._order)
        self._kept_chunks: list[tuple[int, int, Tensor, Tensor]] | None = None
        self._bias: Tensor | None = None
        if padding is not None and padded:
            # Finite, so that a source with padding only gives a uniform softmax instead of NaN.
            least = torch.finfo(buffers.dtype).min / 2
            self._bias = torch.zeros_like(padding, dtype=buffers.dtype).masked_fill_(padding, least)

    def project(self, tokens: Tensor, matrices: Tensor, biases: Tensor, outs: Sequence[Tensor]) -> None:
        for matrix, bias, out in zip(matrices, biases, outs, strict=True):
            rows = _first(tokens, out).reshape(-1, tokens.shape[2])
            torch.addmm(bias, rows, matrix.T, out=out.view(-1, out.shape[2]))

    def project_backward(
        self,
        gradients: Sequence[Tensor],
        tokens: Tensor,
        matrices: Tensor,
        d_tokens: Tensor | None,
        d_maps: tuple[Tensor, Tensor] | None,
    ) -> None:
        for i, (gradient, matrix) in enumerate(zip(gradients, matrices, strict=True)):
            rows = gradient.view(-1, gradient.shape[2])
            if d_maps is not None:
                torch.mm(rows.T, _first(tokens, gradient).reshape(-1, tokens.shape[2]), out=d_maps[0][i])
                torch.sum(rows, 0, out=d_maps[1][i])
            if d_tokens is not None:
                total = _first(d_tokens, gradient)
                if total.is_contiguous():
                    total.view(-1, total.shape[2]).addmm_(rows, matrix)
                else:
                    total.add_(torch.mm(rows, matrix).view(total.shape))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        q, small = self._ordered("queries", q), _small(q, k)
        total = self._buffers("total", *q.shape, dtype=self._weight.dtype).zero_()
        for begin, end, edges, sources in self._chunks(q, k):
            attention, _ = self._attention(q[begin:end], k, sources, small=small)
            values = self._gather("values", v, sources, end - begin, self._weight.index_select(0, edges))
            _add_product(total[begin:end], attention.flatten(2), values)
        out.index_copy_(0, self._order, total.to(out.dtype))

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, up: Tensor, d_weight: Tensor | None, wanted: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        given, small, (of_scores, of_values), dtype = q, _small(q, k), wanted, self._weight.dtype
        q, up = self._ordered("queries", q), self._ordered("up", up)
        names = (("total", q), ("dk", k), ("dv", v))
        dq, dk, dv = (self._buffers(name, *x.shape, dtype=dtype).zero_() for name, x in names)
        for begin, end, edges, sources in self._chunks(q, k):
            n, factor, per_edge = end - begin, self._weight.index_select(0, edges), (len(edges), *k.shape[1:])
            attention, keys = self._attention(q[begin:end], k, sources, small=small)
            if of_values or d_weight is not None:
                received = self._buffers("received", *keys.shape)
                torch.bmm(attention.flatten(2).mT, up[begin:end], out=received)
                received = received.view(per_edge).to(dtype)
                if d_weight is not None:
                    # <message, gradient> = <value, attentionᵀ gradient>: the message itself is not needed.
                    d_weight.index_add_(0, edges, (received * v.index_select(0, sources)).flatten(1).sum(1))
                dv.index_add_(0, sources, received.mul_(factor[:, None, None]))
            if of_scores:
                values = self._gather("values", v, sources, n, factor)
                d_attention = self._buffers("d_attention", *attention.flatten(2).shape)
                torch.bmm(up[begin:end], values.mT, out=d_attention)
                d_scores = torch._softmax_backward_data(
                    d_attention.view_as(attention), attention, -1, attention.dtype,
                    grad_input=self._buffers("d_scores", *attention.shape),
                ).flatten(2)  # fmt: skip
                _add_product(dq[begin:end], d_scores, keys)
                sent = torch.bmm(d_scores.mT, q[begin:end], out=self._buffers("received", *keys.shape))
                dk.index_add_(0, sources, sent.view(per_edge).to(dtype))
        if given.dtype != dtype:
            given = self._buffers("dq", *dq.shape, dtype=dtype)
        return given.index_copy_(0, self._order, dq), dk, dv

    def _ordered(self, name: str, x: Tensor) -> Tensor:
        """Return the rows of destinations by descending degree."""
        return torch.index_select(x, 0, self._order, out=self._buffers(name, *x.shape))

    def _chunks(self, q: Tensor, k: Tensor) -> list[tuple[int, int, Tensor, Tensor]]:
        """Return ``(begin, end, edges, sources)`` of each chunk, the same for all heads."""
        if self._kept_chunks is None:
            size = self._chunk_size
            if size is None:
                on_cpu = q.device.type == "cpu"
                scores = _SCORES_PER_THREAD * torch.get_num_threads() if on_cpu else _SCORES_ACCELERATOR
                size = scores // max(k.shape[1] * max(q.shape[1], q.shape[2]), 1)
            self._kept_chunks = list(self._cut(max(min(size, _MAX_BATCH), 1)))
        return self._kept_chunks

    def _cut(self, size: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield chunks of at most so many edges: equally many for each of the destinations ``begin:end``."""
        degree = self._degree
        begin = 0
        while begin < len(degree) and degree[begin] > 0:
            stop = end = min(begin + max(size // degree[begin], 1), len(degree))
            slot = 0
            while slot < degree[begin]:
                while degree[end - 1] <= slot:
                    end -= 1
                width = max(min(degree[end - 1] - slot, size // (end - begin)), 1)
                slots = torch.arange(slot, slot + width, device=self._start.device)
                edges = (self._start[begin:end, None] + slots).flatten()
                yield begin, end, edges, self._indices.index_select(0, edges)
                slot += width
            begin = stop

    def _gather(self, name: str, nodes: Tensor, sources: Tensor, n: int, factor: Tensor | None = None) -> Tensor:
        """Return ``(n, neighbors x tokens, head_dim)``: the sources of each of ``n`` destinations in a row."""
        rows = torch.index_select(nodes, 0, sources, out=self._buffers(name, len(sources), *nodes.shape[1:]))
        if factor is not None:
            rows.mul_(factor[:, None, None])
        return rows.view(n, -1, nodes.shape[-1])

    def _attention(self, q: Tensor, k: Tensor, sources: Tensor, *, small: bool) -> tuple[Tensor, Tensor]:
        """Return ``(n, tokens, neighbors, source tokens)``, one softmax for each neighbor, and the gathered keys."""
        n, tokens = q.shape[:2]
        keys = self._gather("keys", k, sources, n)
        scores = self._buffers("scores", n, tokens, keys.shape[1])
        if self._bias is None:
            torch.bmm(q, keys.mT, out=scores)
        else:
            torch.baddbmm(self._bias.index_select(0, sources).view(n, 1, -1), q, keys.mT, out=scores)
        segments = scores.view(n, tokens, len(sources) // n, -1)
        if scores.device.type != "cpu":
            return torch.softmax(segments, -1), keys
        # In place, and faster than torch's function on CPUs.
        if not small:
            segments.sub_(segments.amax(-1, keepdim=True))
        total = segments.exp_().sum(-1, keepdim=True)
        # Without the shift by the largest score a source with padding only has no weight at all.
        return segments.mul_(total.clamp_(min=1e-30).reciprocal_()), keys


def _first(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens[: like.shape[0], : like.shape[1]]


def _small(q: Tensor, k: Tensor) -> bool:
    """Tell whether no score can be so large that it must be shifted before it is exponentiated."""
    if q.device.type != "cpu" or not q.numel() or not k.numel():
        return False
    return float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) <= _SAFE_SCORE


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))


def dense_like(x: Tensor) -> Tensor:
    """Return memory of the layout of ``x`` if that is dense; numbers of the last dimension lie next to each other."""
    like = torch.empty_like(x)
    return like if like.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)
