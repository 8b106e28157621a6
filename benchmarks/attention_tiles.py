"""Sizes of tiles of the fused CUDA kernels: how long each kernel takes with each, on the GPU at hand.

Without a GPU (--compile): what the compiler makes of each size for a compute capability, which takes Triton alone:
registers of a thread, bytes that do not fit into them, shared memory, and how many warps of it a multiprocessor holds.
Sizes that the package chooses by itself are marked.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import pandas as pd

from _common import HERE, environment
from attention import tissue

KERNELS = ("forward_kernel", "destination_kernel", "source_kernel")
# Of a multiprocessor of compute capability 8.0, 9.0 and 10.0.
REGISTERS, SHARED, WARPS = 65_536, {80: 163, 90: 227, 100: 227}, 64
POINTERS = {"Q", "K", "V", "OUT", "GRAD", "DQ", "DK", "DV"}
OTHERS = dict.fromkeys(("LSE", "DELTA", "WEIGHT"), "*fp32") | {"PADDED": "*u8", "BOUND": "*i32"}
OTHERS |= dict.fromkeys(("INDPTR", "INDICES", "EDGES", "DESTINATIONS"), "*i64")
OTHERS |= dict.fromkeys(("scale", "scale_log2"), "fp32")


def main() -> None:
    """Measure, or compile, each kernel with each size and write the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--compile", type=int, metavar="CAPABILITY", choices=list(SHARED), help="80, 90 or 100; needs no GPU"
    )
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    p.add_argument("--head-dim", type=int, default=64)
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--cells", type=int, default=10_000)
    p.add_argument("--padding", action="store_true", help="with a mask of padding, as models have")
    p.add_argument("--rows", type=int, nargs="+", default=[64, 128])
    p.add_argument("--columns", type=int, nargs="+", default=[32, 64, 128])
    p.add_argument("--stages", type=int, nargs="+", default=[2, 3, 4])
    args = p.parse_args()

    import torch

    from fimp_sc.nn.ops.triton import _function as _triton

    if args.compile is None and not torch.cuda.is_available():
        p.error("there is no CUDA device here; --compile needs none")
    args.dtype = getattr(torch, args.dtype)
    default = _triton._tiles(args.head_dim, args.tokens, args.tokens, args.dtype)
    # As many warps as the package takes for so many rows, and more of fewer registers each.
    sizes = [
        (m, n, warps, s)
        for m, n, s in itertools.product(args.rows, args.columns, args.stages)
        for warps in {m // 16, 8}
    ]
    rows = []
    for size in sorted({*sizes, default}):
        for found in compiled(args, size) if args.compile else measured(args, size):
            names = dict(zip(("rows", "columns", "warps", "stages"), size, strict=True))
            rows.append({**names, "chosen": "yes" if size == default else "", **found})
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows).sort_values("kernel", kind="stable")
    print("\n" + table.to_string(index=False))
    if args.compile:
        return
    how = {
        "dtype": str(args.dtype),
        **{name: getattr(args, name) for name in ("head_dim", "heads", "tokens", "padding")},
    }
    for key, value in {**how, **environment()}.items():
        table[key] = value
    path = HERE / "results" / f"attention_tiles_{torch.cuda.get_device_name().replace(' ', '_')}.csv"
    table.to_csv(path, index=False, float_format="%.5g")
    print(f"\nwritten: {path.name}")


def measured(args: argparse.Namespace, size: tuple[int, ...]) -> list[dict]:
    """Milliseconds of each kernel, the median of 10 runs."""
    import torch

    from fimp_sc.nn import cross_node_attention
    from fimp_sc.nn.ops.triton import _function as _triton

    _triton._tiles = lambda *_: size
    shape = args.cells, args.heads, args.tokens, args.head_dim
    q, k, v = (torch.randn(shape, device="cuda", dtype=args.dtype).requires_grad_() for _ in range(3))
    graph = [torch.from_numpy(x).cuda() for x in tissue(args.cells, 6)]
    padding = torch.zeros(args.cells, args.tokens, dtype=torch.bool, device="cuda") if args.padding else None

    def step() -> None:
        cross_node_attention(q, k, v, *graph, key_padding_mask=padding, backend="triton").backward(q.detach())

    try:
        step()
    except (*triton_errors(), torch.cuda.OutOfMemoryError) as error:
        return [{"kernel": "all", "error": type(error).__name__}]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            step()
    times = pd.Series([event.device_time for event in profile.events()], [event.name for event in profile.events()])
    return [{"kernel": name, "ms": times[times.index == name].median() / 1000} for name in KERNELS]


def triton_errors() -> tuple[type[Exception], ...]:
    """What Triton raises where a size does not fit."""
    from triton.compiler import CompilationError
    from triton.runtime.errors import OutOfResources

    return CompilationError, OutOfResources


def compiled(args: argparse.Namespace, size: tuple[int, ...]) -> list[dict]:
    """What the compiler makes of each kernel."""
    from fimp_sc.nn.ops.triton import _function as _triton

    _triton._tiles = lambda *_: size
    found = []
    for name in KERNELS:
        try:
            binary, options = binary_of(name, args.dtype, args.compile, args.head_dim, args.tokens, args.padding)
        except RuntimeError as error:
            found.append({"kernel": name, "error": type(error).__name__})
            continue
        use, shared, warps = usage(binary.asm["cubin"]), binary.metadata.shared, options["num_warps"]
        of_warp = -(-use["REG"] // 8) * 8 * 32
        blocks = min(REGISTERS // of_warp // warps, SHARED[args.compile] * 1024 // (shared + 1024), WARPS // warps)
        numbers = {"registers": use["REG"], "spilled": use["STACK"], "shared_kb": shared / 1024}
        found.append({"kernel": name, **numbers, "warps_held": blocks * warps})
    return found


def binary_of(name: str, dtype, capability: int, dim: int, tokens: int, padded: bool) -> tuple:
    """Compile a kernel, which needs no GPU; also returned are the options that it is launched with."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fimp_sc.nn.ops.triton import _function as _triton

    kernel = getattr(_triton, name)
    element = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    options = _triton._options(dtype, dim, tokens, tokens, torch.zeros(1) if padded else None)
    launch = {x: options[x] for x in ("num_warps", "num_stages", "enable_fp_fusion")}
    constants = {x: value for x, value in options.items() if x not in launch}
    if not padded:
        constants |= {"PADDED": None, "BOUND": None}
    places = {x: (place,) for place, x in enumerate(kernel.arg_names)}
    types = {x: f"*{element}" if x in POINTERS else OTHERS.get(x, "i32") for x in places}
    # Addresses are multiples of 16, as those of real tensors; strides are where the width of heads is.
    others = {"n_nodes", "n_heads", "scale", "scale_log2", *constants}
    whole = [x for x in places if x not in others and (types[x].startswith("*") or dim % 16 == 0)]
    source = ASTSource(
        fn=kernel,
        signature={x: "constexpr" if x in constants else kind for x, kind in types.items()},
        constexprs={places[x]: value for x, value in constants.items() if x in places},
        attrs={places[x]: [["tt.divisibility", 16]] for x in whole},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch), options


def usage(cubin: bytes) -> dict[str, int]:
    """Resources of a kernel, as the disassembler that comes with Triton says."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", done.stdout + done.stderr)}


if __name__ == "__main__":
    main()
