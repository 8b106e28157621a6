"""Modalities made by anybody: what is said about them, and what is wrong with them."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from mudata import MuData
from scipy import sparse

from fimp_sc._errors import MissingKeyError
from fimp_sc.data import describe_modality
from fimp_sc.data._modality import quiet_mudata


def adata_of(kind, n=6, **info):
    """Return a modality as somebody may make it by hand."""
    rng = np.random.default_rng(0)
    ring = sparse.csr_matrix((np.ones(n, np.float32), (np.arange(n), (np.arange(n) + 1) % n)), shape=(n, n))
    obs = pd.DataFrame({"run": pd.Categorical(["a"] * n)}, index=[f"{kind}_{n}_{i}" for i in range(n)])
    adata = ad.AnnData(obs=obs)
    if kind != "patch":
        var = pd.DataFrame(index=[f"{kind}_{n}_{i}" for i in range(9)])
        adata = ad.AnnData(X=rng.normal(size=(n, 9)).astype(np.float32), obs=obs, var=var)
    adata.obsp["spatial_connectivities"] = ring
    adata.uns["fimp_modality"] = {"kind": kind, **info}
    if kind == "patch":
        adata.obsm["pixels"] = rng.integers(0, 256, (n, 12)).astype(np.uint8)
        adata.uns["fimp_modality"]["image_shape"] = np.array([2, 2, 3])
    return adata


def mdata_of(**modalities):
    with quiet_mudata():
        return MuData(modalities)


COMMON = {"n_obs": 6, "n_edges": 6, "connectivities_key": "spatial_connectivities", "library_key": None}
OWN = {
    "signal": {"n_times": 9, "sampling_interval": None, "n_recordings": 1},
    "patch": {"image_shape": (2, 2, 3), "stored": "pixels"},
    "feature": {"n_features": 9},
}


@pytest.mark.parametrize("kind", ["signal", "patch", "feature"])
def test_the_least_that_is_needed(kind):
    mdata = mdata_of(one=adata_of(kind), other=adata_of("feature", 4))
    expected = {"modality": "one", "kind": kind, "n_dimensions": 0, **COMMON, **OWN[kind]}
    assert describe_modality(mdata, "one") == expected
    assert describe_modality(adata_of(kind)) == expected | {"modality": "adata"}


def test_all_that_may_be_said():
    adata = adata_of("signal", connectivities_key="mesh", library_key="run", sampling_interval=np.float64(2))
    adata.obsp["mesh"] = sparse.csr_matrix(np.kron(np.eye(2), np.ones((3, 3))))
    adata.obs["run"] = ["a"] * 3 + ["b"] * 3
    adata.obsm["spatial"] = np.zeros((6, 3))
    assert describe_modality(mdata_of(brain=adata), need_coordinates=True) == {
        "modality": "brain",
        "kind": "signal",
        "n_obs": 6,
        "n_edges": 12,  # the diagonal makes nobody a neighbor
        "connectivities_key": "mesh",
        "library_key": "run",
        "n_dimensions": 3,
        "n_times": 9,
        "sampling_interval": 2.0,
        "n_recordings": 2,
    }


def test_a_graph_may_be_left_out_where_none_is_needed():
    adata = adata_of("feature")
    del adata.obsp["spatial_connectivities"]
    description = describe_modality(mdata_of(a=adata), need_graph=False)
    assert (description["n_edges"], description["connectivities_key"]) == (0, None)


def test_features_may_be_in_a_layer():
    adata = adata_of("feature")
    adata.layers["scaled"] = adata.X
    adata.X = None
    assert describe_modality(mdata_of(a=adata))["n_features"] == 9
    del adata.layers["scaled"]
    with pytest.raises(ValueError, match="X is None"):
        describe_modality(mdata_of(a=adata))


def test_modality_must_be_there():
    mdata = mdata_of(brain=adata_of("signal"), image=adata_of("patch"))
    with pytest.raises(MissingKeyError, match=r"'brian' is not in mdata.mod .*'brain', 'image'.*Did you mean 'brain'"):
        describe_modality(mdata, "brian")
    with pytest.raises(ValueError, match=r"2 modalities: choose one with modality=, of \['brain', 'image'\]"):
        describe_modality(mdata)
    with pytest.raises(TypeError, match="found dict"):
        describe_modality({"brain": adata_of("signal")}, "brain")


def _no_info(adata):
    del adata.uns["fimp_modality"]


def _no_kind(adata):
    del adata.uns["fimp_modality"]["kind"]


def _odd_kind(adata):
    adata.uns["fimp_modality"]["kind"] = "sound"


def _no_graph(adata):
    del adata.obsp["spatial_connectivities"]


def _negative(adata):
    adata.obsp["spatial_connectivities"].data[2] = -1


def _no_library(adata):
    adata.uns["fimp_modality"]["library_key"] = "session"


def _joined(adata):
    adata.obs["run"] = ["a"] * 3 + ["b"] * 3
    adata.uns["fimp_modality"]["library_key"] = "run"


def _nan(adata):
    adata.X[4, 2] = np.nan


def _constant(adata):
    adata.X[3] = 5


def _sparse(adata):
    adata.X = sparse.csr_matrix(adata.X)


def _interval(adata):
    adata.uns["fimp_modality"]["sampling_interval"] = -1.0


def _nan_coordinates(adata):
    adata.obsm["spatial"] = np.full((6, 3), np.nan)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_no_info, MissingKeyError, "'fimp_modality' is not in .*pp.fmri.*{'kind': 'signal'}"),
        (_no_kind, MissingKeyError, "'kind' is not in "),
        (_odd_kind, ValueError, "is 'sound': it must be one of 'signal', 'patch', 'text', 'feature'"),
        (_no_graph, MissingKeyError, "Build the graph with"),
        (_negative, ValueError, "1 negative weights"),
        (_no_library, MissingKeyError, "'session' is not in adata.obs"),
        (_joined, ValueError, "2 edges that join different 'run'"),
        (_nan, ValueError, "1 of 6 signals are NaN or infinite, first that of node 'signal_6_4'"),
        (_constant, ValueError, "1 of 6 signals are constant, first that of node 'signal_6_3'"),
        (_sparse, TypeError, "dense array"),
        (_interval, ValueError, "positive seconds"),
        (_nan_coordinates, ValueError, "NaN or infinite for 6"),
    ],
)
def test_what_is_wrong_is_explained(damage, error, message):
    adata = adata_of("signal")
    damage(adata)
    with pytest.raises(error, match=message):
        describe_modality(mdata_of(brain=adata), "brain")


def test_coordinates_are_asked_for_where_they_are_needed():
    with pytest.raises(MissingKeyError, match=r"'spatial' is not in adata\.obsm"):
        describe_modality(mdata_of(brain=adata_of("signal")), need_coordinates=True)


def test_a_graph_of_all_modalities_is_not_that_of_one():
    adata = adata_of("feature")
    del adata.obsp["spatial_connectivities"]
    mdata = mdata_of(a=adata, b=adata_of("signal", 4))
    mdata.obsp["spatial_connectivities"] = sparse.identity(10, format="csr")
    with pytest.raises(MissingKeyError, match=r"one in mdata\.obsp, of 10 nodes, while the modality has 6"):
        describe_modality(mdata, "a")


def test_empty_modalities_are_refused():
    with pytest.raises(ValueError, match="no nodes"):
        describe_modality(adata_of("signal")[:0].copy())
    with pytest.raises(ValueError, match="no features"):
        describe_modality(adata_of("feature")[:, :0].copy())


def test_the_root_logger_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with quiet_mudata():
        pass
    assert logging.getLogger().handlers == []
