"""Residual networks on graphs of tissue, with all kinds of layers, and how their settings are chosen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn
from torch.nn import functional

from _graph_networks import KINDS, Training, chosen, edge_index, layer
from _harness import Fit

NETWORKS = ("MLP", *KINDS)
WIDTH = 128


class Graph:
    """Edges of all nodes, and of each section by itself, which is where global attention stays.

    Parameters
    ----------
    graph
        (n, n), entry [i, j] is an edge from j to i.
    sections
        (n,) section of each node, or None for one section; no edge may join two.
    """

    def __init__(self, graph: sp.spmatrix, sections: np.ndarray | None = None) -> None:
        self.adjacency = graph = sp.csr_matrix(graph)
        self.edges, self.parts = edge_index(graph), [(torch.arange(graph.shape[0]), edge_index(graph))]
        if sections is not None:
            rows = [np.flatnonzero(sections == name) for name in np.unique(sections)]
            self.parts = [(torch.from_numpy(r), edge_index(graph[r][:, r])) for r in rows]


class Network(nn.Module):
    """A linear map of the features, two residual layers of one of `NETWORKS`, and a linear map to the outputs.

    The first map keeps wide features cheap, as some layers would sum the features of neighbors first. In GCN,
    GraphSAGE, GAT and GIN a layer is ``h + dropout(relu(conv(norm(h))))``; in the MLP ``conv`` is linear. GPS has its
    own residuals, around GIN and the Performer's attention over the whole section: exact attention takes
    O(cells²), seconds for a step on sections of thousands of cells.

    Parameters
    ----------
    dropout, drop_inputs
        Shares of hidden values and of features that are dropped.
    zero
        Let all outputs begin at 0.
    """

    def __init__(
        self,
        kind: str,
        n_in: int,
        n_out: int,
        *,
        width: int = WIDTH,
        dropout: float = 0.0,
        drop_inputs: float = 0.0,
        zero: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.dropout, self.drop_inputs = kind, nn.Dropout(dropout), nn.Dropout(drop_inputs)
        self.first, self.head = nn.Linear(n_in, width), nn.Linear(width, n_out)
        self.layers = nn.ModuleList(layer(kind, width, width, dropout=dropout) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        if zero:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def encode(self, x: torch.Tensor, graph: Graph) -> torch.Tensor:
        """Hidden values (n, width) of the features (n, n_in)."""
        h = self.first(self.drop_inputs(x))
        for conv, norm in zip(self.layers, self.norms, strict=False):
            if self.kind == "GPS":
                parts = [conv(h[nodes], edges) for nodes, edges in graph.parts]
                h = torch.zeros_like(h).index_copy(0, torch.cat([nodes for nodes, _ in graph.parts]), torch.cat(parts))
            else:
                near = () if self.kind == "MLP" else (graph.edges,)
                h = h + self.dropout(functional.relu(conv(norm(h), *near)))
        return self.norms[2](h)

    def forward(self, x: torch.Tensor, graph: Graph) -> torch.Tensor:
        """(n, n_out) of the features (n, n_in)."""
        return self.head(self.encode(x, graph))


def choose(trainings: Sequence[Training], trial: int, epochs: int) -> int:
    """Train each for `trial` epochs and go on with the best of them until `epochs`; return its position."""
    for training in trainings:
        training.run(min(trial, epochs))
    chosen = int(np.argmin([training.best for training in trainings]))
    trainings[chosen].run(epochs)
    return chosen


def summary(trainings: Sequence[Training], best: int, configuration: tuple[float, ...], started: float) -> Fit:
    """Return what a `Fit` holds besides its values, see `_graph_networks.chosen`.

    `configuration` is the learning rate, the dropout and the weight decay that were chosen.
    """
    kept = trainings[best]
    lr, dropout, weight_decay = configuration
    note = f"lr {lr:g}, dropout {dropout:g}, weight decay {weight_decay:g}, epoch {kept.best_epoch} of {kept.epochs}"
    return chosen(trainings, kept, started, note)
