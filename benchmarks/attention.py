"""Time and memory of one layer of cross-node attention beside the usual ways to compute it, on synthetic tissue.

Cells lie at random in a square, in spatial order, each with its k nearest neighbors and f tokens of width d. Per-edge
methods gather the tokens of both ends of each edge, as message passing does; "weights returned" is the default of
nn.MultiheadAttention, left out where the weights of all edges would fill more than 4 GB. GATv2Conv and TransformerConv
attend over one vector of width d per cell: another model, shown for what tokens cost.

Each measurement is a fresh process, methods take turns, and the table has the median over rounds. Peak memory is what
forward and backward pass add to the process (on CUDA: to the allocated memory) once inputs and weights are there.
Kernels are compiled before.

On CUDA the "attention only" rows leave out projections. Their rate counts 4·E·f²·d operations forward and 3.5 times
that forward and backward (the backward pass makes five products for the forward pass's two, one of them again), as a
share of the measured rate of a product of 8192 x 8192 matrices.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from _common import HERE, environment, neighbors

MHA = "nn.MultiheadAttention per edge"
WEIGHTS = ", weights returned"
SDPA = "scaled_dot_product_attention per edge"
FLEX = "flex_attention per edge"
CONVOLUTIONS = ("GATv2Conv", "TransformerConv")
OURS = "fimp-sc, "
ALONE = ", attention only"
MAX_WEIGHTS = 2**30  # numbers
EDGES_PER_CHUNK = 4096  # of the per-edge products on CUDA, which fail for very large batches


def main() -> None:
    """Measure each method in each round and write the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--cells", type=int, default=None, help="default: 1000 on CPUs, 20000 on CUDA")
    p.add_argument("--tokens", type=int, nargs="+", default=None, help="default: 64 and 200 on CPUs, 256 on CUDA")
    p.add_argument("--methods", nargs="+", default=None, help="names, or parts of names, of the methods to measure")
    p.add_argument("--quick", action="store_true", help="tiny sizes, 1 round: checks that the script runs")
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        print(json.dumps(measure(**json.loads(args.child))))
        return

    cuda = args.device == "cuda"
    case = {"k": 6, "d": 512, "heads": 8, "dtype": "bfloat16"} if cuda else {"k": 6, "d": 64, "heads": 4}
    tokens = args.tokens or ([256] if cuda else [64, 200])
    cells = args.cells or (20_000 if cuda else 1000)
    if args.quick:
        tokens, cells, args.rounds = [8], 50, 1
    methods = [MHA, MHA + WEIGHTS, SDPA, *CONVOLUTIONS, OURS + "chunked"]
    if not cuda:
        methods.append(OURS + "numba")
    else:
        methods += [FLEX, OURS + "triton", OURS + "chunked" + ALONE, OURS + "triton" + ALONE]
    if args.methods:
        methods = [name for name in methods if any(part in name for part in args.methods)]

    env = {**os.environ, **{f"{v}_NUM_THREADS": str(args.threads) for v in ("OMP", "MKL", "OPENBLAS", "NUMBA")}}
    rows = []
    for turn in range(args.rounds):
        for f in tokens:
            for method in methods:
                if WEIGHTS in method and cells * case["k"] * case["heads"] * f**2 > MAX_WEIGHTS:
                    continue
                message = {**case, "n": cells, "f": f, "method": method, "threads": args.threads, "device": args.device}
                command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(message)]
                run = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
                if run.returncode != 0:
                    raise SystemExit(f"{method} failed (exit status {run.returncode}); its message is above.")
                found = json.loads(run.stdout.strip().splitlines()[-1])
                rows.append({"f": f, "method": method, "round": turn, **found, **message})
                print(f"round {turn}, f {f}, {method}:", found, flush=True)

    table = pd.DataFrame(rows)
    print("\n" + summary(table, OURS + ("triton" if cuda else "numba")))
    for key, value in environment().items():
        table[key] = value
    name = f"attention{'_cuda' if cuda else ''}{'_quick' if args.quick else ''}.csv"
    path = HERE / "results" / name
    path.parent.mkdir(exist_ok=True)
    table.to_csv(path, index=False, float_format="%.5g")
    print(f"\nwritten: {os.path.relpath(path)}")


