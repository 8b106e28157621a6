"""Token embeddings: gene identity and expression value."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fimp_sc._draws import normal
from fimp_sc._recipe import recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray


def random_rows(n: int, width: int, key: NDArray[np.uint64] | None = None) -> Tensor:
    """Return ``(n, width)`` normal numbers; a row depends on torch's generator and its ``(n,)`` key, or its place.

    However many rows there are, what the generator draws afterwards is the same.
    """
    seed = int(torch.randint(2**62, ()))
    return torch.from_numpy(normal(seed, np.arange(n) if key is None else key, np.arange(width)))


class FeatureEmbedding(nn.Module):
    """Embed features (genes) with continuous values, and summarize all features of a node in one more token.

    A token is ``value * loading[gene] + identity[gene] + f(value)``. The summary token is the sum of
    ``value * loading`` over *all* visible genes, so it carries what the token budget leaves out; where genes are
    hidden or not measured each component is scaled up by the fraction of its squared loadings that is missing. With
    loadings from the data's own principal components the summary starts as the cell's PCA scores.

    Parameters
    ----------
    n_features
        Number of features (genes).
    d_model
        Width of a token.
    vector_width
        Width of pretrained vectors of the features, if there are any: ``identity[gene]`` then is ``own[gene] +
        project(vector[gene])``, and ``own`` starts at zero where a vector is known.
    gene_key
        ``(n_features,)`` keys of the features, see ``random_rows``.
    """

    vectors: Tensor

    def __init__(
        self,
        n_features: int,
        d_model: int,
        vector_width: int | None = None,
        gene_key: NDArray[np.uint64] | None = None,
    ) -> None:
        super().__init__()
        self.loading = nn.Parameter(random_rows(n_features, d_model, gene_key) * n_features**-0.5)
        self.identity = nn.Parameter(random_rows(n_features, d_model, gene_key) * recipe().identity)
        # Of one size, so that every head of the first layer tells summaries by it.
        self.summary = nn.Parameter(torch.randn(d_model).sign())
        last = nn.Linear(32, d_model)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.value_code = nn.Sequential(nn.Linear(1, 32), nn.GELU(), last)
        self.project: nn.Linear | None = None
        if vector_width is not None:
            self.project = nn.Linear(vector_width, d_model, bias=False)
            self.register_buffer("vectors", torch.zeros(n_features, vector_width))

    def forward(self, feature_id: Tensor, value: Tensor, profile: Tensor, visible: Tensor, pattern: Tensor) -> Tensor:
        """Return the tokens of each node, its summary first.

        Parameters
        ----------
        feature_id, value
            ``(n, f)`` gene and centered value of each token.
        profile
            ``(n, g)`` centered values of all genes, 0 where not visible.
        visible, pattern
            ``(n_patterns, g)`` bool and ``(n,)`` int64, which genes are visible in each node.

        Returns
        -------
        ``(n, 1 + f, d_model)``.
        """
        energy = self.loading.detach().square()
        total = energy.sum(0)
        seen = visible.to(energy.dtype) @ energy
        missing = total / seen.clamp(min=1e-12)
        summary = (profile @ self.loading) * missing.index_select(0, pattern)
        value = value.unsqueeze(2)
        tokens = (
            value * nn.functional.embedding(feature_id, self.loading)
            + nn.functional.embedding(feature_id, self.identities())
            + self.value_code(value)
        )
        return torch.cat([(summary + self.summary).unsqueeze(1), tokens], dim=1)

    def identities(self) -> Tensor:
        """Return ``(n_features, d_model)``, what tells features apart."""
        return self.identity if self.project is None else self.identity + self.project(self.vectors)

    @torch.no_grad()
    def start_from_vectors(self, vectors: NDArray[np.float32], known: NDArray[np.bool_]) -> None:
        """Use pretrained vectors of features; they stay as they are, their projection is learned.

        Parameters
        ----------
        vectors
            ``(n_features, vector_width)``. Centered and scaled here; the projection starts at their principal
            components, at the size that random identities have.
        known
            ``(n_features,)``, where there is a vector. The others keep an identity of their own.
        """
        if self.project is None:
            raise ValueError("The embedding was made without vectors: pass vector_width.")
        values = np.zeros(vectors.shape, dtype=np.float32)
        values[known] = vectors[known] - vectors[known].mean(0)
        values /= max(float(np.linalg.norm(values[known], axis=1).mean()), 1e-12)
        self.vectors.copy_(torch.from_numpy(values))
        components = torch.linalg.svd(self.vectors, full_matrices=False)[2][: len(self.summary)]
        # Of either sign, else.
        components *= components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
        self.project.weight.zero_()
        self.project.weight[: len(components)] = components
        projected = self.project(self.vectors)[torch.from_numpy(known)]
        self.project.weight *= recipe().identity / projected.square().mean().sqrt().clamp(min=1e-3)
        self.identity[torch.from_numpy(known)] = 0.0

    @torch.no_grad()
    def start_from(self, loading: NDArray) -> None:
        """Set the first columns of the loadings, ``(n_features, k)`` with ``k <= d_model``, and zero the rest."""
        self.loading.zero_()
        self.loading[:, : loading.shape[1]] = torch.as_tensor(loading, dtype=self.loading.dtype)

    @torch.no_grad()
    def mark_summary_outside(self, *columns: slice) -> None:
        """Zero the vector that marks summary tokens in ``columns``, so that messages read from these are centered.

        Its length stays about that of a normalized token, its mean over the others is zero.
        """
        marked = torch.ones(len(self.summary), dtype=torch.bool)
        for some in columns:
            marked[some] = False
        if int(marked.sum()) < 2:
            self.summary.zero_()
            return
        mark = self.summary[marked] - self.summary[marked].mean()
        self.summary.zero_()
        self.summary[marked] = mark * (len(self.summary) ** 0.5 / mark.norm())
