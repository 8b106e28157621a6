"""Hidden expression with graph networks: trained to fill in what is hidden in the training cells."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from torch.nn import functional

import _networks as networks
from _baselines import fit_pca
from _common import DATA, folds, neighbors, sections
from _harness import Fit, Method, Run
from _problems import HIDDEN, Masked

CONFIGURATIONS = ((1e-3, 0.1, 1e-3), (1e-3, 0.4, 1e-3), (5e-4, 0.1, 1e-3))  # learning rate, dropout, weight decay
EPOCHS, PATIENCE, TRIAL = 150, 10, 15  # with the trials of the others 180 epochs at most
STEPS = 2  # of an epoch: each takes the loss on a random part of the genes
MAX_PARTS, PART = 2, 500  # parts that the genes are cut into, and the genes that each has at least
N_NEIGHBORS, N_PCS = 6, 64
FEATURES = ("expression", "PCs")
CHANCES = 2**20  # places in the random numbers at which an epoch's hidden entries may start


def validation_cells(adata, data: str, library_key: str | None, seed: int) -> np.ndarray:
    """Boolean (n_obs,): whole spatial blocks, about 1/8 of the cells."""
    from fimp_sc.data import spatial_tiles

    xy = np.asarray(adata.obsm["spatial"], float)
    blocks = spatial_tiles(xy, DATA[data].block_size, library=sections(adata, library_key), random_state=seed)
    return folds(blocks, 8, seed) == 0


def graph_of(adata, library_key: str | None) -> networks.Graph:
    """Six nearest neighbors in the same section."""
    lib = sections(adata, library_key)
    xy = np.asarray(adata.obsm["spatial"], float)
    return networks.Graph(neighbors(xy, N_NEIGHBORS, lib), lib)


class Inputs:
    """Log-normalized values around the gene means with 0 where hidden, or their scores on principal components.

    Cells are scaled by what is visible of them, so that their totals tell nothing of the rest.

    Means, components and the scale of the scores are those of the training cells; the scores are what is left of
    the sum of a cell's genes, so an entry that is hidden counts as the gene mean. All genes are in the order `genes`.

    Parameters
    ----------
    train
        (n, n_vars) values of the training cells.
    """

    def __init__(self, train: sp.csr_matrix, genes: np.ndarray, kind: str) -> None:
        self.genes = genes
        self.mean = np.asarray(train[:, genes].mean(axis=0), np.float32).ravel()
        linear = np.expm1(train[:, genes].toarray())
        self.target = float(np.median(linear.sum(axis=1)))
        self.share = torch.from_numpy((linear.mean(axis=0) / linear.mean(axis=0).sum()).astype(np.float32))
        self.components = None
        if kind == "PCs":
            components = fit_pca(train[:, genes], N_PCS).components_.T.astype(np.float32)
            scale = (self.center(train) @ components).std()
            self.components = torch.from_numpy(np.ascontiguousarray(components / scale))
        self.width = len(genes) if self.components is None else self.components.shape[1]

    def center(self, x: sp.csr_matrix) -> np.ndarray:
        """(n, n_vars) less the gene means, in the order `genes`."""
        return x[:, self.genes].toarray() - self.mean

    def __call__(self, centered: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Features (n, width) of centered values where `hidden`, boolean, are not seen."""
        mean = torch.from_numpy(self.mean)
        linear = torch.expm1(centered + mean).masked_fill_(hidden, 0)
        total, wanted = linear.sum(1), self.target * (1 - hidden.float() @ self.share)
        linear *= torch.where(total > 0, wanted / total.clamp(min=1e-12), 1.0)[:, None]
        shown = torch.log1p(linear).sub_(mean).masked_fill_(hidden, 0)
        return shown if self.components is None else shown @ self.components


class HiddenEntries:
    """Draws hidden entries: one long row of random numbers, read from another place each time.

    A fresh draw for each epoch would take longer than the network.
    """

    def __init__(self, shape: tuple[int, int], seed: int) -> None:
        self.rng, self.shape = np.random.default_rng(seed), shape
        level = round(HIDDEN * 2**16)
        size = shape[0] * shape[1]
        self.row = torch.from_numpy(self.rng.integers(0, 2**16, size + CHANCES, dtype=np.uint16) < level)
        self.size = size

    def draw(self) -> torch.Tensor:
        """Boolean (n, n_vars)."""
        start = int(self.rng.integers(CHANCES))
        return self.row[start : start + self.size].view(self.shape)


