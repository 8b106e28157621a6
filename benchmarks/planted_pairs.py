"""Pairs of genes that act between neighbors, planted in simulated tissues, and pairs that only look like it.

2,000 cells of four types on a jittered grid. In ten pairs of genes, cells of a type (receivers) express the second
gene more by a factor of exp(effect) for every standard deviation of the activity of the first gene in the neighboring
cells of another type (senders). Twenty further pairs, the decoys, act nowhere. Nothing else depends on neighbors:

- ``plain``: types, genes and depth have nothing to do with places.
- ``domains``: twelve patches of four domains, in which types are mixed differently, depth differs, and every gene is
  shifted by a normal number (sd .8 on log scale). Both genes of a decoy are shifted by the same.
- ``gradients``: every gene and the depth follow a wave over the tissue (a half to one and a half periods across, up to
  1.1 up and down on log scale). Both genes of a decoy follow the same.

Each of the 30 pairs is tested from each type to each, 480 tests with direction. ``power``: fraction of the ten planted
ones found at a false discovery rate of .05; ``found``: of all; ``wrong``: those that were not planted; ``false_rate``:
their fraction. LIANA tests pairs without regard to types: 30 tests.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial import cKDTree
from scipy.stats import false_discovery_control, spearmanr

import _harness
from _common import log_normalize, totals
from _harness import Fit, MissingError, Run

N_CELLS, N_TYPES, N_PLANTED, N_DECOYS, N_OTHERS = 2000, 4, 10, 20, 60
LEVEL = 0.05
TISSUES = tuple(f"{kind}_{effect}" for kind in ("plain", "domains", "gradients") for effect in ("0.3", "0.8"))


def tissue(kind: str, effect: float, seed: int) -> tuple[Any, np.ndarray]:
    """A tissue with counts, types, domains and graph, and where pairs act: bool (pair, sender, receiver)."""
    from anndata import AnnData

    rng = np.random.default_rng([seed, 31])
    n, n_pairs = N_CELLS, N_PLANTED + N_DECOYS
    ligand, receptor = np.arange(n_pairs), np.arange(n_pairs) + n_pairs
    genes = [f"L{i}" for i in ligand] + [f"R{i}" for i in ligand] + [f"G{i}" for i in range(N_OTHERS)]
    side = int(np.ceil(np.sqrt(n)))
    place = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)[:n]
    place = place + rng.uniform(-0.45, 0.45, (n, 2))
    across = place / side - 0.5

    trend, depth = np.zeros((n, len(genes))), rng.normal(0, 0.3, n)
    domain, mixture = np.zeros(n, dtype=int), np.full((1, N_TYPES), 1 / N_TYPES)
    decoy = np.arange(N_PLANTED, n_pairs)
    if kind == "domains":
        seeds, which = rng.uniform(-0.5, 0.5, (12, 2)), np.r_[np.arange(4), rng.integers(0, 4, 8)]
        domain = which[np.argmin(((across[:, None] - seeds) ** 2).sum(-1), axis=1)]
        mixture = rng.dirichlet(np.full(N_TYPES, 3.0), 4)
        shift = rng.normal(0, 0.8, (4, len(genes)))
        shift[:, receptor[decoy]] = shift[:, ligand[decoy]]
        trend, depth = shift[domain], depth + rng.normal(0, 0.3, 4)[domain]
    if kind == "gradients":
        angle, phase = rng.uniform(0, 2 * np.pi, (2, len(genes)))
        periods = rng.uniform(0.5, 1.5, len(genes))
        for wave in (angle, phase, periods):
            wave[receptor[decoy]] = wave[ligand[decoy]]
        along = across[:, :1] * np.cos(angle) + across[:, 1:] * np.sin(angle)
        trend = 1.1 * np.sin(2 * np.pi * periods * along + phase)
        depth = depth + 0.4 * np.sin(2 * np.pi * (across @ rng.normal(size=2)))
    trend[:, 2 * n_pairs :] *= 0.5
    types = np.array([rng.choice(N_TYPES, p=mixture[min(d, len(mixture) - 1)]) for d in domain])

    near = cKDTree(place).query(place, 7)[1][:, 1:]
    graph = sp.csr_matrix((np.ones(6 * n), (np.repeat(np.arange(n), 6), near.ravel())), shape=(n, n))
    graph = sp.csr_matrix((graph + graph.T) > 0, dtype=np.float32)

    level = rng.normal(np.log(1.5), 0.6, len(genes)) + rng.normal(0, 0.5, (N_TYPES, len(genes)))
    activity = rng.normal(0, 0.8, (n, len(genes)))
    activity[:, 2 * n_pairs :] *= 0.5
    acts = np.zeros((n_pairs, N_TYPES, N_TYPES), dtype=bool)
    for i in range(N_PLANTED):
        sender, receiver = rng.choice(N_TYPES, 2, replace=False)
        acts[i, sender, receiver] = True
        level[sender, ligand[i]] = level[receiver, receptor[i]] = np.log(2.5)
        senders = sp.csr_matrix(graph.multiply(types == sender))
        heard = (senders @ activity[:, ligand[i]]) / np.maximum(totals(senders), 1)
        hears = (types == receiver) & (totals(senders) > 0)
        heard = np.where(hears, (heard - heard[hears].mean()) / heard[hears].std(), 0)
        activity[:, receptor[i]] = 0.6 * activity[:, receptor[i]] + effect * heard
    counts = rng.poisson(np.exp(level[types] + trend + activity + depth[:, None])).astype(np.float32)

    names = np.array([f"type{i}" for i in range(N_TYPES)])
    adata = AnnData(
        sp.csr_matrix(counts),
        obs=pd.DataFrame(
            {"type": pd.Categorical(names[types]), "domain": pd.Categorical(domain.astype(str)), "all": "all"},
            index=[f"cell{i}" for i in range(n)],
        ),
        var=pd.DataFrame(index=genes),
        obsm={"spatial": place},
        obsp={"spatial_connectivities": graph},
        layers={"log": log_normalize(counts, np.median(counts.sum(1)))},
    )
    adata.uns["table"] = pd.DataFrame({"ligand": genes[:n_pairs], "receptor": genes[n_pairs : 2 * n_pairs]})
    return adata, acts


def score(fdr: np.ndarray, acts: np.ndarray) -> dict[str, float]:
    """Power and false discoveries of tests (pair, sender, receiver), or (pair,); NaN where nothing was tested."""
    true = acts if fdr.ndim == 3 else acts.any((1, 2))
    found = np.nan_to_num(fdr, nan=1.0) <= LEVEL
    wrong = int((found & ~true).sum())
    return {
        "power": float(found[true].mean()),
        "found": int(found.sum()),
        "wrong": wrong,
        "false_rate": wrong / max(int(found.sum()), 1),
    }


def problem(data: str, args: Any, seed: int) -> tuple[Any, Callable[[np.ndarray], dict[str, float]]]:
    kind, effect = data.split("_")
    adata, acts = tissue(kind, float(effect), seed)
    return adata, lambda fdr: score(fdr, acts)


def fimp(adata: Any, run: Run, **how: Any) -> Fit:
    import fimp_sc

    if how.get("domain_key") == "domain" and adata.obs["domain"].nunique() == 1:
        raise MissingError("there is one domain only")
    fimp_sc.tl.gene_pairs(
        adata, "type", pairs=adata.uns["table"], layer="log", input_scale="log", random_state=run.seed, verbose=False,
        min_support=0, n_permutations=10 if run.quick else 100, **how,
    )  # fmt: skip
    table = adata.uns["fimp_gene_pairs"]["pairs"]
    out = np.full((N_PLANTED + N_DECOYS, N_TYPES, N_TYPES), np.nan)
    pair = table["source_gene"].astype(str).str[1:].astype(int)
    out[pair, table["source_group"].cat.codes, table["destination_group"].cat.codes] = table["fdr"]
    return Fit(out)


def spearman(adata: Any, run: Run) -> Fit:
    """Rank correlation of the receptor with the mean ligand over neighbors of the sending type, one-sided."""
    x, graph = adata.layers["log"].toarray(), adata.obsp["spatial_connectivities"]
    types, n_pairs = adata.obs["type"].cat.codes.to_numpy(), len(adata.uns["table"])
    out = np.ones((n_pairs, N_TYPES, N_TYPES))
    for sender in range(N_TYPES):
        senders = sp.csr_matrix(graph.multiply(types == sender))
        n = totals(senders)
        mean = (senders @ x[:, :n_pairs]) / np.maximum(n, 1)[:, None]
        for receiver in range(N_TYPES):
            cells = (types == receiver) & (n > 0)
            for i in range(n_pairs):
                if np.ptp(mean[cells, i]) and np.ptp(x[cells, n_pairs + i]):
                    test = spearmanr(mean[cells, i], x[cells, n_pairs + i], alternative="greater")
                    out[i, sender, receiver] = test.pvalue
    return Fit(false_discovery_control(out.ravel()).reshape(out.shape))


def ligrec(adata: Any, run: Run) -> Fit:
    """squidpy.gr.ligrec with 1,000 permutations of types."""
    import squidpy as sq

    adata = adata.copy()
    adata.X = adata.layers["log"]
    table = adata.uns["table"].set_axis(["source", "target"], axis=1)
    with warnings.catch_warnings(action="ignore"):
        result = sq.gr.ligrec(
            adata, "type", interactions=table, use_raw=False, n_perms=100 if run.quick else 1000, seed=run.seed,
            corr_method=None, threshold=0.0, copy=True, n_jobs=1, show_progress_bar=False,
        )  # fmt: skip
    found = result["pvalues"]
    out = np.ones((len(table), N_TYPES, N_TYPES))
    for i, (source, target) in enumerate(table.to_numpy()):
        for (sender, receiver), p in found.loc[(source, target)].items():
            out[i, int(sender[-1]), int(receiver[-1])] = 1 if np.isnan(p) else p
    return Fit(false_discovery_control(out.ravel()).reshape(out.shape))


def liana_moran(adata: Any, run: Run) -> Fit:
    """LIANA's global bivariate Moran's R, which knows no types."""
    import liana

    adata = adata.copy()
    adata.X = adata.layers["log"]
    with warnings.catch_warnings(action="ignore"):
        found = liana.mt.bivariate(
            adata, resource=adata.uns["table"], local_name="morans", global_name="morans", use_raw=False,
            connectivity_key="spatial_connectivities", n_perms=100 if run.quick else 1000, nz_prop=0.0,
            seed=run.seed, verbose=False,
        )  # fmt: skip
    names = adata.uns["table"].agg("^".join, axis=1)
    p = found.var["morans_pvals"].reindex(names).fillna(1).to_numpy(dtype=float)
    return Fit(false_discovery_control(p))


METHODS = {
    "tests": {
        "gene_pairs": fimp,
        "gene_pairs, domains known": lambda adata, run: fimp(adata, run, domain_key="domain"),
        "gene_pairs, swapped among all cells of a type": lambda adata, run: fimp(adata, run, domain_key="all"),
        "Spearman, mean of neighbors": spearman,
        "squidpy.gr.ligrec": ligrec,
        "LIANA, bivariate Moran": liana_moran,
    }
}

if __name__ == "__main__":
    _harness.main("planted_pairs", __doc__, TISSUES, problem, METHODS, default=("tests",), more=())
