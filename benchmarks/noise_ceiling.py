"""How much of hidden expression is there to predict, if counts are Poisson draws around what a cell expresses?

An oracle that knew the rate of every gene in every cell would still miss the noise of counting. `r2_gene` is the score
it would reach in `masked_expression.py`, on the same cells, entries and scale: 1 − the summed variance of the
log-normalized draws / the summed square of the entries around their gene means. The variance is simulated twice: with
rates that are a cell's total times the gene's share of all counts, and with its share in the 30 other cells that are
nearest by 20 principal components: rates that differ between cells make for less noise on this scale, and those of few
cells differ too much, so that the truth is between the two. Data must be counts.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA

from _common import Results, load, log_normalize, neighbors, parse, parser, totals
from _problems import hidden_expression

DRAWS, COMPONENTS, SIMILAR = 10, 20, 30


def mean_rates(counts: sp.csr_matrix, train: np.ndarray) -> np.ndarray:
    """Expected counts (n_obs, n_vars): totals × shares of genes in the training cells."""
    share = np.asarray(counts[train].sum(axis=0)).ravel()
    return totals(counts)[:, None] * (share / share.sum())


def near_rates(counts: sp.csr_matrix, target: float) -> np.ndarray:
    """Expected counts (n_obs, n_vars): totals × shares of genes in the most similar other cells."""
    scores = PCA(COMPONENTS, svd_solver="arpack", random_state=0).fit_transform(log_normalize(counts, target))
    around = (neighbors(scores, SIMILAR) @ counts).toarray()
    return around * (totals(counts) / around.sum(axis=1))[:, None]


def noise(rates: np.ndarray, total: np.ndarray, target: float, seed: int) -> np.ndarray:
    """Variance of log(1 + Poisson count / total × target), of the shape of `rates`."""
    rng = np.random.default_rng(seed)
    first, second = np.zeros_like(rates), np.zeros_like(rates)
    for _ in range(DRAWS):
        x = np.log1p(rng.poisson(rates) * (target / total[:, None]))
        first += x
        second += x**2
    return (second - first**2 / DRAWS) / (DRAWS - 1)


def ceiling(counts: sp.csr_matrix, rates: np.ndarray, test: np.ndarray, hidden: np.ndarray, seed: int) -> float:
    """`r2_gene` of the oracle on the entries `hidden`, boolean (n_test, n_vars), of the test cells."""
    target = float(np.median(totals(counts[~test])))
    full = log_normalize(counts, target)
    mean = np.asarray(full[~test].mean(axis=0)).ravel()
    apart = (full[test].toarray() - mean)[hidden]
    return float(1 - noise(rates[test], totals(counts)[test], target, seed)[hidden].sum() / (apart**2).sum())


def main() -> None:
    """Run from the command line."""
    p = parser(__doc__, ("dlpfc", "starmap"), more=("toy",))
    p.set_defaults(seeds=5)
    args = parse(p)
    results = Results("noise_ceiling", args)
    for data in args.datasets:
        for seed in range(args.seeds):
            posed, _ = hidden_expression(data, args.data, seed)
            counts = load(data, args.data)[:, posed.adata.var_names].X
            if (counts.data % 1).any():
                raise SystemExit(f"{data} holds no counts: their noise is not known.")
            hidden = posed.hidden[posed.test].toarray()
            target = float(np.median(totals(counts[~posed.test])))
            for title, rates in (
                ("oracle, rates of the whole tissue", mean_rates(counts, ~posed.test)),
                ("oracle, rates of similar cells", near_rates(counts, target)),
            ):
                results.add(data, title, seed, {"r2_gene": ceiling(counts, rates, posed.test, hidden, seed)})
    results.finish()


if __name__ == "__main__":
    main()
