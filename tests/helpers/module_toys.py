"""A small module and a batch made by hand."""

from __future__ import annotations

import torch

from fimp_sc.model import FIMPModule

GENES = 12


def make_batch(n=6, n_dst=4, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    profile = torch.randn(n, GENES, generator=generator)
    feature_id = torch.stack([torch.randperm(GENES, generator=generator)[:5] for _ in range(n)])
    return {
        "nodes": torch.arange(n),
        "n_nodes": [n, n_dst],
        "indptr": [torch.arange(n_dst + 1) * 2],
        "indices": [torch.randint(0, n, (2 * n_dst,), generator=generator)],
        "feature_id": feature_id,
        "value": profile.gather(1, feature_id),
        "padding": torch.zeros(n, 5, dtype=torch.bool),
        "profile": profile,
        "visible": torch.ones(1, GENES, dtype=torch.bool),
        "pattern": torch.zeros(n, dtype=torch.int64),
        "target": torch.randn(n_dst, GENES, generator=generator),
        "target_mask": torch.rand(n_dst, GENES, generator=generator) < 0.4,
        "label": torch.tensor([2, -1, 0, 2]),
    }


def make_module(n_labels=3, **kwargs) -> FIMPModule:
    torch.manual_seed(0)
    return FIMPModule(GENES, n_labels, n_latent=8, n_layers=1, n_heads=2, **kwargs).eval()
