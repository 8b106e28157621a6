r"""Cross-node attention: the one operation that every FIMP network is made of.

For a graph in compressed sparse rows (row = destination) and a sequence of tokens per node

.. math::

    O_i = \sum_{j \in N(i)} w_{ij} \, \mathrm{softmax}\!\left(Q_i K_j^\top / \sqrt{d}\right) V_j

with one softmax per edge. Queries, keys and values are projected once per *node*, so that nothing of size
edges x tokens x width or edges x tokens² is ever kept: the forward pass goes through the graph in slots (the first
neighbour of every node, the second one, ...) and the backward pass computes the attention weights again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

# Scores held at once. About 1 MB of fp32 stays in the cache of one CPU core; accelerators want much larger products.
_SCORES_PER_CHUNK_CPU = 1 << 18
_SCORES_PER_CHUNK_ACCELERATOR = 1 << 26
# Above this batch size CUDA's batched products have failed.
_MAX_BATCH = 65_535


def cross_node_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indptr: Tensor,
    indices: Tensor,
    *,
    edge_weight: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    reduce: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """Attend from the tokens of each destination to the tokens of each of its sources, and reduce over the sources.

    Parameters
    ----------
    query
        ``(n_destinations, heads, tokens, head_dim)``.
    key, value
        ``(n_sources, heads, source_tokens, head_dim)``. Destinations and sources may be different sets of nodes.
    indptr, indices
        The graph in compressed sparse rows, int64: sources of destination ``i`` are
        ``indices[indptr[i] : indptr[i + 1]]``.
    edge_weight
        ``(n_edges,)`` factor of each message, in the order of ``indices``. With ``reduce="mean"`` the weights of a
        destination are divided by their number, not by their sum. Differentiable.
    key_padding_mask
        ``(n_sources, source_tokens)`` bool, True where a source token is padding. A source whose tokens are all
        padding sends a message of zeros.
    reduce
        ``"mean"`` or ``"sum"`` over the sources.
    chunk_size
        Destinations handled at once. Chosen from the device and the number of tokens by default; changes speed and
        memory, not the result.

    Returns
    -------
    Tensor of the shape and dtype of ``query``. A destination without sources gets zeros.

    Raises
    ------
    ValueError
        When shapes do not fit or ``reduce`` is unknown.

    Notes
    -----
    Source: arXiv 2210.09475, the cross-node attention message; the mean over sources is the convention of the
    predecessor's code, as the paper does not state one.
    """
    _check_shapes(query, key, value, indptr, indices, edge_weight, key_padding_mask)
    degree = indptr.diff()
    if reduce == "mean":
        weight = degree.clamp(min=1).to(query.dtype).reciprocal().repeat_interleave(degree)
        weight = weight if edge_weight is None else weight * edge_weight
    elif reduce == "sum":
        weight = query.new_ones(indices.shape[0]) if edge_weight is None else edge_weight
    else:
        raise ValueError(f"reduce must be 'mean' or 'sum', found {reduce!r}")

    bias = None
    if key_padding_mask is not None and bool(key_padding_mask.any()):
        # Finite, so that a source with padding only gives a uniform softmax over zeros instead of NaN.
        lowest = torch.finfo(query.dtype).min / 2
        bias = torch.zeros_like(key_padding_mask, dtype=query.dtype).masked_fill_(key_padding_mask, lowest)
        value = value.masked_fill(key_padding_mask[:, None, :, None], 0.0)

    # Slot r serves the nodes with more than r sources: sorted by degree these are a prefix, so that queries and
    # results are views and only keys and values are gathered.
    degree, order = degree.sort(descending=True, stable=True)
    if chunk_size is None:
        scores = _SCORES_PER_CHUNK_CPU if query.device.type == "cpu" else _SCORES_PER_CHUNK_ACCELERATOR
        chunk_size = scores // max(query.shape[1] * query.shape[2] * key.shape[2], 1)
    chunk_size = max(min(chunk_size, _MAX_BATCH // query.shape[1]), 1)
    out = _SlotAttention.apply(
        query.index_select(0, order),
        key.contiguous(),
        value.contiguous(),
        weight,
        bias,
        indptr[:-1].index_select(0, order),
        degree.tolist(),
        indices,
        chunk_size,
    )
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return out.index_select(0, inverse)


class _SlotAttention(torch.autograd.Function):
    """Destinations sorted by descending degree; saves the inputs and recomputes the attention weights in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        start: Tensor,
        degree: list[int],
        indices: Tensor,
        chunk_size: int,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, weight, bias, start, indices)
        ctx.degree, ctx.chunk_size = degree, chunk_size
        out = torch.zeros_like(query)
        for begin, end, edges in _slots(start, degree, chunk_size):
            sources = indices.index_select(0, edges)
            attention = _attention_weights(query[begin:end], key, bias, sources)
            message = torch.bmm(attention, _gather(value, sources))
            _flat(out, begin, end).addcmul_(message, _per_row(weight, edges, query.shape[1]))
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weight, bias, start, indices = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        heads, scale = query.shape[1], query.shape[-1] ** -0.5
        d_query, d_key, d_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[3] else None
        for begin, end, edges in _slots(start, ctx.degree, ctx.chunk_size):
            sources = indices.index_select(0, edges)
            shape = (end - begin, heads, key.shape[2], key.shape[3])
            attention = _attention_weights(query[begin:end], key, bias, sources)
            d_message = _flat(grad, begin, end) * _per_row(weight, edges, heads)
            d_value.index_add_(0, sources, torch.bmm(attention.transpose(1, 2), d_message).view(shape))
            d_attention = torch.bmm(d_message, _gather(value, sources).transpose(1, 2))
            if d_weight is not None:
                # <message, grad>, from the parts at hand: the message itself was not kept.
                plain = torch.bmm(_flat(grad, begin, end), _gather(value, sources).transpose(1, 2))
                d_weight[edges] = (attention * plain).view(end - begin, -1).sum(1)
            d_scores = torch._softmax_backward_data(d_attention, attention, -1, attention.dtype)
            _flat(d_query, begin, end).baddbmm_(d_scores, _gather(key, sources), alpha=scale)
            d_keys = torch.bmm(d_scores.transpose(1, 2), _flat(query, begin, end)).mul_(scale)
            d_key.index_add_(0, sources, d_keys.view(shape))
        return d_query, d_key, d_value, d_weight, None, None, None, None, None


