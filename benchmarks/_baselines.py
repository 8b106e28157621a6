"""The simple baselines, each written once. Nothing here sees test labels or hidden entries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from _common import as_seen, library, log_normalize, neighbors, totals
from _harness import Fit, Method, Run
from _problems import HIDDEN, Annotation, Masked
from _smoothing import SMOOTHED, best_share, smooth

N_PCS = 50
N_NEIGHBORS, N_NEIGHBORS_MASKED = 10, 6


def fit_pca(x: sp.csr_matrix, n_components: int = N_PCS) -> PCA:
    """Centered PCA of the rows of sparse `x`."""
    return PCA(min(n_components, min(x.shape) - 1), svd_solver="arpack", random_state=0).fit(x)


def spatial_features(own: np.ndarray, graph: sp.csr_matrix) -> dict[str, np.ndarray]:
    """The cell's own features, the mean over its neighbors, and both, by method name."""
    near = normalize(graph, norm="l1") @ own
    return {"own": own, "neighbors": near, "own + neighbors": np.hstack([own, near])}


def logistic(train: np.ndarray, labels: np.ndarray, blocks: np.ndarray | None = None) -> Pipeline:
    """Logistic regression of `labels` on features standardized with the `train` rows.

    C = 1, or with `blocks` (spatial block of each training row) the C of best accuracy on held-out blocks of the
    training cells, the counterpart of FIMP's early stopping.
    """
    labels = np.asarray(labels).astype(str)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=3000))
    if blocks is None:
        return model.fit(train, labels)
    search = GridSearchCV(model, {"logisticregression__C": [0.01, 0.1, 1.0]}, cv=GroupKFold(3), scoring="accuracy")
    return search.fit(train, labels, groups=blocks).best_estimator_


