"""Cell types with graph networks: cross-entropy on the labeled cells of the reference."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
import torch
from torch.nn import functional

import _networks as networks
from _baselines import fit_pca
from _common import folds, log_normalize
from _harness import Fit, Method, Run
from _networks_masked import graph_of
from _problems import Annotation
from _smoothing import SMOOTHED, best_share, smooth

CONFIGURATIONS = ((1e-3, 0.2, 5e-4), (1e-3, 0.5, 5e-4), (3e-3, 0.5, 5e-4))  # learning rate, dropout, weight decay
EPOCHS, PATIENCE, TRIAL = 200, 30, 40
N_GENES, N_PCS = 2000, 64
FEATURES = ("expression", "PCs", "gene vectors")
VECTORS = "spatialformer_gene_embeddings_512.npz"


def most_variable(x: sp.csr_matrix, n: int) -> np.ndarray:
    """Positions of the `n` columns of most variance, in their order."""
    mean = np.asarray(x.mean(axis=0)).ravel()
    variance = np.asarray(x.multiply(x).mean(axis=0)).ravel() - mean**2
    return np.sort(np.argsort(-variance, kind="stable")[:n])


def inputs(problem: Annotation, features: str, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Features of the cells of reference and query, float32 (n, d).

    All that is fitted comes from the reference; where its cells without a label are the query, from the others.
    """
    reference, query = problem.reference, problem.query
    shared = reference.var_names.intersection(query.var_names)
    known = (reference.obs["label"] != "Unknown").to_numpy()
    fitted = known if query is reference else np.ones(len(known), bool)
    both = [log_normalize(part[:, shared].X, problem.target) for part in (reference, query)]
    seen = both[0][fitted]
    if features == "expression":
        genes = most_variable(seen, N_GENES)
        out = [x[:, genes].toarray() for x in both]
    elif features == "PCs":
        pca = fit_pca(seen, N_PCS)
        out = [pca.transform(x) for x in both]
    else:
        from fimp_sc.pretrained import read_gene_vectors

        table = read_gene_vectors(run.data / VECTORS)
        row = {name: i for i, name in enumerate(table.names)}
        symbols = reference[:, shared].var["human_symbol"].astype(str)
        genes = np.array([i for i, name in enumerate(symbols) if name in row])
        if not len(genes):
            raise ValueError(f"{VECTORS} has none of the {len(shared)} genes of {problem.data}.")
        vectors = np.asarray(table.values, np.float32)[[row[symbols.iloc[i]] for i in genes]]
        mean = np.asarray(seen[:, genes].mean(axis=0)).ravel()
        out = [np.asarray(x[:, genes] @ vectors - mean @ vectors) for x in both]
    mean, scale = out[0][fitted].mean(0), out[0][fitted].std(0)
    if features == "PCs":
        scale = scale.max()  # what says more stays larger
    first, second = (((x - mean) / np.maximum(scale, 1e-6)).astype(np.float32) for x in out)
    return first, second


def method(kind: str, features: str, *, smoothed: bool = False) -> Method:
    """Cell types by one kind of network from one of `FEATURES`, on request smoothed over neighbors as FIMP's are."""

    def run_method(problem: Annotation, run: Run) -> Fit:
        reference, query = problem.reference, problem.query
        x, x_query = (torch.from_numpy(part) for part in inputs(problem, features, run))
        graph = graph_of(reference, problem.library_key)
        names, target = np.unique(reference.obs["label"].astype(str), return_inverse=True)
        known = np.flatnonzero(names[target] != "Unknown")
        classes = np.unique(target[known])
        # Whole blocks of the labeled cells: blocks of cells to annotate would leave validation with few.
        checked = folds(np.asarray(problem.blocks)[known], 8, run.seed) == 0
        nodes = {"fit": torch.from_numpy(known[~checked]), "check": torch.from_numpy(known[checked])}
        truth = torch.from_numpy(np.searchsorted(classes, target))

        def training(lr: float, dropout: float, weight_decay: float) -> networks.Training:
            torch.manual_seed(run.seed)
            model = networks.Network(kind, x.shape[1], len(classes), dropout=dropout, drop_inputs=dropout)

            def loss(part: str) -> torch.Tensor:
                return functional.cross_entropy(model(x, graph)[nodes[part]], truth[nodes[part]])

            def losses() -> Iterator[torch.Tensor]:
                yield loss("fit")

            return networks.Training(
                model, losses, lambda: loss("check").item(), lr=lr, weight_decay=weight_decay, patience=PATIENCE
            )

        started = time.process_time()
        runs = [training(*c) for c in CONFIGURATIONS[: 1 if run.quick else None]]
        chosen = networks.choose(runs, TRIAL, 1 if run.quick else EPOCHS)
        fit = networks.summary(runs, chosen, CONFIGURATIONS[chosen], started)
        model = runs[chosen].finish()
        whole = graph if query is reference else graph_of(query, problem.library_key)
        with torch.no_grad():
            seen, probability = (model(*part).softmax(1).double().numpy() for part in ((x, graph), (x_query, whole)))
        if smoothed:
            share = best_share(seen, graph.adjacency, known[checked], truth[nodes["check"]].numpy())
            probability = smooth(probability, whole.adjacency, share)
            fit.note += f", share of means {share:.2f}"
        fit.values = names[classes][probability.argmax(1)]
        return fit

    return run_method


ANNOTATION: dict[str, Method] = {
    f"{kind}, {features}": method(kind, features) for kind in networks.NETWORKS for features in FEATURES
} | {
    f"{kind}, {features}{SMOOTHED}": method(kind, features, smoothed=True)
    for kind in ("GCN", "GraphSAGE", "GPS")
    for features in FEATURES[:2]
}
