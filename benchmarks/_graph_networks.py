"""Graph networks of PyTorch Geometric (and an MLP without the graph), and how they are trained and chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn
from torch.nn import functional

KINDS = ("GCN", "GraphSAGE", "GAT", "GIN", "GPS")
EPOCHS, PATIENCE = 300, 30
HEADS = 4
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
) -> float:
    """Train until `validate` (lower is better) has not improved for `patience` epochs; keep the best weights.

    `losses` gives the losses of one epoch, one for each step.
    """
    training = Training(model, losses, validate, lr=lr, weight_decay=weight_decay, patience=patience)
    training.run(EPOCHS if epochs is None else epochs)
    training.finish()
    return float(training.best)


def classify(
    kind: str,
    x: np.ndarray,
    graph: sp.spmatrix,
    labels: np.ndarray,
    train: np.ndarray,
    validation: np.ndarray,
    seed: int,
    epochs: int | None = None,
    hidden: int = 256,
) -> np.ndarray:
    """Predicted class of every node; learning rate and dropout are those of least loss on the validation nodes.

    Parameters
    ----------
    x
        (n, f) features of all nodes.
    labels
        (n,) classes 0, 1, …; read where `train` or `validation`, boolean (n,), are true.
    """
    inputs, edges = torch.from_numpy(np.asarray(x, np.float32)), edge_index(graph)
    target = torch.from_numpy(np.asarray(labels, np.int64))
    fitting, checking = torch.from_numpy(train), torch.from_numpy(validation)
    best, predicted = np.inf, np.zeros(len(x), np.int64)
    for lr in (1e-2, 2e-3):
        for dropout in (0.2, 0.6):
            torch.manual_seed(seed)
            model = GraphNetwork(kind, inputs.shape[1], int(target[fitting].max()) + 1, hidden=hidden, dropout=dropout)

            def loss(nodes: torch.Tensor, model: nn.Module = model) -> torch.Tensor:
                return functional.cross_entropy(model(inputs, edges)[nodes], target[nodes])

            def losses(loss: Callable = loss) -> Iterable[torch.Tensor]:
                yield loss(fitting)

            score = fit(model, losses, lambda f=loss: f(checking).item(), lr=lr, weight_decay=5e-4, epochs=epochs)
            if score < best:
                with torch.no_grad():
                    best, predicted = score, model(inputs, edges).argmax(1).numpy()
    return predicted


def regress(
    kind: str,
    edges: torch.Tensor,
    parts: torch.Tensor,
    draw: Callable[[], Iterable[Batch]],
    validation: Batch,
    test: torch.Tensor,
    seed: int,
    epochs: int | None = None,
) -> np.ndarray:
    """Predicted values of the nodes of `test`, float32 (n, n_out).

    A batch is the features (n, n_in), the true values (n, n_out) and where these are hidden, boolean (n, n_out), which
    is where the squared error is taken. All batches have the graph `edges`; `parts` are those of `GraphNetwork`.

    Parameters
    ----------
    draw
        Makes the training batches of one epoch.
    """
    torch.manual_seed(seed)
    model = GraphNetwork(kind, validation[0].shape[1], validation[1].shape[1])

    def loss(batch: Batch) -> torch.Tensor:
        inputs, truth, hidden = batch
        return ((model(inputs, edges, parts) - truth)[hidden] ** 2).mean()

    fit(model, lambda: map(loss, draw()), lambda: loss(validation).item(), lr=2e-3, epochs=epochs, patience=10)
    with torch.no_grad():
        return model(test, edges, parts).numpy()
