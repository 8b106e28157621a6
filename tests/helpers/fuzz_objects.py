"""Objects that the fuzzer calls functions with, and snapshots of what they hold."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

import fimp_sc
from fimp_sc.data._modality import quiet_mudata

QUICK = {"max_epochs": 1, "accelerator": "cpu", "verbose": False}


@cache
def _section() -> AnnData:
    rng = np.random.default_rng(0)
    n_obs, n_vars = 60, 24
    kind = rng.integers(0, 3, n_obs)
    rate = 0.5 + 3 * (kind[:, None] == np.arange(n_vars) % 3)
    adata = AnnData(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)))
    adata.obs_names = [f"cell{i}" for i in range(n_obs)]
    adata.var_names = [f"gene{i}" for i in range(n_vars)]
    adata.obs["type"] = pd.Categorical(np.array(["a", "b", "c"])[kind])
    adata.obs["known"] = pd.Categorical(np.where(rng.random(n_obs) < 0.3, "Unknown", adata.obs["type"].astype(str)))
    adata.obs["section"] = pd.Categorical(np.repeat(["one", "two"], n_obs // 2))
    adata.obs["area"] = rng.random(n_obs)
    adata.obs["batch"] = pd.Categorical(np.array(["x", "y"])[rng.integers(0, 2, n_obs)])
    adata.obsm["spatial"] = rng.random((n_obs, 2)) * 100
    adata.layers["counts"] = adata.X.copy()
    return adata


@cache
def _done() -> AnnData:
    """A section with results of all tools."""
    adata = _section().copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fimp_sc.tl.embed(adata, library_key="section", **QUICK)
        fimp_sc.tl.annotate(adata, "known", library_key="section", **QUICK)
        fimp_sc.tl.impute(adata, library_key="section", **QUICK)
        fimp_sc.tl.niches(adata, 3, library_key="section")
        fimp_sc.tl.attention(adata, "type", library_key="section", n_permutations=10, min_edges=1, **QUICK)
        fimp_sc.tl.gene_pairs(adata, "type", n_genes=4, n_permutations=10, min_edges=1, min_support=1, verbose=False)
    return adata


@cache
def _model() -> fimp_sc.model.FIMP:
    adata = _section().copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fimp_sc.tl.annotate(adata, "known", library_key="section", **QUICK)
    return fimp_sc.tl.get_model(adata)


def _copied(data: Any) -> Any:
    with quiet_mudata():
        return data.copy()


@cache
def _recordings() -> MuData:
    rng = np.random.default_rng(1)
    bold = rng.normal(size=(2, 6, 40)) * 20 + 1e3
    labels = {"lobe": ["front", "back", "side"] * 2}
    return fimp_sc.pp.fmri(bold, coordinates=rng.normal(size=(6, 3)), n_neighbors=2, labels=labels)


@cache
def _pictures() -> MuData:
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 255, (10, 8, 8, 3)).astype(np.uint8)
    labels = {"site": ["bright", "dark"] * 5}
    return fimp_sc.pp.images(pixels, coordinates=rng.random((10, 2)), n_neighbors=2, labels=labels)


@cache
def _joint() -> MuData:
    rng = np.random.default_rng(3)
    names, points = [f"n{i}" for i in range(24)], rng.random((24, 2))
    rna = AnnData(sparse.csr_matrix(rng.poisson(2, (24, 10)).astype(np.float32)), obs=pd.DataFrame(index=names))
    bold = AnnData(rng.normal(5, 2, (20, 12)).astype(np.float32), obs=pd.DataFrame(index=names[4:]))
    bold.uns["fimp_modality"] = {"kind": "signal"}
    rna.var_names, bold.var_names = [f"g{i}" for i in range(10)], [f"t{i}" for i in range(12)]
    with quiet_mudata():
        mdata = MuData({"rna": rna, "bold": bold})
    mdata.obs["kind"] = pd.Categorical(np.array(["one", "two"])[rng.integers(0, 2, 24)])
    mdata.obsm["spatial"] = points
    near = np.linalg.norm(points[:, None] - points, axis=2).argsort(1)[:, 1:4]
    mdata.obsp["spatial_connectivities"] = sparse.csr_matrix(
        (np.ones(near.size), (np.repeat(np.arange(24), 3), near.ravel())), shape=(24, 24)
    )
    return mdata


# Snapshots


def snapshot(data: Any) -> dict[str, str]:
    """Return a digest of everything in an object by its place; of what is no object, none."""
    found: dict[str, str] = {}
    if not isinstance(data, AnnData | MuData):
        return found
    parts = {"": data} | (dict(data.mod) if isinstance(data, MuData) else {})
    for name, part in parts.items():
        found[f"{name}|obs_names"], found[f"{name}|var_names"] = _digest(part.obs_names), _digest(part.var_names)
        for slot in ("obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns"):
            entries = getattr(part, slot, None)
            for key in [] if entries is None else [key for key in entries if key is not None]:
                # scvi-tools' own identifiers, as documented.
                if not str(key).startswith("_scvi"):
                    found[f"{name}|{slot}|{key}"] = _digest(entries[key])
        if isinstance(part, AnnData):
            found[f"{name}|X"] = _digest(part.X)
            found[f"{name}|raw"] = _digest(None if part.raw is None else part.raw.X)
    return found


def _digest(value: Any) -> str:
    hashed = hashlib.sha1()
    _feed(hashed, value)
    return hashed.hexdigest()


def _feed(hashed: Any, value: Any) -> None:
    if sparse.issparse(value):
        hashed.update(f"{value.format} {value.dtype} {value.shape}".encode())
        for part in ("data", "indices", "indptr", "row", "col", "offsets"):
            if isinstance(getattr(value, part, None), np.ndarray):
                hashed.update(np.ascontiguousarray(getattr(value, part)).tobytes())
    elif isinstance(value, np.ndarray):
        hashed.update(f"{value.dtype} {value.shape}".encode())
        hashed.update(repr(value.tolist()).encode() if value.dtype == object else np.ascontiguousarray(value).tobytes())
    elif isinstance(value, pd.DataFrame):
        hashed.update(repr(list(value.columns)).encode())
        for i in range(value.shape[1]):
            _feed(hashed, value.iloc[:, i])
    elif isinstance(value, pd.Series | pd.Index | pd.Categorical):
        hashed.update(f"{value.dtype!r} {list(value)!r}".encode())
        if isinstance(value, pd.Series):
            _feed(hashed, value.index)
    elif isinstance(value, Mapping):
        for key in value:
            hashed.update(repr(key).encode())
            _feed(hashed, value[key])
    elif hasattr(value, "shape") and hasattr(value, "__getitem__"):  # in a file
        hashed.update(repr(np.asarray(value[...] if not hasattr(value, "to_memory") else value.to_memory())).encode())
    else:
        hashed.update(repr(value).encode())
