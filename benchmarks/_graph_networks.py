"""Graph networks of PyTorch Geometric (and an MLP without the graph), and how they are trained and chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn
from torch.nn import functional

KINDS = ("GCN", "GraphSAGE", "GAT")
EPOCHS, PATIENCE = 300, 30
GAT_HEADS = 4
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def edge_index(graph: sp.spmatrix, copies: int = 1) -> torch.Tensor:
    """Sources and destinations, int64 (2, e), of a graph whose entry [i, j] is an edge from j to i.

    With `copies` the nodes are repeated, and every copy has the same edges.
    """
    graph = sp.coo_matrix(graph)
    start = np.repeat(np.arange(copies) * graph.shape[0], graph.nnz)
    edges = np.stack([np.tile(graph.col, copies), np.tile(graph.row, copies)]) + start
    return torch.from_numpy(edges.astype(np.int64))


class GraphNetwork(nn.Module):
    """Two layers of one kind with a ReLU and dropout between them; "MLP" does without the graph."""

    def __init__(self, kind: str, n_in: int, n_out: int, *, hidden: int = 256, dropout: float = 0.0) -> None:
        from torch_geometric.nn import GATConv, GCNConv, SAGEConv

        super().__init__()
        self.kind, self.dropout = kind, nn.Dropout(dropout)
        if kind == "GAT":
            self.first = GATConv(n_in, hidden // GAT_HEADS, heads=GAT_HEADS)
            self.second = GATConv(hidden, n_out)
        else:
            layer = {"MLP": nn.Linear, "GCN": GCNConv, "GraphSAGE": SAGEConv}[kind]
            self.first, self.second = layer(n_in, hidden), layer(hidden, n_out)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """(n, n_out) of the features (n, n_in) and `edges` (2, e)."""
        graph = () if self.kind == "MLP" else (edges,)
        h = functional.relu(self.first(self.dropout(x), *graph))
        return self.second(self.dropout(h), *graph)


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
    draw: Callable[[], Iterable[Batch]],
    validation: Batch,
    test: torch.Tensor,
    seed: int,
    epochs: int | None = None,
) -> np.ndarray:
    """Predicted values of the nodes of `test`, float32 (n, n_out).

    A batch is the features (n, n_in), the true values (n, n_out) and where these are hidden, boolean (n, n_out), which
    is where the squared error is taken. All batches have the graph `edges`.

    Parameters
    ----------
    draw
        Makes the training batches of one epoch.
    """
    torch.manual_seed(seed)
    model = GraphNetwork(kind, validation[0].shape[1], validation[1].shape[1])

    def loss(batch: Batch) -> torch.Tensor:
        inputs, truth, hidden = batch
        return ((model(inputs, edges) - truth)[hidden] ** 2).mean()

    fit(model, lambda: map(loss, draw()), lambda: loss(validation).item(), lr=2e-3, epochs=epochs, patience=10)
    with torch.no_grad():
        return model(test, edges).numpy()
