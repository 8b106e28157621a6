"""Hidden expression on held-out spatial blocks (about 20 % of the cells).

All methods train on the other cells only, with the test cells dropped. Then 15 % of the entries of the test cells
are hidden, chosen without looking at their values (most are zeros in sparse data), and predicted from what is left
in the whole section. Everything happens on the log-normalised scale with each cell's total taken before hiding, for
all methods: FIMP too gets this matrix (input_scale="log"), with hidden entries set to zero and named in `hidden`.
"""

from __future__ import annotations

import time

import numpy as np
import scipy.sparse as sp

import _fimp
from _baselines import HIDDEN, fit_pca, neighbour_mean, reconstruct_filled, reconstruct_visible, ridge
from _common import (
    DATA,
    Results,
    expression_scores,
    folds,
    library,
    load,
    log_normalise,
    neighbours,
    parse,
    parser,
    spatial_block_ids,
    totals,
)

N_NEIGHBOURS = 6


def hide(n_obs: int, n_vars: int, test: np.ndarray, seed: int) -> sp.csr_matrix:
    """Hidden entries as boolean CSR (n_obs, n_vars): 15 % of the entries of the `test` rows."""
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(test)
    row, col = np.nonzero(rng.random((len(rows), n_vars)) < HIDDEN)
    return sp.csr_matrix((np.ones(len(row), bool), (rows[row], col)), shape=(n_obs, n_vars))


def baselines(adata, name: str, test: np.ndarray, hidden: sp.csr_matrix, seed: int):
    """Yield (method, prediction for the test cells); ``adata.X`` has zeros where entries are hidden."""
    xy, lib = np.asarray(adata.obsm["spatial"], float), library(adata, name)
    graph = neighbours(xy, N_NEIGHBOURS, lib)[test]
    x_train = adata.X[~test]
    x, visible = adata.X[test].toarray(), ~hidden[test].toarray()
    mean = np.asarray(x_train.mean(axis=0)).ravel()
    yield "gene mean", np.broadcast_to(mean, x.shape)
    near = neighbour_mean(adata.X, hidden, graph, mean)
    yield "neighbour mean", near
    pca = fit_pca(x_train)
    yield "PCA, hidden = gene mean", reconstruct_filled(pca, x, visible)
    yield "PCA, visible genes, small ridge", reconstruct_visible(pca, x, visible, prior=False)
    yield "PCA, visible genes, probabilistic", reconstruct_visible(pca, x, visible, prior=True)
    part = neighbours(xy[~test], N_NEIGHBOURS, None if lib is None else lib[~test])
    yield "ridge on PCs, own + neighbours", ridge(pca, x_train, part, x, visible, near, seed)


def fimp(adata, name: str, test: np.ndarray, hidden: sp.csr_matrix, seed: int, args, method: str) -> np.ndarray:
    """FIMP's prediction for the test cells, (n_test, n_vars)."""
    key = DATA[name].library_key
    shuffle = seed if method == "shuffled" else None
    part = _fimp.prepare(adata[~test], key, shuffle_seed=shuffle)
    model = _fimp.train(part, args, seed, library_key=key, input_scale="log")
    whole = _fimp.apply(model, _fimp.prepare(adata, key, shuffle_seed=shuffle))
    return np.asarray(whole.get_expression(indices=np.flatnonzero(test), hidden=hidden, scale="log"))


def main() -> None:
    """Run the methods and write the table."""
    args = parse(parser(__doc__, ("dlpfc", "starmap", "merfish")))
    results = Results("masked_expression", args)
    for name in args.datasets:
        section = load(name, args.data)
        for seed in range(args.seeds):
            test = folds(spatial_block_ids(section, name, seed), 5, seed) == 0
            # a gene without expression in the training cells cannot be learnt by any method
            adata = section[:, np.asarray(section.X[~test].sum(axis=0)).ravel() > 0].copy()
            full = log_normalise(adata.X, float(np.median(totals(adata.X[~test]))))
            hidden = hide(*adata.shape, test, seed)
            mask = hidden[test].toarray()
            truth = full[test].toarray()[mask]
            mean = np.broadcast_to(np.asarray(full[~test].mean(axis=0)).ravel(), mask.shape)[mask]
            adata.X = sp.csr_matrix(full - full.multiply(hidden))
            adata.X.eliminate_zeros()
            started = time.perf_counter()
            if "baselines" in args.methods:
                for method, predicted in baselines(adata, name, test, hidden, seed):
                    results.add(name, method, seed, expression_scores(truth, predicted[mask], mean), started)
                    started = time.perf_counter()
            for method in [m for m in ("fimp", "shuffled") if m in args.methods]:
                started = time.perf_counter()
                predicted = fimp(adata, name, test, hidden, seed, args, method)
                title = "FIMP" if method == "fimp" else "FIMP, shuffled positions"
                results.add(name, title, seed, expression_scores(truth, predicted[mask], mean), started)
    results.finish()


if __name__ == "__main__":
    main()
