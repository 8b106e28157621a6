r"""Attention between the tokens of single edges, and the size of their messages.

Attention is reduced over sources wherever results are made; here edges are looked at one by one, some at a time.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fimp_sc.nn._layers import PaperLayer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fimp_sc.nn._layers import CrossNodeAttention
    from fimp_sc.nn._network import Network

# Scores held at once: 2 MB of fp32 stay in the cache of a CPU core.
_SCORES = 1 << 19


def edge_attention(query: Tensor, key: Tensor, padding: Tensor, destination: Tensor, source: Tensor) -> Tensor:
    """Return the attention of each edge, mean over heads.

    Parameters
    ----------
    query
        ``(n_nodes, heads, n_queries, head_dim)``.
    key
        ``(n_nodes, heads, n_tokens, head_dim)``.
    padding
        ``(n_nodes, n_tokens)`` bool, True where there is no token; these are not attended to.
    destination, source
        ``(n_edges,)`` nodes.

    Returns
    -------
    ``(n_edges, n_queries, n_tokens)``, rows of which sum to one, or are zero for a source that is padding only.
    """
    return _weights(query, key, padding, destination, source).mean(1)


def edge_messages(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, destination: Tensor, source: Tensor
) -> Tensor:
    """Return the message of each edge before any projection of outputs, ``(n_edges, n_queries, heads * head_dim)``.

    Parameters
    ----------
    query, key, padding, destination, source
        As in :func:`edge_attention`.
    value
        The shape of ``key``.
    """
    message = _weights(query, key, padding, destination, source) @ value.index_select(0, source)
    return message.transpose(1, 2).flatten(2)


def _weights(query: Tensor, key: Tensor, padding: Tensor, destination: Tensor, source: Tensor) -> Tensor:
    scale = query.shape[-1] ** -0.5
    scores = (query.index_select(0, destination) * scale) @ key.index_select(0, source).mT
    absent = padding.index_select(0, source)
    bias = torch.zeros_like(absent, dtype=scores.dtype).masked_fill_(absent, torch.finfo(scores.dtype).min / 2)
    weights = scores.add_(bias[:, None, None]).softmax(-1)
    nothing = absent.all(1)
    return weights.masked_fill(nothing[:, None, None, None], 0.0) if bool(nothing.any()) else weights


def edges_at_once(n_heads: int, n_queries: int, n_tokens: int) -> int:
    """Return how many edges may be looked at together."""
    return max(_SCORES // max(n_heads * n_queries * n_tokens, 1), 1)


def first_projections(network: Network, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys of tokens in the first layer, ``(n, heads, f, head_dim)`` each.

    Parameters
    ----------
    network
        Of a model.
    tokens
        ``(n, f, width)`` as ``network.tokens`` makes them.
    """
    layer = network.message_layers()[0]
    attention = layer.attention
    if getattr(layer, "norm_first", False):
        tokens = layer.attention_norm(tokens)
    return _heads(attention, attention.query(tokens)), _heads(attention, attention.key(tokens))


@contextmanager
def recorded_influence(network: Network, n_nodes: int, n_destinations: int) -> Iterator[list[Tensor]]:
    r"""Within the context, one pass of the network over a block also leaves the influence of its edges in a list.

    That of an edge on the summary token of its destination (or the mean of the tokens that are its embedding, with
    messages averaged over them before their length is taken) in one layer is :math:`\lVert W_O \,
    \mathrm{softmax}(q K_j^\top / \sqrt d) V_j \rVert` over all heads together, where :math:`W_O` (for the layer of the
    paper: its projection :math:`W`) is used without its bias, which a node receives once, times the weight of the edge.

    Parameters
    ----------
    network
        Of a model.
    n_nodes, n_destinations
        Nodes of the block, and how many of them, the first, are destinations.

    Yields
    ------
    A list to which each layer appends ``(n_edges,)``: the edges of the destinations in the order of the graph, without
    self-loops.
    """
    found: list[Tensor] = []
    handles = [
        layer.attention.register_forward_pre_hook(
            _Recorder(layer, n_nodes, n_destinations, network.pooled_from, found), with_kwargs=True
        )
        for layer in network.message_layers()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    """Hook of the attention of one layer."""

    def __init__(
        self, layer: Any, n_nodes: int, n_destinations: int, pooled_from: int | None, found: list[Tensor]
    ) -> None:
        self.output = layer.combine if isinstance(layer, PaperLayer) else layer.attention.output
        self.n_nodes, self.n_destinations, self.found, self.seen = n_nodes, n_destinations, found, False
        self.pooled_from = pooled_from

    def __call__(self, attention: CrossNodeAttention, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        # A stack runs a layer over the graph first, then over the sources by themselves for what they send next.
        if self.seen:
            return
        self.seen = True
        tokens, padding, indptr, indices = inputs[:4]
        own, n = options.get("own"), self.n_destinations
        queries = tokens if own is None else own
        indices, factor = indices[: int(indptr[n])], options.get("edge_weight")
        destination = torch.repeat_interleave(indptr[: n + 1].diff(), output_size=len(indices))
        # What destinations send to themselves: their own row or, in a stack, a row behind those of the block's nodes.
        real = (indices != destination) & (indices < self.n_nodes)
        destination, source = destination[real], indices[real]
        query = _heads(attention, attention.query(queries[:n] if self.pooled_from is not None else queries[:n, :1]))
        key, value = (_heads(attention, layer(tokens)) for layer in (attention.key, attention.value))
        weight = self.output.weight if isinstance(self.output, nn.Linear) else None
        fraction = self._fraction(padding[:n])
        size = edges_at_once(attention.n_heads, query.shape[2], key.shape[2] * key.shape[3])
        lengths = [query.new_zeros(0)]
        for i in range(0, len(source), size):
            edges = destination[i : i + size], source[i : i + size]
            message = edge_messages(query, key, value, padding, *edges)
            message = message[:, 0] if fraction is None else (fraction[edges[0], None] @ message)[:, 0]
            if weight is not None:
                message = message @ weight.T
            lengths.append(message.norm(dim=1))
        influence = torch.cat(lengths)
        self.found.append(influence if factor is None else influence * factor[: len(real)][real])

    def _fraction(self, padding: Tensor) -> Tensor | None:
        """Return how much each token counts in the embedding of its node, where that is a mean."""
        if self.pooled_from is None:
            return None
        there = (~padding).to(torch.get_default_dtype())
        there[:, : self.pooled_from] = 0.0
        return there / there.sum(1, keepdim=True).clamp(min=1.0)


def _heads(attention: CrossNodeAttention, tokens: Tensor) -> Tensor:
    return tokens.unflatten(2, (attention.n_heads, -1)).transpose(1, 2)
