"""Compiled backends are tried on a tiny graph before they are chosen: what they need shows only where they run.

They are compiled for the device at hand, by whatever release of Triton or numba is there; Triton takes a C compiler
besides. What is compiled for the trial serves what follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fimp_sc._logging import warn
from fimp_sc.nn.ops._attend import without_autocast

if TYPE_CHECKING:
    from collections.abc import Callable

# Differences from the definition, relative to its largest number, beyond what rounding explains (TF32 included).
_TOLERANCE = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Kind(NamedTuple):
    """Tensors that one trial stands for."""

    backend: str
    device: torch.device
    dtype: torch.dtype
    n_heads: int
    n_queries: int
    n_tokens: int
    head_dim: int
    backward: bool


_tried: dict[Kind, bool] = {}


def works(kind: Kind, attention: Callable[..., Tensor]) -> bool:
    """Tell whether a backend runs on tensors of a kind, and agrees with the definition; tried once for each kind.

    Parameters
    ----------
    kind
        What is tried: backend, device, dtype and sizes.
    attention
        :func:`~fimp_sc.nn.cross_node_attention`.

    Warns
    -----
    UserWarning
        It does not: the warning says why, and what is used instead.
    """
    if kind not in _tried:
        reason = _failure(kind, attention)
        _tried[kind] = reason is None
        if reason is not None:
            warn(
                f"Compiled attention (backend={kind.backend!r}) is not used on {str(kind.device)!r}: {reason}. Batched "
                "products (backend='chunked') are used instead: results are the same, but take more time and memory.",
            )
    return _tried[kind]


def _failure(kind: Kind, attention: Callable[..., Tensor]) -> str | None:
    # Layers that are computed again in backward count what is kept for it.
    kept_apart = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    try:
        with kept_apart, without_autocast(kind.device.type):
            found, truth = (_results(kind, attention, backend) for backend in (kind.backend, "dense"))
        # Gradients may be no more than rounding: those of queries are, where there is one token to attend to.
        errors = [(x - y).abs().max() / y.abs().max().clamp(min=1.0) for x, y in zip(found, truth, strict=True)]
        off = float(torch.stack(errors).max())
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # of compilers, drivers and launchers, each of its own kind
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    # Also where it is NaN.
    return None if off <= _TOLERANCE[kind.dtype] else f"its results are off by {off:.2g} of the largest number"


def _results(kind: Kind, attention: Callable[..., Tensor], backend: str) -> list[Tensor]:
    """Return the messages of three nodes, one of them isolated, and all gradients, in single precision."""
    generator = torch.Generator().manual_seed(0)

    def normal(n_tokens: int) -> Tensor:
        # The layout of modules: heads are parts of the last dimension.
        x = torch.randn(3, n_tokens, kind.n_heads * kind.head_dim, generator=generator).to(kind.dtype)
        x = x.to(kind.device, torch.float32 if backend == "dense" else kind.dtype)
        return x.unflatten(2, (kind.n_heads, -1)).transpose(1, 2)

    indptr, indices = torch.tensor([0, 3, 3, 5]), torch.tensor([0, 1, 2, 1, 1])
    padding = torch.zeros(3, kind.n_tokens, dtype=torch.bool)
    padding[1, kind.n_tokens // 2 + 1 :] = True
    weight = torch.rand(len(indices), generator=generator)
    sizes = kind.n_queries, kind.n_tokens, kind.n_tokens
    inputs = [x.requires_grad_(kind.backward) for x in (*map(normal, sizes), weight.to(kind.device))]
    (*heads, weight), up = inputs, normal(kind.n_queries)
    graph = indptr.to(kind.device), indices.to(kind.device)
    out = attention(
        *heads, *graph, edge_weight=weight, key_padding_mask=padding.to(kind.device), reduce="sum", backend=backend
    )
    gradients = torch.autograd.grad(out, inputs, up) if kind.backward else ()
    return [x.detach().float() for x in (out, *gradients)]
