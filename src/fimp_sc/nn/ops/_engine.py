"""What attends over a graph, one head at a time: compiled loops or batched products."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from fimp_sc.nn.ops._chunked import Chunks, best_chunk_size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from fimp_sc.nn.ops._chunked import Buffers, Map


class Sizes(NamedTuple):
    """Sizes of what one head attends to."""

    n_sources: int
    n_queries: int
    n_tokens: int
    head_dim: int


class Engine(Protocol):
    """What attends over a graph that it knows.

    Tensors of destinations, ``(n_destinations, tokens, head_dim)``, have their rows in the order of the engine, which
    is ``None`` where that is the graph's own.
    """

    order: Tensor | None

    def running(self) -> AbstractContextManager[None]:
        """Return the context of a pass, in which alone the other methods are called."""

    def project(self, tokens: Tensor, maps: Sequence[Map], outs: Sequence[Tensor]) -> None:
        """Write what linear maps make of tokens.

        Parameters
        ----------
        tokens
            ``(nodes, tokens, d_model)``.
        maps
            At most three, to ``head_dim`` numbers.
        outs
            Memory for what each makes, contiguous: ``(nodes, tokens, head_dim)``, or fewer nodes and tokens, which are
            the first then.
        """

    def project_backward(
        self,
        gradients: Sequence[Tensor],
        tokens: Tensor,
        maps: Sequence[Map],
        d_tokens: Tensor | None,
        d_maps: Sequence[tuple[Tensor | None, Tensor | None]],
    ) -> None:
        """Add the gradient of tokens, and write those of linear maps.

        Parameters
        ----------
        gradients
            Those of ``outs`` in :meth:`project`.
        tokens, maps
            As in :meth:`project`.
        d_tokens
            Of the shape of ``tokens``.
        d_maps
            Memory for the gradients of maps. Here and in ``d_tokens``, ``None`` is what is not wanted.
        """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, total: Tensor, buffers: Buffers) -> None:
        """Write the reduced messages of one head to ``total``.

        Parameters
        ----------
        q, k, v
            As from :class:`Heads`.
        weight
            ``(n_edges,)`` factor of each message.
        total
            Of the shape of ``q``, in the dtype of ``weight``; where ``order`` is ``None``, of any strides.
        buffers
            Memory to use.
        """

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
        """Return the gradients of one head, and add to those of weights.

        Parameters
        ----------
        q, k, v, weight, buffers
            As in :meth:`forward`.
        up
            Gradient of the reduced messages; as ``total`` in :meth:`forward`.
        d_weight
            Sum over heads of the gradient of ``weight``, where it is wanted.
        wanted
            Whether gradients are wanted of ``q`` or ``k``, and of ``v``. What is not wanted may hold anything.

        Returns
        -------
        Those of ``q``, ``k`` and ``v`` in the dtype of ``weight``, contiguous, in memory of ``buffers`` or of ``q``.
        """


def engine(
    backend: str,
    indptr: Tensor,
    indices: Tensor,
    padding: Tensor | None,
    sizes: Sizes,
    chunk_size: int | None = None,
) -> Engine:
    """Return what attends over a graph.

    Parameters
    ----------
    backend
        ``"numba"`` for compiled loops, else batched products.
    indptr, indices
        Compressed sparse rows over the destinations.
    padding
        ``(n_sources, n_tokens)`` bool, True where a token is padding.
    sizes
        Sizes.
    chunk_size
        Edges that batched products handle at once; by default as many as the cache likes.
    """
    if backend == "numba":
        from fimp_sc.nn.ops.numba._engine import CompiledLoops

        return CompiledLoops(indptr, indices, padding, sizes.n_sources)
    if chunk_size is None:
        chunk_size = best_chunk_size(indptr.device.type, *sizes[1:])
    return Chunks(indptr, indices, padding, chunk_size)
