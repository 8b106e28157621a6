"""Attention over a graph as one operation of torch, with its gradients.

The forward pass keeps its inputs only; the backward pass projects tokens and computes attention weights again. Engines
compute one head at a time, so that queries, keys and values of all heads are never held together; fused kernels
compute all of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fimp_sc.nn.ops._chunked import Buffers, Chunks, dense_like

if TYPE_CHECKING:
    from collections.abc import Sequence


class Engine(Protocol):
    """Attention over a graph that the engine knows, one head at a time.

    ``q``, of destinations and times ``head_dim ** -0.5``, ``k`` and ``v``, of sources, are ``(nodes, tokens,
    head_dim)`` and contiguous.
    """

    def project(self, tokens: Tensor, matrices: Tensor, biases: Tensor, outs: Sequence[Tensor]) -> None:
        """Write what linear maps make of tokens.

        Parameters
        ----------
        tokens
            ``(nodes, tokens, d_model)``.
        matrices, biases
            ``(maps, head_dim, d_model)`` and ``(maps, head_dim)``; at most three maps.
        outs
            For each map contiguous memory, ``(nodes, tokens, head_dim)``, or fewer nodes and tokens: the first then.
        """

    def project_backward(
        self,
        gradients: Sequence[Tensor],
        tokens: Tensor,
        matrices: Tensor,
        d_tokens: Tensor | None,
        d_maps: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Given gradients of ``outs``, add that of tokens and write those of matrices and biases, where wanted."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Write the reduced messages to ``out``, of the shape and dtype of ``q`` and any strides."""

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, up: Tensor, d_weight: Tensor | None, wanted: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of ``q``, which may be overwritten, ``k`` and ``v``, contiguous.

        Parameters
        ----------
        q, k, v
            As in :meth:`forward`.
        up
            Gradient of the messages, as ``out`` there.
        d_weight
            Sum over heads of the gradient of the edges' factors, which is added to, where it is wanted.
        wanted
            Whether gradients are wanted of ``q`` or ``k``, and of ``v``. What is not wanted may hold anything.
        """


def compute(
    query: Tensor | None, key: Tensor, value: Tensor | None, matrices: Tensor | None, biases: Tensor | None,
    weight: Tensor, indptr: Tensor, indices: Tensor, padding: Tensor | None,
    n_queries: int, backend: str, chunk_size: int | None,
) -> Tensor:  # fmt: skip
    """Return the reduced messages, ``(n_destinations, heads, n_queries, head_dim)``.

    Parameters
    ----------
    query, key, value
        ``(nodes, heads, tokens, head_dim)``. With maps, ``query`` and ``key`` are the tokens of destinations and of
        sources, ``(nodes, tokens, d_model)``, and ``value`` is ``None``; without ``query`` destinations are the first
        nodes.
    matrices, biases
        ``(3, heads, head_dim, d_model)`` and ``(3, heads, head_dim)``: maps to queries, keys and values.
    weight
        ``(n_edges,)`` factor of each message, in at least single precision.
    indptr, indices
        Compressed sparse rows over the destinations.
    padding
        ``(n_sources, source_tokens)`` bool, True where a token is padding. Sources with nothing else have weight 0.
    n_queries
        Tokens of each destination.
    backend
        ``"triton"``, which takes no maps, ``"numba"`` or ``"chunked"``.
    chunk_size
        Edges that batched products handle at once.
    """
    graph = indptr, indices, padding
    with without_autocast(key.device.type):
        if backend == "triton":
            from fimp_sc.nn.ops.triton._function import forward

            return forward(query, key, value, weight, *graph)  # type: ignore[arg-type]
        heads = _Heads((query, key, value, matrices, biases, weight), (len(indptr) - 1, n_queries))
        out = _messages_like(query, key, matrices, *heads.shape)
        with heads.engine(backend, graph, chunk_size) as engine:
            for head in range(heads.n_heads):
                one = out[:, head]
                made = one if one.dtype == heads.buffers.dtype else heads.buffers("out", *one.shape)
                engine.forward(*heads.load(head, engine), made)
                if made is not one:
                    one.copy_(made)
    return out


def compute_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """Return the gradients that are wanted, in their order.

    Parameters
    ----------
    grad
        Of the messages.
    *arguments
        Those of :func:`compute`, and whether gradients are wanted of queries, keys, values, matrices, biases, weights.
    """
    *inputs, indptr, indices, padding, n_queries, backend, chunk_size, needed = arguments
    graph = indptr, indices, padding
    with without_autocast(grad.device.type):
        if backend == "triton":
            from fimp_sc.nn.ops.triton._function import backward

            query, key, value, _, _, weight = inputs
            found = backward(grad, query, key, value, weight, *graph, needed)
        else:
            heads = _Heads(inputs, (len(indptr) - 1, n_queries), needed)
            found = heads.gradients
            with heads.engine(backend, graph, chunk_size) as engine:
                for head in range(heads.n_heads):
                    up = grad[:, head]
                    if up.dtype != heads.buffers.dtype:
                        up = heads.buffers("up", *up.shape).copy_(up)
                    made = heads.load(head, engine)
                    heads.collect(head, engine, engine.backward(*made, up, found[5], heads.wanted))
    return [x for x, wanted in zip(found, needed, strict=True) if wanted and x is not None]


_ARGUMENTS = (
    "Tensor? query, Tensor key, Tensor? value, Tensor? matrices, Tensor? biases, Tensor weight, Tensor indptr, "
    "Tensor indices, Tensor? padding, int n_queries, str backend, int? chunk_size"
)
attend = torch.library.custom_op("fimp_sc::attend", compute, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
attend_backward = torch.library.custom_op(
    "fimp_sc::attend_backward", compute_backward, mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}, bool[] needed) -> Tensor[]",
)  # fmt: skip


@attend.register_fake
def _(query: Any, key: Any, value: Any, matrices: Any, biases: Any, weight: Any, indptr: Any, *rest: Any) -> Tensor:
    return _messages_like(query, key, matrices, indptr.shape[0] - 1, rest[2])


@attend_backward.register_fake
def _(grad: Tensor, *arguments: Any) -> list[Tensor]:
    return [dense_like(x) for x, wanted in zip(arguments[:6], arguments[-1], strict=True) if wanted]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


@once_differentiable
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:6])
    found = iter(attend_backward(grad, *ctx.saved_tensors, *ctx.options, needed))
    return *(next(found) if wanted else None for wanted in needed), *[None] * 6


attend.register_autograd(_gradients, setup_context=_keep)


class _Heads:
    """Queries, keys and values of one head at a time, and memory for the gradients of what these are made of.

    Parameters
    ----------
    inputs
        The first six of :func:`compute`.
    shape
        Numbers of destinations and of their queries.
    needed
        Of which of the inputs gradients are wanted.
    """

    def __init__(self, inputs: Sequence[Any], shape: tuple[int, int], needed: Sequence[bool] = (False,) * 6) -> None:
        inputs = [None if x is None else x.detach() for x in inputs]
        self.query, self.key, self.value, self.matrices, self.biases, self.weight = inputs
        self.shape, self.buffers, given = shape, Buffers(self.key), self.matrices is None
        self.n_heads, self.head_dim = self.key.shape[1::2] if given else self.matrices.shape[1:3]
        of_maps = needed[3] or needed[4]
        self.wanted = needed[0] or needed[1] or of_maps, needed[2] or of_maps or (not given and needed[1])
        needed = [*needed[:3], of_maps, of_maps, needed[5]]
        self.gradients = [dense_like(x).zero_() if want else None for x, want in zip(inputs, needed, strict=True)]

    def engine(
        self, backend: str, graph: tuple[Tensor, Tensor, Tensor | None], chunk_size: int | None
    ) -> AbstractContextManager[Engine]:
        """Return the context of an engine that knows a graph: pointers, indices and padding."""
        if backend == "numba":
            from fimp_sc.nn.ops.numba._engine import compiled_loops

            return compiled_loops(*graph, self.weight, len(self.key), Buffers(self.key))
        return nullcontext(Chunks(*graph, self.weight, Buffers(self.key), chunk_size))

    def load(self, head: int, engine: Engine) -> tuple[Tensor, Tensor, Tensor]:
        """Return scaled queries, keys and values."""
        if self.matrices is None:
            parts = zip("qkv", (self.query, self.key, self.value), strict=True)
            q, k, v = (self.buffers(name, *x[:, head].shape).copy_(x[:, head]) for name, x in parts)
            return q.mul_(self.head_dim**-0.5), k, v
        shapes = zip("qkv", (self.shape, self.key.shape[:2], self.key.shape[:2]), strict=True)
        q, k, v = made = [self.buffers(name, *shape, self.head_dim) for name, shape in shapes]
        matrices, biases = self._maps(head)
        for tokens, _, which in self._sources():
            engine.project(tokens, matrices[which], biases[which], made[which])
        return q, k, v

    def collect(self, head: int, engine: Engine, found: tuple[Tensor, ...]) -> None:
        """Take the gradients of what was loaded."""
        scale = self.head_dim**-0.5
        if self.matrices is None:
            found[0].mul_(scale)
            for total, one in zip(self.gradients, found, strict=False):
                if total is not None:
                    total[:, head] = one
            return
        matrices, (d_matrices, d_biases) = self._maps(head)[0], self.gradients[3:5]
        for tokens, d_tokens, which in self._sources():
            d_maps = None
            if d_matrices is not None and d_biases is not None:
                d_maps = d_matrices[which, head], d_biases[which, head]
            engine.project_backward(found[which], tokens, matrices[which], d_tokens, d_maps)
        if d_matrices is not None and d_biases is not None:
            d_matrices[0, head] *= scale
            d_biases[0, head] *= scale

    def _sources(self) -> list[tuple[Tensor, Tensor | None, slice]]:
        """Return tokens, their gradient, and which of queries, keys and values are made of them."""
        d_query, d_key, *_ = self.gradients
        if self.query is None:
            return [(self.key, d_key, slice(0, 3))]
        return [(self.query, d_query, slice(0, 1)), (self.key, d_key, slice(1, 3))]

    def _maps(self, head: int) -> tuple[Tensor, Tensor]:
        """Return the maps of a head; scaled maps make scaled queries."""
        matrices, biases = self.matrices[:, head].clone(), self.biases[:, head].clone()
        matrices[0] *= self.head_dim**-0.5
        biases[0] *= self.head_dim**-0.5
        return matrices, biases


def _messages_like(query: Any, key: Tensor, matrices: Any, n_destinations: int, n_queries: int) -> Tensor:
    if matrices is None:
        return dense_like(query)
    # Heads next to each other in memory, as the projection afterwards wants them.
    return key.new_empty(n_destinations, n_queries, *matrices.shape[1:3]).transpose(1, 2)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context in which products are made in the dtype of their factors."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
