"""Features without labels, by methods of others: PCA, BANKSY's features, scVI and scVIVA, alone and with neighbors.

Nothing is tuned: every method has the one configuration below, as FIMP has its defaults. scVI is trained once for each
data set and seed. Its latent is kept in ``results/.cache``, since every method runs in a process of its own;
`Fit.training_s` and `Fit.epochs` are those of the training, whether it ran now or before.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler, normalize

from _baselines import fit_pca, spatial_features
from _common import log_normalize, neighbors, sections, totals
from _harness import Fit, Method, Run
from _smoothing import averaged

if TYPE_CHECKING:
    from _problems import Embedding

N_NEAREST = 10  # of the means of PCs
N_RING = 6  # of the repeated and the nested means: the first ring of a hexagonal grid
N_GENES = 2000  # variable genes of BANKSY-style, scVI and scVIVA; all of them where there are fewer
BANKSY = {"mean": 15, "gradient": 30, "components": 20}  # neighbors of the two terms; components of the PCA
SCVI = {"n_latent": 10, "n_layers": 1, "gene_likelihood": "nb"}
SCVI_EPOCHS, SCVI_PATIENCE = 100, 10
N_CLUSTERS, N_NICHE = 10, 20  # of scVIVA: clusters in place of cell types; neighbors of a niche
SCVIVA_EPOCHS = 60
CACHE = Path(__file__).resolve().parent / "results" / ".cache"
CODE = Path(__file__).read_bytes()  # a latent is not kept across changes of this file


def spatial(problem: Embedding, k: int) -> sp.csr_matrix:
    """Graph of the `k` nearest cells of the same section, (n_obs, n_obs) binary CSR."""
    return neighbors(np.asarray(problem.adata.obsm["spatial"], float), k, sections(problem.adata, problem.library_key))


def own_and_hops(features: np.ndarray, graph: sp.csr_matrix, hops: int) -> np.ndarray:
    """A cell's own features beside the means over the cells exactly 1, 2, … `hops` edges away, (n_obs, d * (hops + 1)).

    A cell without cells that far away has zeros there.
    """
    graph = (graph + graph.T).astype(bool).astype(np.float32)
    nearer = sp.eye(graph.shape[0], dtype=np.float32, format="csr")
    parts, ring = [features], nearer
    for _ in range(hops):
        reached = ((ring @ graph) > 0).astype(np.float32)
        ring = sp.csr_matrix(reached - reached.multiply(nearer))
        ring.eliminate_zeros()
        nearer = ((nearer + ring) > 0).astype(np.float32)
        parts.append(normalize(ring, norm="l1") @ features)
    return np.hstack(parts)


def log_values(problem: Embedding) -> sp.csr_matrix:
    """``log(1 + x)`` after scaling each cell to the median total, (n_obs, n_vars)."""
    return log_normalize(problem.adata.X, float(np.median(totals(problem.adata.X))))


def counts(problem: Embedding) -> sp.csr_matrix:
    """Values rounded to whole numbers, (n_obs, n_vars) float32 CSR.

    Counts stay what they are. The volume-normalized values of MERFISH, about one for each molecule, become
    pseudo-counts of the same scale; its 21 sequentially measured genes, most of whose values are far below one, are
    nearly lost, as they are to PCA of log-normalized values.
    """
    x = sp.csr_matrix(problem.adata.X, dtype=np.float32, copy=True)
    x.data = np.rint(x.data)
    x.eliminate_zeros()
    return x


def variable_genes(problem: Embedding) -> np.ndarray:
    """The `N_GENES` genes of most variable Pearson residuals; all with counts if there are fewer; (n_vars,) bool."""
    import anndata
    import scanpy as sc
    import torch

    x = counts(problem)
    seen = np.asarray(x.sum(axis=0)).ravel() > 0
    if seen.sum() > N_GENES:
        # Cells without counts have no residuals.
        part = anndata.AnnData(x[totals(x) > 0][:, seen])
        how = {"flavor": "pearson_residuals", "n_top_genes": N_GENES, "inplace": False}
        threads = torch.get_num_threads()
        seen[seen] = sc.experimental.pp.highly_variable_genes(part, **how)["highly_variable"].to_numpy()
        # Numba, which may share OpenMP with torch, sets the number of threads for both: several times slower training.
        torch.set_num_threads(threads)
    return seen


def pca(problem: Embedding, kind: str) -> Fit:
    """50 PCs of all genes ("own"), or what neighbors make of them."""
    x = log_values(problem)
    model = fit_pca(x)
    own = model.transform(x)
    if kind == "mean":
        values = averaged(own, spatial(problem, N_NEAREST))
    elif kind == "mean twice":
        values = averaged(own, spatial(problem, N_RING), times=2)
    else:
        values = spatial_features(own, spatial(problem, N_NEAREST))[kind]
    return Fit(np.asarray(values))


def banksy(problem: Embedding, lam: float) -> Fit:
    """PCA of own expression, neighborhood mean and azimuthal gradient, after Singhal et al. (2024), for one `lam`.

    The three matrices of standardized genes are weighted with ``sqrt(1 - lam)``, ``sqrt(lam * 2 / 3)`` and
    ``sqrt(lam / 3)``. The gradient is ``|sum_j w_ij exp(i phi_ij) (x_j - mean_i)|``, where phi is the direction in
    which neighbor j lies.
    """
    x = log_values(problem)[:, variable_genes(problem)].toarray()
    blocks = [np.sqrt(1 - lam) * StandardScaler().fit_transform(x)]
    if lam > 0:
        mean = kernel(problem, BANKSY["mean"])[0] @ x
        weights, phase = kernel(problem, BANKSY["gradient"])
        # The weights of a row sum to one, but not those turned by the phase.
        turned = weights.multiply(phase).tocsr()
        center = np.asarray(turned.sum(axis=1)) * (weights @ x)
        gradient = np.abs(turned @ x - center)
        blocks.append(np.sqrt(lam * 2 / 3) * StandardScaler().fit_transform(mean))
        blocks.append(np.sqrt(lam / 3) * StandardScaler().fit_transform(gradient.astype(np.float32)))
    joint = np.hstack(blocks).astype(np.float32)
    components = min(BANKSY["components"], min(joint.shape) - 1)
    return Fit(PCA(components, svd_solver="arpack", random_state=0).fit_transform(joint), note=f"lambda {lam}")


def kernel(problem: Embedding, k: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Weights of the `k` nearest cells, rows of sum one, and ``exp(i phi)`` of their directions; (n_obs, n_obs) CSR.

    Weights are ``exp(-(d / median d of the row)²)`` of the distance d.
    """
    xy = np.asarray(problem.adata.obsm["spatial"], float)
    graph = spatial(problem, k).tocoo()
    # `neighbors` gives every row exactly k entries, and tocoo keeps the order of rows.
    step = (xy[graph.col] - xy[graph.row]).reshape(len(xy), -1, 2)
    distance = np.linalg.norm(step, axis=2)
    scale = np.maximum(np.median(distance, axis=1, keepdims=True), 1e-12)
    weights = normalize(np.exp(-((distance / scale) ** 2)), norm="l1").ravel()
    phase = np.exp(1j * np.arctan2(step[..., 1], step[..., 0])).ravel()
    place = (graph.row, graph.col)
    return sp.csr_matrix((weights, place), shape=graph.shape), sp.csr_matrix((phase, place), shape=graph.shape)