def smoothed(
    model: Pipeline,
    reference: tuple[np.ndarray, sp.csr_matrix],
    query: tuple[np.ndarray, sp.csr_matrix],
    labels: np.ndarray,
    known: np.ndarray,
    blocks: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Labels of the query from smoothed probabilities, and the share of the means.

    Parameters
    ----------
    model
        Fitted to the cells of the reference that are `known`.
    reference, query
        Features (n, d) and graph (n, n) of either.
    labels, known, blocks
        Of the cells of the reference, (n,); blocks that are held out together fit the share.
    """
    x, graph = reference
    seen = model.predict_proba(x)
    seen[known] = cross_val_predict(
        clone(model), x[known], labels[known], groups=blocks[known], cv=GroupKFold(3), method="predict_proba"
    )
    share = best_share(seen, graph, np.flatnonzero(known), np.searchsorted(model.classes_, labels[known]))
    return model.classes_[smooth(model.predict_proba(query[0]), query[1], share).argmax(1)], share


def annotate(problem: Annotation, run: Run, kind: str, *, chosen: bool, smoothing: bool = False) -> Fit:
    """Labels of the query cells from logistic regression on PCs of the genes that reference and query share."""
    reference, query = problem.reference, problem.query
    shared = reference.var_names.intersection(query.var_names)
    labels = reference.obs["label"].to_numpy()
    known = labels != "Unknown"
    # Query cells that are there in training have no label: the PCA comes from the others.
    fitted = known if query is reference else np.ones(len(known), bool)
    sections = {"reference": reference, "query": query}
    x = {name: log_normalize(part[:, shared].X, problem.target) for name, part in sections.items()}
    pca = fit_pca(x["reference"][fitted])
    inputs = {}
    for name, part in sections.items():
        graph = neighbors(np.asarray(part.obsm["spatial"], float), N_NEIGHBORS, library(part, problem.data))
        inputs[name] = spatial_features(pca.transform(x[name]), graph)[kind], graph
    model = logistic(inputs["reference"][0][known], labels[known], problem.blocks[known] if chosen else None)
    if smoothing:
        found, share = smoothed(
            model, inputs["reference"], inputs["query"], labels.astype(str), known, np.asarray(problem.blocks)
        )
        return Fit(found, note=f"share of means {share:.2f}")
    return Fit(model.predict(inputs["query"][0]))


def annotate_all_genes(problem: Annotation, run: Run, classifier: Any, grid: dict[str, list[Any]]) -> Fit:
    """Labels of the query cells from a classifier of all genes that both share, its strength chosen as that of PCs."""
    reference, query = problem.reference, problem.query
    shared = reference.var_names.intersection(query.var_names)
    labels = reference.obs["label"].to_numpy().astype(str)
    known = labels != "Unknown"
    x, found = (log_normalize(part[:, shared].X, problem.target).toarray() for part in (reference[known], query))
    model = Pipeline([("scale", StandardScaler()), ("classify", clone(classifier))])
    search = GridSearchCV(
        model, {f"classify__{name}": values for name, values in grid.items()}, cv=GroupKFold(3), scoring="accuracy"
    )
    search.fit(x, labels[known], groups=np.asarray(problem.blocks)[known])
    return Fit(search.predict(found))


def neighbor_mean(x: sp.csr_matrix, hidden: sp.csr_matrix, graph: sp.csr_matrix, mean: np.ndarray) -> np.ndarray:
    """Mean over the neighbors that show the gene, the gene's training mean where none does; (rows of graph, n_vars).

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
    """Ridge regression of each gene on the PCs of the cell's visible genes and of its neighbors; (n, n_vars).

    The genes are cut into about 1 / `HIDDEN` random sets. Each set in turn is hidden in the training cells and
    regressed on the PCs of the other genes, so no gene helps to predict itself. The strength is chosen by leave-one-out
    on training cells. `x`, `visible` and `near` (mean over the neighbors, hidden entries filled) have shape
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
        own = pca.transform(np.where(genes, pca.mean_, as_seen(dense, ~genes)))
        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 4, 9)))
        out[:, genes] = model.fit(np.hstack([own, near_train]), dense[:, genes]).predict(test)
    return out


def _masked(predict: Callable[..., np.ndarray], problem: Masked, run: Run) -> Fit:
    adata, test = problem.adata, problem.test
    x, visible = adata.X[test].toarray(), ~problem.hidden[test].toarray()
    return Fit(np.asarray(predict(problem, x, visible, run)))


def _gene_mean(problem: Masked, x: np.ndarray, visible: np.ndarray, run: Run) -> np.ndarray:
    mean = np.asarray(problem.adata.X[~problem.test].mean(axis=0)).ravel()
    return np.broadcast_to(mean, x.shape)


def _near(problem: Masked, x: np.ndarray, visible: np.ndarray, run: Run) -> np.ndarray:
    adata = problem.adata
    graph = neighbors(np.asarray(adata.obsm["spatial"], float), N_NEIGHBORS_MASKED, library(adata, problem.data))[
        problem.test
    ]
    return neighbor_mean(adata.X, problem.hidden, graph, _gene_mean(problem, x, visible, run)[0])


def _pca(problem: Masked, x: np.ndarray, visible: np.ndarray, run: Run, *, how: str) -> np.ndarray:
    pca = fit_pca(problem.adata.X[~problem.test])
    if how == "filled":
        return reconstruct_filled(pca, x, visible)
    return reconstruct_visible(pca, x, visible, prior=how == "prior")


def _ridge(problem: Masked, x: np.ndarray, visible: np.ndarray, run: Run) -> np.ndarray:
    adata, train = problem.adata, ~problem.test
    lib = library(adata, problem.data)
    part = neighbors(
        np.asarray(adata.obsm["spatial"], float)[train], N_NEIGHBORS_MASKED, None if lib is None else lib[train]
    )
    near = _near(problem, x, visible, run)
    return ridge(fit_pca(adata.X[train]), adata.X[train], part, x, visible, near, run.seed)


ANNOTATION: dict[str, Method] = (
    {
        f"logistic, {kind}, C {'chosen' if chosen else '= 1'}": partial(annotate, kind=kind, chosen=chosen)
        for kind in ("own", "neighbors", "own + neighbors")
        for chosen in (False, True)
    }
    | {
        f"logistic, {kind}, C chosen{SMOOTHED}": partial(annotate, kind=kind, chosen=True, smoothing=True)
        for kind in ("own", "neighbors", "own + neighbors")
    }
    | {
        "logistic, all genes, C chosen": partial(
            annotate_all_genes, classifier=LogisticRegression(max_iter=300), grid={"C": [1e-4, 1e-3, 0.01, 0.1]}
        ),
    }
)
MASKED: dict[str, Method] = {
    "gene mean": partial(_masked, _gene_mean),
    "neighbor mean": partial(_masked, _near),
    "PCA, hidden = gene mean": partial(_masked, partial(_pca, how="filled")),
    "PCA, visible genes, small ridge": partial(_masked, partial(_pca, how="ridge")),
    "PCA, visible genes, probabilistic": partial(_masked, partial(_pca, how="prior")),
    "ridge on PCs, own + neighbors": partial(_masked, _ridge),
}
