"""GraphST and STAGATE by their maintained packages, which are not installed with the benchmarks.

``pip install graphst-modern`` (AGPL-3.0) and ``pip install stagate-modern`` (MIT). Settings are the published ones, but
where a docstring says otherwise. A method whose package is missing is skipped.
"""

from __future__ import annotations

import contextlib
import io
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.decomposition import PCA

from _common import sections
from _embeddings import counts, spatial, variable_genes
from _harness import Fit, Method, Run

if TYPE_CHECKING:
    from anndata import AnnData

    from _problems import Embedding

GRAPHST_EPOCHS, GRAPHST_COMPONENTS = 600, 20
STAGATE_EPOCHS, STAGATE_NEIGHBORS, STAGATE_DIMS = 500, 6, (512, 30)


def graphst(problem: Embedding, run: Run) -> Fit:
    """GraphST (Long et al. 2023): 20 PCs of its reconstruction, as its authors cluster; (n_obs, 20).

    The variant for large data, with a sparse graph of three neighbors, since products with a dense matrix of all
    pairs of cells take too long on a CPU. Sections are moved apart, so that no edge joins them.
    """
    try:
        from GraphST.GraphST import GraphST
    except ImportError as error:
        raise ImportError(f"GraphST needs `pip install graphst-modern` ({error})") from error
    import torch

    device = torch.device("cuda" if run.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    adata = _counts(problem)
    adata.obsm["spatial"] = apart(problem)
    epochs = 1 if run.quick else GRAPHST_EPOCHS
    with quiet():
        model = GraphST(adata, device=device, random_seed=run.seed, epochs=epochs, datatype="Slide")
        started = time.process_time()
        values = model.train().obsm["emb"]
    seconds = time.process_time() - started
    components = min(GRAPHST_COMPONENTS, min(values.shape) - 1)
    values = PCA(components, svd_solver="arpack", random_state=0).fit_transform(values)
    return Fit(values, _size(model.model), epochs, seconds, note="sparse graph")


def stagate(problem: Embedding, run: Run) -> Fit:
    """STAGATE (Dong and Zhang 2022) on variable genes and six neighbors, (n_obs, 30).

    500 epochs, half of the published number, keep it within ten minutes on one thread.
    """
    try:
        from STAGATE_pyG import STAGATE, train_STAGATE
    except ImportError as error:
        raise ImportError(f"STAGATE needs `pip install stagate-modern` ({error})") from error
    import pandas as pd
    import scanpy as sc
    import torch

    adata = _counts(problem)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    adata = adata[:, variable_genes(problem)].copy()
    graph = spatial(problem, STAGATE_NEIGHBORS).tocoo()
    names = adata.obs_names.to_numpy()
    ends = {"Cell1": names[graph.row], "Cell2": names[graph.col]}
    adata.uns["Spatial_Net"] = pd.DataFrame(ends | {"Distance": 1.0})
    device = "cuda" if run.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    epochs = 1 if run.quick else STAGATE_EPOCHS
    started = time.process_time()
    with quiet():
        train_STAGATE(adata, list(STAGATE_DIMS), epochs, random_seed=run.seed, verbose=False, device=device)
    seconds = time.process_time() - started
    size = _size(STAGATE([adata.n_vars, *STAGATE_DIMS]))
    return Fit(np.asarray(adata.obsm["STAGATE"]), size, epochs, seconds)


def apart(problem: Embedding) -> np.ndarray:
    """Positions (n_obs, d) with each section moved so far along the first axis that none is near another."""
    xy = np.array(problem.adata.obsm["spatial"], float)
    lib = sections(problem.adata, problem.library_key)
    if lib is not None:
        xy[:, 0] += 10 * np.ptp(xy, axis=0).max() * np.unique(lib, return_inverse=True)[1]
    return xy


@contextlib.contextmanager
def quiet():
    """Keep progress bars and prints of the packages off the screen."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _counts(problem: Embedding) -> AnnData:
    import anndata

    adata = anndata.AnnData(counts(problem))
    adata.obs_names, adata.var_names = problem.adata.obs_names, problem.adata.var_names
    return adata


def _size(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


EMBEDDING: dict[str, Method] = {"GraphST": graphst, "STAGATE": stagate}
