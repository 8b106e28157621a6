"""A linear model of labels that reads all genes of a panel, of which the network sees tokens and components."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from fimp_sc._recipe import recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fimp_sc.data import ExpressionReader, GraphData
    from fimp_sc.model._fimp import FIMP

# Cells whose expression is read at a time.
_CELLS = 10_000
# Score of a class that no cell has.
_NEVER = -100.0


def has_linear_labels(model: FIMP) -> bool:
    """Tell whether labels of the model are also predicted by a linear model of its genes."""
    return model.module.linear_scores.numel() > 0


def fit_linear_labels(model: FIMP, data: GraphData, train_idx: NDArray[np.int64]) -> None:
    """Fit the linear model to labeled training cells: a logistic regression, of classes weighted as in training.

    Genes are divided by a power of their standard deviation, as for principal components.

    Parameters
    ----------
    model
        Its module is given the linear model, whose weight in predictions stays 0.
    data
        What the model was trained on.
    train_idx
        Training cells, labeled or not.
    """
    module, source = model.module, cast("ExpressionReader", data.expression)
    module.linear_weight.zero_()
    cells = source.present(train_idx[data.label[train_idx] >= 0])
    # In an order that does not depend on that of the cells in the object.
    cells = np.random.default_rng(model.random_state).permutation(data.ordered(cells))[: recipe().linear_cells]
    label = data.label[cells]
    values = source.complete_rows(cells, module.gene_mean.cpu().numpy()).toarray().astype(np.float64)
    values -= source.center[source.batch[cells]]
    deviation = values.std(0)
    if len(np.unique(label)) < 2 or not deviation.any():
        return
    scale = np.maximum(deviation, 1e-3 * deviation.max()) ** -recipe().gene_scale
    scale *= np.sqrt(recipe().linear_strength / np.square(scale * deviation).sum())
    values *= scale
    regression = LogisticRegression(max_iter=300)
    with warnings.catch_warnings():
        # Its weight in predictions says what it is worth in any case.
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression.fit(values, label, module.class_weight.cpu().numpy()[label])
    scores, bias = np.zeros((len(scale), len(model.classes))), np.full(len(model.classes), _NEVER)
    bias[regression.classes_] = 0.0
    # Of two classes there are scores of the second.
    seen = regression.classes_[-len(regression.coef_) :]
    scores[:, seen], bias[seen] = scale[:, None] * regression.coef_.T, regression.intercept_
    module.linear_scores.copy_(torch.from_numpy(scores))
    module.linear_bias.copy_(torch.from_numpy(bias))


def linear_labels(model: FIMP, data: GraphData, nodes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return what the linear model says about cells: log-probabilities, ``(len(nodes), n_classes)``.

    A gene that a cell lacks has its mean; a cell that was not measured at all has NaN.
    """
    module, source = model.module, cast("ExpressionReader", data.expression)
    mean, scores = module.gene_mean.cpu().numpy(), module.linear_scores.cpu().numpy()
    measured = source.measured.any(0)
    bias = module.linear_bias.cpu().numpy() - (source.center * measured) @ scores
    found = [
        source.complete_rows(some, mean) @ scores + bias[source.batch[some]]
        for some in (nodes[i : i + _CELLS] for i in range(0, len(nodes), _CELLS))
    ]
    out = log_softmax(np.concatenate(found), axis=1).astype(np.float32)
    if source.absent is not None:
        out[source.absent[nodes]] = np.nan
    return out