def train(
    kind: str,
    inputs: Inputs,
    centered: torch.Tensor,
    graph: networks.Graph,
    validation: np.ndarray,
    seed: int,
    quick: bool,
) -> tuple[networks.Network, Fit]:
    """Train on the cells that are not `validation`, (n,) boolean, which are seen but in no loss.

    Entries hide in all cells while training. For validation they hide in the validation cells alone, as they will in
    the test cells, and are the same each time.
    """
    n_genes = centered.shape[1]
    fitting, checking = torch.from_numpy(np.flatnonzero(~validation)), torch.from_numpy(np.flatnonzero(validation))
    n_parts = min(MAX_PARTS, max(1, n_genes // PART))
    bounds = np.linspace(0, n_genes, n_parts + 1).astype(int)
    parts = [(slice(a, b), centered[:, a:b][fitting]) for a, b in pairwise(bounds)]
    gone = torch.zeros(centered.shape, dtype=torch.bool)
    gone[checking] = HiddenEntries((len(checking), n_genes), seed + 1).draw()
    checked, wanted, truth = inputs(centered, gone), gone[checking], centered[checking]

    def training(lr: float, dropout: float, weight_decay: float) -> networks.Training:
        torch.manual_seed(seed)
        model = networks.Network(kind, inputs.width, n_genes, dropout=dropout, zero=True)
        draws = HiddenEntries(tuple(centered.shape), seed)

        def losses() -> Iterator[torch.Tensor]:
            hidden = draws.draw()
            features = inputs(centered, hidden)
            for part in draws.rng.permutation(np.arange(max(STEPS, n_parts)) % n_parts)[:STEPS]:
                genes, values = parts[part]
                h = model.encode(features, graph)[fitting]
                out = functional.linear(h, model.head.weight[genes], model.head.bias[genes])
                yield mean_square(out, values, hidden[:, genes][fitting])

        def validate() -> float:
            return mean_square(model.head(model.encode(checked, graph)[checking]), truth, wanted).item()

        return networks.Training(model, losses, validate, lr=lr, weight_decay=weight_decay, patience=PATIENCE)

    started = time.process_time()
    runs = [training(*c) for c in CONFIGURATIONS[: 1 if quick else None]]
    chosen = networks.choose(runs, TRIAL, 1 if quick else EPOCHS)
    fit = networks.summary(runs, chosen, CONFIGURATIONS[chosen], started)
    return runs[chosen].finish(), fit


def mean_square(predicted: torch.Tensor, truth: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the entries `where`, boolean; faster than picking these."""
    share = where.to(truth.dtype)
    return ((predicted - truth) * share).square().sum() / share.sum().clamp(min=1)


def method(kind: str, features: str) -> Method:
    """Hidden expression by one kind of network from "expression" or "PCs"."""

    def run_method(problem: Masked, run: Run) -> Fit:
        adata, test = problem.adata, problem.test
        part = adata[~test]
        genes = np.random.default_rng(run.seed).permutation(adata.n_vars)  # so that parts of them are like the whole
        x_train = sp.csr_matrix(part.X)
        inputs = Inputs(x_train, genes, features)
        validation = validation_cells(part, problem.data, problem.library_key, run.seed)
        graph = graph_of(part, problem.library_key)
        centered = torch.from_numpy(inputs.center(x_train))
        model, fit = train(kind, inputs, centered, graph, validation, run.seed, run.quick)
        hidden = torch.from_numpy(sp.csr_matrix(problem.hidden)[:, genes].toarray())
        shown = inputs(torch.from_numpy(inputs.center(sp.csr_matrix(adata.X))), hidden)
        with torch.no_grad():
            h = model.encode(shown, graph_of(adata, problem.library_key))
            predicted = model.head(h[torch.from_numpy(np.flatnonzero(test))]).numpy()
        fit.values = np.empty_like(predicted)
        fit.values[:, genes] = predicted + inputs.mean
        return fit

    return run_method


MASKED: dict[str, Method] = {
    f"{kind}, {features}": method(kind, features) for kind in networks.NETWORKS for features in FEATURES
}
