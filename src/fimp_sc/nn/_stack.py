"""The transformer stack of a foundation model, its self-attention run across the edges of a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fimp_sc.nn._layers import Activation, TransformerLayer

if TYPE_CHECKING:
    from collections.abc import Iterator

NeighborStates: TypeAlias = Literal["evolving", "static"]
Aggregate: TypeAlias = Literal["layer", "final"]

# Edges whose whole stack runs at once with aggregate="final".
_EDGES = 256


class TransformerStack(nn.Module):
    r"""All layers of a transformer as the creator of messages.

    Node :math:`i` has tokens :math:`H_i`; :math:`S_j^\ell` are the tokens that node :math:`j` sends to layer
    :math:`\ell`, and layer :math:`\ell` with queries from :math:`D`, keys and values from :math:`S` is
    :math:`T_\ell(D \mid S)`. One pass reads one hop of the graph, however many layers there are.

    ``aggregate="layer"``: messages are averaged after the attention of every layer, so that norms and feed-forward
    part run once per node,

    .. math:: D_i^{\ell+1} = T_\ell\bigl(D_i^\ell \mid \{S_j^\ell\}_{j \in N(i)}\bigr), \qquad D_i^0 = H_i.

    ``aggregate="final"``: the paper's text taken literally. Every edge runs the whole stack by itself, and the last
    hidden states are averaged,

    .. math:: D_{ij}^{\ell+1} = T_\ell(D_{ij}^\ell \mid S_j^\ell), \qquad D_i = \mathrm{mean}_j \, D_{ij}^L.

    ``neighbor_states="evolving"``: :math:`S_j^{\ell+1} = T_\ell(S_j^\ell \mid S_j^\ell)`, the hidden states that the
    foundation model itself has of node :math:`j`. ``neighbor_states="static"``: :math:`S_j^\ell = H_j`; cheaper, but
    layers above the first read tokens of a kind that they never saw in pretraining.

    With ``self_loops`` a node is one of its own neighbors and sends what it is at that moment, :math:`D_i^\ell` (or
    :math:`D_{ii}^\ell`). Without other neighbors the result then is exactly that of the foundation model.

    Cost of one layer for a node with :math:`k` neighbors, where 1 is what the layer costs a node by itself without
    attention (its projections and feed-forward part): ``"layer"`` with evolving sources 2.5, with static ones 1.5;
    ``"final"`` with evolving sources about k + 2, with static ones k + 1. To this each comes the attention of k + 1
    edges, :math:`f / (3 d)` per edge for :math:`f` tokens of width :math:`d` where the feed-forward part is as wide as
    the tokens, and evolving sources one more. In training what layers compute is computed again in backward.

    Parameters
    ----------
    d_model, n_heads, n_layers
        Width of a token, attention heads, layers.
    d_feedforward, norm_first, activation, dropout, eps, value_kernel
        See :class:`TransformerLayer`.
    final_norm
        Whether a norm follows the last layer.
    neighbor_states, aggregate, self_loops
        How messages are made, see above.

    Raises
    ------
    ValueError
        When ``neighbor_states`` or ``aggregate`` is unknown, or ``n_heads`` does not divide ``d_model``.

    Notes
    -----
    Source: arXiv 2210.09475. The paper states neither which tokens sources send to later layers nor where messages
    are averaged.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_layers: int,
        *,
        d_feedforward: int,
        norm_first: bool = False,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        eps: float = 1e-5,
        final_norm: bool = False,
        value_kernel: int | None = None,
        neighbor_states: NeighborStates = "evolving",
        aggregate: Aggregate = "layer",
        self_loops: bool = True,
    ) -> None:
        super().__init__()
        if neighbor_states not in ("evolving", "static"):
            raise ValueError(f"neighbor_states must be 'evolving' or 'static', found {neighbor_states!r}")
        if aggregate not in ("layer", "final"):
            raise ValueError(f"aggregate must be 'layer' or 'final', found {aggregate!r}")
        self.neighbor_states, self.aggregate, self.self_loops = neighbor_states, aggregate, self_loops
        self.d_model = d_model
        self.layers = nn.ModuleList(
            TransformerLayer(
                d_model,
                n_heads,
                d_feedforward=d_feedforward,
                norm_first=norm_first,
                activation=activation,
                dropout=dropout,
                eps=eps,
                value_kernel=value_kernel,
            )
            for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(d_model, eps=eps) if final_norm else nn.Identity()

    def forward(
        self,
        tokens: Tensor,
        padding: Tensor,
        indptr: Tensor,
        indices: Tensor,
        n_queries: int | None = None,
        *,
        own: Tensor | None = None,
        own_padding: Tensor | None = None,
        edge_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens of the destinations after the last layer.

        Parameters
        ----------
        tokens
            ``(n_nodes, f, d_model)``, destinations first.
        padding
            ``(n_nodes, f)`` bool, True where there is no token.
        indptr, indices
            The graph over the destinations in compressed sparse rows, without self-loops.
        n_queries
            Return only the first tokens of each destination.
        own, own_padding
            ``(n_destinations, f + q, d_model)`` and ``(n_destinations, f + q)``, where destinations have tokens for
            themselves that they do not send to others: the same as in ``tokens``, followed by these.
        edge_weight
            ``(n_edges,)`` factor of each message, see :func:`cross_node_attention`; that of a self-loop is 1.

        Returns
        -------
        ``(n_destinations, n_queries or f + q, d_model)``. Without neighbors and without self-loops there is no
        message: ``aggregate="final"`` then gives zeros.
        """
        n_dst = len(indptr) - 1
        if own is None or own_padding is None:
            own, own_padding = tokens[:n_dst], padding[:n_dst]
        sent = tokens if len(indices) else tokens[:0]
        sent_padding = padding[: len(sent)]
        if self.aggregate == "final":
            return self._per_edge(sent, sent_padding, own, own_padding, indptr, indices, n_queries, edge_weight)
        all_padding = sent_padding
        if self.self_loops:
            indptr, indices, edge_weight = _with_own(indptr, indices, len(sent), edge_weight)
            all_padding = _joined(sent_padding, own_padding, True)
        states = self._sent(sent, sent_padding)
        for level, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            last = level == len(self.layers) - 1
            sources = _joined(state, own, 0.0) if self.self_loops else state
            graph = indptr, indices, n_queries if last else None
            own = self._run(layer, sources, all_padding, *graph, own=own, edge_weight=edge_weight)
        return self.norm(own)

    def alone(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """Return ``(n_nodes, f, d_model)``, the foundation model's own output for every node by itself."""
        *_, last = self.alone_states(tokens, padding)
        return self.norm(last)

    def alone_states(self, tokens: Tensor, padding: Tensor) -> Iterator[Tensor]:
        """Yield the hidden states after each layer, ``(n_nodes, f, d_model)``, of every node by itself."""
        nodes = torch.arange(len(tokens) + 1, device=tokens.device)
        for layer in self.layers:
            tokens = self._run(layer, tokens, padding, nodes, nodes[:-1])
            yield tokens

    def _run(self, layer: nn.Module, *inputs: Any, **kwargs: Any) -> Tensor:
        if self.training and torch.is_grad_enabled():
            # A dozen wide layers, twice: what they compute is not kept but computed again in backward.
            return checkpoint(layer, *inputs, use_reentrant=False, **kwargs)
        return layer(*inputs, **kwargs)

    def _sent(self, tokens: Tensor, padding: Tensor) -> Iterator[Tensor]:
        """Yield what sources send to each layer; the last layer of their own pass is never computed."""
        if self.neighbor_states == "static" or not len(tokens):
            yield from (tokens for _ in self.layers)
            return
        yield tokens
        states = self.alone_states(tokens, padding)
        yield from (next(states) for _ in range(len(self.layers) - 1))

    def _per_edge(
        self,
        sent: Tensor,
        sent_padding: Tensor,
        own: Tensor,
        own_padding: Tensor,
        indptr: Tensor,
        indices: Tensor,
        n_queries: int | None,
        edge_weight: Tensor | None,
    ) -> Tensor:
        states = list(self._sent(sent, sent_padding))
        if self.self_loops:
            indptr, indices, edge_weight = _with_own(indptr, indices, len(sent), edge_weight)
        degree = indptr.diff()
        destination = torch.repeat_interleave(degree, output_size=len(indices))
        total = torch.zeros_like(own[:, :n_queries])
        for i in range(0, len(indices), _EDGES):
            ends = destination[i : i + _EDGES], indices[i : i + _EDGES]
            run = self._run_edges
            if torch.is_grad_enabled():
                # Of an edge only its message is kept, the stack is run again in backward.
                message = checkpoint(run, states, sent_padding, own, own_padding, *ends, n_queries, use_reentrant=False)
            else:
                message = run(states, sent_padding, own, own_padding, *ends, n_queries)
            if edge_weight is not None:
                message = message * edge_weight[i : i + _EDGES, None, None]
            total = total.index_add(0, ends[0], message.to(total.dtype))
        return total / degree.clamp(min=1).to(total.dtype)[:, None, None]

    def _run_edges(
        self,
        states: list[Tensor],
        sent_padding: Tensor,
        own: Tensor,
        own_padding: Tensor,
        destination: Tensor,
        source: Tensor,
        n_queries: int | None,
    ) -> Tensor:
        """Return the last hidden state of each edge, ``(n_edges, n_queries or f, d_model)``."""
        own = own.index_select(0, destination)
        edges = torch.arange(len(source) + 1, device=source.device)
        n_sent = len(states[0])
        # A node's own edge reads what that edge has come to.
        source = torch.where(source < n_sent, source, n_sent + edges[:-1])
        all_padding = _joined(sent_padding, own_padding.index_select(0, destination), True)
        for level, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            last = level == len(self.layers) - 1
            own = layer(_joined(state, own, 0.0), all_padding, edges, source, n_queries if last else None, own=own)
        return self.norm(own)


def _joined(sent: Tensor, own: Tensor, fill: float) -> Tensor:
    """Put what nodes have for themselves after what they send, which is filled up to the same number of tokens."""
    more = own.shape[1] - sent.shape[1]
    if more:
        sent = nn.functional.pad(sent, [0, 0] * (sent.ndim - 2) + [0, more], value=fill)
    return torch.cat([sent, own])


def _with_own(
    indptr: Tensor, indices: Tensor, first: int, edge_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Put an edge from ``first + i``, of weight 1, before the other edges of each destination ``i``."""
    nodes = torch.arange(len(indptr) - 1, device=indptr.device)
    own = indptr[:-1] + nodes
    out = indices.new_empty(len(indices) + len(nodes))
    others = torch.ones(len(out), dtype=torch.bool, device=indptr.device)
    others[own] = False
    out[own] = first + nodes
    out[others] = indices
    if edge_weight is not None:
        edge_weight = torch.ones_like(out, dtype=edge_weight.dtype).masked_scatter(others, edge_weight)
    return indptr + torch.arange(len(indptr), device=indptr.device), out, edge_weight