def _slots(start: Tensor, degree: list[int], chunk_size: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``(begin, end, edges)``: one edge for each of the destinations ``begin:end``."""
    for begin in range(0, len(degree), chunk_size):
        end = min(begin + chunk_size, len(degree))
        for slot in range(degree[begin]):
            while degree[end - 1] <= slot:
                end -= 1
            yield begin, end, start[begin:end] + slot


def _attention_weights(query: Tensor, key: Tensor, bias: Tensor | None, sources: Tensor) -> Tensor:
    n, heads, tokens, dim = query.shape
    rows, keys = query.reshape(n * heads, tokens, dim), _gather(key, sources).transpose(1, 2)
    if bias is None:
        scores = torch.bmm(rows, keys).mul_(dim**-0.5)
    else:
        added = bias.index_select(0, sources).repeat_interleave(heads, 0).unsqueeze(1)
        scores = torch.baddbmm(added, rows, keys, alpha=dim**-0.5)
    return torch.softmax(scores, -1)


def _gather(nodes: Tensor, sources: Tensor) -> Tensor:
    return nodes.index_select(0, sources).view(-1, *nodes.shape[2:])


def _flat(nodes: Tensor, begin: int, end: int) -> Tensor:
    return nodes[begin:end].view(-1, *nodes.shape[2:])


def _per_row(weight: Tensor, edges: Tensor, heads: int) -> Tensor:
    return weight.index_select(0, edges).repeat_interleave(heads).view(-1, 1, 1)


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indptr: Tensor,
    indices: Tensor,
    edge_weight: Tensor | None,
    key_padding_mask: Tensor | None,
) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            "query, key and value must be (nodes, heads, tokens, head_dim) and key and value of one shape; found "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if query.shape[1] != key.shape[1] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and key differ in heads or head_dim: found {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if indptr.shape != (query.shape[0] + 1,):
        raise ValueError(
            f"indptr must have one entry per destination and one more: expected {query.shape[0] + 1}, "
            f"found {tuple(indptr.shape)}"
        )
    if edge_weight is not None and edge_weight.shape != indices.shape:
        raise ValueError(
            f"edge_weight must have one entry per edge: expected {tuple(indices.shape)}, "
            f"found {tuple(edge_weight.shape)}"
        )
    if key_padding_mask is not None and key_padding_mask.shape != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"key_padding_mask must be (n_sources, source_tokens) = {(key.shape[0], key.shape[2])}, "
            f"found {tuple(key_padding_mask.shape)}"
        )
