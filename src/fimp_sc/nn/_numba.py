"""Cross-node attention in compiled loops for CPUs, whose threads share the destinations.

Each thread adds up gradients of sources by itself, and these are added in a fixed order: with as many threads as before
results are the same to the bit.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from fimp_sc.nn import _numba_kernels as kernels
from fimp_sc.nn._threads import shares, threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from fimp_sc.nn._chunks import Buffers
    from fimp_sc.nn._threads import Run

# A thread costs more than this many edges of few tokens.
_LEAST_EDGES = 32


class CompiledLoops:
    """An :class:`~fimp_sc.nn._engines.Engine` of compiled loops.

    Parameters
    ----------
    indptr, indices
        Compressed sparse rows over the destinations, on the CPU.
    padding
        ``(n_sources, n_tokens)`` bool, True where a token is padding.
    n_sources
        Number of sources.

    Raises
    ------
    IndexError, ValueError
        The rows are not those of a graph between these nodes.
    """

    order: Tensor | None = None
    run: Run  # within a pass

    def __init__(self, indptr: Tensor, indices: Tensor, padding: Tensor | None, n_sources: int) -> None:
        some = padding is not None and bool(padding.any())
        padded = padding.numpy() if padding is not None and some else np.zeros((n_sources, 0), bool)
        # The loops would read memory that is not theirs.
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n_sources:
            raise IndexError(
                f"indices must name one of {n_sources} sources, found {int(indices.min())} to {int(indices.max())}"
            )
        if int(indptr[0]) != 0 or int(indptr[-1]) != len(indices) or bool((indptr.diff() < 0).any()):
            raise ValueError(f"indptr must rise from 0 to the number of edges, {len(indices)}")
        self._graph = padded, indptr.numpy(), indices.numpy()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have threads, ``run``, until the context ends."""
        with threads() as self.run:
            yield

    def forward(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, total: Tensor, buffers: Buffers) -> None:
        """Write the reduced messages of one head to ``total``."""
        given, out = self._given(q, k, v, weight), total.numpy()
        self.run(lambda part: kernels.forward(*given, part.rows, out), self._parts)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor,
        up: Tensor,
        gradients: tuple[Tensor, Tensor, Tensor],
        d_weight: Tensor | None,
        wanted: tuple[bool, bool],
        buffers: Buffers,
    ) -> None:
        """Write the gradients of one head, and add to those of weights."""
        given, grad, which = self._given(q, k, v, weight), up.numpy(), (*wanted, d_weight is not None)
        d_query, *d_sources = (x.numpy() for x in gradients)
        d_edges = np.zeros(0, grad.dtype) if d_weight is None else d_weight.numpy()
        for x in d_sources:
            x.fill(0)
        own = [d_sources] if len(self._parts) == 1 else [self._sums(part, k, buffers) for part in self._parts]

        def one(part: _Part) -> None:
            for x in own[part.number]:
                x.fill(0)
            kernels.backward(*given, part.rows, grad, part.place, d_query, *own[part.number], d_edges, which)

        self.run(one, self._parts)
        if len(own) > 1:
            for part, sums in zip(self._parts, own, strict=True):
                for x, added in zip(d_sources, sums, strict=True):
                    _add_rows(self.run, x, part.nodes, added)

    def _given(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[NDArray, ...]:
        *heads, factor = (x.detach().numpy() for x in (q, k, v, weight))
        return *heads, self._graph[0], factor, *self._graph[1:]

    def _sums(self, part: _Part, k: Tensor, buffers: Buffers) -> list[NDArray]:
        names = (f"{name} of {part.number}" for name in ("dk", "dv"))
        return [buffers(name, len(part.nodes), *k.shape[1:]).numpy() for name in names]

    @cached_property
    def _parts(self) -> list[_Part]:
        """Destinations in as many parts as there are threads, with equally many edges each."""
        _, indptr, indices = self._graph
        n = max(min(torch.get_num_threads(), len(indices) // _LEAST_EDGES), 1)
        bounds = np.searchsorted(indptr, np.linspace(0, len(indices), n + 1)[1:-1]).tolist()
        parts: list[_Part] = []
        for rows in pairwise([0, *bounds, len(indptr) - 1]):
            sources = indices[indptr[rows[0]] : indptr[rows[1]]]
            nodes, place = np.unique(sources, return_inverse=True) if n > 1 else (sources, sources)
            parts.append(_Part(len(parts), rows, nodes, place))
        return parts


class _Part(NamedTuple):
    """What one thread does."""

    number: int
    rows: tuple[int, int]  # its first destination, and the one behind its last
    nodes: NDArray  # their sources
    place: NDArray  # of each edge, the row of its source among the sums of the part


def _add_rows(run: Run, total: NDArray, nodes: NDArray, rows: NDArray) -> None:
    run(lambda part: kernels.add_rows(total, nodes[part], rows[part]), shares(len(nodes), 100))
