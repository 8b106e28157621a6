"""Combine label predictions made with and without neighbors, then smooth them over the graph."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch

from fimp_sc._recipe import recipe
from fimp_sc.model.predict._inference import collect, infer, read_embedding
from fimp_sc.model.predict._linear_labels import has_linear_labels, linear_labels
from fimp_sc.model.predict._reference import compare
from fimp_sc.model.registry._graph_data import graph_data, node_indices, without_messages
from fimp_sc.nn._heads import MIXTURE_WEIGHTS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy import sparse

    from fimp_sc.data import Batch, ExpressionReader, GraphData
    from fimp_sc.data._study import Study
    from fimp_sc.data.expression._reader import JoinedExpression
    from fimp_sc.model._fimp import FIMP
    from fimp_sc.model.module._module import FIMPModule

    Grid: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]

logger = logging.getLogger(__name__)

_LEAST_PROBABILITY = 1e-6
_NONE = np.zeros(1, np.float32)


def label_probability(model: FIMP, study: Study, indices: Any, how: dict[str, Any]) -> NDArray[np.float32]:
    """Return the probabilities of the classes, ``(len(indices), n_classes)``.

    FIMP-base predicts labels twice, with and without neighbors, and averages both predictions; log-probabilities are
    then averaged over cell and neighbors. What neighbors tell about a label is much in one tissue and nothing in
    another. Both weights are therefore fitted to validation cells, twice: as they are, for the cells of training, and
    with their expression shifted as that of another section may be. The mean of neighbors has less noise than a cell,
    so that a shift of the whole section misleads predictions made with neighbors more than those of single cells,
    smoothed afterward.

    A linear model of all genes of a panel adds what neither tokens nor components show: its log-probabilities are
    averaged with those of the network, before they are smoothed, by a weight that validation cells say, too.
    """
    data = graph_data(model, study)
    wanted = node_indices(study.nodes.obs_names, indices)
    if not len(wanted):
        raise ValueError("indices is empty: there is nothing to compute.")
    weight, smoothing = float(model.module.neighbor_weight), model.smoothing_weight
    if study.data is not model.adata and model.messages and (same := compare(model, data)) is not None:
        weight, smoothing = model.module.mixtures[int(not same)].tolist()
    return _mixed(model, wanted, how, data, weight, smoothing)


def _mixed(
    model: FIMP,
    nodes: NDArray[np.int64],
    how: dict[str, Any],
    data: GraphData,
    weight: float,
    smoothing: float,
) -> NDArray[np.float32]:
    """Return probabilities mixed and smoothed; what does not count is not computed."""
    around = _Surroundings(data, nodes) if smoothing else None
    if around is not None:
        nodes = around.nodes
    views = []
    if weight != 0:
        views.append(collect(model, data, nodes, _probability, how))
    if weight != 1:
        views.append(collect(model, without_messages(data), nodes, _probability_alone, how))
    mixed = views[0] if len(views) == 1 else _mix(weight, *views)
    linear_weight = model.linear_weight
    if linear_weight == 0 and around is None:
        return mixed
    logits = _log(mixed)
    if linear_weight != 0:
        logits = _pool(linear_weight, linear_labels(model, data, nodes), logits)
    return _softmax(logits if around is None else around.smoothed(logits, np.float32(smoothing)))


def with_embeddings(
    model: FIMP, data: GraphData, train_idx: NDArray[np.int64], val_idx: NDArray[np.int64]
) -> GraphData:
    """Return the same data with the embeddings of a network that training does not change, computed once.

    Those of training and validation nodes, and of all that the smoothing of their labels reads.
    """
    read = np.unique(np.concatenate([train_idx, _Surroundings(data, val_idx).nodes, val_idx]))
    logger.info("The foundation model stays as it is: embedding %d nodes once.", len(read))
    model.module.eval()
    found = infer(model.module, data, read, read_embedding, n_layers=model.n_layers, n_tokens=model.n_tokens)
    embedding = np.full((len(data.label), found.shape[1]), np.nan, dtype=np.float32)
    embedding[read] = found
    return replace(data, embedding=embedding)


def fit_mixtures(
    model: FIMP,
    data: GraphData,
    train_idx: NDArray[np.int64],
    indices: NDArray[np.int64],
    label: NDArray[np.int64],
) -> None:
    """Set both mixtures to what suits cells, ``indices`` of known ``label``, best.

    So is the weight of a linear model that was fitted: beside the best mixture without it, to which the others are then
    fitted again. It is one for all sections.

    Parameters
    ----------
    data
        What the model was trained on.
    train_idx
        Cells whose deviations from their mean make up shifts.
    """
    module = model.module
    around = _Surroundings(data, indices)

    def predicted() -> tuple[list[NDArray[np.float32]], NDArray[np.float32] | None]:
        views = [collect(model, data, around.nodes, _probability, {})]
        if module.label_head_alone is not None:
            views.append(collect(model, without_messages(data), around.nodes, _probability_alone, {}))
        return views, linear_labels(model, data, around.nodes) if has_linear_labels(model) else None

    views, linear = predicted()
    weights = MIXTURE_WEIGHTS.numpy() if len(views) > 1 else np.ones(1, np.float32)
    smoothing_weights = MIXTURE_WEIGHTS.numpy() if recipe().smoothing and model.messages else _NONE
    grid = weights, smoothing_weights, _NONE
    mixture = _best(around.log_loss(views, linear, label, grid), grid)
    if linear is not None:
        line = mixture[:1], mixture[1:2], MIXTURE_WEIGHTS.numpy()
        linear_weight = _best(around.log_loss(views, linear, label, line), line)[2:]
        module.linear_weight.fill_(float(linear_weight[0]))
        grid = weights, smoothing_weights, linear_weight
        mixture = _best(around.log_loss(views, linear, label, grid), grid)
    mixtures = [mixture[:2]] * 2
    source = data.expression
    # What foundation models read are ranks, which shifts of this kind hardly change.
    if source is not None and model.messages and not module.network.pretrained and recipe().shifts:
        center, total = source.center, cast("Any", 0.0)
        mean = module.gene_mean.cpu().numpy()
        for shift in _shifts(source, train_idx, mean, model.random_state):
            source.center = center + shift
            total = total + around.log_loss(*predicted(), label, grid)
        source.center = center
        mixtures[1] = _best(total, grid)[:2]
    module.mixtures.copy_(torch.from_numpy(np.stack(mixtures)))
    use_mixture(model, elsewhere=False)


def use_mixture(model: FIMP, *, elsewhere: bool) -> None:
    """Predict cells of training, or those of another section."""
    weight, smoothing = model.module.mixtures[int(elsewhere)]
    model.module.neighbor_weight.copy_(weight)
    model.module.smoothing_weight.copy_(smoothing)


def reset_mixtures(model: FIMP) -> None:
    """Forget what validation cells of an earlier training said."""
    model.module.mixtures[:, 0] = 1.0 if model.module.label_head_alone is None else 0.5
    model.module.mixtures[:, 1] = 0.0
    model.module.linear_weight.zero_()
    use_mixture(model, elsewhere=False)


class _Surroundings:
    """Cells and all that two rounds of smoothing read.

    Attributes
    ----------
    nodes
        ``(n,)`` int64 ascending, cells that must be predicted.
    """

    def __init__(self, data: GraphData, wanted: NDArray[np.int64]) -> None:
        near, self._last = data.graph.surroundings(wanted)
        self.nodes, self._first = data.graph.surroundings(near)
        self._near, self._own = np.searchsorted(self.nodes, near), np.searchsorted(self.nodes, wanted)

    def rounds(self, values: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
        """Return values of the wanted cells, their mean, and the mean of means; ``values`` are those of ``nodes``."""
        once = _average(self._first, values)
        return values[self._own], once[np.searchsorted(self._near, self._own)], _average(self._last, once)

    def smoothed(self, values: NDArray[np.float32], weight: Any) -> NDArray[np.float32]:
        """Replace values twice by ``weight`` times their mean over cell and neighbors, and the rest themselves."""
        return _blend(weight, *self.rounds(values))

    def log_loss(
        self,
        views: list[NDArray[np.float32]],
        linear: NDArray[np.float32] | None,
        label: NDArray[np.int64],
        grid: Grid,
    ) -> NDArray[np.floating]:
        """Return the log loss of all combinations of weights: of the first view, of smoothing, of the linear model."""
        weights, smoothing_weights, linear_weights = grid
        found = np.empty([len(axis) for axis in grid])
        for i, weight in enumerate(weights):
            mixed = _log(views[0] if weight == 1 else _mix(float(weight), *views))
            for k, linear_weight in enumerate(linear_weights):
                pooled = mixed if linear is None or linear_weight == 0 else _pool(float(linear_weight), linear, mixed)
                rounds = self.rounds(pooled)
                for j, smoothing in enumerate(smoothing_weights):
                    logits = _blend(smoothing, *rounds)
                    true = logits[np.arange(len(label)), label]
                    found[i, j, k] = np.sum(_log_sum(logits) - true, dtype=np.float64)
        return found


def _shifts(
    source: ExpressionReader | JoinedExpression,
    train_idx: NDArray[np.int64],
    gene_mean: NDArray[np.float32],
    random_state: int,
) -> Any:
    """Draw shifts of all cells, ``(n_genes,)`` each, with the covariance of training cells.

    Sums of the cells' deviations from their mean with random weights: along each principal component a shift has the
    standard deviation of cells times the size asked for. What is not seen of a cell is at its mean.
    """
    rng = np.random.default_rng(random_state)
    cells = np.sort(rng.permutation(source.present(train_idx))[: recipe().cells_per_shift])
    rows = source.complete_rows(cells, gene_mean)
    mean = np.asarray(rows.mean(0)).ravel()
    for _ in range(recipe().shifts):
        weight = rng.standard_normal(len(cells)) * (recipe().shift / np.sqrt(len(cells)))
        yield (rows.T @ weight - mean * weight.sum()).astype(np.float32)


def _blend(weight: Any, own: NDArray[Any], once: NDArray[Any], twice: NDArray[Any]) -> NDArray[Any]:
    return (1 - weight) ** 2 * own + 2 * weight * (1 - weight) * once + weight**2 * twice


def _average(mean: sparse.csr_matrix, values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(mean @ values, dtype=np.float32)


def _best(log_loss: NDArray[np.floating], grid: Grid) -> NDArray[np.float32]:
    """Return the weights of the least loss."""
    place = np.unravel_index(int(log_loss.argmin()), log_loss.shape)
    return np.array([axis[i] for axis, i in zip(grid, place, strict=True)])


def _log(probability: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.log(np.maximum(probability, np.float32(_LEAST_PROBABILITY)))


def _log_sum(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    largest = logits.max(1)
    return largest + np.log(np.exp(logits - largest[:, None]).sum(1))


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.exp(logits - _log_sum(logits)[:, None])


def _mix(weight: float, first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.float32(weight) * first + np.float32(1 - weight) * second


def _pool(weight: float, linear: NDArray[np.float32], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return weighted means of log-probabilities; what the linear model does not know stays as it is."""
    known = np.maximum(np.where(np.isnan(linear), logits, linear), np.float32(np.log(_LEAST_PROBABILITY)))
    return _mix(weight, known, logits)


def _probability(module: FIMPModule, outputs: dict[str, Any], batch: Batch) -> torch.Tensor:
    return module.labels(module.standardized(outputs["embedding"]))["logits"].softmax(-1)


def _probability_alone(module: FIMPModule, outputs: dict[str, Any], batch: Batch) -> torch.Tensor:
    return module.labels(None, module.standardized(outputs["embedding"]))["logits_alone"].softmax(-1)
