"""Everything that takes a GPU, in a few minutes: agreement with the reference, speed, training, inference, tests.

`attention`: rows "error" have the largest error of results and gradients against the definition in double precision,
relative to the largest number; the others are measured as in `attention.py`, those of "attention only" with the share
of the measured rate of a large product of the same precision. `model`: training of FIMP-base on 41,786 random cells
(the second epoch), and embedding with random weights of scGPT's size in all modes. `tests`: those of the fused kernels.

Each part is a process with a time limit. Rows are written to `results/gpu.json` as they come, and a second call
computes those that are missing or failed (`--again` all). Without a GPU, or with --self-check, the same code runs at
tiny sizes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attention
import foundation
from _common import HERE, environment

if TYPE_CHECKING:
    from collections.abc import Callable

    Case = Callable[[], dict[str, Any]]

# Parts in their order, and their shares of the time; what one leaves is for those after it.
# Tests come last: the kernels are compiled for each of their many sizes.
SHARES = {"attention": 1, "model": 1, "tests": 1}
# Largest error of results and gradients, relative to the largest number; a few times what was found on CPUs.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes
    ----------
    device
        Where.
    tests
        What pytest runs.
    backends
        Those compared with the definition, and measured.
    layer
        Neighbors, tokens, width and heads of the attention that is measured.
    nodes, nodes_compared
        How many nodes attend, and how many where all scores are kept.
    cells, genes, tokens, width
        Of FIMP-base, whose cells are at random places.
    weights
        Of the foundation model.
    cells_embedded
        By the foundation model.
    """

    device: str
    tests: str
    backends: tuple[str, ...]
    layer: dict[str, Any]
    nodes: int
    nodes_compared: int
    cells: int
    genes: int
    tokens: int
    width: int
    weights: dict[str, int]
    cells_embedded: int


GPU = Sizes(
    device="cuda",
    tests="tests/nn/ops/triton",
    backends=("triton", "chunked"),
    layer={"k": 6, "f": 256, "d": 512, "heads": 8, "dtype": "bfloat16"},
    nodes=10_000,
    nodes_compared=32,
    cells=41_786,
    genes=1000,
    tokens=200,
    width=128,
    weights={"width": 512, "layers": 12, "heads": 8, "n_genes": 60_697},
    cells_embedded=2000,
)
TINY = Sizes(
    device="cpu",
    tests="tests/nn/ops/test_selftest.py",
    backends=("chunked",),
    layer={"k": 3, "f": 8, "d": 16, "heads": 2, "dtype": "bfloat16"},
    nodes=20,
    nodes_compared=6,
    cells=60,
    genes=30,
    tokens=8,
    width=16,
    weights={"width": 16, "layers": 2, "heads": 2, "n_genes": 40},
    cells_embedded=12,
)


