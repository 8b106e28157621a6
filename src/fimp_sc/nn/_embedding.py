"""Token embeddings: who a token is (its gene) and what it says (its value)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from numpy.typing import NDArray


class FeatureEmbedding(nn.Module):
    """Embed features (genes) with continuous values, and summarise all features of a node in one more token.

    A token is ``value * loading[gene] + identity[gene] + f(value)``. The summary token is the sum of
    ``value * loading`` over *all* visible genes, so it carries what the token budget leaves out; where genes are
    hidden or not measured each component is scaled up by its share of squared loadings that is missing. With
    loadings from the data's own principal components the summary starts as the cell's PCA scores.

    Parameters
    ----------
    n_features
        Number of features (genes).
    d_model
        Width of a token.
    """

    def __init__(self, n_features: int, d_model: int) -> None:
        super().__init__()
        self.loading = nn.Parameter(torch.randn(n_features, d_model) * n_features**-0.5)
        self.identity = nn.Parameter(torch.randn(n_features, d_model) * 0.3)
        self.summary = nn.Parameter(torch.randn(d_model))
        last = nn.Linear(32, d_model)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.value_code = nn.Sequential(nn.Linear(1, 32), nn.GELU(), last)

    def forward(self, feature_id: Tensor, value: Tensor, profile: Tensor, visible: Tensor, pattern: Tensor) -> Tensor:
        """Return the tokens of each node, its summary first.

        Parameters
        ----------
        feature_id, value
            ``(n, f)`` gene and centred value of each token.
        profile
            ``(n, g)`` centred values of all genes, 0 where not visible.
        visible, pattern
            ``(n_patterns, g)`` bool and ``(n,)`` int64, which genes are visible in each node.

        Returns
        -------
        ``(n, 1 + f, d_model)``.
        """
        energy = self.loading.detach().square()
        total = energy.sum(0)
        seen = visible.to(energy.dtype) @ energy
        missing = total / seen.clamp(min=1e-3 * total).clamp(min=1e-12)
        summary = (profile @ self.loading) * missing.index_select(0, pattern)
        value = value.unsqueeze(2)
        tokens = (
            value * nn.functional.embedding(feature_id, self.loading)
            + nn.functional.embedding(feature_id, self.identity)
            + self.value_code(value)
        )
        return torch.cat([(summary + self.summary).unsqueeze(1), tokens], dim=1)

    @torch.no_grad()
    def start_from(self, loading: NDArray) -> None:
        """Set the first columns of the loadings, ``(n_features, k)`` with ``k <= d_model``, and zero the rest."""
        self.loading.zero_()
        self.loading[:, : loading.shape[1]] = torch.as_tensor(loading, dtype=self.loading.dtype)

    @torch.no_grad()
    def mark_summary_outside(self, *columns: slice) -> None:
        """Let the vector that marks summary tokens vanish in ``columns``, so that messages read from these are centred.

        Its length stays about that of a normalised token, its mean over the others is zero.
        """
        marked = torch.ones(len(self.summary), dtype=torch.bool)
        for part in columns:
            marked[part] = False
        if int(marked.sum()) < 2:
            self.summary.zero_()
            return
        mark = self.summary[marked] - self.summary[marked].mean()
        self.summary.zero_()
        self.summary[marked] = mark * (len(self.summary) ** 0.5 / mark.norm())
