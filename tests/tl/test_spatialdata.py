"""Tables of SpatialData, the container of Xenium, MERSCOPE and Visium HD data."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

import fimp_sc

pytestmark = pytest.mark.filterwarnings("ignore")
spatialdata = pytest.importorskip("spatialdata", reason="comes with squidpy")


def test_results_are_written_to_the_table_and_survive_zarr(tissue, quick, tmp_path) -> None:
    sdata = spatialdata.SpatialData(tables={"cells": spatialdata.models.TableModel.parse(tissue)})
    tissue = sdata["cells"]
    fimp_sc.tl.embed(sdata["cells"], library_key="section", **quick)
    fimp_sc.tl.annotate(sdata["cells"], "label", library_key="section", **quick)
    fimp_sc.tl.impute(sdata["cells"], library_key="section", **quick)
    fimp_sc.tl.niches(sdata["cells"], 2)
    fimp_sc.tl.attention(sdata["cells"], "label", library_key="section", **quick)
    fimp_sc.tl.gene_pairs(sdata["cells"], "label", min_edges=5, min_support=1, verbose=False)
    assert sdata["cells"] is tissue
    sdata.write(tmp_path / "section.zarr")
    again = spatialdata.read_zarr(tmp_path / "section.zarr")["cells"]
    for key in ("X_fimp", "fimp_label_probabilities"):
        np.testing.assert_array_equal(again.obsm[key], tissue.obsm[key])
    for key in ("fimp_label", "fimp_niche"):
        np.testing.assert_array_equal(again.obs[key].astype(str), tissue.obs[key].astype(str))
    np.testing.assert_array_equal(again.layers["fimp"], tissue.layers["fimp"])
    np.testing.assert_array_equal(again.obsp["fimp_attention"].toarray(), tissue.obsp["fimp_attention"].toarray())
    assert list(again.uns["fimp_label"]["classes"]) == list(tissue.uns["fimp_label"]["classes"])
    for key, table in (("fimp_attention", "groups"), ("fimp_gene_pairs", "pairs")):
        found, kept = again.uns[key][table], tissue.uns[key][table]
        assert list(found.columns) == list(kept.columns)
        assert found.astype(str).to_numpy().tolist() == kept.astype(str).to_numpy().tolist()
    # What was stored is shown like what was computed.
    fimp_sc.pl.spatial(again, ["fimp_label", "fimp_niche", "fimp_label_confidence"], show=False)
    fimp_sc.pl.attention(again, show=False)
    fimp_sc.pl.gene_pairs(again, show=False)
    fimp_sc.pl.attention_arrows(again, 0, show=False)
    fimp_sc.pl.niche_composition(again, groupby="fimp_label", show=False)
    plt.close("all")


def test_a_table_read_from_zarr_is_as_good_as_any(tissue, reference, quick, tmp_path) -> None:
    """Its strings may be of another kind, and its columns categories."""
    spatialdata.SpatialData(tables={"cells": spatialdata.models.TableModel.parse(tissue)}).write(tmp_path / "s.zarr")
    read = spatialdata.read_zarr(tmp_path / "s.zarr")["cells"]
    for adata in (read, tissue):
        fimp_sc.tl.annotate(adata, "label", model=reference, library_key="section")
        fimp_sc.tl.impute(adata, model=reference, genes=list(tissue.var_names[:3]), library_key="section")
    np.testing.assert_array_equal(read.obsm["fimp_label_probabilities"], tissue.obsm["fimp_label_probabilities"])
    np.testing.assert_array_equal(np.asarray(read.obsm["fimp"]), np.asarray(tissue.obsm["fimp"]))
    again = fimp_sc.tl.embed(read, library_key="section", copy=True, **quick)
    fimp_sc.tl.embed(tissue, library_key="section", **quick)
    np.testing.assert_allclose(again.obsm["X_fimp"], tissue.obsm["X_fimp"], atol=1e-5)


def test_the_container_itself_is_an_error_that_names_its_tables(tissue, quick) -> None:
    sdata = spatialdata.SpatialData(tables={"cells": spatialdata.models.TableModel.parse(tissue)})
    with pytest.raises(TypeError, match=r"found SpatialData: pass one of its tables, \['cells'\], .* sdata\['cells'\]"):
        fimp_sc.tl.embed(sdata, **quick)
    with pytest.raises(TypeError, match="found SpatialData without tables"):
        fimp_sc.pp.spatial_graph(spatialdata.SpatialData())
