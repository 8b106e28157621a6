"""Heads: values of features, and labels, from the embedding of a node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fimp_sc.nn._embedding import random_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# How much the first of two predictions may count.
MIXTURE_WEIGHTS = torch.linspace(0.0, 1.0, 21)


class ValueHead(nn.Module):
    """Predict the centered value of any feature from a node's embedding: ``loading[gene] · W z + bias[gene]``.

    Parameters
    ----------
    n_features
        Number of features (genes).
    d_model
        Width of the embedding.
    gene_key
        ``(n_features,)`` keys of the features, see ``random_rows``.
    """

    def __init__(self, n_features: int, d_model: int, gene_key: NDArray[np.uint64] | None = None) -> None:
        super().__init__()
        self.project = nn.Linear(d_model, d_model, bias=False)
        nn.init.eye_(self.project.weight)
        self.loading = nn.Parameter(random_rows(n_features, d_model, gene_key) * n_features**-0.5)
        self.bias = nn.Parameter(torch.zeros(n_features))

    def forward(self, embedding: Tensor, features: Tensor | None = None) -> Tensor:
        """Return ``(n, g)`` centered values, of ``features`` (int64) or of all."""
        loading = self.loading if features is None else self.loading[features]
        bias = self.bias if features is None else self.bias[features]
        return torch.addmm(bias, self.project(embedding), loading.T)

    @torch.no_grad()
    def start_from(self, loading: NDArray) -> None:
        """Set the first columns of the loadings, ``(n_features, k)``, and zero the rest."""
        self.loading.zero_()
        self.loading[:, : loading.shape[1]] = torch.as_tensor(loading, dtype=self.loading.dtype)


class LabelHead(nn.Module):
    """Class scores from a node's embedding: a linear map of the scaled embedding.

    Parameters
    ----------
    d_model
        Width of the embedding.
    n_labels
        Number of classes.
    dropout
        Rate on the embedding.
    """

    scale: Tensor

    def __init__(self, d_model: int, n_labels: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(d_model))
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(d_model, n_labels)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, embedding: Tensor) -> Tensor:
        """Return ``(n, n_labels)`` logits."""
        return self.score(self.dropout(embedding * self.scale))

    @torch.no_grad()
    def start_from(self, spread: NDArray) -> None:
        """Scale the first columns of the embedding to unit variance, given their standard deviation ``(k,)``."""
        self.scale[: len(spread)] = torch.as_tensor(1.0 / spread, dtype=self.scale.dtype)


def mixture_loss(first: Tensor, second: Tensor) -> Tensor:
    """Return what mixtures of two predictions cost.

    Parameters
    ----------
    first, second
        ``(n,)``, probability that either prediction gives to the true class of each cell.

    Returns
    -------
    Log loss, summed over cells, for each weight of the first in :data:`MIXTURE_WEIGHTS`.
    """
    weights = MIXTURE_WEIGHTS.to(second)[:, None]
    mixed = torch.lerp(second.expand(len(weights), -1), first, weights)
    return -mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log().sum(1)
