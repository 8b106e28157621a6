"""Cell types on a held-out section: train on DLPFC 151673, annotate 151674, which has another gene list.

FIMP trains on all genes of 151673 and annotates 151674 without retraining. The baselines use the genes that both
sections have. PCA, scaling and the target of the log-normalisation come from 151673 alone.
"""

from __future__ import annotations

import time

import numpy as np

import _fimp
from _baselines import annotate, fit_pca, spatial_features
from _common import (
    Results,
    label_scores,
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


def baselines(train, query) -> dict[str, np.ndarray]:
    """Predicted labels of the `query` cells, by method."""
    shared = train.var_names.intersection(query.var_names)
    a, b = train[:, shared].X, query[:, shared].X
    target = float(np.median(totals(a)))
    a, b = log_normalise(a, target), log_normalise(b, target)
    pca = fit_pca(a)
    graphs = [neighbours(np.asarray(x.obsm["spatial"], float), N_NEIGHBOURS) for x in (train, query)]
    fit, new = spatial_features(pca.transform(a), graphs[0]), spatial_features(pca.transform(b), graphs[1])
    known = (train.obs["label"] != "Unknown").to_numpy()
    blocks = spatial_block_ids(train, "dlpfc", 0)[known]
    fit = {kind: features[known] for kind, features in fit.items()}
    return annotate(fit, train.obs["label"].to_numpy()[known], new, blocks)


def main() -> None:
    """Run the methods and write the table."""
    args = parse(parser(__doc__))
    results = Results("annotate_section", args, group="split")
    train, query = load("dlpfc", args.data), load("dlpfc_151674", args.data)
    truth = query.obs["label"].to_numpy().copy()
    query.obs["label"] = "Unknown"  # from here on no method can see them
    both = np.r_[train.obs["label"].to_numpy(), truth]
    scored = split_labels(both, np.arange(len(both)) >= train.n_obs)[2][train.n_obs :]
    if "baselines" in args.methods:
        for method, predicted in baselines(train, query).items():  # nothing random, so one run
            results.add("151673 → 151674", method, 0, label_scores(truth[scored], predicted[scored]))
    for method in [m for m in ("fimp", "shuffled") if m in args.methods]:
        for seed in range(args.seeds):
            started = time.perf_counter()
            shuffle = seed if method == "shuffled" else None
            reference = _fimp.prepare(train, None, shuffle_seed=shuffle)
            model = _fimp.train(reference, args, seed, labels_key="label", unlabeled_category="Unknown")
            predicted = _fimp.apply(model, _fimp.prepare(query, None, shuffle_seed=shuffle)).predict()
            name = "FIMP" if method == "fimp" else "FIMP, shuffled positions"
            scores = label_scores(truth[scored], np.asarray(predicted)[scored])
            results.add("151673 → 151674", name, seed, scores, started)
    results.finish()


if __name__ == "__main__":
    main()