def scvi_latent(problem: Embedding, run: Run) -> Fit:
    """Latent means of scVI, (n_obs, n_latent), from `CACHE` or trained now."""
    x = counts(problem)[:, variable_genes(problem)]
    how = (version("scvi-tools"), SCVI, SCVI_EPOCHS, SCVI_PATIENCE, run.seed, run.quick, run.accelerator, x.shape)
    key = hashlib.sha256(CODE + repr(how).encode())
    for part in (x.data, x.indices, x.indptr):
        key.update(part.tobytes())
    path = CACHE / f"scvi_{key.hexdigest()[:16]}.npz"
    if path.exists():
        with np.load(path) as kept:
            return Fit(
                kept["z"], int(kept["parameters"]), int(kept["epochs"]), float(kept["training_s"]), note="kept latent"
            )
    fit = train_scvi(x, run)
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    unfinished = CACHE / f"{os.getpid()}.npz"
    np.savez(unfinished, z=fit.values, parameters=fit.parameters, epochs=fit.epochs, training_s=fit.training_s)
    unfinished.replace(path)
    return fit


def train_scvi(x: sp.csr_matrix, run: Run) -> Fit:
    """Train scVI on counts (n_obs, n_genes), stopped early by the ELBO of 10 % of the cells."""
    import anndata
    import scvi

    adata = anndata.AnnData(x)
    scvi.settings.seed = run.seed
    scvi.model.SCVI.setup_anndata(adata)
    return trained(scvi.model.SCVI(adata, **SCVI), run, SCVI_EPOCHS, "elbo_validation")


