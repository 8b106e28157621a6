"""Linear probe of the embedding: logistic regression on frozen features, 5 folds of spatial blocks.

The features are made without labels from all cells: `tl.embed` with its defaults, and PCA of the same cells, which
favours neither. Scaling and regression are fitted on the training folds. The scores are those of the pooled
out-of-fold predictions.
"""

from __future__ import annotations

import time

import numpy as np

import _fimp
from _baselines import fit_pca, logistic, spatial_features
from _common import (
    DATA,
    Results,
    folds,
    label_scores,
    library,
    load,
    log_normalise,
    neighbours,
    parse,
    parser,
    spatial_block_ids,
    split_labels,
    totals,
)

N_NEIGHBOURS = 10


def probe(features: np.ndarray, truth: np.ndarray, fold: np.ndarray) -> dict[str, float]:
    """Scores of the pooled predictions over the folds."""
    predicted, scored = np.full(len(truth), "Unknown", object), np.zeros(len(truth), bool)
    for f in np.unique(fold):
        _, train, test = split_labels(truth, fold == f)
        predicted[test] = logistic(features[train], truth[train], features[test])
        scored |= test
    return label_scores(truth[scored], predicted[scored])


def pca_features(adata, name: str) -> dict[str, np.ndarray]:
    """50 PCs of the log-normalised data, their mean over the neighbours, and both."""
    x = log_normalise(adata.X, float(np.median(totals(adata.X))))
    graph = neighbours(np.asarray(adata.obsm["spatial"], float), N_NEIGHBOURS, library(adata, name))
    return {f"50 PCs, {m}": f for m, f in spatial_features(fit_pca(x).transform(x), graph).items()}


def fimp_features(adata, name: str, seed: int, args, method: str) -> np.ndarray:
    """``obsm["X_fimp"]`` of `tl.embed` with its defaults, (n_obs, n_latent)."""
    import fimp_sc

    key = DATA[name].library_key
    adata = _fimp.prepare(adata, key, shuffle_seed=seed if method == "shuffled" else None)
    fimp_sc.tl.embed(
        adata, library_key=key, max_epochs=args.max_epochs, accelerator=args.accelerator, random_state=seed
    )
    return np.asarray(adata.obsm["X_fimp"])


def main() -> None:
    """Run the methods and write the table."""
    args = parse(parser(__doc__, ("dlpfc", "merfish", "starmap")))
    results = Results("probe", args)
    for name in args.datasets:
        adata = load(name, args.data)
        truth = adata.obs["label"].to_numpy()
        pcs = pca_features(adata, name) if "baselines" in args.methods else {}
        for seed in range(args.seeds):
            fold = folds(spatial_block_ids(adata, name, seed), 5, seed)
            for method, features in pcs.items():
                results.add(name, method, seed, probe(features, truth, fold))
            for method in [m for m in ("fimp", "shuffled") if m in args.methods]:
                started = time.perf_counter()
                features = fimp_features(adata, name, seed, args, method)
                title = "X_fimp" if method == "fimp" else "X_fimp, shuffled positions"
                results.add(name, title, seed, probe(features, truth, fold), started)
    results.finish()


if __name__ == "__main__":
    main()
