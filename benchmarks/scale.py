"""Embed 10k, 100k and 1M cells with a trained model: cells per second and peak memory, in memory, backed and lazy.

The cells are copies of the MERFISH section laid side by side until the wanted number is reached. Every case runs in a
fresh process. `graph_s` is building the spatial graph, `start_s` a first call of `tl.embed`, on a few cells, in which
compiled loops are loaded, and `embed_s` the call on the object, with the trained model and its graph. `peak_gb` is the
largest resident memory of the process, `before_gb` that before this call (Python, imports, model and, in memory, the
object), `result_gb` the size of the embedding.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy import sparse

from _common import Results, library, load, parse, parser

CELLS = {"10k": 10_000, "100k": 100_000, "1M": 1_000_000}

TRAIN = """
import sys
import anndata, torch
import fimp_sc
path, folder, max_epochs, accelerator = sys.argv[1:]
section = anndata.read_h5ad(path)
how = {"model_kwargs": {"n_tokens": 32}, "accelerator": accelerator, "verbose": False}
fimp_sc.tl.embed(section, max_epochs=int(max_epochs), **how)
fimp_sc.tl.get_model(section).save(folder)
print("{}")
"""

GRAPH = """
import json, sys, time
import anndata
import fimp_sc
adata = anndata.read_h5ad(sys.argv[1])
start = time.perf_counter()
fimp_sc.pp.spatial_graph(adata)
seconds = time.perf_counter() - start
adata.write_h5ad(sys.argv[1])
print(json.dumps({"graph_s": seconds}))
"""

EMBED = """
import json, resource, sys, time
import anndata, torch
import fimp_sc
path, folder, storage, threads, accelerator = sys.argv[1:]
torch.set_num_threads(int(threads))
unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS, in KiB on Linux
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit / 1024
model = fimp_sc.model.FIMP.load(folder, adata=False, accelerator=accelerator)
if storage == "lazy":
    adata = anndata.experimental.read_lazy(path)
else:
    adata = anndata.read_h5ad(path, backed="r" if storage == "backed" else None)
def embed(adata):
    start = time.perf_counter()
    fimp_sc.tl.embed(adata, model=model, verbose=False)
    return time.perf_counter() - start
first = embed(adata[:200].to_memory())
before = peak()
seconds = embed(adata)
result = adata.obsm["X_fimp"].nbytes
print(json.dumps({
    "start_s": first, "embed_s": seconds,
    "us_per_cell": 1e6 * seconds / adata.n_obs, "cells_per_s": adata.n_obs / seconds,
    "before_gb": before, "peak_gb": peak(), "result_gb": result / 2**30,
}))
"""


def side_by_side(adata, sections: np.ndarray):
    """Return the sections of a sample in one plane, next to each other, with counts and coordinates only."""
    import anndata

    xy = np.asarray(adata.obsm["spatial"], dtype=np.float64)[:, :2].copy()
    number = np.unique(sections, return_inverse=True)[1]
    xy[:, 0] += number * 1.05 * np.ptp(xy[:, 0])
    order = np.argsort(number, kind="stable")
    flat = anndata.AnnData(sparse.csr_matrix(adata.X)[order], var=adata.var[[]])
    flat.obsm["spatial"] = xy[order]
    return flat


def write_tiled(section, n_cells: int, path: Path) -> None:
    """Write copies of a section side by side, on a grid that is about square: the first ``n_cells`` of them."""
    import anndata

    n_tiles = -(-n_cells // section.n_obs)
    across = int(np.ceil(np.sqrt(n_tiles)))
    xy = section.obsm["spatial"]
    pitch = np.ptp(xy, axis=0) * (1 + 1 / np.sqrt(section.n_obs))
    shift = np.array([divmod(i, across) for i in range(n_tiles)]) * pitch
    counts = sparse.vstack([sparse.csr_matrix(section.X)] * n_tiles, format="csr")[:n_cells]
    tiled = anndata.AnnData(counts, var=section.var[[]])
    tiled.obsm["spatial"] = (xy[None] + shift[:, None]).reshape(-1, 2)[:n_cells]
    tiled.write_h5ad(path)


def child(code: str, *arguments: object, threads: int) -> dict[str, float]:
    """Run code in a fresh process and return what it prints."""
    env = {**os.environ, **{f"{v}_NUM_THREADS": str(threads) for v in ("OMP", "MKL", "OPENBLAS", "NUMBA")}}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    run = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if run.returncode != 0:
        raise SystemExit(f"A measurement failed (exit status {run.returncode}); its message is above.")
    return json.loads(run.stdout.strip().splitlines()[-1])


def main() -> None:
    """Train on the section, tile it, and measure every size and storage."""
    p = parser(__doc__, epochs=True)
    p.add_argument("--sizes", nargs="+", default=list(CELLS), choices=CELLS)
    p.add_argument("--storage", nargs="+", default=["memory", "backed", "lazy"], choices=["memory", "backed", "lazy"])
    p.add_argument("--threads", type=int, default=2)
    args = parse(p)
    section = load("merfish", args.data)
    section = side_by_side(section, library(section, "merfish"))
    sizes = {"2k": 2000} if args.quick else {name: CELLS[name] for name in args.sizes}
    results = Results("scale", args, group="cells")
    with tempfile.TemporaryDirectory() as folder:
        model, path = Path(folder, "model"), Path(folder, "section.h5ad")
        (section[:2000].copy() if args.quick else section).write_h5ad(path)
        child(TRAIN, path, model, args.max_epochs or 2, args.accelerator, threads=args.threads)
        for name, n_cells in sizes.items():
            path = Path(folder, f"{name}.h5ad")
            # In a process of its own: the peak memory of a process counts that of the one it was started from.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                pool.apply(write_tiled, (section, n_cells, path))
            graph = child(GRAPH, path, threads=args.threads)
            for storage in args.storage:
                for seed in range(args.seeds):
                    scores = child(EMBED, path, model, storage, args.threads, args.accelerator, threads=args.threads)
                    results.add(name, storage, seed, {**graph, **scores})
            path.unlink()
    results.finish()


if __name__ == "__main__":
    main()
