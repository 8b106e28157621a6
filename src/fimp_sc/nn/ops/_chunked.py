"""Attention over parts of a graph, a bounded number of edges at a time, and its gradients: batched products.

Products run over several neighbors of a node in their inner dimension, so that the sum over neighbors is part of the
product.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

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


def best_chunk_size(device: str, n_queries: int, n_tokens: int, head_dim: int) -> int:
    """Return how many edges are best handled together."""
    scores = _SCORES_PER_THREAD * torch.get_num_threads() if device == "cpu" else _SCORES_ACCELERATOR
    return scores // max(n_tokens * max(n_queries, head_dim), 1)


class Map(NamedTuple):
    """A linear map to one head."""

    matrix: Tensor  # (head_dim, d_model)
    bias: Tensor  # (head_dim,)


class Buffers:
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
        """Return ``(n, neighbors x tokens, head_dim)``: the sources of each of ``n`` destinations in a row."""
        rows = torch.index_select(nodes, 0, sources, out=self(name, len(sources), *nodes.shape[1:]))
        if factor is not None:
            rows.mul_(factor[:, None, None])
        return rows.view(n, -1, nodes.shape[-1])

    def attention(self, q: Tensor, keys: Tensor, bias: Tensor | None, sources: Tensor, *, small: bool) -> Tensor:
        """Return ``(n, tokens, neighbors, source tokens)``, one softmax for each neighbor."""
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


class Chunks:
    """An :class:`~fimp_sc.nn.ops._engine.Engine` of batched products, on any device.

    Parameters
    ----------
    indptr, indices
        Compressed sparse rows over the destinations.
    padding
        ``(n_sources, n_tokens)`` bool, True where a token is padding.
    chunk_size
        Edges handled at once.
    """

    order: Tensor | None

    def __init__(self, indptr: Tensor, indices: Tensor, padding: Tensor | None, chunk_size: int) -> None:
        # One transfer to the host for all that the loops depend on.
        degree, order = indptr.diff().sort(descending=True, stable=True)
        some = degree.new_zeros(1) if padding is None else padding.any().view(1).to(degree.dtype)
        *degrees, padded = torch.cat((degree, some)).tolist()
        start = indptr[:-1].index_select(0, order)
        self._parts = list(_parts(start, indices, degrees, max(min(chunk_size, _MAX_BATCH), 1)))
        self._padding = padding if padded else None
        self.order = order

    def running(self) -> AbstractContextManager[None]:
        """Return a context of nothing."""
        return nullcontext()

    def project(self, tokens: Tensor, maps: Sequence[Map], outs: Sequence[Tensor]) -> None:
        """Write what linear maps make of tokens."""
        for one, out in zip(maps, outs, strict=True):
            rows = _first(tokens, out).reshape(-1, tokens.shape[2])
            torch.addmm(one.bias, rows, one.matrix.T, out=out.view(-1, out.shape[2]))

    def project_backward(
        self,
        gradients: Sequence[Tensor],
        tokens: Tensor,
        maps: Sequence[Map],
        d_tokens: Tensor | None,
        d_maps: Sequence[tuple[Tensor | None, Tensor | None]],
    ) -> None:
        """Add the gradient of tokens, and write those of linear maps."""
        for gradient, one, (d_matrix, d_bias) in zip(gradients, maps, d_maps, strict=True):
            rows = gradient.view(-1, gradient.shape[2])
            if d_matrix is not None:
                torch.mm(rows.T, _first(tokens, gradient).reshape(-1, tokens.shape[2]), out=d_matrix)
            if d_bias is not None:
                torch.sum(rows, 0, out=d_bias)
            if d_tokens is None:
                continue
            total = _first(d_tokens, gradient)
            if total.is_contiguous():
                total.view(-1, total.shape[2]).addmm_(rows, one.matrix)
            else:
                total.add_(torch.mm(rows, one.matrix).view(total.shape))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, total: Tensor, buffers: Buffers) -> None:
        """Write the reduced messages of one head to ``total``."""
        bias, small = _bias(self._padding, buffers.dtype), _small(q, k)
        total.zero_()
        for begin, end, edges, sources in self._parts:
            keys = buffers.gather("keys", k, sources, end - begin)
            attention = buffers.attention(q[begin:end], keys, bias, sources, small=small)
            values = buffers.gather("values", v, sources, end - begin, weight.index_select(0, edges))
            _add_product(total[begin:end], attention.flatten(2), values)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor,
        up: Tensor,
        d_weight: Tensor | None,
        wanted: tuple[bool, bool],
        buffers: Buffers,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of one head, and add to those of weights."""
        of_scores, of_values = wanted
        bias, small = _bias(self._padding, buffers.dtype), _small(q, k)
        dq, dk, dv = (
            buffers(name, *x.shape, dtype=weight.dtype).zero_() for name, x in (("total", q), ("dk", k), ("dv", v))
        )
        for begin, end, edges, sources in self._parts:
            n, factor = end - begin, weight.index_select(0, edges)
            keys = buffers.gather("keys", k, sources, n)
            attention = buffers.attention(q[begin:end], keys, bias, sources, small=small)
            per_edge = (len(edges), *k.shape[1:])
            if of_values or d_weight is not None:
                received = buffers("received", *keys.shape)
                torch.bmm(attention.flatten(2).mT, up[begin:end], out=received)
                received = received.view(per_edge).to(weight.dtype)
                if d_weight is not None:
                    # <message, gradient> = <value, attentionᵀ gradient>: the message itself is not needed.
                    d_weight.index_add_(0, edges, (received * v.index_select(0, sources)).flatten(1).sum(1))
                dv.index_add_(0, sources, received.mul_(factor[:, None, None]))
            if of_scores:
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
        return dq, dk, dv


def _parts(
    start: Tensor, indices: Tensor, degree: list[int], chunk_size: int
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield ``(begin, end, edges, sources)``: equally many edges for each of the destinations ``begin:end``.

    Parameters
    ----------
    start, degree
        First edge and number of edges of each destination, by descending degree.
    indices
        Sources.
    chunk_size
        Most edges of a part.
    """
    begin = 0
    while begin < len(degree) and degree[begin] > 0:
        stop = end = min(begin + max(chunk_size // degree[begin], 1), len(degree))
        slot = 0
        while slot < degree[begin]:
            while degree[end - 1] <= slot:
                end -= 1
            width = max(min(degree[end - 1] - slot, chunk_size // (end - begin)), 1)
            slots = torch.arange(slot, slot + width, device=start.device)
            edges = (start[begin:end, None] + slots).flatten()
            yield begin, end, edges, indices.index_select(0, edges)
            slot += width
        begin = stop


def _first(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens[: like.shape[0], : like.shape[1]]


def _compute_dtype(x: Tensor) -> torch.dtype:
    # CPUs multiply halves many times slower than singles.
    return torch.float32 if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _small(q: Tensor, k: Tensor) -> bool:
    """Tell whether no score can be so large that it must be shifted before it is exponentiated."""
    if q.device.type != "cpu" or not q.numel() or not k.numel():
        return False
    return float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) <= _SAFE_SCORE


def _bias(padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if padding is None:
        return None
    # Finite, so that a source with padding only gives a uniform softmax instead of NaN.
    return torch.zeros_like(padding, dtype=dtype).masked_fill_(padding, torch.finfo(dtype).min / 2)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))


def without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
