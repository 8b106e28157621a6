"""`tl.impute`: predicted expression, and which model makes it."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pytest
import torch
from scipy import sparse

import fimp_sc
from fimp_sc.model import FIMP


@pytest.fixture
def embedded(tissue, quick):
    """Tissue on which a model was trained."""
    fimp_sc.tl.embed(tissue, library_key="section", **quick)
    return tissue


AGAIN = {"library_key": "section", "accelerator": "cpu", "verbose": False}


def test_writes_a_layer_and_nothing_else(tissue, quick, unchanged) -> None:
    written = {"obsp": {"spatial_connectivities", "spatial_distances"}, "uns": {"fimp", "spatial_neighbors"}}
    with unchanged(tissue, layers={"fimp"}, **written):
        assert fimp_sc.tl.impute(tissue, **quick) is None
    layer = tissue.layers["fimp"]
    assert isinstance(layer, np.ndarray)
    assert layer.shape == tissue.shape
    assert layer.dtype == np.float32
    assert (layer >= 0).all()
    assert list(tissue.uns["fimp"]["genes"]) == list(tissue.var_names)
    assert tissue.uns["fimp"]["params"]["scale"] == "log"


def test_genes_limit_what_is_made(embedded, unchanged, trainings) -> None:
    fimp_sc.tl.impute(embedded, **AGAIN)
    genes = [embedded.var_names[7], embedded.var_names[2]]
    with unchanged(embedded, obsm={"few"}, uns={"few"}):
        fimp_sc.tl.impute(embedded, genes=genes, key_added="few", **AGAIN)
    assert embedded.obsm["few"].shape == (100, 2)
    assert embedded.obsm["few"].dtype == np.float32
    np.testing.assert_allclose(embedded.obsm["few"], embedded.layers["fimp"][:, [7, 2]], rtol=1e-5, atol=1e-5)
    assert list(embedded.uns["few"]["genes"]) == genes
    assert trainings == []


def test_one_gene_by_its_name(embedded) -> None:
    gene = embedded.var_names[7]
    fimp_sc.tl.impute(embedded, genes=gene, **AGAIN)
    assert embedded.obsm["fimp"].shape == (100, 1)
    assert list(embedded.uns["fimp"]["genes"]) == [gene]


def test_the_other_slot_holds_no_older_values(embedded) -> None:
    genes = list(embedded.var_names[:2])
    fimp_sc.tl.impute(embedded, **AGAIN)
    fimp_sc.tl.impute(embedded, genes=genes, **AGAIN)
    assert "fimp" not in embedded.layers
    scores = fimp_sc.metrics.imputation_scores(embedded, None, "fimp")
    assert list(scores["r2_per_gene"].index) == genes
    fimp_sc.tl.impute(embedded, **AGAIN)
    assert "fimp" not in embedded.obsm
    assert embedded.layers["fimp"].shape == embedded.shape


def test_what_others_hold_under_the_same_name_stays(embedded, unchanged) -> None:
    embedded.obsm["mine"] = np.zeros((100, 2))
    with unchanged(embedded), pytest.raises(ValueError, match=r"would replace adata\.obsm\['mine'\].*overwrite=True"):
        fimp_sc.tl.impute(embedded, key_added="mine", **AGAIN)


def test_record_of_how_measured_values_are_scaled(embedded, reference, section) -> None:
    fimp_sc.tl.impute(embedded, **AGAIN)
    record = embedded.uns["fimp"]
    assert record["input_scale"] == record["trained_scale"] == "counts"
    assert record["total"] == pytest.approx(record["target_sum"])
    assert list(record["measured"]) == list(embedded.var_names)
    fimp_sc.tl.impute(section, model=reference, accelerator="cpu", verbose=False)
    record = section.uns["fimp"]
    known = section.var_names[section.var_names.isin(reference.genes)]
    fraction = reference.module.gene_fraction.numpy()[np.isin(reference.genes, known)]
    assert record["target_sum"] == float(reference.module.target_sum)
    assert record["total"] == pytest.approx(record["target_sum"] * fraction.sum())
    assert list(record["measured"]) == list(known)
    assert record["fraction"].sum() == pytest.approx(1)


def test_scales(embedded) -> None:
    fimp_sc.tl.impute(embedded, **AGAIN)
    fimp_sc.tl.impute(embedded, scale="counts", key_added="counts", **AGAIN)
    total = np.asarray(embedded.X.sum(axis=1))
    expected = np.expm1(embedded.layers["fimp"]) * total / np.median(total)
    np.testing.assert_allclose(embedded.layers["counts"], expected, rtol=1e-4, atol=1e-4)


def test_model_of_embed_is_used_again(embedded, trainings, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="fimp_sc"):
        fimp_sc.tl.impute(embedded, library_key="section", accelerator="cpu")
    assert trainings == []
    assert "Using the model of the call before" in caplog.text
    np.testing.assert_allclose(
        embedded.layers["fimp"], fimp_sc.tl.get_model(embedded).get_expression(), rtol=1e-5, atol=1e-5
    )


def test_model_of_annotate_is_used_again(tissue, quick, trainings) -> None:
    fimp_sc.tl.annotate(tissue, "label", **quick)
    fimp_sc.tl.impute(tissue, accelerator="cpu", verbose=False)
    assert len(trainings) == 1


def replace_in_place(adata: ad.AnnData) -> None:
    adata.X.data[:20] += 3


def swap_cells(adata: ad.AnnData) -> None:
    adata.X = adata.X[np.roll(np.arange(adata.n_obs), 1)]


def swap_genes(adata: ad.AnnData) -> None:
    adata.X = sparse.csr_matrix(adata.X[:, ::-1])


def rename_genes(adata: ad.AnnData) -> None:
    adata.var_names = [f"g{i}" for i in range(adata.n_vars)]


def rewire(adata: ad.AnnData) -> None:
    for section in ("section_1", "section_2"):
        mine = np.flatnonzero(adata.obs["section"] == section)
        adata.obsm["spatial"][mine] = adata.obsm["spatial"][np.roll(mine, 3)]
    fimp_sc.pp.spatial_graph(adata, library_key="section", overwrite=True)


def rename_sections(adata: ad.AnnData) -> None:
    del adata.obsp["spatial_connectivities"]
    adata.obs["section"] = np.where(np.arange(adata.n_obs) < 20, "a", "b")


@pytest.mark.parametrize("change", [replace_in_place, swap_cells, swap_genes, rename_genes, rewire, rename_sections])
def test_stale_model_is_not_used(embedded, quick, trainings, change) -> None:
    change(embedded)
    fresh = embedded.copy()
    arguments = {key: value for key, value in quick.items() if not key.endswith("kwargs")}
    fimp_sc.tl.impute(embedded, library_key="section", **arguments)
    assert len(trainings) == 1
    fimp_sc.tl.impute(fresh, library_key="section", **arguments)
    np.testing.assert_array_equal(embedded.layers["fimp"], fresh.layers["fimp"])


@pytest.mark.parametrize("option", [{"batch_key": "region"}, {"layer": "counts"}])
def test_other_inputs_need_another_model(embedded, quick, trainings, option) -> None:
    embedded.layers["counts"] = embedded.X.copy()
    fimp_sc.tl.impute(embedded, **{**AGAIN, "max_epochs": 1, **option})
    assert len(trainings) == 1


def test_other_options_need_another_model(embedded, quick, trainings) -> None:
    fimp_sc.tl.impute(embedded, library_key="section", **quick)
    assert trainings == []
    fimp_sc.tl.impute(embedded, library_key="section", n_layers=2, **quick)
    assert len(trainings) == 1


def test_changing_what_is_not_used_keeps_the_model(embedded, trainings) -> None:
    embedded.obs["note"] = 1
    embedded.layers["other"] = embedded.X * 2
    fimp_sc.tl.impute(embedded, **AGAIN)
    assert trainings == []


def test_unknown_genes_of_a_section_are_nan_and_announced(reference, section, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="fimp_sc"):
        fimp_sc.tl.impute(section, model=reference, accelerator="cpu", verbose=False)
    known = section.var_names.isin(reference.genes)
    assert (~known).sum() == 10
    assert np.isnan(section.layers["fimp"][:, ~known]).all()
    assert np.isfinite(section.layers["fimp"][:, known]).all()
    assert "10 genes are not known to the model" in caplog.text


def test_genes_that_are_not_measured_can_be_predicted(reference, section) -> None:
    missing = [gene for gene in reference.genes if gene not in set(section.var_names)]
    assert missing
    fimp_sc.tl.impute(section, genes=missing, model=reference, accelerator="cpu", verbose=False)
    assert section.obsm["fimp"].shape == (section.n_obs, len(missing))
    assert np.isfinite(section.obsm["fimp"]).all()


def test_unknown_gene_that_is_asked_for_is_an_error(embedded, unchanged) -> None:
    with unchanged(embedded), pytest.raises(KeyError, match="Not among the 30 genes of the model"):
        fimp_sc.tl.impute(embedded, genes=["NOTHING"], **AGAIN)
    gene = embedded.var_names[3]
    with unchanged(embedded), pytest.raises(KeyError, match=rf"Did you mean '{gene}'\?"):
        fimp_sc.tl.impute(embedded, genes=[f"{gene}."], **AGAIN)


def test_unknown_gene_is_refused_before_training(tissue, quick, unchanged, trainings) -> None:
    with unchanged(tissue), pytest.raises(KeyError, match="Not among the 30 genes of the model"):
        fimp_sc.tl.impute(tissue, genes=["NOTHING"], **quick)
    assert trainings == []


def test_a_model_that_was_given_before_may_know_more_genes(reference, section, trainings) -> None:
    missing = [gene for gene in reference.genes if gene not in set(section.var_names)]
    fimp_sc.tl.embed(section, model=reference, accelerator="cpu", verbose=False)
    fimp_sc.tl.impute(section, genes=missing[:2], accelerator="cpu", verbose=False)
    assert trainings == []
    assert section.obsm["fimp"].shape == (section.n_obs, 2)


def _with_graph(section: ad.AnnData) -> ad.AnnData:
    adata = section.copy()
    adata.obs["section"] = "one"
    fimp_sc.pp.spatial_graph(adata)
    return adata


@pytest.mark.parametrize("genes", [None, "known"])
def test_diverged_model_writes_nothing(reference, section, unchanged, genes) -> None:
    broken = FIMP.load_query_data(_with_graph(section), reference)
    with torch.no_grad():
        broken.module.value_head.bias.fill_(torch.nan)
    genes = None if genes is None else list(reference.genes[:2])
    with unchanged(section), pytest.raises(FloatingPointError, match="not finite"):
        fimp_sc.tl.impute(section, genes=genes, model=broken, accelerator="cpu", verbose=False)


def test_unknown_scale_is_an_error(embedded, unchanged) -> None:
    with unchanged(embedded), pytest.raises(ValueError, match="scale must be one of"):
        fimp_sc.tl.impute(embedded, scale="raw", **AGAIN)


def test_survives_a_file(embedded, tmp_path) -> None:
    fimp_sc.tl.impute(embedded, **AGAIN)
    fimp_sc.tl.impute(embedded, genes=list(embedded.var_names[:3]), key_added="few", **AGAIN)
    embedded.write_h5ad(tmp_path / "tissue.h5ad")
    again = ad.read_h5ad(tmp_path / "tissue.h5ad")
    np.testing.assert_array_equal(again.layers["fimp"], embedded.layers["fimp"])
    np.testing.assert_array_equal(again.obsm["few"], embedded.obsm["few"])
    assert list(again.uns["few"]["genes"]) == list(embedded.var_names[:3])


def test_copy_and_view(tissue, quick, unchanged) -> None:
    with unchanged(tissue):
        result = fimp_sc.tl.impute(tissue, copy=True, **quick)
        view = tissue[:60]
        fimp_sc.tl.impute(view, **quick)
    assert result.layers["fimp"].shape == (100, 30)
    assert view.layers["fimp"].shape == (60, 30)
    assert list(view.obs_names) == list(tissue.obs_names[:60])


def test_log_input_counts_are_expm1(tissue, quick) -> None:
    tissue.X = tissue.X.log1p()
    fimp_sc.tl.impute(tissue, input_scale="log", **quick)
    fimp_sc.tl.impute(tissue, input_scale="log", scale="counts", key_added="counts", accelerator="cpu", verbose=False)
    np.testing.assert_allclose(tissue.layers["counts"], np.expm1(tissue.layers["fimp"]), rtol=1e-4, atol=1e-5)


def test_what_is_hidden_is_not_seen_in_training_either(tissue, quick, trainings) -> None:
    tissue.X = tissue.X.toarray()
    mask = np.random.default_rng(0).random(tissue.shape) < 0.2
    other = tissue.copy()
    other.X = np.where(mask, 7.0, tissue.X)
    how = {"library_key": "section"}
    fimp_sc.tl.embed(tissue, **how, **quick)
    for adata in (tissue, other):
        fimp_sc.tl.impute(adata, hidden=mask, **how, **quick)
    np.testing.assert_array_equal(tissue.layers["fimp"], other.layers["fimp"])
    n = len(trainings)
    again = {"library_key": "section", "accelerator": "cpu", "verbose": False}
    fimp_sc.tl.impute(other, hidden=mask, key_added="again", **again)
    fimp_sc.tl.impute(other, key_added="seen", **again)
    assert len(trainings) == n
    np.testing.assert_array_equal(other.layers["again"], other.layers["fimp"])
    fimp_sc.tl.impute(other, hidden=np.roll(mask, 1, axis=0), **again)
    assert len(trainings) == n + 1


def test_a_given_model_is_used_whatever_is_hidden(embedded, trainings) -> None:
    """And remembered for this object, unless it was trained on it and saw what is hidden."""
    mask = np.random.default_rng(0).random(embedded.shape) < 0.2
    other = embedded.copy()
    other.X = other.X * 2
    model = fimp_sc.tl.get_model(embedded)
    for adata in (embedded, other):
        fimp_sc.tl.impute(adata, hidden=mask, model=model, **AGAIN)
    fimp_sc.tl.impute(other, hidden=mask, key_added="again", **AGAIN)
    assert trainings == []
    np.testing.assert_array_equal(other.layers["again"], other.layers["fimp"])
    fimp_sc.tl.impute(embedded, hidden=mask, **AGAIN)
    assert len(trainings) == 1


def test_a_gene_that_is_named_twice(tissue, trainings, unchanged) -> None:
    gene = tissue.var_names[3]
    with unchanged(tissue), pytest.raises(ValueError, match=f"genes names '{gene}' more than once"):
        fimp_sc.tl.impute(tissue, genes=[gene, tissue.var_names[0], gene])
    assert trainings == []


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_something_must_be_visible(tissue, quick, unchanged, trainings, form) -> None:
    hidden = form(np.ones(tissue.shape, dtype=bool))
    with unchanged(tissue), pytest.raises(ValueError, match=r"hidden is True everywhere.*leave some values visible"):
        fimp_sc.tl.impute(tissue, hidden=hidden, **quick)
    assert not trainings
