"""Classes of nodes, of which those of some must not be seen: the problem of images and documents, and its methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn
from torch.nn import functional

import _fimp
from _common import label_scores
from _graph_networks import KINDS, GraphNetwork, chosen, edge_index, fit
from _harness import Fit, Method, Run
from _smoothing import SMOOTHED, best_share, smooth

if TYPE_CHECKING:
    from mudata import MuData
    from sklearn.base import ClassifierMixin

NETWORKS = ("MLP", *KINDS)


@dataclass(frozen=True)
class Nodes:
    """Nodes with features and a graph; classes are known of training and validation nodes alone.

    Attributes
    ----------
    x
        (n, f) float32 features.
    graph
        (n, n) CSR, entry [i, j] is an edge from j to i.
    labels
        (n,) classes 0, 1, …; -1 where they must not be seen.
    train, validation
        (n,) bool.
    build
        Makes the object for FIMP, in whose only modality ``obs["label"]`` is "Unknown" where classes must not be seen.
        Its argument, an order of the nodes, says whose place each node takes in the graph.
    """

    x: np.ndarray
    graph: sp.csr_matrix
    labels: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    build: Callable[[np.ndarray], MuData]


def scores(truth: np.ndarray, test: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
    """The function that scores predicted classes of all nodes."""
    return lambda predicted: label_scores(truth[test], predicted[test])


def known(labels: np.ndarray) -> np.ndarray:
    """Names of the classes, "Unknown" for -1."""
    return np.where(labels < 0, "Unknown", labels.astype(str))


def network(problem: Nodes, run: Run, kind: str, hidden: int = 256, *, smoothed: bool = False) -> Fit:
    """Classes of all nodes; learning rate and dropout are those of least loss on the validation nodes."""
    x, edges = torch.from_numpy(problem.x), edge_index(problem.graph)
    target = torch.from_numpy(problem.labels.astype(np.int64))
    fitting, checking = torch.from_numpy(problem.train), torch.from_numpy(problem.validation)
    started, trainings = time.process_time(), []
    for lr in (1e-2, 2e-3):
        for dropout in (0.2, 0.6):
            torch.manual_seed(run.seed)
            model = GraphNetwork(kind, x.shape[1], int(target.max()) + 1, hidden=hidden, dropout=dropout)

            def loss(nodes: torch.Tensor, model: nn.Module = model) -> torch.Tensor:
                return functional.cross_entropy(model(x, edges)[nodes], target[nodes])

            def losses(loss: Callable = loss) -> Iterable[torch.Tensor]:
                yield loss(fitting)

            how = {"lr": lr, "weight_decay": 5e-4, "epochs": 2 if run.quick else None}
            trainings.append(fit(model, losses, lambda f=loss: f(checking).item(), **how))
    best = min(trainings, key=lambda training: training.best)
    found = chosen(trainings, best, started)
    with torch.no_grad():
        probability = best.model(x, edges).softmax(1).double().numpy()
    if smoothed:
        share = best_share(probability, problem.graph, problem.validation, problem.labels[problem.validation])
        probability = smooth(probability, problem.graph, share)
        found.note = f"share of means {share:.2f}"
    return replace(found, values=probability.argmax(1))


def most_accurate(problem: Nodes, x: np.ndarray, models: Iterable[ClassifierMixin]) -> np.ndarray:
    """Classes (n,) of the one of the classifiers of features (n, f) that is best on the validation nodes."""
    fitted = [model.fit(x[problem.train], problem.labels[problem.train]) for model in models]
    checked = x[problem.validation], problem.labels[problem.validation]
    return max(fitted, key=lambda model: model.score(*checked)).predict(x)


def fimp(problem: Nodes, run: Run, variant: _fimp.Variant) -> Fit:
    """Classes of all nodes from FIMP, which stops by the validation nodes."""
    n = len(problem.labels)
    order = np.random.default_rng(run.seed).permutation(n) if variant.shuffled else np.arange(n)
    mdata = problem.build(order)
    (modality,) = mdata.mod
    indices = {
        "train_indices": np.flatnonzero(~problem.validation),
        "validation_indices": np.flatnonzero(problem.validation),
    }
    setup = {"modality": modality, "labels_key": "label", "unlabeled_category": "Unknown"}
    model, found = _fimp.train(mdata, run, replace(variant, train=indices), **setup)
    return replace(found, values=np.asarray(model.predict()).astype(str))


def groups(baselines: dict[str, Method], shuffled: str, *, hidden: int = 256, **model: Any) -> dict[str, dict]:
    """All methods of a task by group; `hidden` is the width of its networks, `model` are arguments of ``FIMP``."""
    return {
        "baselines": baselines,
        "networks": {
            kind + name: partial(network, kind=kind, hidden=hidden, smoothed=bool(name))
            for name in ("", SMOOTHED)
            for kind in (("GCN", "GraphSAGE", "GPS") if name else NETWORKS)
        },
        "fimp": {"FIMP": partial(fimp, variant=_fimp.Variant(model=model))},
        "controls": {shuffled: partial(fimp, variant=_fimp.Variant(model=model, shuffled=True))},
    }
