"""Labels from two predictions of a cell, with its neighbours and by itself, and from what neighbours are predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fimp_sc.model._base import GraphModel
from fimp_sc.nn._heads import SHARES, mixture_loss

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray
    from torch import Tensor

    from fimp_sc.data import Batch, GraphData
    from fimp_sc.model._module import FIMPModule


class MixingModel(GraphModel):
    """A graph model that predicts labels with and without neighbours, mixes both, and smooths them over neighbours.

    What neighbours tell about a label is much in one tissue and nothing in another. How much they count is therefore
    fitted to validation cells.
    """

    @property
    def neighbour_share(self) -> float:
        """How much the prediction with neighbours counts in predicted labels, 0 to 1; the one without has the rest.

        Fitted to the log loss of the labelled validation cells; 0.5 where there are none, 0 without messages, and 1 of
        a foundation model, which predicts with neighbours alone, or without labels.
        """
        return float(self.module.neighbour_share) if self.messages else 0.0

    @property
    def smoothed_share(self) -> float:
        """How much predicted labels are smoothed, 0 to 1: the share of the mean over the cell and its neighbours.

        Fitted to the log loss of the labelled validation cells, after :attr:`neighbour_share`; 0 where there are none,
        without messages or without labels.
        """
        return float(self.module.smoothed_share) if self.messages else 0.0

    def _label_probability(self, adata: AnnData | MuData, indices: Any, how: dict[str, Any]) -> NDArray[np.float32]:
        """Return the probabilities of the classes, ``(len(indices), n_classes)``."""
        data = self._graph_data(adata)
        if not self.smoothed_share:
            return self._mixed(adata, indices, how, data)
        wanted = self._indices(self._nodes(adata), indices)
        nodes, mean = data.graph.surroundings(wanted)
        mixed = self._mixed(adata, nodes, how, data)
        return _mix(self.smoothed_share, mean @ mixed, mixed[np.searchsorted(nodes, wanted)])

    def _mixed(self, adata: Any, indices: Any, how: dict[str, Any], data: GraphData) -> NDArray[np.float32]:
        """Return probabilities of which the share is predicted with neighbours; what does not count is not computed."""
        share = float(self.module.neighbour_share)
        if share == 1:
            return self._with_neighbours(adata, indices, how, data)
        alone = self._alone(adata, indices, how)
        return alone if share == 0 else _mix(share, self._with_neighbours(adata, indices, how, data), alone)

    def _fit_shares(self, indices: NDArray[np.int64], label: NDArray[np.int64], **hidden: Any) -> None:
        """Set both shares to what suits some cells, whose class is known, best; `hidden` as for `_graph_data`."""
        data = self._graph_data(self.adata, **hidden)
        nodes, mean = data.graph.surroundings(indices)
        own, true = np.searchsorted(nodes, indices), np.arange(len(label))
        mixed = self._with_neighbours(self.adata, nodes, {}, data)
        if self.module.label_head_alone is not None:
            alone = self._alone(self.adata, nodes, {}, **hidden)
            self.module.neighbour_share.copy_(_best_share(mixed[own, label], alone[own, label]))
            mixed = _mix(self.neighbour_share, mixed, alone)
        self.module.smoothed_share.copy_(_best_share((mean @ mixed)[true, label], mixed[own, label]))

    def _with_neighbours(self, adata: Any, indices: Any, how: dict[str, Any], data: GraphData) -> NDArray[np.float32]:
        return self._collect(adata, indices, _probability, how, data)

    def _alone(self, adata: Any, indices: Any, how: dict[str, Any], **hidden: Any) -> NDArray[np.float32]:
        return self._collect(adata, indices, _probability_alone, how, self._graph_data(adata, **hidden, messages=False))


def _mix(share: float, first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.float32(share) * first + np.float32(1 - share) * second


def _best_share(first: NDArray[np.float32], second: NDArray[np.float32]) -> Tensor:
    """Return the share of the first of two probabilities of the true class, each ``(n,)``, that costs least."""
    return SHARES[int(mixture_loss(*(torch.from_numpy(part).double() for part in (first, second))).argmin())]


def _probability(module: FIMPModule, outputs: dict[str, Any], batch: Batch) -> Tensor:
    return module.labels(module.standardised(outputs["embedding"]))["logits"].softmax(-1)


def _probability_alone(module: FIMPModule, outputs: dict[str, Any], batch: Batch) -> Tensor:
    return module.labels(None, module.standardised(outputs["embedding"]))["logits_alone"].softmax(-1)
