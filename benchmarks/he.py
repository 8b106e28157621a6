"""Expression of a spot from its H&E patch: what does a frozen image model tell, alone and with messages from neighbors?

HER2ST, patient C: 732 spots of four sections, each with a patch of 112 × 112 pixels. Features of the patches are made
without expression; a ridge regression predicts log-normalized expression from them. One section is left out (in the
column of seeds), and the strength of the ridge is chosen by leaving out each of the other sections in turn. `pearson`
is the mean over genes of the correlation across the spots of the section, `pearson_50` that over the 50 genes with the
highest one, which differ between methods and sections. Genes are the 300 with most counts in patients A, B and D to H.

The image model is a DINOv2 (or another vision transformer) from --checkpoint, whose self-attention FIMP runs between
neighboring patches. Its features, which do not depend on what is left out, are kept in ``results/.cache``: costs are
those of the row that made them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler, normalize
from torch import nn
from torch.nn import functional

import _graph_networks as networks
import _harness
from _common import log_normalize, totals
from _embeddings import CACHE
from _harness import Fit, MissingError, Run

PATCHES, SPOTS = "her2st_he_patches_C2-C5.npz", "her2st_patients_A-F.h5ad"
PATIENT, N_GENES, N_BEST = "C", 300, 50
STRENGTHS = (10.0, 100.0, 1e3, 1e4, 1e5)


@dataclass(frozen=True)
class Spots:
    """Spots of which those of one section have no expression.

    Attributes
    ----------
    pixels
        (n, 112, 112, 3) uint8.
    places
        (n, 2).
    section
        (n,) names.
    graph
        (n, n) CSR, the 6 nearest spots of the section.
    expression
        (n, 300) log-normalized; NaN where it must not be seen.
    """

    pixels: np.ndarray
    places: np.ndarray
    section: np.ndarray
    graph: sp.csr_matrix
    expression: np.ndarray

    @property
    def train(self) -> np.ndarray:
        """(n,) bool, spots whose expression is known."""
        return np.isfinite(self.expression[:, 0])


def problem(data: str, args: Any, seed: int) -> tuple[Spots, Callable[[np.ndarray], dict[str, float]]]:
    """The spots without the expression of one section, and the scores there."""
    import anndata

    import fimp_sc

    adata = anndata.read_h5ad(Path(args.data) / SPOTS)
    others = adata.obs["patient"].astype(str).to_numpy() != PATIENT
    genes = np.argsort(-np.asarray(adata.X[others].sum(0)).ravel(), kind="stable")[:N_GENES]
    with np.load(Path(args.data) / PATCHES) as stored:
        adata, pixels = adata[stored["obs_names"]].copy(), stored["patches"]
    fimp_sc.pp.spatial_graph(adata, library_key="section")
    section = adata.obs["section"].astype(str).to_numpy()
    test = section == np.unique(section)[seed]
    counts = sp.csr_matrix(adata.X)
    truth = log_normalize(counts, float(np.median(totals(counts[~test]))))[:, genes].toarray()

    def score(predicted: np.ndarray) -> dict[str, float]:
        found = np.sort(correlation(truth[test], predicted[test]))[::-1]
        return {"pearson": float(found.mean()), "pearson_50": float(found[:N_BEST].mean())}

    shown = np.where(test[:, None], np.nan, truth).astype(np.float32)
    graph = sp.csr_matrix(adata.obsp["spatial_connectivities"])
    return Spots(pixels, np.asarray(adata.obsm["spatial"], float), section, graph, shown), score


def correlation(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Correlation (g,) of the columns of (n, g); 0 for a gene that does not vary."""
    a, b = truth - truth.mean(0), predicted - predicted.mean(0)
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.divide((a * b).sum(0), size, out=np.zeros(len(size)), where=size > 1e-9)


# Features -------------------------------------------------------------------------------------------------------------


def position(posed: Spots, run: Run) -> np.ndarray:
    """Place in the section, and its squares."""
    x = posed.places.copy()
    for section in np.unique(posed.section):
        x[posed.section == section] -= x[posed.section == section].mean(0)
    x /= x.std()
    return np.column_stack([x, x**2, x[:, :1] * x[:, 1:]])


