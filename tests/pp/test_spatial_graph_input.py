"""`fimp_sc.pp.spatial_graph`: what it refuses, and that nothing is changed then."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import squidpy
from scipy import sparse

from fimp_sc._errors import MissingKeyError
from fimp_sc.pp import spatial_graph


def make_adata(coordinates, library=None) -> ad.AnnData:
    coordinates = np.asarray(coordinates)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(len(coordinates))])
    if library is not None:
        obs["section"] = np.asarray(library)
    matrix = sparse.csr_matrix(np.ones((len(coordinates), 2), dtype=np.float32))
    return ad.AnnData(matrix, obs=obs, obsm={"spatial": coordinates}, uns={"kept": {"a": 1}})


def random_points(n) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 100, size=(n, 2))


def test_existing_graph_joining_samples_is_refused(assert_unchanged):
    adata = make_adata(random_points(30), np.arange(30) % 2)
    with pytest.warns(UserWarning, match="library_key='section'"):
        spatial_graph(adata)
    before = adata.copy()
    with pytest.raises(ValueError, match=r"join samples.*overwrite=True"):
        spatial_graph(adata, library_key="section")
    assert_unchanged(adata, before)


WRONG_PARAMETERS = [
    ({"method": "voronoi"}, ValueError, "method must be one of 'knn'.* found 'voronoi'"),
    ({"method": "radius"}, ValueError, "needs radius="),
    ({"method": "radius", "radius": 0}, ValueError, "positive"),
    ({"method": "radius", "radius": float("nan")}, ValueError, "finite"),
    ({"method": "radius", "radius": (3, 1)}, ValueError, "increasing"),
    ({"method": "radius", "radius": "near"}, TypeError, "'near'"),
    ({"method": "radius", "radius": (1, 2, 3)}, TypeError, "pair"),
    ({"radius": 3.0}, ValueError, "radius=3.0 only applies"),
    ({"method": "grid", "radius": 3.0}, ValueError, "radius=3.0 only applies"),
    ({"n_rings": 2}, ValueError, "n_rings=2 only applies"),
    ({"method": "delaunay", "n_neighbors": 3}, ValueError, "n_neighbors=3 only applies"),
    ({"method": "grid", "n_neighbors": 0}, ValueError, "n_neighbors=0 only applies"),
    ({"n_neighbors": -1}, ValueError, "n_neighbors must be .* at least 0, found -1"),
    ({"method": "grid", "n_rings": 0}, ValueError, "n_rings must be .* at least 1"),
    ({"n_neighbors": 2.5}, TypeError, "whole number of at least 0, found 2.5"),
    ({"n_neighbors": True}, TypeError, "whole number"),
    ({"n_neighbors": 20}, ValueError, r"adata has 20 cells, too few for n_neighbors=20.*n_neighbors=19\)\.$"),
    ({"method": "radius", "radius": 1e-9}, ValueError, "no edges: the median distance"),
    ({"spatial_key": "spatail"}, MissingKeyError, r"'spatail' is not in adata.obsm.*Did you mean 'spatial'"),
    ({"library_key": "sections"}, MissingKeyError, r"'sections' is not in adata.obs .*Did you mean 'section'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG_PARAMETERS)
def test_wrong_parameters_raise_and_change_nothing(arguments, error, message, assert_unchanged):
    adata = make_adata(random_points(20), ["a", "b"] * 10)
    before = adata.copy()
    with pytest.raises(error, match=message):
        spatial_graph(adata, **arguments)
    assert_unchanged(adata, before)


def _without_coordinates(adata):
    del adata.obsm["spatial"]


def _nan_coordinates(adata):
    adata.obsm["spatial"][[4, 7], 0] = [np.nan, np.inf]


def _missing_library(adata):
    adata.obs["section"] = adata.obs["section"].astype(object).where(np.arange(adata.n_obs) > 2)


def _small_library(adata):
    adata.obs["section"] = ["a"] * 17 + ["b"] * 3


def _one_cell_library(adata):
    adata.obs["section"] = ["a"] * 19 + ["b"]


def _one_dimension(adata):
    adata.obsm["spatial"] = adata.obsm["spatial"][:, :1]


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_without_coordinates, MissingKeyError, r"'spatial' is not in adata.obsm \(it holds no keys\)"),
        (_nan_coordinates, ValueError, "NaN or infinite for 2 of 20 cells, first 'cell4'"),
        (_missing_library, ValueError, r"missing \(NaN\) for 3 of 20 cells, first 'cell0'"),
        (
            _small_library,
            ValueError,
            r"'b' \(3 cells\), too few for n_neighbors=6.*n_neighbors=2, library_key=.section",
        ),
        (_one_cell_library, ValueError, r"'b' \(1 cell\).* in every sample: leave these cells out\.$"),
        (_one_dimension, ValueError, r"found \(20, 1\)"),
    ],
)
def test_unusable_objects_raise_and_are_unchanged(damage, error, message, assert_unchanged):
    adata = make_adata(random_points(20), ["a", "b"] * 10)
    damage(adata)
    before = adata.copy()
    with pytest.raises(error, match=message):
        spatial_graph(adata, library_key="section")
    assert_unchanged(adata, before)


def test_cells_on_a_line_cannot_be_triangulated():
    coordinates = np.column_stack([np.arange(20.0), np.arange(20.0) % 3])
    coordinates[10:, 1] = 0
    adata = make_adata(coordinates, ["a"] * 10 + ["b"] * 10)
    with pytest.raises(ValueError, match=r"'b' \(10 cells\) that lie on a line"):
        spatial_graph(adata, method="delaunay", library_key="section")
    assert not adata.obsp


def test_failure_inside_squidpy_leaves_the_object_alone(monkeypatch, assert_unchanged):
    def fail(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr(squidpy.gr, "spatial_neighbors_knn", fail, raising=False)
    adata = make_adata(random_points(20))
    before = adata.copy()
    with pytest.raises(RuntimeError, match="boom"):
        spatial_graph(adata)
    assert_unchanged(adata, before)


def test_not_anndata_and_no_cells():
    with pytest.raises(TypeError, match="found DataFrame"):
        spatial_graph(pd.DataFrame())
    with pytest.raises(ValueError, match="no cells"):
        spatial_graph(make_adata(random_points(5))[:0])
