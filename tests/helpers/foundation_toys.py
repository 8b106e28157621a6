"""What the tests of ViT and BrainLM share: a small graph, sizes, and frozen weights."""

from __future__ import annotations

import numpy as np
import torch

from fimp_sc.model import FIMP

N = 14
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
ONE_EPOCH = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}
QUICK = {"max_epochs": 1, "accelerator": "cpu", "verbose": False}
ALONE, JOINED = np.arange(4), np.arange(4, N)


def graph() -> np.ndarray:
    """The first four nodes have no neighbors, the others are a ring."""
    ring = np.zeros((N, N))
    ring[JOINED, np.roll(JOINED, 1)] = 1
    return ring + ring.T


def weights_of(model: FIMP) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.module.network.state_dict().items() if not k.startswith("head.")}


def assert_frozen(model: FIMP, before: dict[str, torch.Tensor]) -> None:
    after = weights_of(model)
    assert after.keys() == before.keys()
    assert [name for name, value in after.items() if not torch.equal(value, before[name])] == []
