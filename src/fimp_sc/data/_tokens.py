"""From a cell's expression to its sequence of gene tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def choose_tokens(expression: Tensor, observed: Tensor, n_tokens: int, gene_rank: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the genes that become tokens: the highest observed values of each cell.

    Equal values (counts are full of them) are ordered by ``gene_rank``, a seeded permutation, so that the choice is
    reproducible and favours no gene by its position in the file. Zeros carry no token, unless the whole panel fits
    into the budget: in small imaging panels an absent gene is informative too.

    Parameters
    ----------
    expression
        ``(n_nodes, n_genes)`` float32, log-normalised, not negative.
    observed
        ``(n_nodes, n_genes)`` bool. Genes that are hidden or not measured never become tokens.
    n_tokens
        Token budget per cell.
    gene_rank
        ``(n_genes,)`` int64 permutation.

    Returns
    -------
    feature_id
        ``(n_nodes, min(n_tokens, n_genes))`` int64 gene of each token.
    padding
        The same shape, bool, True where there is no token.
    """
    n_genes = expression.shape[1]
    candidates = observed if n_genes <= n_tokens else observed & (expression > 0)
    # Ranks are spread over less than the distance between float32 values of expression that really differ.
    score = expression + gene_rank * (1e-4 / n_genes)
    score = torch.where(candidates, score, -1.0)
    best, feature_id = score.topk(min(n_tokens, n_genes), dim=1)
    padding = best < 0
    # Trailing columns that are padding in every cell cost attention and carry nothing.
    length = max(int((~padding).sum(1).max()), 1) if len(padding) else 1
    return feature_id[:, :length], padding[:, :length]


def hide_entries(
    observed: Tensor,
    ratio: tuple[float, float],
    *,
    gene_ratio: float = 0.0,
    cell_share: float = 1.0,
    generator: torch.Generator,
) -> Tensor:
    """Hide entries for masked prediction, independently of their value.

    Parameters
    ----------
    observed
        ``(n_nodes, n_genes)`` bool, what is known.
    ratio
        Smallest and largest share of hidden entries; each cell draws its own.
    gene_ratio
        Largest share of genes hidden in *all* cells at once, drawn for each block, as in a section with another
        panel.
    cell_share
        Probability that a cell has hidden entries at all, and that a block has hidden genes.
    generator
        Source of randomness.

    Returns
    -------
    ``(n_nodes, n_genes)`` bool, what stays visible.
    """
    n_nodes, n_genes = observed.shape
    low, high = ratio
    share = low + (high - low) * torch.rand(n_nodes, 1, generator=generator)
    share *= torch.rand(n_nodes, 1, generator=generator) < cell_share
    visible = observed & (torch.rand(n_nodes, n_genes, generator=generator) >= share)
    if float(torch.rand(1, generator=generator)) < cell_share:
        share = gene_ratio * torch.rand(1, generator=generator)
        visible &= torch.rand(n_genes, generator=generator) >= share
    return visible
