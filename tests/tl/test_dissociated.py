"""Cells without places or neighbors: a graph without edges, a model without messages, and both ways between kinds."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import fimp_sc
from fimp_sc import tl
from fimp_sc.model import FIMP

HOW = {"accelerator": "cpu", "verbose": False}


@pytest.fixture
def cells(tissue) -> ad.AnnData:
    """The tissue, dissociated."""
    del tissue.obsm["spatial"]
    fimp_sc.pp.spatial_graph(tissue, n_neighbors=0)
    return tissue


@pytest.fixture
def trained(cells, quick) -> FIMP:
    tl.annotate(cells, "label", **quick)
    return tl.get_model(cells)


def test_the_way_in_is_named_where_nothing_looks_spatial(tissue, quick) -> None:
    del tissue.obsm["spatial"]
    way = r"dissociated tissue have no neighbors: fimp_sc.pp.spatial_graph\(adata, n_neighbors=0\)"
    for call in (tl.embed, fimp_sc.pp.spatial_graph, FIMP.setup_anndata):
        with pytest.raises(KeyError, match=way):
            call(tissue)
    tissue.obsm["X_centroids"] = np.zeros((tissue.n_obs, 2))
    with pytest.raises(KeyError) as error:
        tl.embed(tissue, **quick)
    assert "spatial_key=" in str(error.value)
    assert "dissociated" not in str(error.value)


def test_an_empty_graph_nobody_asked_for_is_an_error(tissue, quick) -> None:
    tissue.obsp["spatial_connectivities"] = sparse.csr_matrix((tissue.n_obs, tissue.n_obs))
    with pytest.raises(ValueError, match="no edges between nodes"):
        tl.embed(tissue, **quick)


def test_the_graph_says_in_a_file_too_that_it_is_empty(cells, tmp_path, recwarn) -> None:
    cells.write_h5ad(tmp_path / "cells.h5ad")
    again = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert again.obsp["spatial_connectivities"].nnz == again.obsp["spatial_distances"].nnz == 0
    FIMP.setup_anndata(again)
    model = FIMP(again)
    assert not model.messages
    assert not [w for w in recwarn if "no neighbors" in str(w.message)]
    with pytest.raises(ValueError, match="graph without edges leaves"):
        FIMP(again, self_loops=False)


def test_training_is_that_of_a_model_without_messages(tissue, quick) -> None:
    other = tissue.copy()
    fimp_sc.pp.spatial_graph(tissue, n_neighbors=0)
    tl.annotate(tissue, "label", **quick)
    tl.annotate(other, "label", **{**quick, "model_kwargs": quick["model_kwargs"] | {"messages": False}})
    key = "fimp_label_probabilities"
    np.testing.assert_array_equal(tissue.obsm[key], other.obsm[key])


def test_a_section_is_annotated_by_its_cells_alone(trained, section, tmp_path) -> None:
    trained.save(tmp_path / "model")
    shuffled = section.copy()
    shuffled.obsm["spatial"] = np.random.default_rng(0).permutation(section.obsm["spatial"])
    tl.annotate(section, "label", model=trained, **HOW)
    tl.annotate(shuffled, "label", model=tmp_path / "model", **HOW)
    assert section.obsp["spatial_connectivities"].nnz == 6 * section.n_obs
    key = "fimp_label_probabilities"
    np.testing.assert_allclose(section.obsm[key], shuffled.obsm[key], rtol=1e-4, atol=1e-6)
    genes = [gene for gene in trained.genes if gene not in section.var_names][:3]
    tl.impute(section, genes=genes, model=trained, **HOW)
    assert section.obsm["fimp"].shape == (section.n_obs, 3)
    assert (section.obsm["fimp"].std(0) > 0).all()


def test_a_spatial_model_reads_each_of_them_by_itself(reference, cells) -> None:
    some = cells[::3].copy()
    for adata in (cells, some):
        tl.annotate(adata, "label", model=reference, **HOW)
    key = "fimp_label_probabilities"
    np.testing.assert_allclose(cells.obsm[key][::3], some.obsm[key], rtol=1e-4, atol=1e-6)
    assert tl.get_model(cells).messages


def test_other_tools(cells, quick) -> None:
    tl.embed(cells, **quick)
    tl.niches(cells, 2, n_seeds=2, verbose=False)
    assert cells.obs["fimp_niche"].nunique() == 2
    with pytest.raises(ValueError, match="of 0 that join cells"):
        tl.attention(cells, "label", **quick)
    with pytest.raises(ValueError, match="of 0 that join cells"):
        tl.gene_pairs(cells, "label", verbose=False)
