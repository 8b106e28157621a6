"""Genes that a section did not measure: trained on DLPFC 151673, a fifth of the genes of 151674 predicted.

Both sections are cut to the genes that both have. The truth is log-normalized by totals of whole cells to the median
total of 151673, which is the scale of FIMP's predictions. Methods see neither the hidden genes nor these totals: values
of the query are scaled by totals of its other genes. Scores are means over genes: of all that vary, and of those that
at least a tenth of the cells express. Ridge and nearest cells read 50 principal components of the genes that are seen;
nothing is tuned on 151674.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

import _fimp
import _harness
from _baselines import fit_pca
from _common import log_normalize, neighbors, totals
from _harness import Fit, Method, Run
from _problems import missing_genes

if TYPE_CHECKING:
    import scipy.sparse as sp

    from _problems import Missing


def components(problem: Missing, *, around: bool = False) -> tuple[np.ndarray, np.ndarray, sp.csr_matrix]:
    """PCs of reference and query, and the log-normalized hidden genes of the reference.

    With `around` also those of the mean over the 6 nearest neighbors.
    """
    seen = problem.reference[:, problem.query.var_names].X
    target = float(np.median(totals(seen)))
    own = [log_normalize(seen, target), log_normalize(problem.query.X, target)]
    pca = fit_pca(own[0])
    features = [pca.transform(x.toarray()) for x in own]
    if around:
        graphs = [neighbors(adata.obsm["spatial"], 6) for adata in (problem.reference, problem.query)]
        near = [pca.transform((normalize(g, norm="l1") @ x).toarray()) for g, x in zip(graphs, own, strict=True)]
        features = [np.hstack(pair) for pair in zip(features, near, strict=True)]
    hidden = problem.reference.var_names.get_indexer(problem.genes)
    return *features, log_normalize(problem.reference.X, problem.target)[:, hidden]


def ridge(problem: Missing, run: Run, *, around: bool) -> Fit:
    """Each gene from the PCs, the strength chosen by leave-one-out on the reference."""
    train, query, genes = components(problem, around=around)
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 4, 9)))
    return Fit(model.fit(train, genes.toarray()).predict(query))


def nearest(problem: Missing, run: Run, *, k: int) -> Fit:
    """Mean over the k nearest cells of the reference."""
    train, query, genes = components(problem)
    near = NearestNeighbors(n_neighbors=k).fit(train).kneighbors_graph(query)
    return Fit((near @ genes).toarray() / k)


def mean(problem: Missing, run: Run) -> Fit:
    """Mean of each gene over the reference."""
    *_, genes = components(problem)
    return Fit(np.repeat(np.asarray(genes.mean(axis=0)), problem.query.n_obs, axis=0))


BASELINES: dict[str, Method] = {
    "gene mean": mean,
    "mean of 15 nearest cells (PCs)": partial(nearest, k=15),
    "mean of 50 nearest cells (PCs)": partial(nearest, k=50),
    "ridge, PCs": partial(ridge, around=False),
    "ridge, PCs of cell and neighbors": partial(ridge, around=True),
}
GROUPS = {"baselines": BASELINES, **_fimp.groups(_fimp.missing)}

if __name__ == "__main__":
    _harness.main(
        "missing_genes",
        __doc__,
        ("dlpfc",),
        lambda data, args, seed: missing_genes(args.data, seed),
        GROUPS,
        default=("baselines", "fimp", "controls"),
    )
