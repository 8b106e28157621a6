"""Labels read off embeddings with and without neighbors, and what the network learns from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scvi.module.base import BaseModuleClass
from torch import Tensor, nn

from fimp_sc._recipe import recipe
from fimp_sc.nn._heads import mixture_loss

if TYPE_CHECKING:
    from fimp_sc.nn._heads import LabelHead


class LabelingModule(BaseModuleClass):
    """A module with a head for labels and, where they are also predicted without neighbors, a second one."""

    label_head: LabelHead | None
    label_head_alone: LabelHead | None
    neighbor_weight: Tensor
    smoothing_weight: Tensor
    linear_scores: Tensor
    linear_bias: Tensor
    linear_weight: Tensor
    embedding_mean: Tensor
    embedding_std: Tensor
    class_weight: Tensor

    def labels(self, embedding: Tensor | None, alone: Tensor | None = None) -> dict[str, Tensor]:
        """Return scores of classes, ``(n, n_labels)``, by name.

        Parameters
        ----------
        embedding, alone
            ``(n, n_latent)``, :meth:`standardized`: with neighbors, for ``"logits"``, and without, for
            ``"logits_alone"``.
        """
        out: dict[str, Tensor] = {}
        if embedding is not None and alone is not None:
            # The network learns from either prediction as much as it counts; the heads learn alike.
            weight = self.neighbor_weight.clamp(min=recipe().least_neighbor_weight)
            embedding = _scaled_gradient(embedding, 2 * weight)
            alone = _scaled_gradient(alone, 2 - 2 * weight)
        if alone is not None and self.label_head_alone is not None:
            out["logits_alone"] = self.label_head_alone(alone)
        if embedding is not None and self.label_head is not None:
            out["logits"] = self.label_head(embedding)
        return out

    def label_loss(self, generative_outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of both predictions or, in validation, the log loss of their best mixture.

        0 where no destination is labeled.

        Parameters
        ----------
        generative_outputs
            Of :meth:`FIMPModule.generative`.
        labels
            ``(n_dst,)`` int64, -1 where not labeled.
        """
        n_labeled = (labels >= 0).sum().clamp(min=1)
        # Validation asks how good predictions are, not how well a weighted loss is minimized.
        if not self.training:
            return self.log_loss(generative_outputs, labels).min() / n_labeled
        how: Any = {"weight": self.class_weight, "ignore_index": -1, "reduction": "sum"}
        logits = [generative_outputs[name] for name in ("logits", "logits_alone") if name in generative_outputs]
        return torch.stack([nn.functional.cross_entropy(view, labels, **how) for view in logits]).mean() / n_labeled

    def log_loss(self, generative_outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Return the log loss of predicted labels, summed over labeled nodes.

        Parameters
        ----------
        generative_outputs, labels
            As in :meth:`label_loss`.

        Returns
        -------
        ``(21,)``, of the mixtures of both predictions, by weight, or ``(1,)`` where there is one prediction.
        """
        known = labels >= 0
        names = [name for name in ("logits", "logits_alone") if name in generative_outputs]
        logits = [generative_outputs[name][known].float() for name in names]
        if len(logits) == 1:
            return nn.functional.cross_entropy(logits[0], labels[known], reduction="sum")[None]
        true = labels[known, None]
        return mixture_loss(*(view.softmax(1).gather(1, true).squeeze(1) for view in logits))

    def standardized(self, embedding: Tensor) -> Tensor:
        """Return embeddings on the scale that heads read."""
        return (embedding - self.embedding_mean) / self.embedding_std


def _scaled_gradient(values: Tensor, factor: Tensor) -> Tensor:
    """Return ``values``, of which what is before them learns ``factor`` times as fast."""
    return values.detach() + factor * (values - values.detach())
