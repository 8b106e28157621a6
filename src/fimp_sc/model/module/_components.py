"""Components of expression that FIMP-base starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.decomposition import PCA

if TYPE_CHECKING:
    from scipy import sparse


class Components(NamedTuple):
    """Orthonormal directions of expression.

    Attributes
    ----------
    directions
        ``(k, n_features)``.
    variance
        ``(k,)``, of the cells' scores.
    """

    directions: np.ndarray
    variance: np.ndarray


def principal_components(cells: sparse.csr_matrix, k: int, random_state: int) -> Components:
    """Return the ``k`` directions of largest variance of ``(n_cells, n_features)`` CSR expression."""
    pca = PCA(k, svd_solver="arpack", random_state=random_state).fit(cells)
    return Components(pca.components_, pca.explained_variance_)


def shared_components(
    cells: sparse.csr_matrix, near: sparse.csr_matrix, weight: float, k: int, random_state: int
) -> Components:
    """Return the ``k`` directions of largest covariance of cells with themselves and their neighbors.

    Directions in which single cells vary most are those of noise where there is much of it. Noise of different cells
    does not covary, so what neighbors have in common stands out.

    Parameters
    ----------
    cells
        ``(n_cells, n_features)`` CSR expression.
    near
        ``(n_cells, n_cells)`` CSR, a row averages over a cell's neighbors.
    weight
        How much the neighbors' mean counts beside the cell itself.
    k
        Number of directions, less than there are features.
    random_state
        Seed of the eigensolver's start.
    """
    mean = np.asarray(cells.mean(0)).ravel()

    def scores(vectors: np.ndarray) -> np.ndarray:
        return cells @ vectors - mean @ vectors

    def covariance(vector: np.ndarray) -> np.ndarray:
        own = scores(np.ravel(vector).astype(cells.dtype))
        # Half of either direction of the edges makes it symmetric.
        both = own + weight * (near @ own + near.T @ own) / 2
        return cells.T @ both - mean * both.sum()

    n_features = cells.shape[1]
    start = np.random.default_rng(random_state).uniform(-1, 1, n_features).astype(cells.dtype)
    operator = LinearOperator((n_features, n_features), matvec=covariance, dtype=cells.dtype)
    values, vectors = eigsh(operator, k, which="LA", v0=start)
    directions = np.ascontiguousarray(vectors[:, np.argsort(values)[::-1]].T)
    # Of either sign, else.
    largest = np.abs(directions).argmax(1)[:, None]
    directions *= np.sign(np.take_along_axis(directions, largest, axis=1))
    return Components(directions, np.var(scores(directions.T), axis=0, ddof=1))
