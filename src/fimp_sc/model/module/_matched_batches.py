"""Gains of genes that differ between technical batches, from cells that batches have in common."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

from fimp_sc._recipe import recipe
from fimp_sc.model.module._linear_smoother import principal_components

if TYPE_CHECKING:
    from numpy.typing import NDArray


# Variance of a log ratio below which genes count alike when the variance between genes is estimated.
_PRECISE = 0.05


def matched_gains(
    cells: sparse.csr_matrix,
    seen: sparse.csr_matrix,
    around: sparse.csr_matrix,
    batch: NDArray[np.int64],
    batch_around: NDArray[np.int64],
    random_state: int = 0,
) -> NDArray[np.float32]:
    """Return factors that make the expression of matched neighborhoods of any two batches alike.

    Neighborhoods of two batches match if each is among the nearest of the other in principal components. Means of
    genes are compared over these alone, so that tissue which one batch lacks is not taken for a difference of
    technique. Matches are found again with the gains of the last round, which starts without any.

    Parameters
    ----------
    cells
        ``(n_sources, n_genes)`` CSR log-normalized expression, the mean where a gene is not measured or hidden.
    seen
        The same with 0 in place of these means.
    around
        ``(n, n_sources)`` CSR, a row averages over the neighborhood of one of the ``n`` cells to match.
    batch, batch_around
        ``(n_sources,)`` and ``(n,)`` codes of the batches of either, from 0.
    random_state
        Seed of the components' solver.

    Returns
    -------
    ``(n_batches, n_genes)`` float32. The logarithm of a factor is shrunk by what counting noise explains of it: all
    factors are 1 where batches differ by no more. Factors of a gene have a geometric mean of 1.
    """
    n_batches = int(max(batch.max(), batch_around.max())) + 1
    n_components = min(recipe().matching_components, min(cells.shape) - 1)
    gain = np.ones((n_batches, cells.shape[1]), dtype=np.float32)
    if n_components < 1:
        return gain
    members = [np.flatnonzero(batch_around == code) for code in range(n_batches)]
    stored = np.repeat(batch, np.diff(cells.indptr))
    for _ in range(recipe().matching_rounds):
        scaled = sparse.csr_matrix(
            (cells.data * gain[stored, cells.indices], cells.indices, cells.indptr), shape=cells.shape
        )
        directions = principal_components(scaled, n_components, random_state).directions
        scores = np.asarray(around @ (scaled @ directions.T))
        laplacian, differences = np.zeros((n_batches, n_batches)), np.zeros(gain.shape)
        for first, second in combinations(range(n_batches), 2):
            weights = _mutual(scores[members[first]], scores[members[second]])
            if weights is None:
                continue
            pair = [
                around[members[code]].T @ weight * (batch == code)
                for code, weight in zip((first, second), weights, strict=True)
            ]
            difference = _log_ratio(seen, *pair)
            strength = float(weights[0].sum())
            for code, sign in ((first, 1.0), (second, -1.0)):
                differences[code] += sign * strength * difference
                laplacian[code, code] += strength
            laplacian[first, second] -= strength
            laplacian[second, first] -= strength
        gain = np.exp(np.linalg.pinv(laplacian, hermitian=True) @ differences).astype(np.float32)
        if (gain == 1.0).all():
            break
    return gain


def _mutual(first: NDArray, second: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the weight of each cell in pairs of mutual nearest neighbors, ``None`` where there are none."""
    if not len(first) or not len(second):
        return None
    k = recipe().matching_neighbors
    there = NearestNeighbors(n_neighbors=min(k, len(second))).fit(second).kneighbors_graph(first)
    back = NearestNeighbors(n_neighbors=min(k, len(first))).fit(first).kneighbors_graph(second)
    pairs = sparse.coo_matrix(there.multiply(back.T))
    if not pairs.nnz:
        return None
    # Both cells of a pair count by the fraction of their pairs that it is.
    number = [np.bincount(side, minlength=len(of)) for side, of in ((pairs.row, first), (pairs.col, second))]
    weight = 1.0 / number[0][pairs.row] + 1.0 / number[1][pairs.col]
    return (
        np.bincount(pairs.row, weight, minlength=len(first)).astype(np.float64),
        np.bincount(pairs.col, weight, minlength=len(second)).astype(np.float64),
    )


def _log_ratio(seen: sparse.csr_matrix, first: NDArray, second: NDArray) -> NDArray[np.float64]:
    """Return the shrunk log ratio of the second to the first weighted mean of each gene.

    Its variance is that of counting cells that express the gene; the variance between genes beyond it is estimated
    from all of them. Genes that one side does not express, or did not measure, have 0.
    """
    expressed = sparse.csr_matrix((np.ones_like(seen.data), seen.indices, seen.indptr), shape=seen.shape)
    expressed.data[seen.data == 0] = 0
    mean, variance = [], []
    for weight in (first, second):
        weight = weight / max(float(weight.sum()), 1e-300)
        mean.append(seen.T @ weight)
        variance.append((expressed.T @ weight**2) / np.maximum(expressed.T @ weight, 1e-150) ** 2)
    both = (mean[0] > 0) & (mean[1] > 0)
    ratio = np.zeros(seen.shape[1])
    if not both.any():
        return ratio
    found = np.log(mean[1][both] / mean[0][both])
    noise = (variance[0] + variance[1])[both]
    precision = 1.0 / (noise + _PRECISE) ** 2
    between = max(0.0, float((precision * (found**2 - noise)).sum() / precision.sum()))
    ratio[both] = found * between / (between + noise) if between else 0.0
    return ratio