def scvi_features(problem: Embedding, run: Run, kind: str) -> Fit:
    """scVI's latent ("own"), its mean over a cell and its neighbors, or the cell's own beside those of three hops."""
    fit = scvi_latent(problem, run)
    if kind == "mean":
        return replace(fit, values=averaged(fit.values, spatial(problem, N_RING)))
    if kind == "hops":
        return replace(fit, values=own_and_hops(fit.values, spatial(problem, N_RING), hops=3))
    return fit


def scviva(problem: Embedding, run: Run) -> Fit:
    """scVIVA's latent means, (n_obs, n_latent), with clusters of scVI's latent in place of cell types."""
    import anndata
    import pandas as pd
    import scvi

    latent = scvi_latent(problem, run).values
    lib = sections(problem.adata, problem.library_key)
    n = len(latent)
    clusters = KMeans(N_CLUSTERS, n_init=5, random_state=run.seed).fit_predict(latent)
    obs = {"cluster": [f"c{i}" for i in clusters], "section": np.repeat("0", n) if lib is None else lib}
    adata = anndata.AnnData(counts(problem)[:, variable_genes(problem)], pd.DataFrame(obs).astype("category"))
    adata.obs_names = problem.adata.obs_names
    adata.obsm["spatial"], adata.obsm["X_scVI"] = np.asarray(problem.adata.obsm["spatial"], float), latent
    keys = {"sample_key": "section", "labels_key": "cluster"}
    scvi.settings.seed = run.seed
    scvi.external.SCVIVA.preprocessing_anndata(adata, k_nn=N_NICHE, **keys)
    scvi.external.SCVIVA.setup_anndata(adata, **keys)
    model = scvi.external.SCVIVA(adata, n_latent=SCVI["n_latent"], gene_likelihood=SCVI["gene_likelihood"])
    return replace(trained(model, run, SCVIVA_EPOCHS, "elbo_validation"), note=f"{N_CLUSTERS} k-means clusters")


def trained(model: Any, run: Run, epochs: int, monitor: str) -> Fit:
    """Latent means of a model of scvi-tools, trained with early stopping."""
    for noisy in ("scvi", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    stop = {"early_stopping": True, "early_stopping_monitor": monitor, "early_stopping_patience": SCVI_PATIENCE}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    started = time.process_time()
    model.train(1 if run.quick else epochs, accelerator=run.accelerator, train_size=0.9, **stop, **quiet)
    seconds = time.process_time() - started
    trained = sum(p.numel() for p in model.module.parameters() if p.requires_grad)
    return Fit(np.asarray(model.get_latent_representation()), trained, len(model.history[monitor]), seconds)


EMBEDDING: dict[str, Method] = {
    "PCA": lambda problem, run: pca(problem, "own"),
    "PCA, mean of neighbors": lambda problem, run: pca(problem, "mean"),
    "PCA, mean of neighbors twice": lambda problem, run: pca(problem, "mean twice"),
    "PCA, own + neighbors": lambda problem, run: pca(problem, "own + neighbors"),
    "BANKSY-style, lambda 0.2": lambda problem, run: banksy(problem, 0.2),
    "BANKSY-style, lambda 0.8": lambda problem, run: banksy(problem, 0.8),
    "scVI": lambda problem, run: scvi_features(problem, run, "own"),
    "scVI, mean of neighbors": lambda problem, run: scvi_features(problem, run, "mean"),
    "scVI, own + 3 hops": lambda problem, run: scvi_features(problem, run, "hops"),
    "scVIVA, clusters of scVI": scviva,
}
