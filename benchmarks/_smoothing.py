"""Features and predicted classes averaged over neighbors: what FIMP's tools do with theirs, for every method."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from sklearn.preprocessing import normalize

MIXTURE_WEIGHTS = np.linspace(0, 1, 21)
SMOOTHED = ", smoothed"  # at the end of a method's name


def averaged(values: np.ndarray, graph: sp.spmatrix, times: int = 1) -> np.ndarray:
    """Means over each node and its neighbors, `times` in succession, (n, d)."""
    joined = sp.csr_matrix(graph, dtype=bool) + sp.eye(graph.shape[0], dtype=bool, format="csr")
    weights = normalize(joined.astype(np.float64), norm="l1")
    for _ in range(times):
        values = weights @ values
    return values


def best_share(probability: np.ndarray, graph: sp.spmatrix, nodes: np.ndarray, truth: np.ndarray) -> float:
    """The share of the means of (n, n_classes) that costs `nodes`, whose class is `truth`, the least log loss."""
    own, near = (part[nodes, truth] for part in (probability, averaged(probability, graph)))
    losses = [-np.log(np.maximum(share * near + (1 - share) * own, 1e-300)).sum() for share in MIXTURE_WEIGHTS]
    return float(MIXTURE_WEIGHTS[np.argmin(losses)])


def smooth(probability: np.ndarray, graph: sp.spmatrix, share: float) -> np.ndarray:
    """Probabilities of which a share is means."""
    return share * averaged(probability, graph) + (1 - share) * probability
