"""Tokenizers: from the expression of a block to values, masks, and the genes that become tokens of each cell."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from scipy import sparse

from fimp_sc._draws import uniform
from fimp_sc.data.expression._binning import bin_edges, bin_values, content_key

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from fimp_sc.data.expression._reader import ExpressionReader, JoinedExpression


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
    mask_cells: float = 1.0,
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
        Smallest and largest fraction of hidden genes; each mask draws its own.
    gene_ratio
        Largest fraction of genes hidden in *all* cells at once, as in a section with another panel.
    mask_cells
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
    fraction = low + (high - low) * torch.rand(_N_PATTERNS, 1, generator=generator)
    visible = measured.repeat(_N_PATTERNS + 1, 1)
    visible[1:] &= drawn[:-1] >= fraction
    pattern = torch.randint(1, _N_PATTERNS + 1, (n_nodes,), generator=generator)
    pattern *= torch.rand(n_nodes, generator=generator) < mask_cells
    if float(torch.rand(1, generator=generator)) < mask_cells:
        fraction = gene_ratio * torch.rand(1, generator=generator)
        visible &= drawn[-1] >= fraction
    return visible, pattern


class Tokenizer(Protocol):
    """Makes the tokens of cells from their expression."""

    def __call__(
        self,
        rows: sparse.csr_matrix,
        profile: Tensor,
        visible: Tensor,
        pattern: Tensor,
        n_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make tokens.

        Parameters
        ----------
        rows
            ``(n, g)`` log-normalized expression.
        profile
            ``(n, g)`` float32, the same, centered and 0 where not visible.
        visible, pattern
            ``(n_patterns, g)`` bool and ``(n,)`` int64: which genes each cell shows.
        n_tokens
            Largest number of tokens of a cell.

        Returns
        -------
        Gene, value and padding of each token, ``(n, f)`` int64, float32 and bool.
        """


