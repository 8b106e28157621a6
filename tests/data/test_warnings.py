"""Control probes among the genes, by their type or by their names."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import squidpy  # noqa: F401  # importing it warns

import fimp_sc
from fimp_sc.data._warnings import warn_control_features

GENES = ["ACTB", "NEGR1", "BLNK", "Blanka", "NegAtive", "CD4"]


def make_adata(names, **columns) -> ad.AnnData:
    return ad.AnnData(np.ones((3, len(names)), np.float32), var=pd.DataFrame(columns, index=list(names)))


def mended(adata, message) -> ad.AnnData:
    variables = {"adata": adata}
    exec(message.split("leave them out with ")[1].rstrip("."), variables)
    return variables["adata"]


@pytest.mark.parametrize("kind", [object, "category"])
def test_feature_types(kind):
    kinds = ["Gene Expression"] * 6 + ["Negative Control Probe"] * 2 + ["Unassigned Codeword"]
    adata = make_adata([*GENES, "p1", "p2", "q"], feature_types=pd.array(kinds, dtype=kind))
    with pytest.warns(
        UserWarning, match="tells 2 'Negative Control Probe', 1 'Unassigned Codeword' from 6 genes"
    ) as record:
        warn_control_features(adata)
    kept = mended(adata, str(record[0].message))
    assert list(kept.var_names) == GENES
    warn_control_features(kept)  # silent
    warn_control_features(make_adata(["CD3", "CD4"], feature_types=["Antibody Capture"] * 2))


@pytest.mark.parametrize(
    "name",
    [
        "NegControlProbe_00042",
        "NegControlCodeword_0500",
        "NegPrb3",
        "Negative01",
        "BLANK_0006",
        "Blank-12",
        "SystemControl5",
    ],
)
def test_names_of_control_probes(name):
    adata = make_adata([*GENES, name])
    with pytest.warns(UserWarning, match=rf"1 of 7 genes have names of control probes \('{name}'\)") as record:
        warn_control_features(adata)
    kept = mended(adata, str(record[0].message))
    assert list(kept.var_names) == GENES
    warn_control_features(kept)  # silent


def test_models_and_tools_warn_once_of_them(small_toy):
    small_toy.var["feature_types"] = ["Gene Expression"] * 58 + ["Negative Control Probe"] * 2
    with pytest.warns(UserWarning, match="'Negative Control Probe'") as record:
        fimp_sc.tl.embed(
            small_toy, library_key="section", max_epochs=1, accelerator="cpu", verbose=False,
            model_kwargs={"n_latent": 16, "n_heads": 2},
        )  # fmt: skip
    ours = [warning for warning in record if "Control" in str(warning.message)]
    assert [warning.filename for warning in ours] == [__file__]


@pytest.mark.filterwarnings("ignore")
def test_spatialdata_keeps_coordinates_with_its_shapes():
    spatialdata = pytest.importorskip("spatialdata", reason="comes with squidpy")
    geopandas = pytest.importorskip("geopandas", reason="comes with spatialdata")
    from shapely import Point

    places = np.random.default_rng(0).random((8, 2))
    order = np.random.default_rng(1).permutation(8)
    shapes = geopandas.GeoDataFrame({"geometry": [Point(*xy) for xy in places], "radius": 1.0}, index=np.arange(8))
    table = ad.AnnData(
        np.ones((8, 2), np.float32),
        obs=pd.DataFrame({"region": "cells", "cell_id": order}, index=[f"c{i}" for i in order]),
    )
    sdata = spatialdata.SpatialData(
        shapes={"cells": spatialdata.models.ShapesModel.parse(shapes)},
        tables={
            "table": spatialdata.models.TableModel.parse(
                table, region="cells", region_key="region", instance_key="cell_id"
            )
        },
    )
    adata = sdata["table"]
    with pytest.raises(KeyError, match="SpatialData keeps them with the shapes: ") as caught:
        fimp_sc.pp.spatial_graph(adata)
    line = str(caught.value).split("with the shapes: ")[1].rstrip(".")
    exec(line, {"adata": adata, "sdata": sdata, "spatialdata": spatialdata})
    np.testing.assert_allclose(adata.obsm["spatial"], places[order])
    fimp_sc.pp.spatial_graph(adata, n_neighbors=3)