def colors(posed: Spots, run: Run) -> np.ndarray:
    """Mean, standard deviation and deciles of each channel."""
    flat = posed.pixels.reshape(len(posed.pixels), -1, 3).astype(np.float32)
    return np.column_stack([flat.mean(1), flat.std(1), *np.quantile(flat, [0.1, 0.5, 0.9], axis=1)])


def with_neighbors(posed: Spots, x: np.ndarray) -> np.ndarray:
    """Features of a spot and their mean over its neighbors."""
    return np.hstack([x, neighbor_mean(posed, x)])


def neighbor_mean(posed: Spots, x: np.ndarray) -> np.ndarray:
    """Mean of features over the neighbors of a spot."""
    return normalize(posed.graph, norm="l1") @ x


def random_edges(posed: Spots, run: Run) -> sp.csr_matrix:
    """As many neighbors of each spot as it has, drawn from its section; other ones when another section is left out."""
    rng = np.random.default_rng(run.seed)
    rows, columns = [], []
    for i, degree in enumerate(np.diff(posed.graph.indptr)):
        others = np.flatnonzero(posed.section == posed.section[i])
        columns.append(rng.choice(others[others != i], degree, replace=False))
        rows.append(np.full(degree, i))
    edges = np.concatenate(rows), np.concatenate(columns)
    return sp.csr_matrix((np.ones(len(edges[0]), np.float32), edges), shape=posed.graph.shape)


@torch.no_grad()
def change_weights(network: nn.Module, how: str, seed: int) -> None:
    """Draw the weights of a network anew, or deal out the numbers of each tensor to other places in it."""
    torch.manual_seed(seed)
    if how == "random":
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()
        return
    for weight in network.parameters():
        weight.copy_(weight.flatten()[torch.randperm(weight.numel())].view_as(weight))


def image_model(
    posed: Spots, run: Run, *, messages: bool, edges: str = "near", weights: str = "pretrained", self_loops: bool = True
) -> np.ndarray:
    """Class tokens (n, d) of a frozen image model, with messages between neighbors or without."""
    from fimp_sc.model import FIMP
    from fimp_sc.pp import images
    from fimp_sc.pretrained import load

    if run.checkpoint is None:
        raise MissingError("--checkpoint names no folder of a vision transformer")
    # What is drawn is drawn anew for each section that is left out.
    drawn = run.seed if edges == "random" or weights != "pretrained" else "any"
    files = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(run.checkpoint.iterdir()) if path.is_file()))
    name = f"he_{files.hexdigest()[:8]}_{weights}_{edges if messages else 'alone'}_{drawn}_{self_loops}"
    path = CACHE / f"{name}.npy"
    if path.exists() and not run.quick:
        return np.load(path)
    graph = random_edges(posed, run) if edges == "random" else posed.graph
    mdata = images(posed.pixels, adjacency=graph)
    FIMP.setup_mudata(mdata, modality="image")
    model = FIMP(mdata, foundation=load("vit", run.checkpoint), self_loops=self_loops)
    if weights != "pretrained":
        change_weights(model.module.network, weights, run.seed)
    x = model.get_latent_representation(messages=messages)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not run.quick:
        np.save(path, x)
    return x


# Methods --------------------------------------------------------------------------------------------------------------


def ridge(posed: Spots, run: Run, features: Callable[[Spots, Run], np.ndarray]) -> Fit:
    """Expression (n, 300) from a ridge regression on features."""
    x, train = features(posed, run), posed.train
    y, section = posed.expression[train], posed.section[train]
    losses = np.zeros(len(STRENGTHS))
    for left in np.unique(section):
        inner = section != left
        scaler = StandardScaler().fit(x[train][inner])
        fitted, checked = scaler.transform(x[train][inner]), scaler.transform(x[train][~inner])
        for i, strength in enumerate(STRENGTHS):
            model = Ridge(alpha=strength).fit(fitted, y[inner])
            losses[i] += ((model.predict(checked) - y[~inner]) ** 2).sum()
    strength = STRENGTHS[int(losses.argmin())]
    scaler = StandardScaler().fit(x[train])
    model = Ridge(alpha=strength).fit(scaler.transform(x[train]), y)
    return Fit(model.predict(scaler.transform(x)), note=f"strength {strength:g}, {x.shape[1]} features")


