"""Cell types on held-out spatial blocks (about 20 % of the cells) of one data set.

Transductive by default: the labels of the test blocks are hidden, but their expression is there while training, for
FIMP as for the neighbour means of the baselines. With --inductive the test cells are dropped before training, so
that training cells at the edge of a test block have fewer or other neighbours; they come back for the prediction.
PCA, scaling and the target of the log-normalisation always come from the training cells alone.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import _fimp
from _baselines import annotate, fit_pca, spatial_features
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


def baselines(
    adata, name: str, blocks: np.ndarray, held_out: np.ndarray, labels: np.ndarray, inductive: bool
) -> dict[str, np.ndarray]:
    """Predicted labels of all cells, by method; `labels` is "Unknown" where a label must not be used."""
    xy, lib = np.asarray(adata.obsm["spatial"], float), library(adata, name)
    x = log_normalise(adata.X, float(np.median(totals(adata.X[~held_out]))))
    pca = fit_pca(x[~held_out])
    own = pca.transform(x)
    features = spatial_features(own, neighbours(xy, N_NEIGHBOURS, lib))
    fit, known = features, labels != "Unknown"
    if inductive:
        part = neighbours(xy[~held_out], N_NEIGHBOURS, None if lib is None else lib[~held_out])
        fit, known = spatial_features(own[~held_out], part), known[~held_out]
        labels, blocks = labels[~held_out], blocks[~held_out]
    return annotate({kind: f[known] for kind, f in fit.items()}, labels[known], features, blocks[known])


def fimp(
    adata, name: str, held_out: np.ndarray, labels: np.ndarray, seed: int, args: argparse.Namespace, method: str
) -> np.ndarray:
    """Predicted labels of all cells from FIMP trained without the labels of the test blocks."""
    key = DATA[name].library_key
    adata = adata.copy()
    adata.obs["label"] = labels
    section = _fimp.prepare(adata, key, shuffle_seed=seed if method == "shuffled" else None)
    setup = {"labels_key": "label", "unlabeled_category": "Unknown", "library_key": key}
    if not args.inductive:
        return np.asarray(_fimp.train(section, args, seed, **setup).predict())
    part = _fimp.prepare(section[~held_out], key)
    return np.asarray(_fimp.apply(_fimp.train(part, args, seed, **setup), section).predict())


def main() -> None:
    """Run the methods and write the table."""
    p = parser(__doc__, ("merfish", "starmap", "dlpfc"))
    p.add_argument("--inductive", action="store_true", help="train on the training cells alone")
    args = parse(p)
    results = Results("annotate_blocks_inductive" if args.inductive else "annotate_blocks", args)
    for name in args.datasets:
        adata = load(name, args.data)
        for seed in range(args.seeds):
            blocks = spatial_block_ids(adata, name, seed)
            held_out = folds(blocks, 5, seed) == 0
            truth = adata.obs["label"].to_numpy()
            labels, _, test = split_labels(truth, held_out)
            if "baselines" in args.methods:
                for method, predicted in baselines(adata, name, blocks, held_out, labels, args.inductive).items():
                    results.add(name, method, seed, label_scores(truth[test], predicted[test]))
            for method in [m for m in ("fimp", "shuffled") if m in args.methods]:
                started = time.perf_counter()
                predicted = fimp(adata, name, held_out, labels, seed, args, method)
                title = "FIMP" if method == "fimp" else "FIMP, shuffled positions"
                results.add(name, title, seed, label_scores(truth[test], predicted[test]), started)
    results.finish()


if __name__ == "__main__":
    main()
