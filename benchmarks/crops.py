"""Parts of a section that hold only some of the classes: train on DLPFC 151673, annotate crops of 151674.

A cell's label must not depend on which other cells are in the object: every crop should get the labels that its spots
get within the whole section. The section is annotated as it is, and with distorted counts: each gene multiplied by a
log-normal factor (sigma 0.5) and 40 % of the counts kept. FIMP with ``center="batch"`` subtracts the mean of the query
itself.
"""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import scipy.sparse as sp

import _fimp
from _common import Results, load, log_normalize, neighbors, parse, parser, totals
from _harness import Fit, Run, apart

CROPS = (("L1",), ("L2",), ("L5",), ("WM",), ("L6", "WM"), ("L1", "L2", "L3", "L4"))
DISTORTION, KEPT = 0.5, 0.4


def distorted(section, seed: int = 0):
    """A copy with gene factors and fewer counts."""
    rng = np.random.default_rng(seed)
    factor = rng.lognormal(0, DISTORTION, section.n_vars)
    counts = sp.coo_matrix(section.X)
    kept = rng.binomial(np.rint(counts.data).astype(int), np.minimum(1, KEPT * factor[counts.col]))
    out = section.copy()
    out.X = sp.csr_matrix((kept.astype(np.float32), (counts.row, counts.col)), shape=counts.shape)
    out.X.eliminate_zeros()
    return out


def fimp(train, queries: dict, run: Run, center: str) -> Fit:
    """Labels of every query, one after the other."""
    from fimp_sc.model import FIMP

    model, fit = _fimp.train(_fimp.prepare(train, None), run, _fimp.Variant(), labels_key="label")
    found = []
    for query in queries.values():
        part = _fimp.prepare(query, None)
        found.append(FIMP.load_query_data(part, model, center=center).predict().astype(str))
    fit.values = np.concatenate(found)
    return fit


def logistic(train, queries: dict, run: Run) -> Fit:
    """Logistic regression on the mean principal components of 10 neighbors, centered by the training mean."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    genes = train.var_names.intersection(next(iter(queries.values())).var_names)
    started = time.process_time()
    target = float(np.median(totals(train[:, genes].X)))
    pca = PCA(50, svd_solver="arpack", random_state=0)
    scores = pca.fit_transform(log_normalize(train[:, genes].X, target))
    labels = train.obs["label"].to_numpy()
    known = labels != "Unknown"
    near = neighbors(train.obsm["spatial"], 10) @ scores
    scale = near.std(0)
    model = LogisticRegression(C=0.01, max_iter=2000).fit((near / scale)[known], labels[known])
    found = []
    for query in queries.values():
        scores = pca.transform(log_normalize(query[:, genes].X, target))
        near = neighbors(query.obsm["spatial"], min(10, query.n_obs - 1)) @ scores
        found.append(model.predict(near / scale).astype(str))
    return Fit(np.concatenate(found), training_s=time.process_time() - started)


METHODS = {
    "FIMP": partial(fimp, center="training"),
    'FIMP, center="batch"': partial(fimp, center="batch"),
    "logistic, neighbors": logistic,
}


def main() -> None:
    """Run from the command line."""
    p = parser(__doc__)
    p.set_defaults(seeds=5)
    p.add_argument("--only", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    p.add_argument("--threads", type=int, default=1)
    args = parse(p)
    results = Results("crops", args)
    train, section = load("dlpfc", args.data), load("dlpfc_151674", args.data)
    truth = section.obs["label"].to_numpy().astype(str)
    queries, rows = {}, {}
    for version, whole in (("as it is", section), ("distorted", distorted(section))):
        for crop in ((), *CROPS):
            name = f"{'+'.join(crop) or 'whole section'}, {version}"
            rows[name] = np.flatnonzero(np.isin(truth, crop)) if crop else np.arange(section.n_obs)
            queries[name] = whole[rows[name]].copy()
    ends = np.cumsum([len(part) for part in rows.values()])[:-1]
    for seed in range(args.seeds):
        for title in args.only:
            if not any(results.wants(name, title, seed) for name in rows):
                continue
            run = Run(seed, args.quick, args.data, args.accelerator)
            fit, costs = apart(partial(METHODS[title], train, queries, run), args.threads)
            labels = dict(zip(rows, np.split(fit.values, ends), strict=True))
            for name, found in labels.items():
                whole = labels[f"whole section, {name.split(', ')[1]}"]
                scored = truth[rows[name]] != "Unknown"
                scores = {
                    "accuracy": np.mean((found == truth[rows[name]])[scored]),
                    "within_whole": np.mean((whole[rows[name]] == truth[rows[name]])[scored]),
                }
                results.add(name, title, seed, scores | {"cpu_s": costs["cpu_s"]}, note=fit.note)
    results.finish()


if __name__ == "__main__":
    main()
