"""Attention over a graph and its gradients, one head at a time: queries, keys and values are those of ``Heads``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fimp_sc.nn.ops._chunked import Buffers
    from fimp_sc.nn.ops._engine import Engine


class Heads(Protocol):
    """Where queries, keys and values come from and where their gradients go, one head at a time.

    Rows of queries are those of destinations in the order of an engine.
    """

    n_heads: int

    def load(self, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries times ``head_dim ** -0.5``, keys and values of a head, ``(nodes, tokens, head_dim)``."""

    def collect(self, head: int, gradients: tuple[Tensor, Tensor, Tensor]) -> None:
        """Take the gradients of the scaled queries, keys and values of a head; nothing of those that are not needed."""


def attend(heads: Heads, engine: Engine, weight: Tensor, buffers: Buffers, out: Tensor) -> None:
    """Write the reduced messages of all heads to ``out``, ``(n_destinations, heads, tokens, head_dim)``."""
    with engine.running():
        for head in range(heads.n_heads):
            q, k, v = heads.load(head)
            direct = _direct(out, engine, weight)
            total = out[:, head] if direct else buffers("total", *q.shape, dtype=weight.dtype)
            engine.forward(q, k, v, weight, total, buffers)
            if not direct:
                write_head(out, head, total, engine.order)


def attend_backward(
    heads: Heads, engine: Engine, weight: Tensor, buffers: Buffers, grad: Tensor, wanted: tuple[bool, bool, bool]
) -> Tensor | None:
    """Give ``heads`` their gradients and return that of the edges' weights.

    Parameters
    ----------
    heads, engine, weight, buffers
        As in :func:`attend`.
    grad
        Gradient of the reduced messages.
    wanted
        Whether gradients are wanted of queries or keys, of values, and of weights.
    """
    d_weight = torch.zeros_like(weight) if wanted[2] else None
    with engine.running():
        for head in range(heads.n_heads):
            q, k, v = heads.load(head)
            up = grad[:, head] if _direct(grad, engine, weight) else buffers.head("up", grad, head, engine.order)
            heads.collect(head, engine.backward(q, k, v, weight, up, d_weight, wanted[:2], buffers))
    return d_weight


def _direct(x: Tensor, engine: Engine, weight: Tensor) -> bool:
    """Tell whether the heads of a tensor of destinations are what the engine takes."""
    return engine.order is None and x.dtype == weight.dtype


def like_heads(x: Tensor) -> Tensor:
    # Heads next to each other in memory, as the projections before and after want them.
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def write_head(out: Tensor, head: int, rows: Tensor, order: Tensor | None) -> None:
    if order is None:
        out[:, head] = rows
    else:
        out[:, head].index_copy_(0, order, rows.to(out.dtype))