def network(posed: Spots, run: Run, kind: str) -> Fit:
    """Expression (n, 300) from a graph network on class tokens; the last training section chooses configuration."""
    x = StandardScaler().fit_transform(image_model(posed, run, messages=False)).astype(np.float32)
    sections = np.unique(posed.section[posed.train])
    checking = torch.from_numpy(posed.section == sections[-1])
    fitting = torch.from_numpy(posed.train) & ~checking
    mean = np.nanmean(posed.expression, 0)
    target, inputs = torch.from_numpy(posed.expression - mean), torch.from_numpy(x)
    edges, started, trainings = networks.edge_index(posed.graph), time.process_time(), []
    for lr in (1e-3, 3e-4):
        for dropout in (0.2, 0.6):
            torch.manual_seed(run.seed)
            model = networks.GraphNetwork(kind, x.shape[1], N_GENES, dropout=dropout)

            def loss(nodes: torch.Tensor, model: nn.Module = model) -> torch.Tensor:
                return functional.mse_loss(model(inputs, edges)[nodes], target[nodes])

            def losses(loss: Callable = loss) -> Iterable[torch.Tensor]:
                yield loss(fitting)

            how = {"lr": lr, "weight_decay": 1e-2, "epochs": 2 if run.quick else None}
            trainings.append(networks.fit(model, losses, lambda f=loss: f(checking).item(), **how))
    best = min(trainings, key=lambda training: training.best)
    with torch.no_grad():
        predicted = best.model(inputs, edges).numpy() + mean
    return replace(networks.chosen(trainings, best, started), values=predicted)


def joined(*parts: Callable[[Spots, Run], np.ndarray]) -> Callable[[Spots, Run], np.ndarray]:
    """Features side by side."""
    return lambda posed, run: np.hstack([part(posed, run) for part in parts])


ALONE = partial(image_model, messages=False)
FIMP = partial(image_model, messages=True)


def _around(features: Callable[[Spots, Run], np.ndarray], how: Callable) -> Callable[[Spots, Run], np.ndarray]:
    return lambda posed, run: how(posed, features(posed, run))


def _group(**features: Callable[[Spots, Run], np.ndarray]) -> dict[str, Callable]:
    return {name: partial(ridge, features=made) for name, made in features.items()}


GROUPS: dict[str, dict[str, Any]] = {
    "baselines": _group(
        **{
            "position": position,
            "colors": colors,
            "colors, own + neighbors": _around(colors, with_neighbors),
            "patch alone": ALONE,
            "neighbor mean": _around(ALONE, neighbor_mean),
            "patch + neighbor mean": _around(ALONE, with_neighbors),
        }
    ),
    "fimp": _group(
        **{
            "FIMP": FIMP,
            "FIMP, neighbors only": partial(FIMP, self_loops=False),
            "patch + FIMP": joined(ALONE, FIMP),
            "patch + FIMP, neighbors only": joined(ALONE, partial(FIMP, self_loops=False)),
            "patch + neighbor mean + FIMP": joined(_around(ALONE, with_neighbors), FIMP),
        }
    ),
    "controls": _group(
        **{
            "patch + FIMP, random edges": joined(ALONE, partial(FIMP, edges="random")),
            "random weights: patch alone": partial(ALONE, weights="random"),
            "random weights: patch + FIMP": joined(partial(ALONE, weights="random"), partial(FIMP, weights="random")),
            "shuffled weights: patch alone": partial(ALONE, weights="shuffled"),
            "shuffled weights: patch + FIMP": joined(
                partial(ALONE, weights="shuffled"), partial(FIMP, weights="shuffled")
            ),
        }
    ),
    "networks": {f"{kind} on patches": partial(network, kind=kind) for kind in ("MLP", "GCN", "GAT", "GPS")},
}

if __name__ == "__main__":
    default = ("baselines", "fimp", "controls", "networks")
    _harness.main("he", __doc__, ("her2st_C",), problem, GROUPS, default=default, more=(), n_folds=lambda data: 4)
