"""The baselines, each written once. Nothing here sees test labels or hidden entries."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from _common import totals

N_PCS = 50
HIDDEN = 0.15


def fit_pca(x: sp.csr_matrix, n_components: int = N_PCS) -> PCA:
    """Centred PCA of the rows of sparse `x`."""
    return PCA(min(n_components, min(x.shape) - 1), svd_solver="arpack", random_state=0).fit(x)


def spatial_features(own: np.ndarray, graph: sp.csr_matrix) -> dict[str, np.ndarray]:
    """The cell's own features, the mean over its neighbours, and both, by method name."""
    near = normalize(graph, norm="l1") @ own
    return {"own": own, "neighbours": near, "own + neighbours": np.hstack([own, near])}


def logistic(train: np.ndarray, labels: np.ndarray, test: np.ndarray, blocks: np.ndarray | None = None) -> np.ndarray:
    """Labels of the `test` rows from logistic regression on features standardised with the training rows.

    C = 1, or with `blocks` (spatial block of each training row) the C of best accuracy on held-out blocks of the
    training cells, the counterpart of FIMP's early stopping.
    """
    labels = np.asarray(labels).astype(str)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=3000))
    if blocks is None:
        return model.fit(train, labels).predict(test)
    search = GridSearchCV(model, {"logisticregression__C": [0.01, 0.1, 1.0]}, cv=GroupKFold(3), scoring="accuracy")
    return search.fit(train, labels, groups=blocks).predict(test)


def annotate(
    train: dict[str, np.ndarray], labels: np.ndarray, test: dict[str, np.ndarray], blocks: np.ndarray
) -> dict[str, np.ndarray]:
    """Labels of the `test` rows for each kind of features, with C = 1 and with C chosen on the training cells."""
    out = {}
    for kind in train:
        out[f"logistic, {kind}, C = 1"] = logistic(train[kind], labels, test[kind])
        out[f"logistic, {kind}, C chosen"] = logistic(train[kind], labels, test[kind], blocks)
    return out


def neighbour_mean(x: sp.csr_matrix, hidden: sp.csr_matrix, graph: sp.csr_matrix, mean: np.ndarray) -> np.ndarray:
    """Mean over the neighbours that show the gene, the gene's training mean where none does; (rows of graph, n_vars).

    `x` (hidden entries are 0) and `hidden` (boolean) have shape (n_obs, n_vars).
    """
    total = (graph @ x).toarray()
    count = totals(graph)[:, None] - (graph @ hidden.astype(np.float32)).toarray()
    return np.where(count > 0, total / np.maximum(count, 1), mean)


def reconstruct_filled(pca: PCA, x: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """PCA reconstruction with the gene mean in place of hidden entries; (n, n_vars)."""
    return pca.inverse_transform(pca.transform(np.where(visible, x, pca.mean_)))


def reconstruct_visible(pca: PCA, x: np.ndarray, visible: np.ndarray, *, prior: bool) -> np.ndarray:
    """PCA reconstruction from a least-squares fit to the visible genes alone; (n, n_vars).

    The ridge is 1e-3 for each component, or with `prior` the noise variance over the component's variance, which is
    the posterior mean of probabilistic PCA.
    """
    v = pca.components_.astype(np.float64)
    noise = (pca.noise_variance_ / pca.explained_variance_) if prior else np.full(len(v), 1e-3)
    scores = np.empty((len(x), len(v)))
    for i, seen in enumerate(visible):
        a = v[:, seen]
        scores[i] = np.linalg.solve(a @ a.T + np.diag(noise), a @ (x[i, seen] - pca.mean_[seen]))
    return scores @ v + pca.mean_


def ridge(
    pca: PCA,
    x_train: sp.csr_matrix,
    graph_train: sp.csr_matrix,
    x: np.ndarray,
    visible: np.ndarray,
    near: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Ridge regression of each gene on the PCs of the cell's visible genes and of its neighbours; (n, n_vars).

    The genes are cut into about 1 / `HIDDEN` random sets. Each set in turn is hidden in the training cells and
    regressed on the PCs of the other genes, so no gene helps to predict itself. The strength is chosen by leave-one-out
    on training cells. `x`, `visible` and `near` (mean over the neighbours, hidden entries filled) have shape
    (n, n_vars).
    """
    dense = x_train.toarray()
    near_train = pca.transform((normalize(graph_train, norm="l1") @ x_train).toarray())
    test = np.hstack([pca.transform(np.where(visible, x, pca.mean_)), pca.transform(near)])
    out = np.empty(x.shape, np.float32)
    n_sets = round(1 / HIDDEN)
    sets = np.random.default_rng(seed).permutation(x.shape[1]) % n_sets
    for s in range(n_sets):
        genes = sets == s
        own = pca.transform(np.where(genes, pca.mean_, dense))
        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 4, 9)))
        out[:, genes] = model.fit(np.hstack([own, near_train]), dense[:, genes]).predict(test)
    return out
