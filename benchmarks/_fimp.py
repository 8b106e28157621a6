"""How the benchmarks call FIMP: public functions and default settings only."""

from __future__ import annotations

import argparse

import numpy as np


def prepare(adata, library_key: str | None, *, shuffle_seed: int | None = None):
    """Copy of `adata` with FIMP's spatial graph.

    With `shuffle_seed` the positions are permuted within each section first: the same graph joins random cells, which
    shows what the neighbours are worth.
    """
    import fimp_sc

    adata = adata.copy()
    if shuffle_seed is not None:
        rng = np.random.default_rng(shuffle_seed)
        xy = np.array(adata.obsm["spatial"])
        sections = np.zeros(adata.n_obs, int) if library_key is None else adata.obs[library_key].astype(str).to_numpy()
        for name in np.unique(sections):
            idx = np.flatnonzero(sections == name)
            xy[idx] = xy[rng.permutation(idx)]
        adata.obsm["spatial"] = xy
    fimp_sc.pp.spatial_graph(adata, library_key=library_key, overwrite=True)  # a part of a section needs its own
    return adata


def train(adata, args: argparse.Namespace, seed: int, **setup):
    """Train FIMP with its defaults on `adata`; `setup` goes to ``FIMP.setup_anndata``.

    ``args.model``, where a script sets it, holds arguments of the model other than its defaults.
    """
    from fimp_sc.model import FIMP

    FIMP.setup_anndata(adata, **setup)
    model = FIMP(adata, random_state=seed, **getattr(args, "model", {}))
    model.train(max_epochs=args.max_epochs, accelerator=args.accelerator)
    return model


def apply(model, adata):
    """The trained model bound to another section or a larger part of the same one; nothing is retrained."""
    from fimp_sc.model import FIMP

    return FIMP.load_query_data(adata, model)
