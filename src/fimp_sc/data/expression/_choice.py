"""From a cell's expression to its sequence of gene tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fimp_sc._draws import uniform

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy import sparse
    from torch import Tensor

# Masks of a batch. Enough for cells to differ, few enough to cost nothing beside the values themselves.
_N_PATTERNS = 64


def choose_tokens(
    expression: sparse.csr_matrix,
    visible: Tensor,
    pattern: Tensor,
    n_tokens: int,
    gene_rank: Tensor,
    *,
    zeros: bool = True,
) -> tuple[Tensor, Tensor]:
    """Choose the genes that become tokens: the highest visible values of each cell.

    Equal values (counts are full of them) are ordered by ``gene_rank``, a seeded permutation, so that the choice is
    reproducible and favors no gene by its position in the file. Zeros carry no token, unless the whole panel fits
    into the budget: in small imaging panels an absent gene is informative too.

    Parameters
    ----------
    expression
        ``(n_nodes, n_genes)`` float32, log-normalized, not negative.
    visible, pattern
        ``(n_patterns, n_genes)`` bool and ``(n_nodes,)`` int64: which genes each node shows. Genes that are hidden
        or not measured never become tokens.
    n_tokens
        Token budget per cell.
    gene_rank
        ``(n_genes,)`` int64 permutation.
    zeros
        Whether genes that are not expressed become tokens where the whole panel fits into the budget.

    Returns
    -------
    feature_id
        ``(n_nodes, length)`` int64 gene of each token, best first; ``length`` is that of the longest sequence, as
        columns that are padding in every cell cost attention and carry nothing.
    padding
        The same shape, bool, True where there is no token.
    """
    n_nodes, n_genes = expression.shape
    value, gene, length = expression.data, expression.indices, np.diff(expression.indptr)
    whole = zeros and n_genes <= n_tokens
    if whole:
        value, gene = expression.toarray().ravel(), np.tile(np.arange(n_genes, dtype=gene.dtype), n_nodes)
        length = np.full(n_nodes, n_genes)
    gene = gene.astype(np.int32 if visible.numel() < 2**31 else np.int64, copy=False)
    row = np.repeat(np.arange(n_nodes, dtype=gene.dtype), length)
    first_of_pattern = (pattern * n_genes).numpy().astype(gene.dtype)
    shown = visible.numpy().ravel()

    def seen(entries: NDArray[np.int64]) -> NDArray[np.int64]:
        return entries[shown.take(first_of_pattern.take(row.take(entries)) + gene.take(entries))]

    if whole:
        entries = np.arange(len(value))
    else:
        # Most counts of a cell are ones. Where enough higher ones are visible, these need not be ranked.
        lowest = np.zeros(n_nodes, dtype=value.dtype)
        lowest[length > 0] = np.minimum.reduceat(value, expression.indptr[:-1][length > 0]) if len(value) else 0
        candidate = value > np.repeat(lowest, length)
        higher = row.take(seen(np.flatnonzero(candidate)))
        scarce = np.bincount(higher, minlength=n_nodes) < n_tokens
        candidate |= np.repeat(scarce, length) & (value > 0)
        entries = np.flatnonzero(candidate)
    # Positions rather than masks: taking is several times faster than compressing.
    entries = seen(entries)
    value, gene, row = value.take(entries), gene.take(entries), row.take(entries)

    length = np.bincount(row, minlength=n_nodes)
    width = max(int(length.max(initial=0)), 1)
    place = np.arange(len(row)) + (np.arange(n_nodes) * width - np.cumsum(length) + length)[row]
    # Bits of numbers that are not negative are in their order, however small they are; ranks come behind. No two of
    # these coincide, so that the choice does not depend on what else is in the batch.
    score = np.full(n_nodes * width, -1)
    bits = np.abs(value.astype(np.float32, copy=False)).view(np.int32)
    score[place] = (bits.astype(np.int64) << 32) | gene_rank.numpy()[gene]
    genes = np.zeros(n_nodes * width, dtype=np.int64)
    genes[place] = gene
    best, chosen = torch.from_numpy(score).view(n_nodes, width).topk(min(n_tokens, width), dim=1)
    return torch.from_numpy(genes).view(n_nodes, width).gather(1, chosen), best < 0


def hide_genes(
    measured: Tensor,
    n_nodes: int,
    ratio: tuple[float, float],
    *,
    gene_ratio: float = 0.0,
    cell_share: float = 1.0,
    seed: int,
    gene_key: NDArray[np.uint64] | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide genes for masked prediction, independently of their value.

    Masks are drawn per batch and dealt out to its cells: a mask for every cell would cost more than all else in
    making a batch of whole transcriptomes.

    Parameters
    ----------
    measured
        ``(n_genes,)`` bool, what is known.
    n_nodes
        Cells to serve.
    ratio
        Smallest and largest share of hidden genes; each mask draws its own.
    gene_ratio
        Largest share of genes hidden in *all* cells at once, as in a section with another panel.
    cell_share
        Probability that a cell has a mask at all, and that genes are hidden in all cells.
    seed
        Whole number from 0.
    gene_key
        ``(n_genes,)`` keys of the genes, by default their places. What is drawn for a gene depends on its key alone.

    Returns
    -------
    visible
        ``(n_patterns, n_genes)`` bool, what stays visible. The first pattern hides nothing of its own.
    pattern
        ``(n_nodes,)`` int64, the pattern of each cell.
    """
    (low, high), generator = ratio, torch.Generator().manual_seed(seed)
    keys = np.arange(len(measured)) if gene_key is None else gene_key
    # The last row is for all cells.
    drawn = torch.from_numpy(uniform(seed, np.arange(_N_PATTERNS + 1), keys))
    share = low + (high - low) * torch.rand(_N_PATTERNS, 1, generator=generator)
    visible = measured.repeat(_N_PATTERNS + 1, 1)
    visible[1:] &= drawn[:-1] >= share
    pattern = torch.randint(1, _N_PATTERNS + 1, (n_nodes,), generator=generator)
    pattern *= torch.rand(n_nodes, generator=generator) < cell_share
    if float(torch.rand(1, generator=generator)) < cell_share:
        share = gene_ratio * torch.rand(1, generator=generator)
        visible &= drawn[-1] >= share
    return visible, pattern