@dataclass
class CenteredTokenizer:
    """The genes of highest expression, with centered log-normalized values: what FIMP-base reads.

    Of numbers that may be negative, those furthest from zero.

    Attributes
    ----------
    gene_rank
        ``(g,)`` int64 permutation that orders equal values.
    """

    gene_rank: Tensor

    def __call__(
        self,
        rows: sparse.csr_matrix,
        profile: Tensor,
        visible: Tensor,
        pattern: Tensor,
        n_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Tokenizer`."""
        size = abs(rows) if (rows.data < 0).any() else rows
        feature_id, padding = choose_tokens(size, visible, pattern, n_tokens, self.gene_rank)
        return feature_id, profile.gather(1, feature_id).masked_fill_(padding, 0.0), padding


@dataclass
class BinnedTokenizer:
    """The expressed genes that a vocabulary knows, their values as quantile bins of the cell: what scGPT reads.

    Bins are made from all visible expressed genes of the vocabulary, before the highest become tokens. They depend on
    the order of values only, so that neither scaling nor logarithm matters; equal values are spread over their bins by
    draws that depend on which genes the cell expresses, so that its place in the object does not matter either.

    Attributes
    ----------
    gene_rank
        ``(g,)`` int64 permutation that orders equal values.
    known
        ``(g,)`` bool, genes in the vocabulary.
    n_bins
        Number of bins, that of zeros included.
    random_state
        Seed of the bins among which equal values are spread.
    n_queries
        Hidden genes per cell that a decoder learns to predict.
    gene_key
        See :class:`Tokenizer`.
    usual
        ``(g,)`` by which counts are divided first, the usual value of each gene, where the model reads it so; ``rows``
        then are counts.
    """

    gene_rank: Tensor
    known: Tensor
    n_bins: int
    random_state: int
    n_queries: int = 0
    gene_key: NDArray[np.uint64] | None = None
    usual: NDArray[np.float64] | None = None

    def __call__(
        self,
        rows: sparse.csr_matrix,
        profile: Tensor,
        visible: Tensor,
        pattern: Tensor,
        n_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Tokenizer`."""
        shown = visible & self.known
        expressed = self._expressed(rows, shown, pattern)
        feature_id, padding = choose_tokens(expressed, shown, pattern, n_tokens, self.gene_rank, zeros=False)
        keys = self._keys
        expressed.data = bin_values(
            expressed.data, expressed.indptr, self.n_bins, cell=content_key(expressed, keys),
            gene=keys[expressed.indices], random_state=self.random_state,
        )  # fmt: skip
        bins = torch.from_numpy(expressed.toarray())
        return feature_id, bins.gather(1, feature_id).masked_fill_(padding, 0.0), padding

    def edges(self, rows: sparse.csr_matrix, visible: Tensor, pattern: Tensor) -> NDArray[np.float64]:
        """Return the ``(n, n_bins - 1)`` edges of each cell's bins, on the scale of ``rows``."""
        expressed = self._expressed(rows, visible & self.known, pattern)
        return bin_edges(expressed.data, expressed.indptr, self.n_bins)

    def queries(
        self,
        rows: sparse.csr_matrix,
        visible: Tensor,
        pattern: Tensor,
        hidden: Tensor,
        seed: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose hidden genes for a decoder to predict, whatever their value.

        Parameters
        ----------
        rows, visible, pattern
            As above, of the cells to predict in.
        hidden
            ``(n, g)`` bool, where the truth is known but was hidden.
        seed
            Whole number from 0.

        Returns
        -------
        Genes, bins among the *visible* values of the cell, and padding where a cell has fewer hidden genes,
        ``(n, n_queries)`` int64, float32 and bool.
        """
        keys = self._keys
        # Other numbers than those of the masks.
        score = torch.from_numpy(uniform(seed + 2, np.arange(len(hidden)), keys)).masked_fill_(
            ~(hidden & self.known), -1.0
        )
        best, genes = score.topk(min(self.n_queries, score.shape[1]), dim=1)
        values = rows.toarray()[np.arange(rows.shape[0])[:, None], genes.numpy()]
        indptr = np.arange(rows.shape[0] + 1) * genes.shape[1]
        expressed = self._expressed(rows, visible & self.known, pattern)
        bins = bin_values(
            values.ravel(), indptr, self.n_bins, cell=content_key(expressed, keys), gene=keys[genes.numpy().ravel()],
            random_state=self.random_state, edges=bin_edges(expressed.data, expressed.indptr, self.n_bins),
        )  # fmt: skip
        return genes, torch.from_numpy(bins).view(genes.shape), best < 0

    def _expressed(self, rows: sparse.csr_matrix, shown: Tensor, pattern: Tensor) -> sparse.csr_matrix:
        expressed = _expressed(rows, shown, pattern)
        if self.usual is not None:
            expressed.data = (expressed.data / self.usual[expressed.indices]).astype(np.float32)
        return expressed

    @property
    def _keys(self) -> NDArray[np.uint64]:
        return np.arange(len(self.known), dtype=np.uint64) if self.gene_key is None else self.gene_key


@dataclass
class RankTokenizer:
    """The expressed genes that a vocabulary knows, in the order of their counts over usual ones: what Geneformer reads.

    The total of a cell divides all of its values alike and does not change their order. Equal values are ordered by
    the place of their tokens in the vocabulary, so that neither the order of genes in the object nor other cells
    matter.

    Attributes
    ----------
    place
        ``(g,)`` int64, which of ``t`` tokens each gene is, -1 where it is none. Counts of genes with one token are
        added; it goes by the first of them.
    usual
        ``(t,)`` float64, by which counts are divided: the usual value of each token.
    n_most
        Largest number of tokens of a cell.
    """

    place: NDArray[np.int64]
    usual: NDArray[np.float64]
    n_most: int

    def __call__(
        self,
        rows: sparse.csr_matrix,
        profile: Tensor,
        visible: Tensor,
        pattern: Tensor,
        n_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Tokenizer`; here ``rows`` are counts."""
        counts = _expressed(rows, visible & torch.from_numpy(self.place >= 0), pattern)
        token, n_cells, n_tokens = self.place[counts.indices], rows.shape[0], min(n_tokens, self.n_most)
        table = sparse.csr_matrix(
            (counts.data.astype(np.float64), token, counts.indptr), shape=(n_cells, len(self.usual))
        )
        table.sum_duplicates()
        table.data /= self.usual[table.indices]
        length = np.minimum(np.diff(table.indptr), n_tokens)
        width = max(int(length.max(initial=0)), 1)
        chosen, value = np.zeros((n_cells, width), dtype=np.int64), np.zeros((n_cells, width), dtype=np.float32)
        for cell, (start, stop) in enumerate(pairwise(table.indptr)):
            # Tokens come in the order of the vocabulary, which a stable sort keeps among equals.
            best = start + np.argsort(-table.data[start:stop], kind="stable")[:n_tokens]
            chosen[cell, : len(best)], value[cell, : len(best)] = table.indices[best], table.data[best]
        padding = np.arange(width) >= length[:, None]
        first = np.zeros(len(self.usual), dtype=np.int64)
        genes = np.flatnonzero(self.place >= 0)[::-1]
        first[self.place[genes]] = genes
        feature_id = np.where(padding, 0, first[chosen])
        return torch.from_numpy(feature_id), torch.from_numpy(value), torch.from_numpy(padding)


def _expressed(rows: sparse.csr_matrix, shown: Tensor, pattern: Tensor) -> sparse.csr_matrix:
    """Return the values above zero of the genes that each row shows."""
    row = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    keep = shown.numpy()[pattern.numpy()[row], rows.indices] & (rows.data > 0)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row[keep], minlength=rows.shape[0]))])
    return sparse.csr_matrix((rows.data[keep], rows.indices[keep], indptr), shape=rows.shape)


