from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import fimp_sc
from fimp_sc.model import FIMP

QUICK = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "verbose": False,
    "model_kwargs": {"n_latent": 16, "n_heads": 2, "n_tokens": 12},
    "train_kwargs": {"batch_size": 32},
}


def _freeze(value: Any) -> Any:
    """Deep copy of whatever an object may hold, with dtypes and formats."""
    if isinstance(value, pd.DataFrame | pd.Series | pd.Index):
        return value.copy(deep=True)
    if sparse.issparse(value):
        return (type(value), value.shape, *(np.array(x) for x in (value.data, value.indices, value.indptr)))
    if isinstance(value, np.ndarray):
        return np.array(value)
    if hasattr(value, "items"):
        return {key: _freeze(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_freeze(inner) for inner in value]
    return value


def _same(a: Any, b: Any, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b)
    elif isinstance(a, pd.Series):
        pd.testing.assert_series_equal(a, b)
    elif isinstance(a, pd.Index):
        pd.testing.assert_index_equal(a, b)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype, where
        np.testing.assert_array_equal(a, b, err_msg=where)
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            _same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


KINDS = ("obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns")


def snapshot(adata: ad.AnnData) -> dict[str, Any]:
    parts = {kind: _freeze(dict(getattr(adata, kind))) for kind in KINDS[2:]}
    return {
        "X": _freeze(adata.X), "obs": _freeze(adata.obs), "var": _freeze(adata.var), **parts,
        "names": [_freeze(adata.obs_names), _freeze(adata.var_names)], "view": adata.is_view,
    }  # fmt: skip


@pytest.fixture
def unchanged():
    """Context in which the object, bit for bit, must stay as it is, but for what is named."""

    @contextmanager
    def check(adata: ad.AnnData, **but: set[str]):
        before = snapshot(adata)
        yield
        after = snapshot(adata)
        for kind, keys in but.items():
            assert keys <= set(after[kind]), f"{kind} should have {keys}"
            after[kind] = (
                after[kind].drop(columns=list(keys))
                if isinstance(after[kind], pd.DataFrame)
                else {key: value for key, value in after[kind].items() if key not in keys}
            )
        _same(before, after, "adata")

    return check


@pytest.fixture
def quick() -> dict[str, Any]:
    """Arguments that make any tool train for a second on one core, quietly."""
    return dict(QUICK)


@pytest.fixture(scope="session")
def _tl_tissue() -> ad.AnnData:
    adata = fimp_sc.datasets.toy_tissue(n_obs=100, random_state=3)
    adata.obsm["spatial"][adata.obs["section"] == "section_2", 0] += 1000
    genes = np.asarray(adata.X.sum(axis=0)).ravel().argsort()[::-1][:30]
    adata = adata[:, np.sort(genes)].copy()
    labels = adata.obs["cell_type"].astype(object)
    frequent = labels.value_counts().index[:3]
    labels = labels.where(labels.isin(frequent))
    adata.obs["label"] = labels.replace({frequent[0]: "T cell / naïve", frequent[1]: "B", frequent[2]: "C"})
    adata.uns["something"] = {"nested": np.arange(3), "text": "kept"}
    return adata


@pytest.fixture
def tissue(_tl_tissue: ad.AnnData) -> ad.AnnData:
    """100 cells x 30 genes in two sections side by side without a graph; labels "B", "C", "T cell / naïve" and NaN."""
    return _tl_tissue.copy()


@pytest.fixture(scope="session")
def reference(_tl_tissue: ad.AnnData) -> FIMP:
    """A model with labels, trained on the tissue; not to be changed."""
    adata = _tl_tissue.copy()
    fimp_sc.tl.annotate(adata, "label", library_key="section", **QUICK)
    return fimp_sc.tl.get_model(adata)


@pytest.fixture
def section(_tl_tissue: ad.AnnData) -> ad.AnnData:
    """Another section without graph or labels: 60 cells; 20 genes shared with the tissue, 10 others."""
    adata = fimp_sc.datasets.toy_tissue(n_obs=60, random_state=8)
    adata = adata[:, adata.X.getnnz(axis=0) > 0]
    known = [g for g in _tl_tissue.var_names if g in set(adata.var_names)][:20]
    others = [g for g in adata.var_names if g not in set(_tl_tissue.var_names)][:10]
    adata = adata[:, [*others, *known[::-1]]].copy()
    adata = adata[np.asarray(adata.X.sum(axis=1)).ravel() > 0].copy()
    del adata.obs["section"]
    return adata


@pytest.fixture
def trainings(monkeypatch) -> list[FIMP]:
    """Models trained from here on."""
    done, train = [], FIMP.train

    def spy(self, *args, **kwargs):
        done.append(self)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(FIMP, "train", spy)
    return done
