"""What the compiler makes of the fused kernels, which needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

BENCHMARKS = str(Path(__file__).parents[4] / "benchmarks")
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


def compile_kernels(dtype: torch.dtype, capability: int, dim: int, tokens: int, padded: bool) -> None:
    from attention_tiles import KERNELS, binary_of, usage

    for name in KERNELS:
        compiled, options = binary_of(name, dtype, capability, dim, tokens, padded)
        # What a block may have on the smallest devices of these generations.
        assert compiled.metadata.shared <= 99 * 1024
        # Accumulators that do not fit into registers would be kilobytes; single values may move.
        assert usage(compiled.asm["cubin"])["STACK"] <= 64
        # Hopper's matrix instructions take 64 rows at once.
        if capability == 90 and dtype != torch.float32 and options["BLOCK_M"] >= 64:
            assert "wgmma.mma_async" in compiled.asm["ptx"]


def compile_all_kernels() -> None:
    compile_kernels(torch.bfloat16, 90, 64, 256, True)
    compile_kernels(torch.float16, 80, 128, 1, True)
    compile_kernels(torch.float32, 80, 24, 20, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile the kernels")
@pytest.mark.skipif(VERSION < (3, 3), reason="the compiler is called differently before triton 3.3")
def test_kernels_compile(tmp_path: Path) -> None:
    """The compiler, which needs no GPU, is stricter than the interpreter."""
    # In a process of its own, as the interpreter leaves triton.language changed.
    code = f"import runpy; runpy.run_path({__file__!r})['compile_all_kernels']()"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": BENCHMARKS}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
