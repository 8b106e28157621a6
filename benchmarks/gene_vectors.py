"""Do pretrained vectors of genes help FIMP-base? The table of vectors is given with --vectors.

Three versions of one model: gene identities that start at random (the default), at the pretrained vectors, and at the
same vectors dealt out to other genes, which have all of their statistics but not their meaning. Tasks, splits and
scores are those of masked_expression.py, annotate_blocks.py and annotate_section.py on DLPFC, whose tables have the
baselines. Genes without a vector learn theirs from scratch; the share that has one is printed.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

import _fimp
import annotate_blocks
import masked_expression
from _common import (
    Results,
    expression_scores,
    folds,
    label_scores,
    load,
    log_normalise,
    parse,
    parser,
    spatial_block_ids,
    split_labels,
    totals,
)

VERSIONS = ("random", "pretrained", "shuffled")


def shuffled(vectors, genes, seed: int):
    """The same vectors for the same genes of `genes`, permuted among them."""
    from fimp_sc.pretrained import GeneVectors

    mine = np.isin(vectors.names, np.asarray(genes, dtype=str))
    order = np.flatnonzero(mine)
    values = vectors.values.copy()
    values[order] = values[np.random.default_rng(seed).permutation(order)]
    return GeneVectors(vectors.names, values)


def told(section, vectors) -> float:
    """Correlate the 40 leading loadings of genes with those predicted from their vectors; genes in 5 folds."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.preprocessing import StandardScaler

    section = section[:, np.asarray(section.X.sum(axis=0)).ravel() > 0]
    x = log_normalise(section.X, float(np.median(totals(section.X))))
    mean = np.asarray(x.mean(axis=0)).ravel()
    scale = np.sqrt(np.sqrt(np.maximum(np.asarray(x.power(2).mean(axis=0)).ravel() - mean**2, 1e-12)))
    loading = PCA(40, svd_solver="arpack", random_state=0).fit(x @ sp.diags(1 / scale)).components_.T
    values, known = vectors.rows(pd.Index(vectors.names).get_indexer(section.var_names.astype(str)))
    given = StandardScaler().fit_transform(values[known])
    ridge = RidgeCV(alphas=10.0 ** np.arange(0, 7))
    predicted = cross_val_predict(ridge, given, loading[known], cv=KFold(5, shuffle=True, random_state=0))
    return float(np.corrcoef(predicted.ravel(), loading[known].ravel())[0, 1])


def masked(section, seed: int, args) -> dict[str, float]:
    """Hidden expression in held-out blocks, as in masked_expression.py."""
    test = folds(spatial_block_ids(section, "dlpfc", seed), 5, seed) == 0
    adata = section[:, np.asarray(section.X[~test].sum(axis=0)).ravel() > 0].copy()
    full = log_normalise(adata.X, float(np.median(totals(adata.X[~test]))))
    hidden = masked_expression.hide(*adata.shape, test, seed)
    mask = hidden[test].toarray()
    mean = np.broadcast_to(np.asarray(full[~test].mean(axis=0)).ravel(), mask.shape)[mask]
    adata.X = sp.csr_matrix(full - full.multiply(hidden))
    adata.X.eliminate_zeros()
    predicted = masked_expression.fimp(adata, "dlpfc", test, hidden, seed, args, "fimp")
    return expression_scores(full[test].toarray()[mask], predicted[mask], mean)


def blocks(section, seed: int, args) -> dict[str, float]:
    """Layers of held-out blocks, as in annotate_blocks.py."""
    held_out = folds(spatial_block_ids(section, "dlpfc", seed), 5, seed) == 0
    truth = section.obs["label"].to_numpy()
    labels, _, test = split_labels(truth, held_out)
    predicted = annotate_blocks.fimp(section, "dlpfc", held_out, labels, seed, args, "fimp")
    return label_scores(truth[test], predicted[test])


def section_to_section(train, query, seed: int, args) -> dict[str, float]:
    """Layers of another section, as in annotate_section.py."""
    truth = query.obs["label"].to_numpy()
    both = np.r_[train.obs["label"].to_numpy(), truth]
    scored = split_labels(both, np.arange(len(both)) >= train.n_obs)[2][train.n_obs :]
    query = query.copy()
    query.obs["label"] = "Unknown"
    setup = {"labels_key": "label", "unlabeled_category": "Unknown"}
    model = _fimp.train(_fimp.prepare(train, None), args, seed, **setup)
    predicted = np.asarray(_fimp.apply(model, _fimp.prepare(query, None)).predict())
    return label_scores(truth[scored], predicted[scored])


def main() -> None:
    """Run all versions on all tasks and write the table."""
    p = parser(__doc__)
    p.set_defaults(seeds=5)
    p.add_argument("--vectors", type=Path, required=True, help="file that read_gene_vectors reads")
    p.add_argument(
        "--tasks", nargs="*", default=["masked", "section", "blocks"], choices=["masked", "section", "blocks"]
    )
    args = parse(p)
    args.inductive = False
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    from fimp_sc.pretrained import read_gene_vectors

    vectors = read_gene_vectors(args.vectors)
    train, query = load("dlpfc", args.data), load("dlpfc_151674", args.data)
    have = np.isin(train.var_names.astype(str), vectors.names)
    share = float(train.X[:, have].sum() / train.X.sum())
    print(f"{have.sum()} of {train.n_vars} genes, which hold {share:.0%} of counts, have a vector.")
    for version, table in (("pretrained", vectors), ("shuffled", shuffled(vectors, train.var_names, 0))):
        print(f"What {version} vectors tell of the data's own loadings: correlation {told(train, table):.3f}")
    if not args.tasks:
        return
    results = Results("gene_vectors", args, group="task")
    for task in args.tasks:
        for seed in range(args.seeds):
            for version in VERSIONS:
                given = {"random": None, "pretrained": vectors, "shuffled": shuffled(vectors, train.var_names, seed)}
                args.model = {"gene_embeddings": given[version]}
                started = time.perf_counter()
                if task == "section":
                    scores = section_to_section(train, query, seed, args)
                else:
                    scores = (masked if task == "masked" else blocks)(train, seed, args)
                results.add(task, version, seed, scores, started)
    results.finish()


if __name__ == "__main__":
    main()
