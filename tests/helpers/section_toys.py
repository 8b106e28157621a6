"""Sections beside the tissue that models are trained on."""

from __future__ import annotations

import anndata as ad

import fimp_sc


def other_section(n_obs=70, seed=5) -> ad.AnnData:
    adata = fimp_sc.datasets.toy_tissue(n_obs=n_obs, random_state=seed)
    adata = adata[:, adata.X.getnnz(axis=0) > 0].copy()
    fimp_sc.pp.spatial_graph(adata, library_key="section", n_neighbors=4)
    return adata


def restrict(adata: ad.AnnData, genes) -> ad.AnnData:
    return adata[:, list(genes)].copy()
