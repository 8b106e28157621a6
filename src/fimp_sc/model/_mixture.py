"""Labels from two predictions of a cell: with its neighbours, and by itself."""

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

    from fimp_sc.data import Batch
    from fimp_sc.model._module import FIMPModule


class MixingModel(GraphModel):
    """A graph model that predicts labels with and without neighbours, and mixes both.

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

    def _label_probability(self, adata: AnnData | MuData, indices: Any, how: dict[str, Any]) -> NDArray[np.float32]:
        """Return the probabilities of the classes, ``(len(indices), n_classes)``."""
        share = np.float32(self.module.neighbour_share.item())
        both = self._predictions(adata, indices, how)
        return both[0] if len(both) == 1 else share * both[0] + (1 - share) * both[1]

    def _fit_share(self, indices: NDArray[np.int64], label: NDArray[np.int64]) -> None:
        """Set the share to what suits some cells, whose class is known, best."""
        both = self._predictions(self.adata, indices, {})
        true = [torch.from_numpy(part[np.arange(len(label)), label]).double() for part in both]
        self.module.neighbour_share.copy_(SHARES[int(mixture_loss(*true).argmin())])

    def _predictions(self, adata: Any, indices: Any, how: dict[str, Any]) -> list[NDArray[np.float32]]:
        """Return probabilities with neighbours and, where the model has this view, without."""
        both = [self._collect(adata, indices, _with_neighbours, how)]
        if self.module.label_head_alone is not None:
            both.append(self._collect(adata, indices, _alone, how, self._graph_data(adata, messages=False)))
        return both


def _with_neighbours(module: FIMPModule, outputs: dict[str, Any], batch: Batch) -> Tensor:
    return module.generative(outputs["embedding"])["logits"].softmax(-1)


def _alone(module: FIMPModule, outputs: dict[str, Any], batch: Batch) -> Tensor:
    embedding = outputs["embedding"]
    return module.generative(embedding, alone=embedding)["logits_alone"].softmax(-1)
