"""Features without labels: masked autoencoding of nodes (GraphMAE, Hou et al. 2022) and a random network."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import _networks as networks
from _baselines import fit_pca
from _common import log_normalize, totals
from _harness import Fit, Method, Run
from _networks_annotation import N_GENES, N_PCS, most_variable
from _networks_masked import graph_of, validation_cells
from _problems import Embedding

CONFIGURATIONS = ((1e-3, 0.0, 0.0), (1e-3, 0.2, 2e-4), (3e-3, 0.2, 2e-4))  # learning rate, dropout, weight decay
EPOCHS, PATIENCE, TRIAL = 200, 20, 30
MASKED_NODES = 0.5
GAMMA = 2  # power of the error, which makes nodes that are easy count less
WIDTH = 128  # of the embedding


class GraphMAE(nn.Module):
    """Two layers of GAT that see a token in place of masked nodes, and one that decodes what they hide.

    Masked nodes are set to zero before the decoder too, so that it has to read them from their neighbors.
    """

    def __init__(self, n_in: int, dropout: float) -> None:
        from torch_geometric.nn import GATConv

        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, n_in))
        self.encoder = networks.Network("GAT", n_in, 1, width=WIDTH, dropout=dropout, drop_inputs=dropout)
        self.encoder.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.decoder = GATConv(WIDTH, n_in)

    def embed(self, x: torch.Tensor, graph: networks.Graph) -> torch.Tensor:
        """(n, WIDTH) of features (n, n_in), none of them masked."""
        return self.encoder.encode(x, graph)

    def forward(self, x: torch.Tensor, graph: networks.Graph, masked: torch.Tensor) -> torch.Tensor:
        """Features (n, n_in) as they are decoded; those of nodes `masked`, boolean (n, 1), are not seen."""
        h = self.encoder(torch.where(masked, self.token, x), graph)
        return self.decoder(h.masked_fill(masked, 0), graph.edges)


def scaled_cosine_error(predicted: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean over rows of (1 - cosine) ** GAMMA."""
    return (1 - functional.cosine_similarity(predicted, truth, dim=1)).pow(GAMMA).mean()


def inputs(problem: Embedding, features: str) -> torch.Tensor:
    """Standardized log-normalized values of the most variable genes, or principal component scores; (n_obs, d)."""
    adata = problem.adata
    x = log_normalize(adata.X, float(np.median(totals(adata.X))))
    if features == "PCs":
        values = fit_pca(x, N_PCS).transform(x)
        return torch.from_numpy((values / values.std(0).max()).astype(np.float32))
    values = x[:, most_variable(x, N_GENES)].toarray()
    return torch.from_numpy(((values - values.mean(0)) / np.maximum(values.std(0), 1e-6)).astype(np.float32))


def graphmae(features: str) -> Method:
    """GraphMAE of "expression" or "PCs"."""

    def run_method(problem: Embedding, run: Run) -> Fit:
        x, graph = inputs(problem, features), graph_of(problem.adata, problem.library_key)
        held_out = validation_cells(problem.adata, problem.data, problem.library_key, run.seed)
        rng = np.random.default_rng(run.seed)
        # Masked at random in the held-out blocks, and seen everywhere else.
        checked = torch.from_numpy((rng.random(len(x)) < MASKED_NODES) & held_out)[:, None]
        free = torch.from_numpy(~held_out)[:, None]

        def training(lr: float, dropout: float, weight_decay: float) -> networks.Training:
            torch.manual_seed(run.seed)
            model = GraphMAE(x.shape[1], dropout)

            def losses() -> Iterator[torch.Tensor]:
                masked = torch.rand(len(x), 1) < MASKED_NODES
                counted = (masked & free).flatten()
                yield scaled_cosine_error(model(x, graph, masked)[counted], x[counted])

            def validate() -> float:
                nodes = checked.flatten()
                return scaled_cosine_error(model(x, graph, checked)[nodes], x[nodes]).item()

            return networks.Training(model, losses, validate, lr=lr, weight_decay=weight_decay, patience=PATIENCE)

        started = time.process_time()
        runs = [training(*c) for c in CONFIGURATIONS[: 1 if run.quick else None]]
        chosen = networks.choose(runs, TRIAL, 1 if run.quick else EPOCHS)
        fit = networks.summary(runs, chosen, CONFIGURATIONS[chosen], started)
        with torch.no_grad():
            fit.values = runs[chosen].finish().embed(x, graph).numpy()
        return fit

    return run_method


def untrained(problem: Embedding, run: Run) -> Fit:
    """Hidden values of GraphSAGE with random weights, from expression."""
    torch.manual_seed(run.seed)
    x = inputs(problem, "expression")
    model = networks.Network("GraphSAGE", x.shape[1], 1, width=WIDTH).eval()
    with torch.no_grad():
        values = model.encode(x, graph_of(problem.adata, problem.library_key)).numpy()
    return Fit(values, 0, 0, 0.0, note="random weights")


EMBEDDING: dict[str, Method] = {
    "GraphMAE, expression": graphmae("expression"),
    "GraphMAE, PCs": graphmae("PCs"),
    "GraphSAGE, untrained": untrained,
}
