"""Small Nicheformers of torch's own parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn


class Reference(nn.Module):
    """Nicheformer of torch's own parts, by the names of its authors."""

    def __init__(self, n_genes: int, width: int = 16, n_positions: int = 40) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 24, 0.0, batch_first=True, layer_norm_eps=1e-12)
        self.encoder_layer = layer
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.embeddings = nn.Embedding(30 + n_genes + 5, width, padding_idx=1)
        self.positional_embedding = nn.Embedding(n_positions, width)
        self.classifier_head = nn.Linear(width, 30 + n_genes)
        self.pooler_head, self.cls_head = nn.Linear(width, width), nn.Linear(width, 3)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(1 + 0.2 * noise if "norm" in name and "weight" in name else 0.4 * noise)

    def forward(self, tokens: torch.Tensor, n_layers: int) -> torch.Tensor:
        states = self.embeddings(tokens) + self.positional_embedding(torch.arange(tokens.shape[1]))
        for layer in self.encoder.layers[:n_layers]:
            states = layer(states, src_key_padding_mask=tokens == 1)
        return states


def write_nicheformer(folder: Path, genes, *, prefix: str = "", means=None, **config) -> Reference:
    """Write a random checkpoint whose order of genes is that of ``genes``, and return its layers."""
    torch.manual_seed(0)
    reference = Reference(len(genes)).eval()
    folder.mkdir(exist_ok=True)
    state = {prefix + name: value.clone() for name, value in reference.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    sizes = {"dim_model": 16, "nheads": 4, "dim_feedforward": 24, "nlayers": 3}
    (folder / "config.json").write_text(json.dumps(sizes | config))
    (folder / "genes.txt").write_text("\n".join(genes))
    rng = np.random.default_rng(0)
    means = rng.choice([np.nan, 0.0, 0.4, 1.6, 2.5, 3.0, -2.0], len(genes)) if means is None else means
    for technique in ("xenium", "dissociated"):
        np.save(folder / f"{technique}_mean_script.npy", means)
    return reference
