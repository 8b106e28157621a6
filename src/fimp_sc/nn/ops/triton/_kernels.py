"""The three kernels of fused attention across the edges of a graph; `_function.py` says what they compute."""

# Triton looks up the annotations of a kernel's arguments, and accepts none but its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

__all__ = ["destination_kernel", "forward_kernel", "source_kernel", "triton"]

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def _jit(function: Any) -> Any:
    # The number of nodes changes from batch to batch: no kernel of its own for multiples of 16.
    return function if triton is None else triton.jit(function, do_not_specialize=("n_nodes",))


# Programs are numbered tile first, then node, then head: what runs at one time are neighboring nodes of one head, and
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


# In all kernels the program owns BLOCK_M tokens of one node and goes through the tokens of its neighbors in steps of
# BLOCK_N. ONE_TILE makes that inner loop vanish at compile time, so that loads are pipelined over the edges instead.
# Scores are in base 2 (their scale includes log2 e). The running maximum starts at a finite number: minus infinity
# minus minus infinity would be NaN in a tile that is padding throughout.
@_jit
def forward_kernel(
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
def destination_kernel(
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
        # The normalizer is found again together with delta, which needs the same products: cheaper than to keep it
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
def source_kernel(
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