def summary(table: pd.DataFrame, ours: str) -> str:
    """Medians over rounds as Markdown, with ratios to the rows of `ours`."""
    rates = "forward_share" in table
    head = ["method", "f", "forward s", "forward + backward s", "peak MB", "time / ours", "memory / ours"]
    head += ["forward, share of peak rate", "forward + backward, share"] if rates else []
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    columns = ["forward_s", "both_s", "peak_mb", *(["forward_share", "both_share"] if rates else [])]
    median = table.groupby(["f", "method"], sort=False)[columns].median()
    for (f, method), row in median.iterrows():
        cells = [method, str(f)]
        if np.isnan(row["both_s"]):
            lines.append("| " + " | ".join([*cells, "out of memory", *[""] * (len(head) - 3)]) + " |")
            continue
        cells += [f"{row['forward_s']:.3g}", f"{row['both_s']:.3g}", f"{row['peak_mb']:.0f}"]
        base = median.loc[(f, ours)] if (f, ours) in median.index else row * np.nan
        cells += [f"{row[name] / base[name]:.1f}" for name in ("both_s", "peak_mb")]
        cells += ["" if np.isnan(row[name]) else f"{row[name]:.2f}" for name in columns[3:]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tissue(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Compressed sparse rows of the k nearest neighbors of random places, sorted along a space-filling curve."""
    xy = np.random.default_rng(0).random((n, 2))
    cell = (xy * 1024).astype(np.int64)
    code = sum(((cell[:, axis] >> bit) & 1) << (2 * bit + axis) for bit in range(10) for axis in range(2))
    graph = neighbors(xy[np.argsort(code)], k)
    return graph.indptr.astype(np.int64), graph.indices.astype(np.int64)


def measure(
    method: str, n: int, k: int, f: int, d: int, heads: int, threads: int, device: str, dtype: str = "float32"
) -> dict[str, float]:
    """Seconds and peak memory of a method; runs in its own process."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    call, width = build(method, d, heads, device, kind)
    indptr, indices = (torch.from_numpy(x).to(device) for x in tissue(n, k))
    few = max(n // 20, k + 1)
    small = [torch.from_numpy(x).to(device) for x in tissue(few, k)]

    def tokens(count: int):
        shape = (count, f, width) if method not in CONVOLUTIONS else (count, width)
        return torch.randn(shape, device=device, dtype=kind).requires_grad_()

    def step(x, up, indptr, indices) -> tuple[float, float]:
        wait(device)
        started = time.perf_counter()
        out = call(x, indptr, indices)
        wait(device)
        forward = time.perf_counter() - started
        out.backward(up)
        wait(device)
        return forward, time.perf_counter() - started

    def upstream(x):
        return torch.randn_like(x.detach()[..., :d])

    x = tokens(few)
    step(x, upstream(x), *small)  # libraries and kernels are loaded, and compiled, on first use
    x = tokens(n)
    up = upstream(x)
    seconds = []
    try:
        if device == "cuda":  # memory is obtained, and what is compiled for each number of edges
            step(x, up, indptr, indices)
            x.grad = None
        before = start_of_memory(device)
        while len(seconds) < 5 and sum(both for _, both in seconds) < 2:
            x.grad = None
            seconds.append(step(x, up, indptr, indices))
    except torch.cuda.OutOfMemoryError:
        return {"forward_s": float("nan"), "both_s": float("nan"), "peak_mb": float("nan")}
    forward, both = (statistics.median(column) for column in zip(*seconds, strict=True))
    found = {"forward_s": forward, "both_s": both, "peak_mb": peak_memory(device) - before}
    if ALONE in method:
        rate, work = matmul_rate(kind, device), 4 * len(indices) * f**2 * d
        found |= {"matmul_tflops": rate / 1e12, "forward_share": work / forward / rate}
        found["both_share"] = 3.5 * work / both / rate
    return found


def build(method: str, d: int, heads: int, device: str, dtype):
    """Return the method as a function of (x, indptr, indices), and the width of x."""
    import torch
    from torch import nn
    from torch.nn.functional import scaled_dot_product_attention
    from torch.utils.checkpoint import checkpoint
    from torch_geometric.nn import GATv2Conv, MessagePassing, TransformerConv

    from fimp_sc.nn import CrossNodeAttention, attention_backend, cross_node_attention

    def edge_index(indptr, indices):
        destination = torch.arange(len(indptr) - 1, device=device).repeat_interleave(indptr.diff())
        return torch.stack([indices, destination])

    class PerEdge(MessagePassing):
        def __init__(self) -> None:
            super().__init__(aggr="mean", node_dim=0)
            self.attention = nn.MultiheadAttention(d, heads, batch_first=True)

        def forward(self, x, indptr, indices):
            return self.propagate(edge_index(indptr, indices), x=x)

        def message(self, x_i, x_j):
            return self.attention(x_i, x_j, x_j, need_weights=WEIGHTS in method)[0]

    product = scaled_dot_product_attention
    if method == FLEX:
        from torch.nn.attention.flex_attention import flex_attention

        product = torch.compile(flex_attention) if device == "cuda" else flex_attention

    class PerEdgeProduct(CrossNodeAttention):
        def forward(self, x, indptr, indices):
            q, k, v = (part(x).unflatten(2, (heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
            source, destination = edge_index(indptr, indices)
            share = indptr.diff().clamp(min=1).reciprocal().to(x.dtype)[destination, None, None, None]

            def messages(edges):
                i, j = destination[edges], source[edges]
                return product(q[i], k[j], v[j]) * share[edges]

            total = torch.zeros_like(q)
            if device == "cpu":
                total.index_add_(0, destination, messages(slice(None)))
            else:
                for begin in range(0, len(source), EDGES_PER_CHUNK):
                    edges = slice(begin, begin + EDGES_PER_CHUNK)
                    total.index_add_(0, destination[edges], checkpoint(messages, edges, use_reentrant=False))
            return self.output(total.transpose(1, 2).flatten(2))

    if method.removesuffix(WEIGHTS) == MHA:
        return PerEdge().to(device, dtype), d
    if method in (SDPA, FLEX):
        return PerEdgeProduct(d, heads).to(device, dtype), d
    if method in CONVOLUTIONS:
        layer = {"GATv2Conv": GATv2Conv, "TransformerConv": TransformerConv}[method]
        conv = layer(d, d // heads, heads=heads).to(device, dtype)
        return lambda x, indptr, indices: conv(x, edge_index(indptr, indices)), d

    backend = method.removeprefix(OURS).removesuffix(ALONE)
    if ALONE in method:

        def attention(x, indptr, indices):
            q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in x.chunk(3, -1))
            out = cross_node_attention(q, k, v, indptr, indices, backend=backend)
            return out.transpose(1, 2).flatten(2)

        return attention, 3 * d

    layer = CrossNodeAttention(d, heads).to(device, dtype)

    def ours(x, indptr, indices):
        padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=device)
        with attention_backend(backend):
            return layer(x, padding, indptr, indices)

    return ours, d


def wait(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def start_of_memory(device: str) -> float:
    """Memory in use now, MB."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * resource.getpagesize() / 2**20 if pages.exists() else peak_memory(device)


def peak_memory(device: str) -> float:
    """Largest memory so far, MB."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def matmul_rate(dtype, device: str = "cuda") -> float:
    """Operations per second of a large product on the device."""
    import torch

    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(20):
        wait(device)
        started = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[5:])


if __name__ == "__main__":
    main()
