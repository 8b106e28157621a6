"""Two ways to cluster a representation: a mixture of normal distributions, and Leiden on its nearest neighbors."""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sklearn.mixture import GaussianMixture

logger = logging.getLogger(__name__)

_MAX_ITER = 300
# Of the mean variance of a column, added to all variances: columns that are nearly constant stay harmless.
_REG_COVAR = 1e-4
_MAX_RESOLUTION = 1e3
_MAX_STEPS = 40


def fit_mixture(
    values: NDArray[np.float64], n: int, *, covariance_type: str, n_init: int, random_state: int
) -> GaussianMixture:
    """Fit a mixture of ``n`` normal distributions, the likeliest of ``n_init`` starts.

    Parameters
    ----------
    values
        ``(n_obs, n_features)`` with a mean variance of about 1.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(
        n, covariance_type=covariance_type, n_init=n_init, max_iter=_MAX_ITER, reg_covar=_REG_COVAR,
        random_state=random_state,
    )  # fmt: skip
    with warnings.catch_warnings():
        # Of EM, which is told below, and of k-means where cells are alike.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(values)
    if not model.converged_:
        logger.info("The mixture of %d niches still improves after %d steps.", n, _MAX_ITER)
    return model


class Leiden:
    """Leiden clusterings of the graph of nearest neighbors in a representation, by scanpy.

    Parameters
    ----------
    values
        ``(n_obs, n_features)``.
    random_state
        Seed of the graph.

    Raises
    ------
    ImportError
        igraph is missing.
    """

    def __init__(self, values: NDArray[np.float64], random_state: int) -> None:
        if find_spec("igraph") is None:
            raise ImportError(
                "method='leiden' needs igraph, which is not installed: pip install igraph, or use method='mixture'."
            )
        import scanpy as sc
        from anndata import AnnData

        self._work = AnnData(values.astype(np.float32))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of umap and numba, about themselves
            sc.pp.neighbors(
                self._work, n_neighbors=min(15, len(values) - 1), use_rep="X", random_state=random_state
            )  # scanpy's number, as far as there are cells

    def labels(self, resolution: float, random_state: int) -> NDArray[np.int64]:
        """Return the cluster of each cell, ``(n_obs,)``."""
        import scanpy as sc

        sc.tl.leiden(
            self._work, resolution=resolution, random_state=random_state, flavor="igraph", n_iterations=2,
            directed=False,
        )  # fmt: skip
        codes: NDArray[np.int64] = self._work.obs["leiden"].cat.codes.to_numpy().astype(np.int64)
        return codes

    def with_number(self, n: int, random_state: int) -> tuple[NDArray[np.int64], float]:
        """Return clusters and resolution, searched by bisection, whose number is ``n`` or as near as was found."""
        low, high = 0.0, 1.0
        found: list[tuple[int, float, Any]] = []

        def number(resolution: float) -> int:
            labels = self.labels(resolution, random_state)
            count = int(labels.max()) + 1
            found.append((abs(count - n), resolution, labels))
            return count

        while (count := number(high)) < n and high < _MAX_RESOLUTION:
            low, high = high, 2 * high
        for _ in range(_MAX_STEPS):
            if count == n:
                break
            middle = (low + high) / 2
            count = number(middle)
            low, high = (middle, high) if count < n else (low, middle)
        _, resolution, labels = min(found, key=lambda item: item[:2])
        return labels, resolution
