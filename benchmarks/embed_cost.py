"""Wall time and peak memory of `tl.embed` with its defaults on DLPFC 151673, in a fresh process with two threads.

The time covers the call of `tl.embed` (graph, training, embedding); `total_s` adds Python, imports and reading.
The peak is the largest resident memory of the whole process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from _common import DATA, Results, parse, parser

CHILD = """
import json, resource, sys, time
import anndata, torch
import fimp_sc
path, max_epochs, accelerator, seed, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
adata = anndata.read_h5ad(path)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
fimp_sc.tl.embed(adata, max_epochs=max_epochs, accelerator=accelerator, random_state=seed, verbose=False)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS, in KiB on Linux
print(json.dumps({"embed_s": seconds, "peak_gb": peak / unit / 1024, "before_gb": before / unit / 1024}))
"""


def main() -> None:
    """Measure one process for each seed and write the table."""
    p = parser(__doc__, epochs=True)
    p.add_argument("--threads", type=int, default=2)
    args = parse(p)
    results = Results("embed_cost", args)
    path = str((Path(args.data) / DATA["dlpfc"].file).resolve())
    env = {**os.environ, **{f"{v}_NUM_THREADS": str(args.threads) for v in ("OMP", "MKL", "OPENBLAS", "NUMBA")}}
    for seed in range(args.seeds):
        message = json.dumps([path, args.max_epochs, args.accelerator, seed, args.threads])
        started = time.perf_counter()
        run = subprocess.run([sys.executable, "-c", CHILD, message], env=env, stdout=subprocess.PIPE, text=True)
        if run.returncode != 0:
            raise SystemExit(f"tl.embed failed with seed {seed} (exit status {run.returncode}); its message is above.")
        scores = json.loads(run.stdout.strip().splitlines()[-1])
        results.add("dlpfc", "tl.embed", seed, {**scores, "total_s": time.perf_counter() - started})
    results.finish()


if __name__ == "__main__":
    main()
