r"""Cross-node attention as three fused Triton kernels.

The forward pass reads the neighbours of a destination one after the other and keeps scores and messages on the chip.
It saves its inputs only. The backward pass goes through the graph twice: once per destination for the gradient of the
queries, once per source, over the transposed graph, for the gradients of keys and values. Every number has one writer
that adds in a fixed order, so that results are the same bit by bit from run to run.

With :math:`P_e` the attention of edge :math:`e = (i, j)` and :math:`G_i` the gradient that arrives at destination
:math:`i`, the rows of :math:`\delta_e = \mathrm{rowsum}(P_e \circ G_i V_j^\top)` are needed twice: they center the
gradient of the scores, :math:`w_e P_e \circ (G_i V_j^\top - \delta_e)`, and add up to the gradient of :math:`w_e`.
"""

# Triton looks up the annotations of a kernel's arguments, and accepts none but its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 128
_LOG2_E = 1.4426950408889634


def unsupported(query: Tensor, key: Tensor) -> str | None:
    """Why :func:`triton_attention` cannot take these tensors.

    Parameters
    ----------
    query, key
        As for :func:`triton_attention`; only device, dtype and the last dimension are looked at.

    Returns
    -------
    The reason, or None if there is none.
    """
    if triton is None:
        return "triton is not installed"
    if _version() < (3, 2):
        return f"triton {triton.__version__} is older than 3.2"
    if _interpreted():
        if query.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 numbers wrongly"
    else:
        if query.device.type != "cuda":
            return f"the kernels run on CUDA devices, not on {query.device.type!r}"
        if torch.cuda.get_device_capability(query.device) < (8, 0):
            return "the kernels need a device of compute capability 8.0 or higher"
    if query.dtype not in _DTYPES or key.dtype != query.dtype:
        return f"tensors must all be float32, float16 or bfloat16, found {query.dtype} and {key.dtype}"
    if not 1 <= query.shape[-1] <= _MAX_HEAD_DIM:
        return f"head_dim must be 1 to {_MAX_HEAD_DIM}, found {query.shape[-1]}"
    return None


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indptr: Tensor,
    indices: Tensor,
    weight: Tensor,
    padding: Tensor | None = None,
) -> Tensor:
    r"""Sum of :math:`w_e\,\mathrm{softmax}(Q_i K_j^\top / \sqrt{d}) V_j` over the edges of each destination.

    Parameters
    ----------
    query
        ``(n_destinations, heads, tokens, head_dim)`` in float32, float16 or bfloat16, ``head_dim`` at most 128.
        Any strides; copied only if the last dimension is not contiguous.
    key, value
        ``(n_sources, heads, source_tokens, head_dim)`` of the dtype of ``query``.
    indptr, indices
        The graph in compressed sparse rows, int64. Edges may repeat.
    weight
        ``(n_edges,)`` factor of each message. Differentiable.
    padding
        ``(n_sources, source_tokens)`` bool, True where a source token is padding, in any pattern. What padded tokens
        hold is never read. A source whose tokens are all padding sends a message of zeros.

    Returns
    -------
    Tensor of the shape and dtype of ``query``, in its memory layout if that is dense. A destination without sources
    gets zeros.

    Raises
    ------
    ValueError
        When :func:`unsupported` has a reason.

    Notes
    -----
    Products are accumulated in fp32. fp32 inputs are multiplied exactly unless TF32 products are allowed in torch.
    Memory beyond inputs and outputs: none in the forward pass; in the backward pass two fp32 numbers per edge, head
    and query token. Gradients of gradients are not available.
    """
    reason = unsupported(query, key)
    if reason is None and value.dtype != key.dtype:
        reason = f"key and value differ in dtype: found {key.dtype} and {value.dtype}"
    if reason is not None:
        raise ValueError(f"the Triton kernels cannot be used: {reason}; use backend='chunked'")
    if padding is not None and padding.numel() == 0:
        padding = None
    out: Tensor = _FusedAttention.apply(query, key, value, indptr, indices, weight, padding)
    return out


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        indptr: Tensor,
        indices: Tensor,
        weight: Tensor,
        padding: Tensor | None,
    ) -> Tensor:
        query, key, value = _readable(query), _readable(key), _readable(value)
        indptr, indices, weight = indptr.contiguous(), indices.contiguous(), weight.contiguous()
        ctx.save_for_backward(query, key, value, indptr, indices, weight, padding)
        out = _empty_like(query)
        n, heads, tokens, dim = query.shape
        with torch.cuda.device_of(query):
            _launch(
                _forward_kernel,
                out,
                *(query, key, value, out, indptr, indices, weight, *_padded(padding)),
                *(*_strides(query, key, value, out), n, heads, tokens, key.shape[2], _LOG2_E * dim**-0.5),
                **_options(query.dtype, dim, tokens, key.shape[2], padding),
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, indptr, indices, weight, padding = ctx.saved_tensors
        grad = _readable(grad_outputs[0])
        d_query, d_key, d_value = _empty_like(query), None, None
        n, heads, tokens, dim = query.shape
        n_sources, source_tokens = key.shape[0], key.shape[2]
        lse = query.new_empty((indices.shape[0], heads, tokens), dtype=torch.float32)
        delta = torch.empty_like(lse)
        padded = _padded(padding)
        sizes = (heads, tokens, source_tokens, dim**-0.5, _LOG2_E * dim**-0.5)
        with torch.cuda.device_of(query):
            _launch(
                _destination_kernel,
                d_query,
                *(query, key, value, grad, d_query, lse, delta, indptr, indices, weight, *padded),
                *(*_strides(query, key, value, grad, d_query), n, *sizes),
                **_options(query.dtype, dim, tokens, source_tokens, padding),
            )
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                d_key, d_value = _empty_like(key), _empty_like(value)
                transposed = _transposed(indptr, indices, n_sources)
                _launch(
                    _source_kernel,
                    d_key,
                    *(query, key, value, grad, d_key, d_value, lse, delta, *transposed, weight, *padded),
                    *(*_strides(query, key, value, grad, d_key, d_value), n_sources, *sizes),
                    **_options(key.dtype, dim, source_tokens, tokens, padding),
                )
        d_weight = delta.sum((1, 2)).to(weight.dtype) if ctx.needs_input_grad[5] else None
        return d_query, d_key, d_value, None, None, d_weight, None


def _jit(function: Any) -> Any:
    # The number of nodes changes from batch to batch: no kernel of its own for multiples of 16.
    return function if triton is None else triton.jit(function, do_not_specialize=("n_nodes",))


# Programs are numbered tile first, then node, then head: what runs at one time are neighbouring nodes of one head, and
# these share sources (in L2) when nodes are in spatial order. All of it in the first axis of the grid, the only one
# that goes beyond 65,535.
@_jit
def _place(n_nodes, n_tokens, BLOCK: tl.constexpr):
    n_tiles = tl.cdiv(n_tokens, BLOCK)
    program = tl.program_id(0)
    node = (program // n_tiles) % n_nodes
    head = program // n_tiles // n_nodes
    tokens = (program % n_tiles) * BLOCK + tl.arange(0, BLOCK)
    return node.to(tl.int64), head.to(tl.int64), tokens


@_jit
def _load(rows, stride, tokens, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (columns < D)[None, :]
    return tl.load(rows + tokens[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@_jit
def _store(rows, stride, tokens, tile, n_tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    mask = (tokens < n_tokens)[:, None] & (columns < D)[None, :]
    tl.store(rows + tokens[:, None] * stride + columns[None, :], tile.to(rows.dtype.element_ty), mask=mask)


@_jit
def _live(PADDED, node, tokens, n_tokens, HAS_PADDING: tl.constexpr):
    live = tokens < n_tokens
    if HAS_PADDING:
        live = live & (tl.load(PADDED + node * n_tokens + tokens, mask=live, other=1) == 0)
    return live


@_jit
def _scores(q, k, scale, live, PRECISION: tl.constexpr):
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    return tl.where(live[None, :], s, -float("inf"))


# In all kernels the program owns BLOCK_M tokens of one node and goes through the tokens of its neighbours in steps of
# BLOCK_N. ONE_TILE makes that inner loop vanish at compile time, so that loads are pipelined over the edges instead.
# Scores are in base 2 (their scale includes log2 e). The running maximum starts at a finite number: minus infinity
# minus minus infinity would be NaN in a tile that is padding throughout.
@_jit
def _forward_kernel(
    Q, K, V, OUT, INDPTR, INDICES, WEIGHT, PADDED, BOUND,
    qn, qh, qt, kn, kh, kt, vn, vh, vt, on, oh, ot,
    n_nodes, n_heads, n_tokens, n_source_tokens, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_PADDING: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, h, rows = _place(n_nodes, n_tokens, BLOCK_M)
    q = _load(Q + i * qn + h * qh, qt, rows, rows < n_tokens, D, BLOCK_D)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for e in range(tl.load(INDPTR + i), tl.load(INDPTR + i + 1)):
        j = tl.load(INDICES + e).to(tl.int64)
        w = tl.load(WEIGHT + e).to(tl.float32)
        bound = BLOCK_N if ONE_TILE else (tl.load(BOUND + j) if HAS_PADDING else n_source_tokens)
        top = tl.full((BLOCK_M,), -3.0e38, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        message = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, bound, BLOCK_N):
            tokens = start + tl.arange(0, BLOCK_N)
            live = _live(PADDED, j, tokens, n_source_tokens, HAS_PADDING)
            k = _load(K + j * kn + h * kh, kt, tokens, live, D, BLOCK_D)
            v = _load(V + j * vn + h * vh, vt, tokens, live, D, BLOCK_D)
            s = _scores(q, k, scale_log2, live, PRECISION)
            new_top = tl.maximum(top, tl.max(s, 1))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(s - new_top[:, None])
            total = total * shrink + tl.sum(p, 1)
            message = tl.dot(p.to(v.dtype), v, message * shrink[:, None], input_precision=PRECISION)
            top = new_top
        out += message * (w / tl.where(total == 0.0, 1.0, total))[:, None]
    _store(OUT + i * on + h * oh, ot, rows, out, n_tokens, D, BLOCK_D)


@_jit
def _destination_kernel(
    Q, K, V, GRAD, DQ, LSE, DELTA, INDPTR, INDICES, WEIGHT,
    PADDED, BOUND,
    qn, qh, qt, kn, kh, kt, vn, vh, vt, gn, gh, gt,
    dn, dh, dt, n_nodes, n_heads, n_tokens, n_source_tokens, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_PADDING: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, h, rows = _place(n_nodes, n_tokens, BLOCK_M)
    q = _load(Q + i * qn + h * qh, qt, rows, rows < n_tokens, D, BLOCK_D)
    grad = _load(GRAD + i * gn + h * gh, gt, rows, rows < n_tokens, D, BLOCK_D)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for e in range(tl.load(INDPTR + i), tl.load(INDPTR + i + 1)):
        j = tl.load(INDICES + e).to(tl.int64)
        w = tl.load(WEIGHT + e).to(tl.float32)
        bound = BLOCK_N if ONE_TILE else (tl.load(BOUND + j) if HAS_PADDING else n_source_tokens)
        top = tl.full((BLOCK_M,), -3.0e38, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        delta = tl.zeros((BLOCK_M,), tl.float32)
        # The normaliser is found again together with delta, which needs the same products: cheaper than to keep it
        # from the forward pass.
        for start in range(0, bound, BLOCK_N):
            tokens = start + tl.arange(0, BLOCK_N)
            live = _live(PADDED, j, tokens, n_source_tokens, HAS_PADDING)
            k = _load(K + j * kn + h * kh, kt, tokens, live, D, BLOCK_D)
            v = _load(V + j * vn + h * vh, vt, tokens, live, D, BLOCK_D)
            s = _scores(q, k, scale_log2, live, PRECISION)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            new_top = tl.maximum(top, tl.max(s, 1))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(s - new_top[:, None])
            total = total * shrink + tl.sum(p, 1)
            delta = delta * shrink + tl.sum(p * dp, 1)
            top = new_top
            if ONE_TILE:
                total = tl.where(total == 0.0, 1.0, total)
                delta = delta / total
                ds = p * (dp - delta[:, None]) * (w / total)[:, None]
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        if not ONE_TILE:
            total = tl.where(total == 0.0, 1.0, total)
            delta = delta / total
        lse = top + tl.log2(total)
        if not ONE_TILE:
            for start in range(0, bound, BLOCK_N):
                tokens = start + tl.arange(0, BLOCK_N)
                live = _live(PADDED, j, tokens, n_source_tokens, HAS_PADDING)
                k = _load(K + j * kn + h * kh, kt, tokens, live, D, BLOCK_D)
                v = _load(V + j * vn + h * vh, vt, tokens, live, D, BLOCK_D)
                p = tl.exp2(_scores(q, k, scale_log2, live, PRECISION) - lse[:, None])
                dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                ds = p * (dp - delta[:, None]) * w
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        at = (e * n_heads + h) * n_tokens + rows
        tl.store(LSE + at, lse, mask=rows < n_tokens)
        tl.store(DELTA + at, delta, mask=rows < n_tokens)
    _store(DQ + i * dn + h * dh, dt, rows, dq * scale, n_tokens, D, BLOCK_D)


@_jit
def _source_kernel(
    Q, K, V, GRAD, DK, DV, LSE, DELTA, INDPTR, EDGES,
    DESTINATIONS, WEIGHT, PADDED, BOUND,
    qn, qh, qt, kn, kh, kt, vn, vh, vt, gn, gh, gt,
    dkn, dkh, dkt, dvn, dvh, dvt,
    n_nodes, n_heads, n_tokens, n_source_tokens, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_PADDING: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    j, h, rows = _place(n_nodes, n_source_tokens, BLOCK_M)
    live = _live(PADDED, j, rows, n_source_tokens, HAS_PADDING)
    k = _load(K + j * kn + h * kh, kt, rows, live, D, BLOCK_D)
    v = _load(V + j * vn + h * vh, vt, rows, live, D, BLOCK_D)
    dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first = tl.load(INDPTR + j)
    last = tl.load(INDPTR + j + 1)
    if HAS_PADDING:
        last = tl.where(tl.min(rows, 0) < tl.load(BOUND + j), last, first)
    for t in range(first, last):
        e = tl.load(EDGES + t)
        i = tl.load(DESTINATIONS + t)
        w = tl.load(WEIGHT + e).to(tl.float32)
        bound = BLOCK_N if ONE_TILE else n_tokens
        for start in range(0, bound, BLOCK_N):
            # Queries beyond the last one add nothing: they and their gradients are read as zeros.
            tokens = start + tl.arange(0, BLOCK_N)
            real = tokens < n_tokens
            q = _load(Q + i * qn + h * qh, qt, tokens, real, D, BLOCK_D)
            grad = _load(GRAD + i * gn + h * gh, gt, tokens, real, D, BLOCK_D)
            at = (e * n_heads + h) * n_tokens + tokens
            lse = tl.load(LSE + at, mask=real, other=0.0)
            delta = tl.load(DELTA + at, mask=real, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
            p = tl.exp2(s - lse[None, :]) * w
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    # Rows do not mix above, so that padding need only be taken out here.
    dk = tl.where(live[:, None], dk * scale, 0.0)
    dv = tl.where(live[:, None], dv, 0.0)
    _store(DK + j * dkn + h * dkh, dkt, rows, dk, n_source_tokens, D, BLOCK_D)
    _store(DV + j * dvn + h * dvh, dvt, rows, dv, n_source_tokens, D, BLOCK_D)


def _tiles(head_dim: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """``(BLOCK_M, BLOCK_N, num_warps, num_stages)`` for ``rows`` tokens owned and ``columns`` tokens streamed.

    A fixed table rather than a search, so that results do not depend on what was timed fastest. The kernels hold two
    accumulators of BLOCK_M x head_dim and two score tiles in registers: with 64 rows per four warps, the unit of
    Hopper's matrix instructions, these fit into the 255 registers of a thread, and shared memory stays below the 99 kB
    of the smaller devices. fp32 tiles are small because exact fp32 products run outside the matrix units, with both
    factors in registers.
    """
    wide = head_dim > 64
    if dtype == torch.float32:
        most, columns_most, stages = 32, 16 if wide else 32, 2
    else:
        # 128 rows read each neighbour half as often, unless the last tile would be half empty.
        most = 128 if not wide and _ceil_div(rows, 64) % 2 == 0 else 64
        columns_most, stages = 32 if wide else 64, 2 if wide else 3
    block_m = min(max(_power_of_two(rows), 16), most)
    block_n = min(max(_power_of_two(columns), 16), columns_most)
    return block_m, block_n, 8 if block_m > 64 else 4, stages


def _options(dtype: torch.dtype, dim: int, rows: int, columns: int, padding: Tensor | None) -> dict[str, Any]:
    block_m, block_n, warps, stages = _tiles(dim, rows, columns, dtype)
    return {
        "D": dim,
        "BLOCK_D": max(_power_of_two(dim), 16),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "HAS_PADDING": padding is not None,
        "ONE_TILE": columns <= block_n,
        "PRECISION": "tf32" if dtype == torch.float32 and _tf32_allowed() else "ieee",
        # Multiplications and additions in one instruction; asked for because the default depends on the version.
        "enable_fp_fusion": True,
        "num_warps": warps,
        "num_stages": stages,
    }


def _launch(kernel: Any, result: Tensor, *arguments: Any, **options: Any) -> None:
    """One program per tile of tokens, head and node of ``result``."""
    nodes, heads, tokens, _ = result.shape
    if result.numel():
        kernel[(nodes * heads * _ceil_div(tokens, options["BLOCK_M"]),)](*arguments, **options)


def _strides(*tensors: Tensor) -> list[int]:
    """Of nodes, heads and tokens; that of the last dimension is 1."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _transposed(indptr: Tensor, indices: Tensor, n_sources: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row pointers, edges and their destinations, by source; without waiting for the device."""
    by_source, edges = indices.sort(stable=True)
    pointers = torch.searchsorted(by_source, torch.arange(n_sources + 1, device=indices.device))
    return pointers, edges, torch.searchsorted(indptr, edges, right=True) - 1


def _padded(padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Bytes of the mask, and the number of tokens up to the last one of each source that is not padding."""
    if padding is None:
        return None, None
    place = torch.arange(1, padding.shape[1] + 1, dtype=torch.int32, device=padding.device)
    return padding.contiguous().view(torch.uint8), place.mul(~padding).amax(1)


def _readable(x: Tensor) -> Tensor:
    # In the kernels offsets of tokens have 32 bits, those of nodes and heads 64.
    return x if x.stride(3) == 1 and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    like = torch.empty_like(x)
    return like if like.stride(3) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    # The older name raises once the newer one (torch 2.9) has been set.
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


def _interpreted() -> bool:
    return not isinstance(_forward_kernel, triton.runtime.JITFunction)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
