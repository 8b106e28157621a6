"""Niches of a section against its annotated regions: `tl.niches` beside other ways to cluster, 7 niches each.

All methods are told the number of regions and nothing else. Leiden clusterings search the resolution that gives this
number. scVI is that of `embedding.py`; "3 hops" are the means over the cells 1, 2 and 3 edges away, clustered by
squidpy's niche function (`squidpy.gr.calculate_niche`, flavor "cellcharter": a Gaussian mixture).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

import _embeddings
import _fimp
import _harness
from _harness import Fit, Method, Run
from _problems import Embedding, without_labels
from embedding import REGIONS, UNKNOWN

if TYPE_CHECKING:
    from anndata import AnnData

N_NICHES = 7


def with_features(problem: Embedding, fit: Fit) -> AnnData:
    """Cells with the features of `fit` in ``obsm["X"]`` and FIMP's spatial graph."""
    adata = _fimp.prepare(problem.adata, problem.library_key)
    adata.obsm["X"] = fit.values
    return adata


def niches(problem: Embedding, run: Run, features: Method, **how: Any) -> Fit:
    """Clusters (n_obs,) that `tl.niches` makes of the features of a method."""
    import fimp_sc

    fit = features(problem, run)
    adata = with_features(problem, fit)
    fimp_sc.tl.niches(adata, N_NICHES, use_rep="X", random_state=run.seed, library_key=problem.library_key, **how)
    return replace(fit, values=adata.obs["fimp_niche"].astype(str).to_numpy())


def squidpy_niches(problem: Embedding, run: Run, features: Method) -> Fit:
    """Clusters (n_obs,) of squidpy's niche function on the features of a method and those of 3 hops."""
    import squidpy

    fit = features(problem, run)
    adata = with_features(problem, fit)
    squidpy.gr.calculate_niche(
        adata, flavor="cellcharter", distance=3, aggregation="mean", n_components=N_NICHES, use_rep="X",
        random_state=run.seed,
    )  # fmt: skip
    return replace(fit, values=adata.obs["cellcharter_niche"].astype(str).to_numpy())


def problem(data: str, args: Any, seed: int) -> tuple[Any, Callable[[np.ndarray], dict[str, float]]]:
    """The cells without labels, and the scores of niches."""
    posed, whole = without_labels(data, args.data)
    region = whole.obs[REGIONS[data]].astype(str).to_numpy()
    known = ~np.isin(region, UNKNOWN)

    def scores(found: np.ndarray) -> dict[str, float]:
        a, b = region[known], found[known]
        return {"ari": float(adjusted_rand_score(a, b)), "nmi": float(normalized_mutual_info_score(a, b))}

    return posed, scores


PCS, AROUND = _embeddings.EMBEDDING["PCA"], _embeddings.EMBEDDING["PCA, mean of neighbors"]
SCVI, SCVI_AROUND = (_embeddings.EMBEDDING[name] for name in ("scVI", "scVI, mean of neighbors"))
FIMP = partial(_fimp.embed, variant=_fimp.DEFAULT["FIMP"])
PLAIN = {"smooth": 0, "n_components": None}  # of the features as they are
GROUPS: dict[str, dict[str, Method]] = {
    "baselines": {
        "Leiden on PCs": partial(niches, features=PCS, method="leiden", **PLAIN),
        "Leiden on PCs, mean of neighbors": partial(niches, features=AROUND, method="leiden", **PLAIN),
        "mixture on PCs, mean of neighbors": partial(niches, features=AROUND, **PLAIN),
        "mixture on scVI, mean of neighbors": partial(niches, features=SCVI_AROUND, **PLAIN),
        "squidpy, PCs and 3 hops": partial(squidpy_niches, features=PCS),
        "squidpy, scVI and 3 hops": partial(squidpy_niches, features=SCVI),
        "tl.niches on PCs": partial(niches, features=PCS),
    },
    "fimp": {
        "tl.niches": partial(niches, features=FIMP),
        "tl.niches, Leiden": partial(niches, features=FIMP, method="leiden"),
    },
}

if __name__ == "__main__":
    _harness.main(
        "niches", __doc__, ("dlpfc", "dlpfc_151674", "starmap"), problem, GROUPS, default=("baselines", "fimp")
    )  # fmt: skip
