"""Validation of a trained model by hand."""

from __future__ import annotations

import numpy as np
import torch
from graph_toys import data_of
from scipy.special import softmax

from fimp_sc.data import BlockSplitter
from fimp_sc.model import FIMP


def make_splitter(model: FIMP, val_idx: np.ndarray, batch_size: int) -> BlockSplitter:
    """The blocks of cells that a training would validate, with its masks."""
    data = data_of(model)
    return BlockSplitter(
        data, np.setdiff1d(np.arange(len(data.label)), val_idx), val_idx, batch_size=batch_size,
        n_layers=model.n_layers, n_tokens=model.n_tokens, mask_ratio=(0.0, 0.4), mask_cells=0.5,
    )  # fmt: skip


def validation_losses(model: FIMP, val_idx: np.ndarray, batch_size: int) -> dict[str, float]:
    """Losses by their names in a history: those of labels of all cells in one go."""
    masked, n_obs, labels, logits = [], [], [], []
    with torch.no_grad():
        for batch in make_splitter(model, val_idx, batch_size).val_dataloader():
            _, generative, losses = model.module.eval()(batch)
            masked.append(float(losses.extra_metrics["masked_loss"]))
            n_obs.append(len(batch["label"]))
            labels.append(batch["label"].numpy())
            logits.append([generative[name].numpy() for name in ("logits", "logits_alone") if name in generative])
    true = np.concatenate(labels)
    cells = np.flatnonzero(true >= 0)
    views = [
        softmax(np.concatenate(view).astype(float), axis=1)[cells, true[cells]] for view in zip(*logits, strict=True)
    ]
    shares = np.linspace(0, 1, 21) if len(views) == 2 else [1.0]
    mixtures = [share * views[0] + (1 - share) * views[-1] for share in shares]
    # In single precision no probability is smaller.
    label = min(-np.log(np.maximum(mixed, np.finfo(np.float32).tiny)).mean() for mixed in mixtures)
    mean = np.average(masked, weights=n_obs)
    return {
        "masked_loss_validation": mean,
        "label_loss_validation": label,
        "validation_loss": mean + model.module.label_weight * label,
    }
