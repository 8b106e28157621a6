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
        share, smoothed = np.float32(self.neighbour_share), np.float32(self.smoothed_share)
        if not smoothed:
            return _mixed(self._predictions(adata, indices, how), share)
        data = self._graph_data(adata)
        wanted = self._indices(self._nodes(adata), indices)
        nodes, mean = data.graph.surroundings(wanted)
        mixed = _mixed(self._predictions(adata, nodes, how, data), share)
        own = mixed[np.searchsorted(nodes, wanted)]
        return _mixed([mean @ mixed, own], smoothed)

    def _fit_shares(self, indices: NDArray[np.int64], label: NDArray[np.int64]) -> None:
        """Set both shares to what suits some cells, whose class is known, best."""
        data = self._graph_data(self.adata)
        nodes, mean = data.graph.surroundings(indices)
        both = self._predictions(self.adata, nodes, {}, data)
        own, true = np.searchsorted(nodes, indices), np.arange(len(label))
        if len(both) > 1:
            self.module.neighbour_share.copy_(_best_share(*(part[own, label] for part in both)))
        mixed = _mixed(both, np.float32(self.neighbour_share))
        self.module.smoothed_share.copy_(_best_share((mean @ mixed)[true, label], mixed[own, label]))

    def _predictions(
        self, adata: Any, indices: Any, how: dict[str, Any], data: GraphData | None = None
    ) -> list[NDArray[np.float32]]:
        """Return probabilities with neighbours and, where the model has this view, without."""
        both = [self._collect(adata, indices, _with_neighbours, how, data)]
        if self.module.label_head_alone is not None:
            both.append(self._collect(adata, indices, _alone, how, self._graph_data(adata, messages=False)))
        return both


def _mixed(parts: list[NDArray[np.float32]], share: np.float32) -> NDArray[np.float32]:
    return parts[0] if len(parts) == 1 else share * parts[0] + (1 - share) * parts[1]


def _best_share(first: NDArray[np.float32], second: NDArray[np.float32]) -> Tensor:
    """Return the share of the first of two probabilities of the true class, each ``(n,)``, that costs least."""
    return SHARES[int(mixture_loss(*(torch.from_numpy(part).double() for part in (first, second))).argmin())]


def _with_neighbours(module: FIMPModule, outputs: dict[str, Any], batch: Batch) -> Tensor:
    return module.labels(outputs["embedding"])["logits"].softmax(-1)


def _alone(module: FIMPModule, outputs: dict[str, Any], batch: Batch) -> Tensor:
    return module.labels(None, alone=outputs["embedding"])["logits_alone"].softmax(-1)