def main() -> None:
    """Compute what is missing, part by part, and print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=8, help="for all parts together")
    p.add_argument("--parts", nargs="+", default=list(SHARES), choices=SHARES)
    p.add_argument("--again", action="store_true", help="compute rows that are there already, too")
    p.add_argument("--self-check", action="store_true", help="tiny sizes on the CPU; fails where a row fails")
    p.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = p.parse_args()
    sizes = TINY if args.self_check or not _cuda() else GPU
    if args.child:
        run_cases(args.child[0], sizes, args.child[1:])
        return
    if sizes is TINY and not args.self_check:
        print("There is no CUDA device here: the same code runs at tiny sizes, whose figures mean nothing.\n")
    path = HERE / "results" / f"gpu{'_self_check' if sizes is TINY else ''}.json"
    rows = Rows(path, machine(sizes.device), again=args.again or sizes is TINY)
    command = [sys.executable, str(Path(__file__).resolve()), *(["--self-check"] if sizes is TINY else []), "--child"]
    end = time.monotonic() + 60 * args.minutes
    for place, part in enumerate(args.parts):
        missing = rows.missing(part, list(cases(part, sizes)))
        ahead = sum(SHARES[other] for other in args.parts[place:])
        if missing:
            run_part(part, missing, rows, (end - time.monotonic()) * SHARES[part] / ahead, [*command, part])
    print("\n" + rows.table(args.parts) + f"\n\nwritten: {os.path.relpath(path)}")
    if sizes is TINY and rows.failed():
        raise SystemExit(f"Failed: {', '.join(rows.failed())}.")


class Rows:
    """Rows by part and case, in a file that is written whenever one is added."""

    def __init__(self, path: Path, made_on: dict[str, Any], *, again: bool) -> None:
        self.path, self.made_on = path, made_on
        found = {} if again or not path.exists() else json.loads(path.read_text(encoding="utf-8"))
        if found and found["machine"] != made_on:
            print(f"{path.name} is of another machine or other versions, and made anew.")
            found = {}
        self.rows: dict[str, dict[str, dict[str, Any]]] = found.get("rows", {})

    def missing(self, part: str, names: list[str]) -> list[str]:
        """Cases without a result, those that failed before at the end."""
        rows = self.rows.get(part, {})
        return sorted(
            (name for name in names if "error" in rows.get(name, {"error": ""})), key=lambda name: name in rows
        )

    def add(self, part: str, case: str, row: dict[str, Any]) -> None:
        """Keep a row, in place of an older one."""
        print(f"{part}, {case}:", _text(row), flush=True)
        self.rows.setdefault(part, {})[case] = row
        self.path.parent.mkdir(exist_ok=True)
        unfinished = self.path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({"machine": self.made_on, "rows": self.rows}, indent=1), encoding="utf-8")
        unfinished.replace(self.path)

    def failed(self) -> list[str]:
        """Cases with an error."""
        return [f"{part}, {case}" for part, rows in self.rows.items() for case, row in rows.items() if "error" in row]

    def table(self, parts: list[str]) -> str:
        """All rows as Markdown."""
        lines = [", ".join(f"{key} {value}" for key, value in self.made_on.items()), ""]
        lines += ["| part | case | result |", "|---|---|---|"]
        rows = [(part, case, row) for part in parts for case, row in self.rows.get(part, {}).items()]
        return "\n".join(lines + [f"| {part} | {case} | {_text(row)} |" for part, case, row in rows])


def _text(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"failed: {row['error']}".replace("|", "\\|")
    words = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()}
    return ", ".join(f"{key} {word}" for key, word in words.items())


def machine(device: str) -> dict[str, Any]:
    """Versions, and the GPU."""
    found: dict[str, Any] = environment()
    if device == "cuda":
        import torch

        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def run_part(part: str, names: list[str], rows: Rows, limit: float, command: list[str]) -> None:
    """Run cases in a process of their own, `command` and their names, for at most `limit` seconds.

    A case in which the process ends is a row with an error; those after it run in a new process.
    """
    end = time.monotonic() + limit
    while names:
        before = len(names)
        status, last = _run_process([*command, *names], end - time.monotonic(), partial(_keep, part, names, rows))
        if names and status is None:
            rows.add(part, names[0], {"error": f"out of time, {limit:.0f} s for this part"})
            return
        if names and (status or len(names) == before):
            rows.add(part, names.pop(0), {"error": f"exit status {status}: {last[:300]}"})


def _keep(part: str, names: list[str], rows: Rows, line: str) -> None:
    if line.startswith('{"case": '):
        row = json.loads(line)
        names.remove(row["case"])
        rows.add(part, row.pop("case"), row)


def _run_process(command: list[str], limit: float, each_line: Callable[[str], None]) -> tuple[int | None, str]:
    """Hand over lines as they come; the exit status, None when it took too long, and the last line of its messages."""
    late = threading.Event()
    with (
        tempfile.TemporaryFile("w+") as messages,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=messages, text=True, start_new_session=True
        ) as process,
    ):

        def stop() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started

        timer = threading.Timer(max(limit, 1.0), stop)
        timer.start()
        try:
            for line in process.stdout:
                each_line(line)
            process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                stop()
        messages.seek(0)
        last = next((line.strip() for line in reversed(messages.readlines()) if line.strip()), "")
    return None if late.is_set() else process.returncode, last


def run_cases(part: str, sizes: Sizes, names: list[str]) -> None:
    """Run cases one after the other and print a line of JSON for each."""
    known = cases(part, sizes)
    for name in names:
        try:
            row = known[name]()
            if any(isinstance(value, float) and math.isnan(value) for value in row.values()):
                row = {"error": "out of memory, or not a number"}
        except Exception as error:  # whatever fails is a row
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps({"case": name, **row}), flush=True)
        if "CUDA error" in row.get("error", ""):
            return  # nothing runs on the device in this process after that


def cases(part: str, sizes: Sizes) -> dict[str, Case]:
    """Cases of a part by name."""
    if part == "tests":
        return {sizes.tests: partial(tests, sizes.tests)}
    found: dict[str, Case] = {}
    if part == "attention":
        for backend, kind in itertools.product(sizes.backends, TOLERANCE):
            found[f"error of {backend}, {kind}"] = partial(errors, backend, kind, sizes)
        ours = [attention.OURS + backend for backend in sizes.backends]
        others = [attention.SDPA, *([attention.FLEX] if sizes.device == "cuda" else [])]
        for method in (ours[0] + attention.ALONE, ours[0], *others, *ours[1:]):
            how = {"threads": _threads(), "device": sizes.device}
            found[method] = partial(attention.measure, method, sizes.nodes, **sizes.layer, **how)
    else:
        for precision in ("32-true", "bf16-mixed"):
            found[f"train {sizes.cells} cells, {precision}"] = partial(training, precision, sizes)
        for aggregate, states in itertools.product(("layer", "final"), ("evolving", "static")):
            name = f"embed {sizes.cells_embedded} cells, {aggregate}, {states}"
            found[name] = partial(inference, aggregate, states, sizes)
    return found


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def tests(what: str) -> dict[str, Any]:
    """Run tests, and count them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", what]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", lines[-1] if lines else "")
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:1]
        raise RuntimeError(" ".join([*lines[-1:], *failed]) or done.stderr.strip()[-300:])
    return {kind: int(count) for count, kind in counts}


