"""Attention between tokens: the maps that make queries, keys and values of them, and what runs them where."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fimp_sc.nn.ops._api import check_graph, cross_node_attention, edge_factor, resolve
from fimp_sc.nn.ops._engine import Sizes, engine
from fimp_sc.nn.ops._projected import projected_attention


def token_attention(
    tokens: Tensor,
    maps: tuple[nn.Module, nn.Module, nn.Module],
    n_heads: int,
    indptr: Tensor,
    indices: Tensor,
    *,
    own: Tensor | None = None,
    n_queries: int | None = None,
    edge_weight: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    reduce: str = "mean",
) -> Tensor:
    """Attend as :func:`cross_node_attention`, with queries, keys and values that maps make of tokens.

    On CPUs, in single and double precision, linear maps are applied head by head: queries, keys and values of all
    heads are never held together.

    Parameters
    ----------
    tokens
        ``(n_sources, n_tokens, d_model)``.
    maps
        What makes queries, keys and values, ``d_model`` wide each, of tokens.
    n_heads
        Heads that the width is shared by.
    indptr, indices
        As in :func:`cross_node_attention`.
    own
        ``(n_destinations, n, d_model)`` tokens of the destinations. By default the destinations are the first nodes.
    n_queries
        Use only the first tokens of each destination.
    edge_weight, key_padding_mask, reduce
        As in :func:`cross_node_attention`.

    Returns
    -------
    ``(n_destinations, n_queries or n, d_model)``, head after head.

    Raises
    ------
    ValueError
        When graph, tokens and padding do not fit each other.
    """
    linear = _linear_maps(tokens, maps)
    if linear is not None:
        n_destinations = len(indptr) - 1 if own is None else len(own)
        check_graph(n_destinations, (tokens.shape[0], tokens.shape[1]), indptr, indices, edge_weight, key_padding_mask)
        n_tokens = tokens.shape[1]
        if own is None:
            queries: Tensor | int = n_tokens if n_queries is None else min(n_queries, n_tokens)
        else:
            queries = own[:, :n_queries]
        weight = edge_factor(tokens, indptr, indices, edge_weight, key_padding_mask, reduce)
        n = queries if isinstance(queries, int) else queries.shape[1]
        sizes = Sizes(len(tokens), n, n_tokens, tokens.shape[2] // n_heads)
        attends = engine(resolve("auto", tokens, tokens, (n, n_tokens)), indptr, indices, key_padding_mask, sizes)
        return projected_attention(queries, tokens, linear, n_heads, n_destinations, weight, attends)
    own = (tokens[: len(indptr) - 1] if own is None else own)[:, :n_queries]
    query, key, value = (
        part(x).unflatten(2, (n_heads, -1)).transpose(1, 2) for part, x in zip(maps, (own, tokens, tokens), strict=True)
    )
    out = cross_node_attention(
        query, key, value, indptr, indices, edge_weight=edge_weight, key_padding_mask=key_padding_mask, reduce=reduce
    )
    return out.transpose(1, 2).flatten(2)


def _linear_maps(tokens: Tensor, maps: tuple[nn.Module, ...]) -> tuple[Tensor, ...] | None:
    """Return weights and biases of maps that can be applied head by head here, else None."""
    if tokens.device.type != "cpu" or resolve("auto", tokens, tokens) not in ("numba", "chunked"):
        return None
    if tokens.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(tokens.device.type):
        return None
    parts: list[Tensor] = []
    for part in maps:
        # Anything else, such as a map with a change of low rank, makes its outputs itself.
        if type(part) is not nn.Linear or part.bias is None or {p.dtype for p in part.parameters()} != {tokens.dtype}:
            return None
        parts += [part.weight, part.bias]
    return tuple(parts)
