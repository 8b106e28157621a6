"""Cross-node attention in compiled loops for CPUs, whose threads share the destinations.

Threads that share a source have sums of its gradients each, which are added in a fixed order: with as many threads as
before results are the same to the bit.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from fimp_sc.nn.ops.numba import _kernels as kernels
from fimp_sc.nn.ops.numba._threads import thread_ranges, threads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from fimp_sc.nn.ops._chunked import Buffers
    from fimp_sc.nn.ops.numba._threads import Run

# A thread costs more than so many edges or nodes of few tokens.
_LEAST_EDGES = 32
_LEAST_NODES = 32


@contextmanager
def compiled_loops(*graph: Any) -> Iterator[CompiledLoops]:
    """Yield an engine that has threads until the context ends, see :class:`CompiledLoops`."""
    with threads() as run:
        yield CompiledLoops(run, *graph)


class CompiledLoops:
    """An :class:`~fimp_sc.nn.ops._attend.Engine` of compiled loops.

    Parameters
    ----------
    run
        Does tasks in threads.
    indptr, indices
        Compressed sparse rows over the destinations, on the CPU.
    padding
        ``(n_sources, n_tokens)`` bool, True where a token is padding.
    weight
        ``(n_edges,)`` factor of each message.
    n_sources
        Number of sources.
    buffers
        Memory to use.

    Raises
    ------
    IndexError, ValueError
        The rows are not those of a graph between these nodes.
    """

    def __init__(
        self,
        run: Run,
        indptr: Tensor,
        indices: Tensor,
        padding: Tensor | None,
        weight: Tensor,
        n_sources: int,
        buffers: Buffers,
    ) -> None:
        some = padding is not None and bool(padding.any())
        padded = padding.numpy() if padding is not None and some else np.zeros((n_sources, 0), bool)
        # The loops would read memory that is not theirs.
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n_sources:
            raise IndexError(
                f"indices must name one of {n_sources} sources, found {int(indices.min())} to {int(indices.max())}"
            )
        if int(indptr[0]) != 0 or int(indptr[-1]) != len(indices) or bool((indptr.diff() < 0).any()):
            raise ValueError(f"indptr must rise from 0 to the number of edges, {len(indices)}")
        self.run, self._buffers = run, buffers
        self._graph = padded, weight.numpy(), indptr.numpy(), indices.numpy()

    def project(self, tokens: Tensor, matrices: Tensor, biases: Tensor, outs: Sequence[Tensor]) -> None:
        x, made, columns = tokens.numpy(), _three(outs), matrices.mT.contiguous().numpy()
        self.run(lambda rows: kernels.project(x, rows, columns, biases.numpy(), made), _ranges(x))

    def project_backward(
        self,
        gradients: Sequence[Tensor],
        tokens: Tensor,
        matrices: Tensor,
        d_tokens: Tensor | None,
        d_maps: tuple[Tensor, Tensor] | None,
    ) -> None:
        x = (tokens if tokens.stride(2) == 1 else tokens.contiguous()).numpy()
        given, rows_of = _three(gradients), matrices.numpy()
        total, wanted = x if d_tokens is None else d_tokens.numpy(), (d_tokens is not None, d_maps is not None)

        def one(rows: tuple[int, int]) -> tuple[NDArray, NDArray]:
            of_maps = np.zeros_like(rows_of), np.zeros(rows_of.shape[:2], x.dtype)
            kernels.project_backward(given, x, rows, rows_of, total, *of_maps, wanted)
            return of_maps

        if any(wanted):
            sums = zip(*self.run(one, _ranges(x)), strict=True)
            for target, of_threads in zip(d_maps or (), sums, strict=False):
                np.add.reduce(of_threads, out=target.numpy())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        heads, total = [x.numpy() for x in (q, k, v)], out.numpy()
        self.run(lambda one: kernels.forward(*heads, *self._graph, one.rows, total), self._thread_ranges)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, up: Tensor, d_weight: Tensor | None, wanted: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, grad, which = [x.numpy() for x in (q, k, v)], up.numpy(), (*wanted, d_weight is not None)
        d_edges = np.zeros(0, grad.dtype) if d_weight is None else d_weight.numpy()
        dk, dv = (self._buffers(name, len(k) + self._n_more, *k.shape[1:]) for name in ("dk", "dv"))
        sums = dk.numpy(), dv.numpy()

        def clear(rows: tuple[int, int]) -> None:
            for x in sums:
                x[slice(*rows)] = 0

        def work(own: _ThreadRange) -> None:
            # Queries of a destination are needed for it alone: their gradients take their place.
            kernels.backward(*heads, *self._graph, own.rows, grad, own.place, heads[0], *sums, d_edges, which)

        self.run(clear, _ranges(sums[0]))
        self.run(work, self._thread_ranges)
        for own in self._thread_ranges:
            for x in sums:
                _add_rows(self.run, x, own.nodes, x[own.more])
        return q, dk[: len(k)], dv[: len(k)]

    @cached_property
    def _thread_ranges(self) -> list[_ThreadRange]:
        """Destinations in as many ranges as there are threads, with equally many edges each."""
        padded, _, indptr, indices = self._graph
        n = max(min(torch.get_num_threads(), len(indices) // _LEAST_EDGES), 1)
        bounds = np.searchsorted(indptr, np.linspace(0, len(indices), n + 1)[1:-1]).tolist()
        ranges = list(pairwise([0, *bounds, len(indptr) - 1]))
        sources = [indices[indptr[a] : indptr[b]] for a, b in ranges]
        # Of the ranges that share a source the first adds to its sums, the others each to a row of their own.
        first = np.zeros(len(padded), np.int64)
        for number in reversed(range(n)):
            first[sources[number]] = number
        found: list[_ThreadRange] = []
        begin = len(padded)
        for number, rows in enumerate(ranges):
            nodes = np.unique(sources[number][first[sources[number]] != number])
            more = slice(begin, begin + len(nodes))
            place = np.arange(len(padded))
            place[nodes] = np.arange(more.start, more.stop)
            found.append(_ThreadRange(rows, place[sources[number]], nodes, more))
            begin = more.stop
        return found

    @property
    def _n_more(self) -> int:
        return self._thread_ranges[-1].more.stop - len(self._graph[0])


class _ThreadRange(NamedTuple):
    """Work of one thread."""

    rows: tuple[int, int]  # its first destination, and the one behind its last
    place: NDArray  # of each edge, the row of its source among sums
    nodes: NDArray  # sources whose sums have
    more: slice  # rows of their own here


def _ranges(nodes: NDArray) -> list[tuple[int, int]]:
    return [(own.start, own.stop) for own in thread_ranges(len(nodes), _LEAST_NODES)]


def _three(tensors: Sequence[Tensor]) -> tuple[NDArray, ...]:
    """Return arrays and, for a kernel of one kind, others without nodes."""
    arrays = [x.numpy() for x in tensors]
    return *arrays, *([np.empty((0, *arrays[0].shape[1:]), arrays[0].dtype)] * (3 - len(arrays)))


def _add_rows(run: Run, total: NDArray, nodes: NDArray, rows: NDArray) -> None:
    run(lambda own: kernels.add_rows(total, nodes[own], rows[own]), thread_ranges(len(nodes), _LEAST_NODES))
