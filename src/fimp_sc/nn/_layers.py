"""Layers whose attention runs across the edges of a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fimp_sc._recipe import recipe
from fimp_sc.nn.ops._api import token_attention

if TYPE_CHECKING:
    from fimp_sc.data._batch import Batch


class SwiGLU(nn.Module):
    """Gated unit, ``silu(a) * b`` of the two halves of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., n)`` of ``(..., 2 * n)``."""
        gate, value = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * value


Activation: TypeAlias = Literal["gelu", "relu", "swiglu"]
_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "swiglu": SwiGLU}


class CrossNodeAttention(nn.Module):
    r"""Multi-head attention from the tokens of a node to the tokens of each of its sources.

    .. math::

        A(H)_i = W_O \, \mathrm{mean}_{j \in N(i)} \, w_{ij} \, \mathrm{softmax}\!\left(
        (W_Q H_i) (W_K H_j)^\top / \sqrt{d} \right) W_V H_j

    for every head, of width :math:`d`. Queries, keys and values are projected once per node; the output projection is
    applied once, after the reduction over sources, with its bias only where a node has sources, so that an isolated
    node receives exactly zero.

    Parameters
    ----------
    d_model
        Width of a token.
    n_heads
        Heads; must divide ``d_model``.
    reduce
        ``"mean"`` or ``"sum"`` over sources.
    project_output
        Whether the reduced messages pass an output projection.
    value_kernel
        Width of a depthwise convolution along the tokens of each source's values, odd, whose result joins its message
        (position by position: destination and source tokens must correspond). Nyströmformers have it.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        reduce: str = "mean",
        project_output: bool = True,
        value_kernel: int | None = None,
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"n_heads must divide the width: {d_model} is not a multiple of {n_heads}")
        self.n_heads = n_heads
        self.reduce = reduce
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.output: Any = nn.Linear(d_model, d_model) if project_output else nn.Identity()
        self.value_convolution: nn.Conv2d | None = None
        if value_kernel is not None:
            self.value_convolution = nn.Conv2d(
                n_heads, n_heads, (value_kernel, 1), padding=(value_kernel // 2, 0), groups=n_heads, bias=False
            )

    def forward(
        self,
        tokens: Tensor,
        padding: Tensor,
        indptr: Tensor,
        indices: Tensor,
        n_queries: int | None = None,
        *,
        own: Tensor | None = None,
        edge_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the reduced messages.

        Parameters
        ----------
        tokens
            ``(n_nodes, n_tokens, d_model)`` tokens of all nodes; destinations first, unless ``own`` is given.
        padding
            ``(n_nodes, n_tokens)`` bool, True where there is no token.
        indptr, indices
            Compressed sparse rows over the destinations.
        n_queries
            Make messages for only the first tokens of each destination.
        own
            ``(n_destinations, n, d_model)`` tokens of the destinations, where they are not what these send.
        edge_weight
            ``(n_edges,)`` factor of each message, see :func:`cross_node_attention`.

        Returns
        -------
        ``(n_destinations, n_queries or n, d_model)``.
        """
        messages = token_attention(
            tokens,
            (self.query, self.key, self.value),
            self.n_heads,
            indptr,
            indices,
            own=own,
            n_queries=n_queries,
            edge_weight=edge_weight,
            key_padding_mask=padding,
            reduce=self.reduce,
        )
        if self.value_convolution is not None:
            convolved = self._convolved(tokens, padding, indptr, indices, edge_weight)
            messages = messages + convolved[:, : messages.shape[1]]
        out, connected = self.output(messages), indptr.diff() > 0
        # Where it costs nothing to ask, tokens are not gone through again for nothing.
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and bool(connected.all()):
            return out
        return out * connected.to(messages.dtype)[:, None, None]

    def _convolved(
        self, tokens: Tensor, padding: Tensor, indptr: Tensor, indices: Tensor, edge_weight: Tensor | None
    ) -> Tensor:
        """Return the part of the reduced messages that is convolved values, ``(n_destinations, n_tokens, d_model)``.

        One row per edge is held: sequences that are convolved are short.
        """
        value = self.value(tokens).masked_fill(padding[:, :, None], 0.0).unflatten(2, (self.n_heads, -1))
        convolved = self.value_convolution(value.transpose(1, 2)).transpose(1, 2).flatten(2)  # type: ignore[misc]
        degree = indptr.diff()
        destination = torch.repeat_interleave(degree, output_size=len(indices))
        total = convolved.new_zeros(len(degree), *convolved.shape[1:])
        sent = convolved.index_select(0, indices)
        if edge_weight is not None:
            sent = sent * edge_weight.to(sent.dtype)[:, None, None]
        total = total.index_add(0, destination, sent)
        if self.reduce == "sum":
            return total
        return total / degree.clamp(min=1).to(total.dtype)[:, None, None]


class TransformerLayer(nn.Module):
    r"""Transformer layer that attends across nodes: attention, residual, norm and feed-forward.

    .. math::

        H_i' = H_i + A(\mathrm{norm}(H))_i, \qquad H_i'' = H_i' + \mathrm{feedforward}(\mathrm{norm}(H_i'))

    with norms first, :math:`A` as in :class:`CrossNodeAttention`; else :math:`H_i' = \mathrm{norm}(H_i + A(H)_i)` and
    :math:`H_i'' = \mathrm{norm}(H_i' + \mathrm{feedforward}(H_i'))`.

    Parameters
    ----------
    d_model, n_heads
        Width of a token and number of heads.
    d_feedforward
        Width of the hidden layer of the feed-forward part.
    norm_first
        Norms before attention and feed-forward (pre-norm) or after the residuals (post-norm).
    activation
        ``"gelu"``, ``"relu"``, or ``"swiglu"``: a gate for each unit of the hidden layer, which doubles :attr:`expand`.
    dropout
        Rate on messages and on what the feed-forward part adds.
    eps
        Of the layer norms.
    reduce
        ``"mean"`` or ``"sum"`` over sources.
    value_kernel
        See :class:`CrossNodeAttention`.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        d_feedforward: int,
        norm_first: bool = True,
        activation: Activation = "gelu",
        dropout: float = 0.1,
        eps: float = 1e-5,
        reduce: str = "mean",
        value_kernel: int | None = None,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = CrossNodeAttention(d_model, n_heads, reduce=reduce, value_kernel=value_kernel)
        self.attention_norm = nn.LayerNorm(d_model, eps=eps)
        self.expand = nn.Linear(d_model, 2 * d_feedforward if activation == "swiglu" else d_feedforward)
        self.activation = _ACTIVATIONS[activation]()
        self.contract = nn.Linear(d_feedforward, d_model)
        self.feedforward_norm = nn.LayerNorm(d_model, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens: Tensor,
        padding: Tensor,
        indptr: Tensor,
        indices: Tensor,
        n_queries: int | None = None,
        *,
        own: Tensor | None = None,
        edge_weight: Tensor | None = None,
    ) -> Tensor:
        """Update the tokens of the destinations.

        Parameters
        ----------
        tokens
            ``(n_nodes, n_tokens, d_model)`` tokens that sources send; destinations first, unless ``own`` is given.
        padding
            ``(n_nodes, n_tokens)`` bool.
        indptr, indices
            Compressed sparse rows over the destinations.
        n_queries
            Update (and return) only the first tokens of each destination.
        own
            ``(n_destinations, n_tokens, d_model)`` tokens of the destinations, where they are not what these send.
        edge_weight
            ``(n_edges,)`` factor of each message, see :func:`cross_node_attention`.

        Returns
        -------
        ``(n_destinations, n_queries or n_tokens, d_model)``.
        """
        graph = padding, indptr, indices, n_queries
        apart = None if own is None else own[:, :n_queries]
        own = tokens[: len(indptr) - 1, :n_queries] if apart is None else apart
        if self.norm_first:
            queries = None if apart is None else self.attention_norm(apart)
            messages = self.attention(self.attention_norm(tokens), *graph, own=queries, edge_weight=edge_weight)
            own = own + self.dropout(messages)
            return own + self.dropout(self._feedforward(self.feedforward_norm(own)))
        messages = self.attention(tokens, *graph, own=apart, edge_weight=edge_weight)
        own = self.attention_norm(own + self.dropout(messages))
        return self.feedforward_norm(own + self.dropout(self._feedforward(own)))

    @torch.no_grad()
    def start_as_neighbor_mean(
        self, read: slice, write: slice, scale: float, *, focus: float | None = None, noise: float | None = None
    ) -> None:
        """Initialize so that each token receives some columns of its counterparts in the sources.

        Queries and keys start near a multiple of the identity, so that a token attends to tokens like itself (the
        same gene, the summary). Values copy the columns ``read`` of the normalized source token, and the output adds
        them to the columns ``write``: the layer starts as a mean over neighbors, which training then refines. From a
        random start most of an epoch budget goes into finding it.

        Parameters
        ----------
        read, write
            Columns copied from and added to; slices of one length.
        scale
            Factor of the message.
        focus
            Scale of queries and keys, by default 1.4; larger attends more strictly to the counterpart.
        noise
            Fraction of the usual random initialization that remains, by default 0.1.
        """
        focus = recipe().layer_focus if focus is None else focus
        noise = recipe().layer_noise if noise is None else noise
        attention = self.attention
        projections = (attention.query, attention.key, attention.value, attention.output, self.contract)
        for linear in projections:
            linear.weight.mul_(noise)
            linear.bias.zero_()
        identity = torch.eye(len(attention.query.weight))
        attention.query.weight.add_(focus * identity)
        attention.key.weight.add_(focus * identity)
        columns = torch.arange(len(identity))
        received = columns[write]
        attention.value.weight[received, columns[read]] += 1.0
        attention.output.weight[received, received] += scale

    def _feedforward(self, tokens: Tensor) -> Tensor:
        return self.contract(self.activation(self.expand(tokens)))


class PaperLayer(nn.Module):
    r"""The layer as the paper writes it: messages, element-wise addition, one projection.

    .. math:: H_i' = W \left(H_i + \mathrm{mean}_j \, \mathrm{softmax}(Q_i K_j^\top / \sqrt{d}) V_j\right)

    No norm, no feed-forward part, no second residual. Source: arXiv 2210.09475, FIMP-base; the paper does not state
    the reduction, mean follows the predecessor's code.

    Parameters
    ----------
    d_model, n_heads
        Width of a token and number of heads.
    reduce
        ``"mean"`` or ``"sum"`` over sources.
    """

    def __init__(self, d_model: int, n_heads: int, *, reduce: str = "mean") -> None:
        super().__init__()
        # COMBINE projects: a projection of the messages alone is not part of the paper's layer.
        self.attention = CrossNodeAttention(d_model, n_heads, reduce=reduce, project_output=False)
        self.combine = nn.Linear(d_model, d_model)

    def forward(
        self,
        tokens: Tensor,
        padding: Tensor,
        indptr: Tensor,
        indices: Tensor,
        n_queries: int | None = None,
        *,
        edge_weight: Tensor | None = None,
    ) -> Tensor:
        """Update the tokens of the destinations; parameters and result as in :class:`TransformerLayer`."""
        own = tokens[: len(indptr) - 1, :n_queries]
        return self.combine(own + self.attention(tokens, padding, indptr, indices, n_queries, edge_weight=edge_weight))


def weight_of(batch: Batch, level: int) -> Tensor | None:
    """Return the factors of the messages of one layer, ``None`` where all are 1."""
    return batch["edge_weight"][level] if "edge_weight" in batch else None


def run_layers(layers: nn.ModuleList, tokens: Tensor, padding: Tensor, batch: Batch, n_queries: int | None) -> Tensor:
    """Run ``layers`` over a block; each updates only the nodes that later layers read.

    Parameters
    ----------
    layers
        One per hop of the block.
    tokens, padding
        ``(n, f, d_model)`` and ``(n, f)`` of all nodes of the block.
    batch
        The block's graphs.
    n_queries
        Tokens of each destination that the last layer updates; ``None`` for all.

    Returns
    -------
    ``(n_dst, n_queries or f, d_model)``.
    """
    for level, layer in enumerate(layers):
        last = level == len(layers) - 1
        graph = batch["indptr"][level], batch["indices"][level], n_queries if last else None
        tokens = layer(tokens, padding, *graph, edge_weight=weight_of(batch, level))
        padding = padding[: len(tokens)]
    return tokens