def _reads_counts(tokens: Tokenizer) -> bool:
    return isinstance(tokens, RankTokenizer) or (isinstance(tokens, BinnedTokenizer) and tokens.usual is not None)


def expression_fields(
    source: ExpressionReader | JoinedExpression,
    tokens: Tokenizer,
    nodes: NDArray[np.int64],
    n_dst: int,
    n_tokens: int,
    *,
    mask_ratio: tuple[float, float] | None,
    gene_mask_ratio: float,
    mask_cells: float,
    seed: int,
) -> dict[str, Any]:
    """Return what a batch holds of the expression of ``nodes``.

    Parameters
    ----------
    source, tokens
        Values, and which of them become tokens.
    nodes
        ``(n,)``, the ``n_dst`` destinations first.
    n_dst
        Number of destinations.
    n_tokens, mask_ratio, gene_mask_ratio, mask_cells
        See :class:`~fimp_sc.data.BlockDataset`.
    seed
        Of the masks.
    """
    rows = source.sparse_rows(nodes)
    masks = mask_ratio, gene_mask_ratio, mask_cells, seed, source.gene_key
    visible, pattern, hidden = _masks(source, nodes, n_dst, *masks)
    profile = _centered(rows if mask_ratio is None else source.as_seen(rows, nodes, visible, pattern), source, nodes)
    target = profile[:n_dst].clone() if mask_ratio is None else _centered(rows[:n_dst], source, nodes[:n_dst])
    if mask_ratio is not None or not visible.all():
        profile.mul_(visible.float().index_select(0, pattern))
    # What reads counts reads one table.
    read = cast("ExpressionReader", source).counts(rows, nodes) if _reads_counts(tokens) else rows
    feature_id, value, padding = tokens(read, profile, visible, pattern, n_tokens)
    made: dict[str, Any] = {
        "feature_id": feature_id,
        "value": value,
        "padding": padding,
        "profile": profile,
        "visible": visible,
        "pattern": pattern,
        "target": target,
        "target_mask": hidden,
    }
    if mask_ratio is not None and isinstance(tokens, BinnedTokenizer) and tokens.n_queries:
        queries = tokens.queries(rows[:n_dst], visible, pattern[:n_dst], hidden, seed)
        made["query_id"], made["query_bin"], made["query_padding"] = queries
    return made


def _centered(rows: sparse.csr_matrix, source: ExpressionReader | JoinedExpression, nodes: NDArray[np.int64]) -> Tensor:
    values, code = rows.toarray(), source.batch[nodes]
    for batch in np.unique(code):
        mine = code == batch
        values[slice(None) if mine.all() else mine] -= source.center[batch]
    return torch.from_numpy(values)


def _masks(
    source: ExpressionReader | JoinedExpression,
    nodes: NDArray[np.int64],
    n_dst: int,
    ratio: tuple[float, float] | None,
    gene_ratio: float,
    mask_cells: float,
    seed: int,
    gene_key: NDArray[np.uint64] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return visible genes of each pattern, the pattern of each node, and what is hidden of the destinations."""
    # Copies: with Dask's workers the arrays of a source cannot be written to, which tensors must be.
    observed, pattern = (torch.from_numpy(array.copy()) for array in source.observed(nodes))
    visible = observed
    if ratio is not None:
        visible, drawn = hide_genes(
            observed.any(0),
            len(nodes),
            ratio,
            gene_ratio=gene_ratio,
            mask_cells=mask_cells,
            seed=seed,
            gene_key=gene_key,
        )
        if len(observed) > 1:
            visible, drawn = observed[pattern] & visible[drawn], torch.arange(len(nodes))
            observed = observed[pattern]
        else:
            observed = observed.expand(len(visible), -1)
        pattern = drawn
    return visible, pattern, (observed & ~visible)[pattern[:n_dst]]
