"""Graph networks of PyTorch Geometric (and an MLP without the graph), and how they are trained and chosen."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn
from torch.nn import functional

from _harness import Fit

KINDS = ("GCN", "GraphSAGE", "GAT", "GIN", "GPS")
EPOCHS, PATIENCE = 300, 30
HEADS = 4


def edge_index(graph: sp.spmatrix, copies: int = 1) -> torch.Tensor:
    """Sources and destinations, int64 (2, e), of a graph whose entry [i, j] is an edge from j to i.

    With `copies` the nodes are repeated, and every copy has the same edges.
    """
    graph = sp.coo_matrix(graph)
    start = np.repeat(np.arange(copies) * graph.shape[0], graph.nnz)
    edges = np.stack([np.tile(graph.col, copies), np.tile(graph.row, copies)]) + start
    return torch.from_numpy(edges.astype(np.int64))


def layer(kind: str, n_in: int, n_out: int, *, heads: int = HEADS, dropout: float = 0.0) -> nn.Module:
    """One layer; GPS, with its own residuals around GIN and the Performer's attention, keeps the width."""
    from torch_geometric import nn as geometric

    if kind in ("GIN", "GPS"):
        mlp = nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU(), nn.Linear(n_out, n_out))
        gin = geometric.GINConv(mlp, train_eps=True)
        if kind == "GIN":
            return gin
        return geometric.GPSConv(
            n_in,
            gin,
            heads=heads,
            dropout=dropout,
            norm="layer_norm",  # of each node: statistics of batches differ between a part and the whole graph
            norm_kwargs={"mode": "node"},
            attn_type="performer",
            attn_kwargs={"head_channels": n_in // heads},
        )
    if kind == "GAT":
        return geometric.GATConv(n_in, n_out // heads, heads=heads)
    return {"MLP": nn.Linear, "GCN": geometric.GCNConv, "GraphSAGE": geometric.SAGEConv}[kind](n_in, n_out)


class GraphNetwork(nn.Module):
    """Two layers of one kind with a ReLU and dropout between them; "MLP" does without the graph.

    GPS has two layers of the hidden width between linear maps.
    """

    def __init__(self, kind: str, n_in: int, n_out: int, *, hidden: int = 256, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind, self.dropout = kind, nn.Dropout(dropout)
        ends = "MLP" if kind == "GPS" else kind
        self.first = layer(ends, n_in, hidden)
        self.second = layer(ends, hidden, n_out, heads=1)
        middle = (layer(kind, hidden, hidden, dropout=dropout) for _ in range(2 if kind == "GPS" else 0))
        self.middle = nn.ModuleList(middle)

    def forward(self, x: torch.Tensor, edges: torch.Tensor, parts: torch.Tensor | None = None) -> torch.Tensor:
        """(n, n_out) of the features (n, n_in) and `edges` (2, e).

        `parts` (n,), ascending, tells graphs apart that GPS must not attend across.
        """
        graph = () if self.kind in ("MLP", "GPS") else (edges,)
        h = self.first(self.dropout(x), *graph)
        for conv in self.middle:
            h = conv(h, edges, batch=parts)
        return self.second(self.dropout(functional.relu(h)), *graph)


class Training:
    """A network, its optimizer and its best weights so far; can be stopped and continued.

    Parameters
    ----------
    losses
        Gives the losses of one epoch, one for each step.
    validate
        Gives the score, of which lower is better.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Callable[[], Iterable[torch.Tensor]],
        validate: Callable[[], float],
        *,
        lr: float,
        weight_decay: float = 0.0,
        patience: int = PATIENCE,
    ) -> None:
        self.model, self.losses, self.validate, self.patience = model, losses, validate, patience
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
        self.best, self.kept = np.inf, copy.deepcopy(model.state_dict())
        self.epochs = self.best_epoch = 0

    def run(self, epochs: int) -> None:
        """Train until there were `epochs` in all, or for as long as the patience lasts."""
        while self.epochs < epochs and self.epochs - self.best_epoch < self.patience:
            self.model.train()
            for loss in self.losses():
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            self.model.eval()
            with torch.no_grad():
                score = self.validate()
            self.epochs += 1
            if score < self.best:
                self.best, self.kept, self.best_epoch = score, copy.deepcopy(self.model.state_dict()), self.epochs

    def finish(self) -> nn.Module:
        """Return the network with its best weights, for predictions."""
        self.model.load_state_dict(self.kept)
        return self.model.eval()


def fit(
    model: nn.Module,
    losses: Callable[[], Iterable[torch.Tensor]],
    validate: Callable[[], float],
    *,
    lr: float,
    weight_decay: float = 0.0,
    epochs: int | None = None,
    patience: int = PATIENCE,
) -> Training:
    """Train until `validate` (lower is better) has not improved for `patience` epochs; keep the best weights.

    `losses` gives the losses of one epoch, one for each step.
    """
    training = Training(model, losses, validate, lr=lr, weight_decay=weight_decay, patience=patience)
    training.run(EPOCHS if epochs is None else epochs)
    training.finish()
    return training


def chosen(trainings: Sequence[Training], best: Training, started: float, note: str = "") -> Fit:
    """Return what a `Fit` holds besides its values; epochs and seconds are of all `trainings`.

    `started` is a ``time.process_time()`` value from before them.
    """
    seconds, epochs = time.process_time() - started, sum(training.epochs for training in trainings)
    parameters = sum(p.numel() for p in best.model.parameters() if p.requires_grad)
    return Fit(np.empty(0), parameters, epochs, seconds, float(best.best), note)
