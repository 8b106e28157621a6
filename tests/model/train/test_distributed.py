"""Training spread over processes by Lightning, and over worker processes by torch's loader."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import validation_toys

SCRIPT = """
import json, os, sys
import anndata, numpy as np, torch
import fimp_sc
from lightning.pytorch import Callback
from scipy import sparse
from validation_toys import validation_losses

torch.set_num_threads(1)

class Seen(Callback):
    def __init__(self):
        self.nodes, self.steps, self.shares, self.labeled = [], 0, [], []
    def on_train_epoch_start(self, trainer, module):
        self.shares.append(float(module.module.neighbor_weight))
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps += 1
        if trainer.current_epoch == 0:
            self.nodes += batch["nodes"][: batch["n_nodes"][-1]].tolist()
    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        if trainer.current_epoch == 0:
            self.labeled.append(int((batch["label"] >= 0).sum()))

if __name__ == "__main__":
    rng = np.random.default_rng(0)
    adata = anndata.AnnData(sparse.csr_matrix(rng.poisson(1.0, (400, 30)).astype(np.float32)))
    adata.obsm["spatial"] = rng.random((400, 2))
    labels = np.where(adata.obsm["spatial"][:, 0] < 0.5, "left", "right").astype(object)
    # A block of validation cells for each process, and labels for one of them.
    order = adata.obsm["spatial"][:, 1].argsort()
    held = np.concatenate([order[:64], order[-64:]])
    labels[order[-64:]] = np.nan
    adata.obs["label"] = labels
    fimp_sc.pp.spatial_graph(adata)
    fimp_sc.model.FIMP.setup_anndata(adata, labels_key="label")
    model = fimp_sc.model.FIMP(adata, n_latent=16, n_heads=2)
    seen = Seen()
    model.train(
        4, accelerator="cpu", devices=2, strategy="ddp", batch_size=64, enable_progress_bar=False, callbacks=[seen],
        validation_indices=held,
    )
    rank = os.environ.get("LOCAL_RANK", "0")
    weights = [float(p.detach().double().abs().sum()) for p in model.module.parameters()]
    result = {
        "weights": weights, "nodes": seen.nodes, "steps": seen.steps, "train": model.train_indices.tolist(),
        "shares": [*seen.shares, model.neighbor_weight, model.smoothing_weight],
        "embedding": float(np.abs(model.get_latent_representation()).sum()), "labeled": seen.labeled,
        "losses": validation_losses(model, held, 64),
        "history": {name: frame.iloc[:, 0].tolist() for name, frame in (model.history or {}).items()},
    }
    with open(os.path.join(sys.argv[1], f"rank{rank}.json"), "w") as file:
        json.dump(result, file)
"""


def test_two_processes_share_the_blocks_and_end_with_the_same_weights(tmp_path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join(filter(None, [str(Path(validation_toys.__file__).parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    np.testing.assert_allclose(first["weights"], second["weights"], rtol=1e-6)
    assert first["embedding"] == pytest.approx(second["embedding"], rel=1e-5)
    assert first["shares"] == second["shares"], "fitted to the validation cells of both"
    assert len(set(first["shares"])) > 1
    assert sorted(first["labeled"] + second["labeled"]) == [0, 64], "one process has no labels to validate"
    best = int(np.argmin(first["history"]["validation_loss"]))
    for name, loss in first["losses"].items():
        assert first["history"][name][best] == pytest.approx(loss, rel=1e-4), name
    assert np.isfinite(first["history"]["label_loss_train"]).all()
    # Each process takes half of the blocks; together they see every training cell, and no other.
    blocks = -(-len(first["train"]) // 64)
    assert first["steps"] == second["steps"] == 4 * -(-blocks // 2)
    assert set(first["nodes"]) | set(second["nodes"]) == set(first["train"])
    assert set(first["nodes"]) != set(second["nodes"])
    overlap = len(set(first["nodes"]) & set(second["nodes"]))
    assert overlap <= 64, "at most one block is repeated, to give both as many"


def test_worker_processes_do_not_change_the_result(tissue, make_model, train) -> None:
    def embedding(num_workers: int) -> np.ndarray:
        return train(make_model(tissue.copy()), max_epochs=1, num_workers=num_workers).get_latent_representation()

    np.testing.assert_allclose(embedding(1), embedding(0), atol=1e-5)


def test_bf16_mixed_precision_trains_to_nearly_the_same(tissue, make_model, train) -> None:
    def run(**kwargs) -> tuple[float, np.ndarray]:
        model = train(make_model(tissue.copy(), {"labels_key": "label"}), **kwargs)
        assert all(p.dtype == torch.float32 for p in model.module.parameters())
        return float(model.history["train_loss"].iloc[-1, 0]), model.get_latent_representation()

    (half_loss, half), (full_loss, full) = run(precision="bf16-mixed"), run()
    assert half_loss == pytest.approx(full_loss, rel=0.02)
    assert np.corrcoef(half.ravel(), full.ravel())[0, 1] > 0.99