def errors(backend: str, dtype: str, sizes: Sizes) -> dict[str, float]:
    """Largest error of the result and of each gradient against the definition in double precision."""
    import torch

    from fimp_sc.nn import cross_node_attention

    kind, n, layer = getattr(torch, dtype), sizes.nodes_compared, sizes.layer
    graph = [torch.from_numpy(x).to(sizes.device) for x in attention.tissue(n, layer["k"])]
    generator = torch.Generator().manual_seed(0)

    def normal():
        x = torch.randn(n, layer["f"], layer["d"], generator=generator).to(sizes.device, kind)
        return x.unflatten(2, (layer["heads"], -1)).transpose(1, 2)

    inputs, up = [normal() for _ in range(3)], normal()
    padding = (torch.rand(n, layer["f"], generator=generator) < 0.3).to(sizes.device)

    def results(backend: str, kind: torch.dtype):
        given = [x.detach().to(kind).requires_grad_() for x in inputs]
        out = cross_node_attention(*given, *graph, key_padding_mask=padding, backend=backend)
        return out.detach(), *torch.autograd.grad(out, given, up.to(kind))

    names = ("result", "d_query", "d_key", "d_value")
    pairs = zip(names, results(backend, kind), results("dense", torch.float64), strict=True)
    found = {name: float((x - y).abs().max() / y.abs().max().clamp(min=1.0)) for name, x, y in pairs}
    if not all(error <= TOLERANCE[dtype] for error in found.values()):
        raise ValueError(f"differs from the definition by more than {TOLERANCE[dtype]:g}: {_text(found)}")
    return found


def random_section(n_cells: int, n_genes: int, path: Path) -> None:
    """Write cells with Poisson counts, more than a third of them not zero, at random places."""
    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse

    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(0.5, (n_cells, n_genes)).astype(np.float32))
    section = AnnData(counts, var=pd.DataFrame(index=[f"SYMBOL{i}" for i in range(n_genes)]))
    section.obsm["spatial"] = rng.random((n_cells, 2)) * 1000
    section.write_h5ad(path)


def training(precision: str, sizes: Sizes) -> dict[str, float]:
    """Two epochs of FIMP-base; the second is that of steps alone, with kernels compiled and workers started."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "section.h5ad")
        random_section(sizes.cells, sizes.genes, path)
        task = {"kind": "train", "path": str(path), "cells": None, "checkpoint": None, "threads": _threads()}
        task |= {"accelerator": _accelerator(sizes), "epochs": 2, "batch_size": None, "train": {"precision": precision}}
        task |= {"n_tokens": sizes.tokens, "model": {"n_latent": sizes.width}}
        found = foundation.measure(task)
    kept = ("last_epoch_s", "start_s", "last_loss", "peak_gpu_gb")
    return {"cells_per_s": sizes.cells / found["last_epoch_s"]} | {name: found[name] for name in kept if name in found}


def inference(aggregate: str, states: str, sizes: Sizes) -> dict[str, float]:
    """Embedding without training, twice: what is compiled and read on first use is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "section.h5ad")
        n_genes = min(sizes.genes, sizes.weights["n_genes"] // 2)
        random_section(sizes.cells_embedded, n_genes, path)
        foundation.write_checkpoint(Path(folder), [f"SYMBOL{i}" for i in range(n_genes)], **sizes.weights)
        task = {"kind": "embed", "path": str(path), "checkpoint": folder, "threads": _threads()}
        task |= {"accelerator": _accelerator(sizes)}
        task |= {"foundation": {"aggregate": aggregate, "neighbor_states": states}, "n_tokens": sizes.tokens}
        foundation.measure({**task, "cells": min(8, sizes.cells_embedded)})
        found = foundation.measure({**task, "cells": None})
    return {name: found[name] for name in ("embed_s", "ms_per_cell", "peak_gpu_gb") if name in found}


def _accelerator(sizes: Sizes) -> str:
    return "gpu" if sizes.device == "cuda" else "cpu"


if __name__ == "__main__":
    main()
