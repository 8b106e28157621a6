"""Cross-node attention: the one operation that every FIMP network is made of.

This module checks the arguments, turns the reduction into one factor per edge, and chooses a backend: the plain version
is here, those that keep nothing per edge and token are behind one operation of torch.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from fimp_sc.nn.ops._attend import attend, without_autocast
from fimp_sc.nn.ops._selftest import Kind, works

if TYPE_CHECKING:
    from collections.abc import Iterator

Backend = Literal["auto", "triton", "numba", "chunked", "dense"]

# Of one edge and head: with 16 x 16 both take as long, with 32 x 32 loops take 0.6 times as long as products.
_SCORES_WORTH_COMPILING = 1 << 10

# Heads, tokens of a destination and of a source, and width of a head: what compiled loops are tried on, which are the
# same for all. Fused kernels are tried on what they are used for, with about so many tokens at most.
_SIZES_TRIED, _MOST_TRIED = (2, 37, 41, 24), 512

_DEFAULT: ContextVar[Backend] = ContextVar("attention_backend", default="auto")


@contextmanager
def attention_backend(backend: Backend) -> Iterator[None]:
    """Use one backend for all attention in a ``with`` block, for instance to compare backends on a whole model.

    Parameters
    ----------
    backend
        As in :func:`cross_node_attention`; a backend other than ``"auto"`` given there wins.

    Raises
    ------
    ValueError
        When ``backend`` is unknown.
    """
    token = _DEFAULT.set(_known(backend))
    try:
        yield
    finally:
        _DEFAULT.reset(token)


def cross_node_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indptr: Tensor,
    indices: Tensor,
    *,
    edge_weight: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    reduce: str = "mean",
    backend: Backend = "auto",
    chunk_size: int | None = None,
) -> Tensor:
    r"""Attend from the tokens of each destination to the tokens of each of its sources, and reduce over the sources.

    .. math::

        O_i = \sum_{j \in N(i)} w_{ij} \, \mathrm{softmax}\!\left(Q_i K_j^\top / \sqrt{d}\right) V_j

    with one softmax per edge and head. Queries, keys and values belong to nodes, so that nothing of size edges x tokens
    x width or edges x tokens² is kept. :func:`torch.compile` sees one operation.

    Parameters
    ----------
    query
        ``(n_destinations, heads, tokens, head_dim)``.
    key, value
        ``(n_sources, heads, source_tokens, head_dim)``. Destinations and sources may be different sets of nodes.
    indptr, indices
        The graph in compressed sparse rows, int64: sources of destination ``i`` are
        ``indices[indptr[i] : indptr[i + 1]]``.
    edge_weight
        ``(n_edges,)`` factor of each message, in the order of ``indices``. With ``reduce="mean"`` the weights of a
        destination are divided by their number, not by their sum. Differentiable.
    key_padding_mask
        ``(n_sources, source_tokens)`` bool, True where a source token is padding. A source whose tokens are all
        padding sends a message of zeros.
    reduce
        ``"mean"`` or ``"sum"`` over the sources.
    backend
        ``"triton"``: fused kernels for CUDA. ``"numba"``: compiled loops for CPUs. ``"chunked"``: batched products
        over chunks of the graph, on any device. ``"dense"``: the definition, a reference for tests whose memory grows
        with edges x tokens². ``"auto"``: on CUDA triton where it runs, on CPUs numba where tokens are many (from 32
        on) and not in double precision, else chunked, unless :func:`attention_backend` says otherwise. Before their
        first use the two compiled ones are tried on a few nodes; where that fails, or gives other numbers than the
        definition, it warns and takes chunked.
    chunk_size
        Edges that the chunked backend handles at once. Chosen from the device and the number of tokens by default;
        changes speed and memory, not the result.

    Returns
    -------
    Tensor of the shape and dtype of ``query``, also under :class:`torch.autocast`. Sums over edges of half precision
    inputs are made in single precision. A destination without sources gets zeros.

    Raises
    ------
    ValueError
        When shapes or dtypes do not fit, ``reduce`` or ``backend`` is unknown, or the backend cannot run here.
    IndexError
        When ``indices`` names a source that is not there.

    Notes
    -----
    Source: arXiv 2210.09475, the cross-node attention message; the mean over sources is the convention of the
    predecessor's code, as the paper does not state one.
    """
    _check_heads(query, key, value)
    check_graph(query.shape[0], (key.shape[0], key.shape[2]), indptr, indices, edge_weight, key_padding_mask)
    weight = edge_factor(query, indptr, indices, edge_weight, key_padding_mask, reduce)
    sizes = query.shape[1], query.shape[2], key.shape[2], query.shape[3]
    backend = resolve(backend, query.device, query.dtype, sizes)
    graph = weight, indptr, indices, key_padding_mask
    if backend == "dense":
        with without_autocast(query.device.type):
            return dense_attention(query, key, value, *graph)
    out: Tensor = attend(query, key, value, None, None, *graph, query.shape[2], backend, chunk_size)
    return out


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, indptr: Tensor, indices: Tensor, padding: Tensor | None
) -> Tensor:
    """Attend as the definition reads: the reference for all backends, whose memory grows with edges x tokens²."""
    destination = torch.arange(len(query), device=query.device).repeat_interleave(indptr.diff())
    q, k, v = (x.to(weight.dtype) for x in (query[destination], key[indices], value[indices]))
    scores = q @ k.mT * query.shape[-1] ** -0.5
    if padding is not None:
        scores = scores.masked_fill(padding[indices][:, None, None], torch.finfo(scores.dtype).min / 2)
    messages = scores.softmax(-1) @ v * weight[:, None, None, None]
    return messages.new_zeros(query.shape).index_add(0, destination, messages).to(query.dtype)


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
        To queries, keys and values, each ``d_model`` wide.
    n_heads
        Heads that share the width.
    indptr, indices, edge_weight, key_padding_mask, reduce
        As in :func:`cross_node_attention`.
    own
        ``(n_destinations, n, d_model)`` tokens of the destinations. By default the destinations are the first nodes.
    n_queries
        Use only the first tokens of each destination.

    Returns
    -------
    ``(n_destinations, n_queries or n, d_model)``, head after head.

    Raises
    ------
    ValueError
        When graph, tokens and padding do not fit each other.
    """
    n_destinations, (_, n_tokens, d_model) = indptr.shape[0] - 1 if own is None else len(own), tokens.shape
    linear = _linear_maps(tokens, maps)
    if linear is not None:
        own = None if own is None else own[:, :n_queries]
        n = own.shape[1] if own is not None else n_tokens if n_queries is None else min(n_queries, n_tokens)
        sizes = n_heads, n, n_tokens, d_model // n_heads
        backend = resolve("auto", tokens.device, tokens.dtype, sizes)
        if backend in ("numba", "chunked"):
            check_graph(n_destinations, (len(tokens), n_tokens), indptr, indices, edge_weight, key_padding_mask)
            weight = edge_factor(tokens, indptr, indices, edge_weight, key_padding_mask, reduce)
            matrices = torch.stack([one.weight for one in linear]).unflatten(1, (n_heads, -1))
            biases = torch.stack([one.bias for one in linear]).unflatten(1, (n_heads, -1))
            graph = weight, indptr, indices, key_padding_mask
            return attend(own, tokens, None, matrices, biases, *graph, n, backend, None).transpose(1, 2).flatten(2)
    own = (tokens[:n_destinations] if own is None else own)[:, :n_queries]
    query, key, value = (
        one(x).unflatten(2, (n_heads, -1)).transpose(1, 2) for one, x in zip(maps, (own, tokens, tokens), strict=True)
    )
    out = cross_node_attention(
        query, key, value, indptr, indices, edge_weight=edge_weight, key_padding_mask=key_padding_mask, reduce=reduce
    )
    return out.transpose(1, 2).flatten(2)


