"""What the compiler makes of the fused kernels, which needs no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


def compile_kernels(dtype: torch.dtype, capability: int, dim: int, tokens: int, padded: bool) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fimp_sc.nn import _triton as module

    element = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    types = dict.fromkeys(("Q", "K", "V", "OUT", "GRAD", "DQ", "DK", "DV"), f"*{element}")
    types |= dict.fromkeys(("LSE", "DELTA", "WEIGHT"), "*fp32") | {"PADDED": "*u8", "BOUND": "*i32"}
    types |= dict.fromkeys(("INDPTR", "INDICES", "EDGES", "DESTINATIONS"), "*i64")
    types |= dict.fromkeys(("scale", "scale_log2"), "fp32")
    for kernel in (module.forward_kernel, module.destination_kernel, module.source_kernel):
        options = module._options(dtype, dim, tokens, tokens, torch.zeros(1) if padded else None)
        launch = {name: options.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        constants = options if padded else {**options, "PADDED": None, "BOUND": None}
        source = ASTSource(
            fn=kernel,
            signature={x: "constexpr" if x in constants else types.get(x, "i32") for x in kernel.arg_names},
            constexprs={(place,): constants[x] for place, x in enumerate(kernel.arg_names) if x in constants},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
        # What a block may have on the smallest devices of these generations.
        assert compiled.metadata.shared <= 99 * 1024
        # Accumulators that do not fit into registers would be kilobytes; single values may move.
        assert stack_bytes(compiled.asm["cubin"]) <= 64
        # Hopper's matrix instructions take 64 rows at once.
        if capability == 90 and dtype != torch.float32 and options["BLOCK_M"] >= 64:
            assert "wgmma.mma_async" in compiled.asm["ptx"]


def stack_bytes(cubin: bytes) -> int:
    """What a thread keeps outside registers, as the disassembler that comes with Triton says."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", done.stdout + done.stderr).group(1))


def compile_all_kernels() -> None:
    compile_kernels(torch.bfloat16, 90, 64, 256, True)
    compile_kernels(torch.float16, 80, 128, 1, True)
    compile_kernels(torch.float32, 80, 24, 20, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile the kernels")
@pytest.mark.skipif(VERSION < (3, 7), reason="the compiler is called differently before triton 3.7")
def test_kernels_compile(tmp_path: Path) -> None:
    """The compiler, which needs no GPU, is stricter than the interpreter."""
    # In a process of its own, as the interpreter leaves triton.language changed.
    code = f"import runpy; runpy.run_path({__file__!r})['compile_all_kernels']()"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
