"""What a foundation model costs: reading, embedding without training, fine-tuning.

Without --checkpoint one in the size of scGPT whole-human (60,697 genes, 512 wide, 8 heads, 12 layers), or with --model
geneformer in that of Geneformer-V1-10M (25,424 genes, 256 wide, 4 heads, 6 layers, the last of which is not run), is
written with random weights first: costs are those of the real one, embeddings mean nothing. Every row is a fresh
process. `read_s` is the time to read the checkpoint alone; `embed_s` covers the whole call of `tl.embed` (graph,
reading, embedding) with a frozen model, `cpu_s` is what it took of all cores together; `epoch_s` is the mean time of a
training epoch over --train-cells cells, `trained` the number of trained parameters of the foundation model, heads left
out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from _common import DATA, Results, load, parse, parser

SIZES = {
    "scgpt": {"width": 512, "layers": 12, "heads": 8, "n_genes": 60_697},
    "geneformer": {"width": 256, "layers": 6, "heads": 4, "n_genes": 25_424},
}


def write_checkpoint(folder: Path, genes: list[str], *, width: int, layers: int, heads: int, n_genes: int) -> None:
    """Write a checkpoint with random weights in the released format; its vocabulary begins with `genes`."""
    import torch

    names = [*genes, *(f"GENE{i}" for i in range(n_genes - 3 - len(genes))), "<pad>", "<cls>", "<eoc>"]
    args = {"embsize": width, "nheads": heads, "d_hid": width, "nlayers": layers, "n_bins": 51, "pad_value": -2}
    args |= {"mask_value": -1, "dropout": 0.2, "input_emb_style": "continuous", "max_seq_len": 1200}
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    generator = torch.Generator().manual_seed(0)

    def linear(name: str, n_out: int, n_in: int) -> None:
        tensors[f"{name}weight"] = torch.randn(n_out, n_in, generator=generator) * n_in**-0.5
        tensors[f"{name}bias"] = 0.1 * torch.randn(n_out, generator=generator)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.ones(width), torch.zeros(width)

    tensors = {"encoder.embedding.weight": torch.randn(len(names), width, generator=generator)}
    norm("encoder.enc_norm")
    linear("value_encoder.linear1.", width, 1)
    linear("value_encoder.linear2.", width, width)
    norm("value_encoder.norm")
    for i in range(layers):
        layer = f"transformer_encoder.layers.{i}"
        linear(f"{layer}.self_attn.Wqkv.", 3 * width, width)
        linear(f"{layer}.self_attn.out_proj.", width, width)
        linear(f"{layer}.linear1.", width, width)
        linear(f"{layer}.linear2.", width, width)
        norm(f"{layer}.norm1")
        norm(f"{layer}.norm2")
    for i, n_out in ((0, width), (2, width), (4, 1)):
        linear(f"decoder.fc.{i}.", n_out, width)
    torch.save(tensors, folder / "best_model.pt")


def write_geneformer(folder: Path, genes: list[str], *, width: int, layers: int, heads: int, n_genes: int) -> None:
    """Write a Geneformer with random weights and random medians of genes."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    names = [*genes, *(f"GENE{i}" for i in range(n_genes - len(genes)))]
    tokens = {"<pad>": 0, "<mask>": 1} | {name: i + 2 for i, name in enumerate(names)}
    medians = dict(zip(names, np.random.default_rng(0).uniform(0.5, 4, len(names)).tolist(), strict=True))
    (folder / "token_dictionary.json").write_text(json.dumps(tokens))
    (folder / "gene_median_dictionary.json").write_text(json.dumps(medians))
    sizes = {"model_type": "bert", "hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(sizes | {"hidden_act": "relu", "intermediate_size": 2 * width}))
    generator = torch.Generator().manual_seed(0)
    n_rows = {"word": len(tokens), "position": 2048, "token_type": 2}
    shapes = {f"embeddings.{name}_embeddings.weight": (n, width) for name, n in n_rows.items()}
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        linear = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
        linear |= {"attention.output.dense": (width, width), "intermediate.dense": (2 * width, width)}
        linear |= {"output.dense": (width, 2 * width)}
        shapes |= {f"{layer}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{layer}.{name}.bias": shape[:1] for name, shape in linear.items()}
        for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}.{norm}.{kind}": (width,) for kind in ("weight", "bias")}
    shapes |= {f"embeddings.LayerNorm.{kind}": (width,) for kind in ("weight", "bias")}
    tensors = {
        f"bert.{name}": torch.ones(shape)
        if name.endswith("LayerNorm.weight")
        else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")


def measure(task: dict) -> dict[str, float]:
    """Read a checkpoint, embed or train, as `task` says; without a checkpoint FIMP-base is trained."""
    import anndata
    import torch

    import fimp_sc
    from fimp_sc.pretrained import load as load_foundation

    torch.set_num_threads(task["threads"])
    warnings.filterwarnings("ignore")
    adata = anndata.read_h5ad(task["path"])[: task["cells"]].copy()
    unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss is in bytes on macOS, in KiB on Linux
    out = {"before_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    cuda = torch.cuda.is_available() and task["accelerator"] != "cpu"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    given = {}
    if task["checkpoint"] is not None:
        given["foundation"] = load_foundation(
            task.get("model_name", "scgpt"), task["checkpoint"], **task.get("foundation", {})
        )
    if task["kind"] == "read":
        given["foundation"].read()
        out["read_s"] = time.perf_counter() - start
    elif task["kind"] == "embed":
        how = {"accelerator": task["accelerator"], "verbose": False, "n_tokens": task["n_tokens"]}
        cpu = time.process_time()
        fimp_sc.tl.embed(adata, **given, zero_shot=True, **how)
        out["embed_s"], out["cpu_s"] = time.perf_counter() - start, time.process_time() - cpu
        out["ms_per_cell"] = 1000 * out["embed_s"] / adata.n_obs
    else:
        fimp_sc.pp.spatial_graph(adata)
        fimp_sc.model.FIMP.setup_anndata(adata)
        model = fimp_sc.model.FIMP(adata, **given, n_tokens=task["n_tokens"], **task.get("model", {}))
        out["trained"] = sum(p.numel() for p in model.module.network.parameters() if p.requires_grad)
        out["heads"] = sum(p.numel() for p in model.module.value_head.parameters())
        clock = _clock(cuda)
        how = {"enable_progress_bar": False, "early_stopping": False, "validation_size": 0.0, "callbacks": [clock]}
        how |= {"accelerator": task["accelerator"], "batch_size": task["batch_size"], **task.get("train", {})}
        start = time.perf_counter()
        model.train(task["epochs"], **how)
        seconds = time.perf_counter() - start
        out["epoch_s"], out["last_epoch_s"] = sum(clock.times) / len(clock.times), clock.times[-1]
        out["start_s"] = seconds - sum(clock.times)
        out["last_loss"] = float(model.history["train_loss"].iloc[-1, 0])
    out["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if cuda:
        out["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return out


def _clock(cuda: bool):
    """Return a callback that keeps the seconds of each epoch."""
    import torch
    from lightning.pytorch import Callback

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(Callback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_epoch_start(self, *args) -> None:
            self.times.append(-now())

        def on_train_epoch_end(self, *args) -> None:
            self.times[-1] += now()

    return Clock()


def run(task: dict, env: dict[str, str]) -> dict[str, float]:
    """Run one task in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(task)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{task['kind']} failed (exit status {done.returncode}); its message is above.")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure and write the table."""
    p = parser(__doc__)
    p.add_argument("--model", default="scgpt", choices=SIZES)
    p.add_argument("--checkpoint", type=Path, help="folder of a checkpoint of the model; default: random weights")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--tokens", type=int, default=200)
    p.add_argument("--cells", type=int, default=None, help="cells to embed with aggregate='layer'; default: all")
    p.add_argument("--cells-final", type=int, default=256, help="cells to embed with aggregate='final'")
    p.add_argument("--train-cells", type=int, default=256)
    p.add_argument("--train-tokens", type=int, default=64)
    p.add_argument("--kinds", nargs="+", default=["read", "embed", "train"], choices=["read", "embed", "train"])
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = parse(p)
    if args.child:
        print(json.dumps(measure(json.loads(args.child))))
        return
    results = Results("foundation" if args.model == "scgpt" else f"foundation_{args.model}", args)
    size = SIZES[args.model]
    if args.quick:
        size = {"width": 32, "layers": 2, "heads": 4, "n_genes": 9000}
        args.cells, args.cells_final, args.train_cells, args.tokens = 128, 64, 64, 16
    adata = load("dlpfc", args.data)
    path = str((Path(args.data) / DATA["dlpfc"].file).resolve())
    env = {**os.environ, **{f"{v}_NUM_THREADS": str(args.threads) for v in ("OMP", "MKL", "OPENBLAS", "NUMBA")}}
    common = {"path": path, "threads": args.threads, "accelerator": args.accelerator, "cells": None}
    with tempfile.TemporaryDirectory() as folder:
        if args.checkpoint is None:
            write = write_checkpoint if args.model == "scgpt" else write_geneformer
            write(Path(folder), list(map(str, adata.var_names)), **size)
        common |= {"checkpoint": str(args.checkpoint or folder), "model_name": args.model}
        if "read" in args.kinds:
            for seed in range(args.seeds):
                results.add("dlpfc", "read", seed, run({**common, "kind": "read"}, env))
        if "embed" in args.kinds:
            for aggregate in ("layer", "final"):
                for states in ("evolving", "static"):
                    cells = args.cells if aggregate == "layer" else args.cells_final
                    task = {"foundation": {"aggregate": aggregate, "neighbor_states": states}, "n_tokens": args.tokens}
                    scores = run({**common, "kind": "embed", "cells": cells, **task}, env)
                    title = f"embed, {aggregate}, {states}, {cells or adata.n_obs} cells, {args.tokens} tokens"
                    results.add("dlpfc", title, 0, scores)
        if "train" in args.kinds:
            for trained in ("frozen", "last:2", "lora", "full"):
                task = {"foundation": {"train": trained}, "n_tokens": args.train_tokens}
                task |= {"kind": "train", "cells": args.train_cells, "epochs": 1 if args.quick else 2}
                scores = run({**common, **task, "batch_size": 64}, env)
                title = f"train {trained}, {args.train_cells} cells, {args.train_tokens} tokens"
                results.add("dlpfc", title, 0, scores)
    results.finish()


if __name__ == "__main__":
    main()
