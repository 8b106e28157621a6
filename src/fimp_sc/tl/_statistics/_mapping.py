"""Niches of a reference as numbers that a file holds, and other cells among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from sklearn.mixture import GaussianMixture

# Densities of the cells of the reference are kept as so many quantiles.
_QUANTILES = 1001


class Axes:
    """The columns that are clustered: centered, projected onto principal components, of mean variance 1.

    Parameters
    ----------
    values
        ``(n_obs, n_features)`` of the cells that are clustered.
    n_components
        Number of components; ``None`` for all features as they are.

    Attributes
    ----------
    values
        ``(n_obs, k)`` of these cells.
    center, unit
        ``(n_features,)`` mean, and the number by which projections are divided.
    components
        ``(k, n_features)``; ``None`` for all features as they are.
    """

    def __init__(self, values: NDArray[np.float64], n_components: int | None) -> None:
        self.center: NDArray[np.float64] = values.mean(axis=0)
        centered = values - self.center
        self.components: NDArray[np.float64] | None = None
        if n_components is not None and n_components < min(centered.shape):
            from sklearn.decomposition import PCA

            pca = PCA(n_components, svd_solver="full")
            centered, self.components = pca.fit_transform(centered), pca.components_
        self.unit = float(np.sqrt(centered.var(axis=0).mean())) or 1.0
        self.values: NDArray[np.float64] = centered / self.unit


def stored_mixture(
    model: GaussianMixture, axes: Axes, codes: NDArray[np.integer], names: NDArray[Any]
) -> dict[str, Any]:
    """Return a mixture and its columns as arrays that h5ad holds.

    Parameters
    ----------
    model
        Fitted to ``axes.values``.
    codes
        ``(n_obs,)`` number of the niche of each of these cells.
    names
        ``(n_obs,)`` of the cells.

    Returns
    -------
    ``center``, ``unit`` and ``components`` of the columns (see :class:`Axes`); ``weights``, ``means`` and
    ``covariances`` (``(n, k, k)``) of the niches by their number; ``typical``, the name of a cell of each, by which a
    niche is recognized whatever it is called since; and ``density``, quantiles of the log density of the cells.
    """
    found = model.predict(axes.values)
    number = {int(component): int(code) for component, code in zip(found, codes, strict=True)}
    chosen = np.array(sorted(number, key=lambda component: number[component]))
    means, k = model.means_[chosen], axes.values.shape[1]
    covariances = {
        "tied": lambda held: np.broadcast_to(held, (len(chosen), k, k)),
        "full": lambda held: held[chosen],
        "diag": lambda held: held[chosen][:, :, None] * np.eye(k),
        "spherical": lambda held: held[chosen][:, None, None] * np.eye(k),
    }[model.covariance_type](model.covariances_)
    mixture = {
        "center": axes.center,
        "unit": axes.unit,
        **({} if axes.components is None else {"components": axes.components}),
        "weights": model.weights_[chosen] / model.weights_[chosen].sum(),
        "means": means,
        "covariances": np.ascontiguousarray(covariances),
    }
    density = _log_densities(axes.values, mixture)
    typical = [int(np.where(codes == code, density[:, code], -np.inf).argmax()) for code in range(len(chosen))]
    total = np.logaddexp.reduce(density, axis=1)
    mixture["typical"] = np.asarray(names)[typical].astype(object)
    mixture["density"] = np.quantile(total, np.linspace(0, 1, _QUANTILES))
    return mixture


def among_niches(
    values: NDArray[np.float64], mixture: Mapping[str, Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the probability of each niche for each cell, and how well cells fit.

    Parameters
    ----------
    values
        ``(n_obs, n_features)``, averaged over neighbors as those of the reference were.
    mixture
        Of :func:`stored_mixture`.

    Returns
    -------
    ``(n_obs, n_niches)`` probabilities, and ``(n_obs,)`` fractions of the cells of the reference whose density in the
    mixture is lower.
    """
    centered = values - mixture["center"]
    if "components" in mixture:
        centered = centered @ mixture["components"].T
    density = _log_densities(centered / mixture["unit"], mixture)
    total = np.logaddexp.reduce(density, axis=1)
    quantiles = np.asarray(mixture["density"])
    fit = np.asarray(np.interp(total, quantiles, np.linspace(0, 1, len(quantiles))))
    return np.exp(density - total[:, None]), fit


def typical_among(
    mixture: Mapping[str, Any], codes: NDArray[np.integer], names: NDArray[Any], own: slice, own_names: NDArray[Any]
) -> dict[str, Any]:
    """Return a mixture of the cells of several objects with typical cells of one of them.

    Parameters
    ----------
    mixture
        Of :func:`stored_mixture`.
    codes, names
        ``(n_obs,)`` niche and name of all cells.
    own, own_names
        Rows of this object, and how its cells are called there. A niche without a cell here has the name ``""``.
    """
    typical = []
    for code, cell in enumerate(mixture["typical"]):
        mine = np.flatnonzero(codes[own] == code)
        best = mine[names[own][mine] == cell]
        typical.append(str(own_names[[*best, *mine][0]]) if len(mine) else "")
    return {**mixture, "typical": np.array(typical, dtype=object)}


def _log_densities(values: NDArray[np.float64], mixture: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return ``(n_obs, n_niches)`` logarithms of weight times density."""
    from scipy.stats import multivariate_normal

    parts = zip(mixture["weights"], mixture["means"], mixture["covariances"], strict=True)
    density = [np.log(w) + np.atleast_1d(multivariate_normal.logpdf(values, mean, cov)) for w, mean, cov in parts]
    return np.stack(density, axis=1)
