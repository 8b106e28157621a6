r"""Cross-node attention as three fused Triton kernels.

The forward pass reads the neighbors of a destination one after the other and keeps scores and messages on the chip.
It saves its inputs only. The backward pass goes through the graph twice: once per destination for the gradient of the
queries, once per source, over the transposed graph, for the gradients of keys and values. Every number has one writer
that adds in a fixed order, so that results are the same bit by bit from run to run.

With :math:`P_e` the attention of edge :math:`e = (i, j)` and :math:`G_i` the gradient that arrives at destination
:math:`i`, the rows of :math:`\delta_e = \mathrm{rowsum}(P_e \circ G_i V_j^\top)` are needed twice: they center the
gradient of the scores, :math:`w_e P_e \circ (G_i V_j^\top - \delta_e)`, and add up to the gradient of :math:`w_e`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fimp_sc.nn.ops._chunked import dense_like
from fimp_sc.nn.ops.triton._kernels import destination_kernel, forward_kernel, source_kernel, triton

if TYPE_CHECKING:
    from collections.abc import Sequence

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 128
_LOG2_E = 1.4426950408889634


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why the kernels cannot take such tensors, or ``None`` if they can."""
    if triton is None:
        return "triton is not installed"
    if _version() < (3, 2):
        return f"triton {triton.__version__} is older than 3.2"
    if _interpreted():
        if dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 numbers wrongly"
    else:
        if device.type != "cuda":
            return f"the kernels run on CUDA devices, not on {device.type!r}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "the kernels need a device of compute capability 8.0 or higher"
    if dtype not in _DTYPES:
        return f"tensors must be float32, float16 or bfloat16, found {dtype}"
    if not 1 <= head_dim <= _MAX_HEAD_DIM:
        return f"head_dim must be 1 to {_MAX_HEAD_DIM}, found {head_dim}"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    indptr: Tensor,
    indices: Tensor,
    padding: Tensor | None,
) -> Tensor:
    r"""Return the sum of :math:`w_e\,\mathrm{softmax}(Q_i K_j^\top / \sqrt{d}) V_j` over the edges of each destination.

    Parameters are those of :func:`~fimp_sc.nn.ops._attend.attend`. Tensors may have any strides, and are copied only
    if their last dimension is not contiguous; the result has the layout of ``query`` if that is dense. Products are
    accumulated in fp32; fp32 inputs are multiplied exactly unless TF32 products are allowed in torch.
    """
    out, padding = dense_like(query), _some(padding)
    query, key, value = (_readable(x.detach()) for x in (query, key, value))
    indptr, indices, weight = indptr.contiguous(), indices.contiguous(), weight.detach().contiguous()
    n, heads, tokens, dim = query.shape
    with torch.cuda.device_of(query):
        _launch(
            forward_kernel,
            out,
            *(query, key, value, out, indptr, indices, weight, *_padded(padding)),
            *(*_strides(query, key, value, out), n, heads, tokens, key.shape[2], _LOG2_E * dim**-0.5),
            **_options(query.dtype, dim, tokens, key.shape[2], padding),
        )
    return out


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    indptr: Tensor,
    indices: Tensor,
    padding: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of queries, keys and values, ``None`` twice, and the gradient of the edges' factors.

    Beyond inputs and outputs two fp32 numbers are held per edge, head and query token. What is not ``needed`` may hold
    anything.
    """
    d_query, d_key, d_value = (dense_like(x) for x in (query, key, value))
    grad, query, key, value = (_readable(x.detach()) for x in (grad, query, key, value))
    indptr, indices, weight = indptr.contiguous(), indices.contiguous(), weight.detach().contiguous()
    padding = _some(padding)
    n, heads, tokens, dim = query.shape
    n_sources, source_tokens = key.shape[0], key.shape[2]
    lse = query.new_empty((indices.shape[0], heads, tokens), dtype=torch.float32)
    delta = torch.empty_like(lse)
    padded = _padded(padding)
    sizes = (heads, tokens, source_tokens, dim**-0.5, _LOG2_E * dim**-0.5)
    with torch.cuda.device_of(query):
        _launch(
            destination_kernel,
            d_query,
            *(query, key, value, grad, d_query, lse, delta, indptr, indices, weight, *padded),
            *(*_strides(query, key, value, grad, d_query), n, *sizes),
            **_options(query.dtype, dim, tokens, source_tokens, padding),
        )
        if needed[1] or needed[2]:
            transposed = _transposed(indptr, indices, n_sources)
            _launch(
                source_kernel,
                d_key,
                *(query, key, value, grad, d_key, d_value, lse, delta, *transposed, weight, *padded),
                *(*_strides(query, key, value, grad, d_key, d_value), n_sources, *sizes),
                **_options(key.dtype, dim, source_tokens, tokens, padding),
            )
    return [d_query, d_key, d_value, None, None, delta.sum((1, 2)).to(weight.dtype)]


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
        # 128 rows read each neighbor half as often, unless the last tile would be half empty.
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


def _some(padding: Tensor | None) -> Tensor | None:
    return None if padding is None or padding.numel() == 0 else padding


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    # The older name raises once the newer one (torch 2.9) has been set.
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


def _interpreted() -> bool:
    return not isinstance(forward_kernel, triton.runtime.JITFunction)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
