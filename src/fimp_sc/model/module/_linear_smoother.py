"""The linear smoother of leading components that FIMP-base starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.decomposition import PCA
from sklearn.isotonic import isotonic_regression

from fimp_sc._draws import uniform
from fimp_sc._recipe import recipe

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


class Smoother(NamedTuple):
    """Prediction of hidden entries by components.

    Attributes
    ----------
    own, neighbors
        ``(k,)`` and ``(n_neighborhood,)``: factors of the cell's and of its neighbors' scores, from 0 to 1 and 2.
    signal
        Fraction of the variance of the first ``n_neighborhood`` scores of the cell that is signal, not noise.
    n_telling
        Number of leading components whose scores of the cell alone tell anything.
    """

    own: np.ndarray
    neighbors: np.ndarray
    signal: float
    n_telling: int


class Loadings(NamedTuple):
    """From expression to scores, and back.

    Attributes
    ----------
    encode, decode
        ``(n_features, k)``.
    spread
        ``(k,)``, standard deviation of the scores.
    """

    encode: np.ndarray
    decode: np.ndarray
    spread: np.ndarray


def fit_components(
    components: Components,
    gene_scale: np.ndarray,
    cells: sparse.csr_matrix,
    around: sparse.csr_matrix,
    mean: np.ndarray,
    n_neighborhood: int,
    random_state: int,
    gene_key: np.ndarray | None = None,
) -> tuple[Loadings, Smoother]:
    """Scale components, and fit what their scores tell about hidden entries.

    Parameters
    ----------
    components
        Of genes divided by ``gene_scale``, ``(n_features,)``.
    cells, around, mean, n_neighborhood, random_state, gene_key
        See :func:`linear_smoother`.
    """
    spread = np.sqrt(np.maximum(components.variance, 1e-12))
    scale = spread ** recipe().whitening
    scale *= np.mean(spread / scale)
    encode = components.directions.T / (gene_scale[:, None] * scale)
    decode = components.directions.T * (gene_scale[:, None] * scale)
    fit = linear_smoother(cells, around, mean, encode, decode, n_neighborhood, random_state, gene_key)
    return Loadings(encode, decode, spread / scale), fit


def linear_smoother(
    cells: sparse.csr_matrix,
    around: sparse.csr_matrix,
    mean: np.ndarray,
    encode: np.ndarray,
    decode: np.ndarray,
    n_neighborhood: int,
    random_state: int,
    gene_key: np.ndarray | None = None,
) -> Smoother:
    """Fit hidden entries by each component of the cell's visible entries and of its neighbors' mean.

    Parameters
    ----------
    cells, around
        ``(n_cells, n_features)`` expression of cells and mean expression of their neighbors.
    mean
        ``(n_features,)``.
    encode, decode
        ``(n_features, k)`` loadings to scores, and from scores back.
    n_neighborhood
        Number of leading components of which the neighbors' mean is used.
    random_state
        Seed of the hidden entries.
    gene_key
        ``(n_features,)`` keys of the features, by default their places, on which it depends where they are hidden.

    Returns
    -------
    Factors fitted with least squares within bounds, component by component. Without cells, scores tell what they say.
    """
    if not cells.shape[0] or not recipe().smoother:
        return Smoother(np.ones(encode.shape[1]), np.zeros(n_neighborhood), 1.0, encode.shape[1])
    columns = np.arange(cells.shape[1]) if gene_key is None else gene_key
    fraction = recipe().smoother_hidden
    square = np.zeros((encode.shape[1], 2, 2))
    product = np.zeros((encode.shape[1], 2))
    for i in range(0, cells.shape[0], 512):
        centered = cells[i : i + 512].toarray() - mean
        hidden = uniform(random_state, np.arange(i, i + len(centered)), columns) < fraction
        own = np.where(hidden, 0.0, centered) @ encode / (1.0 - fraction)
        scores = np.stack([own, (around[i : i + 512].toarray() - mean) @ encode], axis=2)
        weight = hidden.astype(np.float32) @ decode**2
        square += np.einsum("nk,nka,nkb->kab", weight, scores, scores)
        product += np.einsum("nka,nk->ka", scores, np.where(hidden, centered, 0.0) @ decode)
    fitted = _bounded(square, product)
    # Beyond the leading components the cell is by itself.
    fitted[n_neighborhood:, 0] = np.clip(_slope(square[:, 0, 0], product[:, 0]), 0.0, recipe().largest_factors[0])[
        n_neighborhood:
    ]
    alone, told = square[:, 0, 0], product[:, 0]
    signal = float(told[:n_neighborhood].sum() / max(alone[:n_neighborhood].sum(), 1e-12))
    return Smoother(fitted[:, 0], fitted[:n_neighborhood, 1], signal, _n_telling(alone, told))


def _slope(square: np.ndarray, product: np.ndarray) -> np.ndarray:
    return product / np.maximum(square, 1e-12)


def _bounded(square: np.ndarray, product: np.ndarray) -> np.ndarray:
    """Solve least squares within bounds.

    Parameters
    ----------
    square, product
        ``(k, 2, 2)`` and ``(k, 2)``, normal equations.

    Returns
    -------
    ``(k, 2)`` factors from 0 to ``recipe().largest_factors``.
    """
    ridge = 1e-6 * np.trace(square, axis1=1, axis2=2)[:, None, None] + 1e-12
    free = np.linalg.solve(square + ridge * np.eye(2), product[..., None])[..., 0]
    # Where the solution is outside, the best one inside is on a side: one factor is at its bound, the other free.
    sides = []
    for i, other in ((0, 1), (1, 0)):
        for bound in (0.0, recipe().largest_factors[i]):
            side = np.full_like(product, bound)
            rest = product[:, other] - square[:, 0, 1] * bound
            side[:, other] = np.clip(_slope(square[:, other, other], rest), 0.0, recipe().largest_factors[other])
            sides.append(side)
    candidates = np.stack(sides)
    error = np.einsum("ska,kab,skb->sk", candidates, square, candidates) - 2 * (candidates * product).sum(2)
    best = candidates[error.argmin(0), np.arange(len(product))]
    inside = ((free >= 0.0) & (free <= recipe().largest_factors)).all(1, keepdims=True)
    return np.where(inside, free, best)


def _n_telling(square: np.ndarray, product: np.ndarray) -> int:
    """Count leading components with a slope; no component is taken to tell more than one before it.

    The slope of what is hidden on a score is the share of the score that is signal. Few cells leave it noisy, which
    the order makes up for.
    """
    slope = _slope(square, product)
    weight = square + 1e-6 * square.mean() + 1e-12
    return int((isotonic_regression(slope, sample_weight=weight, increasing=False) > recipe().telling).sum())
