"""What the tokens of a cell are: which genes, with which values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from scipy import sparse

from fimp_sc._draws import uniform
from fimp_sc.data.expression._binning import bin_edges, bin_values, content_key
from fimp_sc.data.expression._choice import choose_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


class TokenSource(Protocol):
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
class CenteredTokens:
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
        """See :class:`TokenSource`."""
        size = abs(rows) if (rows.data < 0).any() else rows
        feature_id, padding = choose_tokens(size, visible, pattern, n_tokens, self.gene_rank)
        return feature_id, profile.gather(1, feature_id).masked_fill_(padding, 0.0), padding


@dataclass
class BinnedTokens:
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
        See :class:`TokenSource`.
    """

    gene_rank: Tensor
    known: Tensor
    n_bins: int
    random_state: int
    n_queries: int = 0
    gene_key: NDArray[np.uint64] | None = None

    def __call__(
        self,
        rows: sparse.csr_matrix,
        profile: Tensor,
        visible: Tensor,
        pattern: Tensor,
        n_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`TokenSource`."""
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

    @property
    def _keys(self) -> NDArray[np.uint64]:
        return np.arange(len(self.known), dtype=np.uint64) if self.gene_key is None else self.gene_key

    @staticmethod
    def _expressed(rows: sparse.csr_matrix, shown: Tensor, pattern: Tensor) -> sparse.csr_matrix:
        row = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
        keep = shown.numpy()[pattern.numpy()[row], rows.indices] & (rows.data > 0)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row[keep], minlength=rows.shape[0]))])
        return sparse.csr_matrix((rows.data[keep], rows.indices[keep], indptr), shape=rows.shape)
