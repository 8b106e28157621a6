"""Cross-node attention as its definition reads: the reference that tests compare the other backends with."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indptr: Tensor,
    indices: Tensor,
    weight: Tensor,
    padding: Tensor | None = None,
) -> Tensor:
    """Gather queries, keys and values for each edge; memory grows with edges x tokens².

    Parameters
    ----------
    query
        ``(n_destinations, heads, tokens, head_dim)``.
    key, value
        ``(n_sources, heads, source_tokens, head_dim)``.
    indptr, indices
        Compressed sparse rows over the destinations.
    weight
        ``(n_edges,)`` factor of each message.
    padding
        ``(n_sources, source_tokens)`` bool, True where a source token is padding.

    Returns
    -------
    Tensor of the shape and dtype of ``query``.
    """
    destination = torch.arange(len(query), device=query.device).repeat_interleave(indptr.diff())
    q, k, v = (x.to(weight.dtype) for x in (query[destination], key[indices], value[indices]))
    scores = q @ k.mT * query.shape[-1] ** -0.5
    if padding is not None:
        scores = scores.masked_fill(padding[indices][:, None, None], torch.finfo(scores.dtype).min / 2)
    messages = scores.softmax(-1) @ v * weight[:, None, None, None]
    return messages.new_zeros(query.shape).index_add(0, destination, messages).to(query.dtype)
