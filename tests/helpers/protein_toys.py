"""Cells with expression and proteins."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
from mudata import MuData
from scipy import sparse

import fimp_sc
from fimp_sc.data._modality import quiet_mudata

N_PROTEINS, N_GENES = 6, 40


def cells_with_proteins(n_obs: int = 120, seed: int = 0, *, shared: str | None = None) -> MuData:
    """Return the most expressed genes of the toy tissue ("rna") and proteins made from them ("protein"), both counts.

    A protein has Poisson counts whose mean is 20 plus 15 times the molecules of a few genes. Proteins that make up most
    of a total are steady, so that normalizing does not undo this. ``shared`` is the name that the first column of both
    tables gets. Cells lie in two sections side by side, with a graph in the expression.
    """
    rng = np.random.default_rng(seed)
    rna = fimp_sc.datasets.toy_tissue(n_obs=n_obs, random_state=seed)
    rna.obsm["spatial"][rna.obs["section"] == "section_2", 0] += 1000
    genes = np.sort(np.asarray(rna.X.sum(0)).ravel().argsort()[::-1][:N_GENES])
    rna = rna[:, genes].copy()
    molecules = rna.X.toarray()
    level = 20 + 15 * molecules[:, : 3 * N_PROTEINS].reshape(n_obs, N_PROTEINS, 3).sum(2)
    steady = np.full((n_obs, 2), 1500.0)
    counts = rng.poisson(np.concatenate([level, steady], axis=1)).astype(np.float32)
    names = [*(f"CD{i}" for i in range(N_PROTEINS)), "IgG", "CD45"]
    protein = ad.AnnData(sparse.csr_matrix(counts), pd.DataFrame(index=rna.obs_names), pd.DataFrame(index=names))
    if shared is not None:
        for table in (rna, protein):
            table.var_names = [shared, *table.var_names[1:]]
    fimp_sc.pp.spatial_graph(rna, n_neighbors=4)
    with quiet_mudata(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of mudata, about names that both tables have
        return MuData({"rna": rna, "protein": protein})
