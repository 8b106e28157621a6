"""Features made without labels from all cells: do they carry cell types, and do they cluster into spatial domains?

`accuracy`, `macro_f1`: logistic regression (C = 1) on the standardized features, 5 folds of spatial blocks; scores of
the pooled out-of-fold predictions. `ari`, `nmi`, where a data set has regions: a Gaussian mixture with one tied
covariance and as many components as there are regions, on the 15 leading principal components of the features, the
same for all methods; `ari_smoothed` and `macro_f1_smoothed` after the features were averaged once over the 6 nearest
neighbors and the cell itself, which is what `tl.niches` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture

import _embeddings
import _fimp
import _graphmae
import _harness
import _peers
from _baselines import logistic
from _common import folds, label_scores, library, neighbors, spatial_block_ids, split_labels
from _problems import without_labels
from _smoothing import averaged

REGIONS = {"dlpfc": "label", "dlpfc_151674": "label", "dlpfc_few_counts": "label", "starmap": "region"}
UNKNOWN = ("Unknown", "Unlabelled")
N_COMPONENTS, N_STARTS, N_NEIGHBORS = 15, 5, 6

GROUPS = {
    "baselines": _embeddings.EMBEDDING,
    "networks": _graphmae.EMBEDDING,
    "peers": _peers.EMBEDDING,
    **_fimp.groups(_fimp.embed),
}


def probe(features: np.ndarray, truth: np.ndarray, fold: np.ndarray) -> dict[str, float]:
    """Scores of the pooled predictions over the folds."""
    predicted, scored = np.full(len(truth), "Unknown", object), np.zeros(len(truth), bool)
    for f in np.unique(fold):
        _, train, test = split_labels(truth, fold == f)
        predicted[test] = logistic(features[train], truth[train]).predict(features[test])
        scored |= test
    return label_scores(truth[scored], predicted[scored])


def domains(features: np.ndarray, n_domains: int, seed: int) -> np.ndarray:
    """Clusters, int (n_obs,), of a Gaussian mixture with one tied covariance."""
    components = PCA(min(N_COMPONENTS, features.shape[1]), random_state=seed).fit_transform(features)
    mixture = GaussianMixture(n_domains, covariance_type="tied", n_init=N_STARTS, reg_covar=1e-4, random_state=seed)
    return mixture.fit_predict(components)


def problem(data: str, args: Any, seed: int) -> tuple[Any, Callable[[np.ndarray], dict[str, float]]]:
    """The cells without labels, and the scores of features."""
    posed, whole = without_labels(data, args.data)
    truth = whole.obs["label"].to_numpy().astype(str)
    fold = folds(spatial_block_ids(whole, data, seed), 5, seed)

    def scores(features: np.ndarray) -> dict[str, float]:
        out = probe(features, truth, fold)
        if data not in REGIONS:
            return out
        region = whole.obs[REGIONS[data]].astype(str).to_numpy()
        known = ~np.isin(region, UNKNOWN)
        graph = neighbors(np.asarray(whole.obsm["spatial"], float), N_NEIGHBORS, library(whole, data))
        smoothed = averaged(features, graph)
        out |= {f"{name}_smoothed": value for name, value in probe(smoothed, truth, fold).items()}
        for suffix, x in (("", features), ("_smoothed", smoothed)):
            found = domains(x, len(np.unique(region[known])), seed)
            out[f"ari{suffix}"] = float(adjusted_rand_score(region[known], found[known]))
            out[f"nmi{suffix}"] = float(normalized_mutual_info_score(region[known], found[known]))
        return out

    return posed, scores


if __name__ == "__main__":
    _harness.main(
        "embedding",
        __doc__,
        ("dlpfc", "dlpfc_151674", "starmap", "merfish"),
        problem,
        GROUPS,
        default=("baselines", "networks", "fimp", "controls"),
    )