def _linear_maps(tokens: Tensor, maps: tuple[nn.Module, ...]) -> list[nn.Linear] | None:
    """Return maps that can be applied head by head here, else None."""
    device, dtype = tokens.device.type, tokens.dtype
    if device != "cpu" or dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(device):
        return None
    # Anything else, such as a map with a change of low rank, makes its outputs itself.
    linear = [one for one in maps if type(one) is nn.Linear and one.bias is not None and one.weight.dtype == dtype]
    return linear if len(linear) == len(maps) else None


def edge_factor(
    like: Tensor,
    indptr: Tensor,
    indices: Tensor,
    edge_weight: Tensor | None,
    key_padding_mask: Tensor | None,
    reduce: str,
) -> Tensor:
    """Return the factor of each message in at least single precision."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if reduce == "mean":
        degree = indptr.diff()
        # The number of edges is known: without it, repeating waits for the device.
        factor = degree.clamp(min=1).to(dtype).reciprocal().repeat_interleave(degree, output_size=len(indices))
    elif reduce == "sum":
        factor = like.new_ones(len(indices), dtype=dtype)
    else:
        raise ValueError(f"reduce must be 'mean' or 'sum', found {reduce!r}")
    if edge_weight is not None:
        factor = factor * edge_weight.to(dtype)
    if key_padding_mask is not None:
        # No backend has a softmax over nothing: whatever it makes of such a source counts zero.
        factor = factor * ~key_padding_mask.all(1).index_select(0, indices)
    return factor


def _known(backend: Backend) -> Backend:
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(map(repr, get_args(Backend)))}, found {backend!r}")
    return backend


def resolve(backend: Backend, device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> Backend:
    """Return the backend that computes this, other than ``"auto"``.

    Parameters
    ----------
    backend
        As in :func:`cross_node_attention`.
    device, dtype
        Of queries, keys and values.
    sizes
        Heads, tokens of a destination and of a source, width of a head.

    Raises
    ------
    ValueError
        When the backend is unknown or cannot run.
    """
    # A branch rather than a number: numbers of tokens may be symbols of torch's compiler.
    scores = "many" if sizes[1] * sizes[2] >= _SCORES_WORTH_COMPILING else "few"
    if torch.compiler.is_compiling():
        sizes = (*_SIZES_TRIED[:3], sizes[3])
    return _resolve(_known(backend), device, dtype, sizes, scores)


@torch.compiler.assume_constant_result
def _resolve(
    backend: Backend, device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, int], scores: str
) -> Backend:
    if backend == "auto":
        backend = _DEFAULT.get()
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        reason = _unsupported(device, dtype, sizes[3])
        if backend == "triton":
            if reason is not None:
                raise ValueError(f"backend 'triton' cannot run: {reason}. Use backend='auto' or 'chunked'.")
            return "triton"
        return "triton" if reason is None and _works("triton", device, dtype, sizes) else "chunked"
    if backend == "numba" and device.type != "cpu":
        raise ValueError(f"backend 'numba' runs on CPUs only, found {device.type!r}. Use backend='auto' or 'chunked'.")
    if backend != "auto":
        return backend
    # Few scores are not worth the calls, nor what is compiled for doubles, which networks do not have.
    compiled = device.type == "cpu" and dtype != torch.float64 and scores == "many"
    return "numba" if compiled and _works("numba", device, dtype, _SIZES_TRIED) else "chunked"


def _unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    try:
        from fimp_sc.nn.ops.triton._function import unsupported
    except ImportError:
        return "its kernels are not installed"
    return unsupported(device, dtype, head_dim)


def _works(backend: Backend, device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> bool:
    n_heads, n_queries, n_tokens, head_dim = sizes
    if not min(sizes):
        return True
    # Of many tokens fewer do that fill tiles likewise.
    n_queries, n_tokens = (min(n, _MOST_TRIED + n % (_MOST_TRIED // 4)) for n in (n_queries, n_tokens))
    kind = Kind(backend, device, dtype, n_heads, n_queries, n_tokens, head_dim, backward=torch.is_grad_enabled())
    return works(kind, cross_node_attention)


def _check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            "query, key and value must be (nodes, heads, tokens, head_dim) and key and value of one shape; found "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if query.shape[1] != key.shape[1] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and key differ in heads or head_dim: found {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must have one dtype; found {query.dtype}, {key.dtype} and {value.dtype}"
        )


def check_graph(
    n_destinations: int,
    sources: tuple[int, int],
    indptr: Tensor,
    indices: Tensor,
    edge_weight: Tensor | None,
    key_padding_mask: Tensor | None,
) -> None:
    """Raise a ValueError where a graph does not fit its nodes; ``sources`` are ``(n_sources, source_tokens)``."""
    if indptr.shape != (n_destinations + 1,):
        raise ValueError(
            f"indptr must have one entry per destination and one more: expected {n_destinations + 1}, "
            f"found {tuple(indptr.shape)}"
        )
    if edge_weight is not None and edge_weight.shape != indices.shape:
        raise ValueError(
            f"edge_weight must have one entry per edge: expected {tuple(indices.shape)}, "
            f"found {tuple(edge_weight.shape)}"
        )
    if key_padding_mask is not None and key_padding_mask.shape != sources:
        raise ValueError(
            f"key_padding_mask must be (n_sources, source_tokens) = {sources}, found {tuple(key_padding_mask.shape)}"
        )
