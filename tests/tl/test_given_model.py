"""Keys of a given model go before those of earlier calls; what the user passes goes before both."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from protein_toys import cells_with_proteins

import fimp_sc
from fimp_sc import tl
from fimp_sc.model import FIMP

HOW = {"accelerator": "cpu"}


@pytest.fixture
def by_section(tissue, quick) -> FIMP:
    """A model that subtracts the mean of each section."""
    adata = tissue.copy()
    tl.embed(adata, library_key="section", center="batch", **quick)
    return tl.get_model(adata)


def said(caplog) -> str:
    return " ".join(r.getMessage() for r in caplog.records if r.name.startswith("fimp_sc.tl._call._inputs"))


def embedding(adata, model, **keys) -> np.ndarray:
    """Return what the model says of an object, without the tools."""
    return FIMP.load_query_data(adata, model, **keys).get_latent_representation()


def test_a_model_keeps_its_center_and_its_batches(tissue, by_section, tmp_path, caplog) -> None:
    by_section.save(tmp_path / "model")
    for model in (by_section, tmp_path / "model"):
        adata = tissue.copy()
        with caplog.at_level(logging.INFO, logger="fimp_sc"):
            tl.embed(adata, model=model, **HOW)
        assert "From the model: library_key='section', center='batch'" in said(caplog)
        caplog.clear()
        expected = embedding(adata, by_section)
        np.testing.assert_allclose(adata.obsm["X_fimp"], expected, rtol=1e-5, atol=1e-6)
        params = adata.uns["X_fimp"]["params"]
        assert (params["library_key"], params["center"]) == ("section", "batch")
        tl.embed(adata, model=model, center="training", verbose=False, key_added="other", **HOW)
        assert np.abs(adata.obsm["other"] - expected).max() > 1e-3


def test_a_model_goes_before_an_earlier_call(tissue, reference, quick, caplog) -> None:
    tissue.obs["kit"] = np.where(np.arange(tissue.n_obs) % 2, "a", "b")
    tl.embed(tissue, library_key="section", batch_key="kit", center="batch", **quick)
    with caplog.at_level(logging.INFO, logger="fimp_sc"):
        tl.embed(tissue, model=reference, key_added="given", **HOW)
    assert "From the model: library_key='section', center='training'" in said(caplog)
    np.testing.assert_allclose(tissue.obsm["given"], embedding(tissue, reference), rtol=1e-5, atol=1e-6)
    assert tissue.uns["given"]["params"]["center"] == "training"


def test_batches_of_an_earlier_call_are_not_those_of_a_model(tissue, by_section, quick) -> None:
    tissue.obs["kit"] = np.where(np.arange(tissue.n_obs) % 2, "a", "b")
    tl.embed(tissue, library_key="section", batch_key="kit", **quick)
    tl.embed(tissue, model=by_section, key_added="given", verbose=False, **HOW)
    np.testing.assert_allclose(tissue.obsm["given"], embedding(tissue, by_section), rtol=1e-5, atol=1e-6)
    tl.embed(tissue, model=by_section, batch_key="kit", key_added="kits", verbose=False, **HOW)
    expected = embedding(tissue, by_section, batch_key="kit")
    np.testing.assert_allclose(tissue.obsm["kits"], expected, rtol=1e-5, atol=1e-6)
    assert np.abs(tissue.obsm["given"] - expected).max() > 1e-3


def test_a_layer_is_that_of_the_model(tissue, quick, tmp_path, unchanged, caplog) -> None:
    tissue.layers["counts"] = tissue.X.copy()
    tissue.X = tissue.X * 3
    tl.embed(tissue, layer="counts", **quick)
    expected = tissue.obsm["X_fimp"]
    model = tl.get_model(tissue)
    assert model.adata_manager.registry["setup_args"]["layer"] == "counts"
    model.save(tmp_path / "model")
    again = FIMP.load(tmp_path / "model", tissue, accelerator="cpu")
    np.testing.assert_allclose(again.get_latent_representation(), expected, rtol=1e-5, atol=1e-6)
    other = tissue.copy()
    del other.uns["X_fimp"], other.obsm["X_fimp"]
    with caplog.at_level(logging.INFO, logger="fimp_sc"):
        tl.embed(other, model=tmp_path / "model", **HOW)
    assert "From the model: layer='counts'" in said(caplog)
    np.testing.assert_allclose(other.obsm["X_fimp"], expected, rtol=1e-5, atol=1e-6)
    other.X = other.layers.pop("counts")
    with unchanged(other), pytest.raises(KeyError, match=r"'counts'.*adata\.layers.*layer of the model.*layer='X'"):
        tl.embed(other, model=model, key_added="x", layer=None, verbose=False, **HOW)
    tl.embed(other, model=model, key_added="x", layer="X", verbose=False, **HOW)
    np.testing.assert_allclose(other.obsm["x"], expected, rtol=1e-5, atol=1e-6)


def test_what_the_model_reads_and_the_object_lacks_is_named(tissue, by_section, quick, unchanged, caplog) -> None:
    alone = tissue[tissue.obs["section"] == "section_2"].copy()
    del alone.obs["section"]
    with unchanged(alone), pytest.raises(KeyError, match=r"'section'.*adata\.obs.*library_key of the model.*= 'one'"):
        tl.embed(alone, model=by_section, verbose=False, **HOW)
    alone.obs["section"] = "one"
    tl.embed(alone, model=by_section, verbose=False, **HOW)
    tissue.obsm["places"] = tissue.obsm["spatial"][:, ::-1].copy()
    fimp_sc.pp.spatial_graph(tissue, spatial_key="places", key_added="near", n_neighbors=4)
    tl.embed(tissue, spatial_key="places", connectivities_key="near_connectivities", **quick)
    model, other = tl.get_model(tissue), tissue.copy()
    del other.uns["X_fimp"], other.obsm["X_fimp"]
    for slot, key, argument in (
        ("obsm", "places", "spatial_key"), ("obsp", "near_connectivities", "connectivities_key")
    ):  # fmt: skip
        kept = getattr(other, slot)[key]
        del getattr(other, slot)[key]
        with unchanged(other), pytest.raises(KeyError, match=rf"{key}.*{argument} of the model: pass {argument}="):
            tl.annotate(other, "label", model=model, verbose=False, **HOW)
        getattr(other, slot)[key] = kept
    tl.embed(other, model=model, verbose=False, **HOW)
    np.testing.assert_allclose(other.obsm["X_fimp"], tissue.obsm["X_fimp"], rtol=1e-5, atol=1e-6)


def test_one_sample_needs_no_column_of_samples(section, reference, caplog) -> None:
    """Where what is subtracted is the mean of training, samples are no matter for it."""
    assert reference.adata_manager.registry["setup_args"]["library_key"] == "section"
    with caplog.at_level(logging.INFO, logger="fimp_sc"):
        tl.embed(section, model=reference, **HOW)
    assert "read without: library_key of the model='section'" in said(caplog)
    assert "library_key" not in section.uns["X_fimp"]["params"]


def test_modalities_are_those_of_the_model() -> None:
    mdata = cells_with_proteins()
    small = {"max_epochs": 1, "verbose": False, "model_kwargs": {"n_latent": 16, "n_heads": 2}, **HOW}
    tl.embed(mdata, modality=["rna", "protein"], **small)
    model, other = tl.get_model(mdata), cells_with_proteins()
    tl.embed(other, model=model, verbose=False, **HOW)
    np.testing.assert_array_equal(other.obsm["X_fimp"], mdata.obsm["X_fimp"])
    other.mod["adt"] = other.mod.pop("protein")
    with pytest.raises(KeyError, match=r"'protein' is not in mdata\.mod.*'adt'.*reads \['rna', 'protein'\] together"):
        tl.embed(other, model=model, verbose=False, **HOW)
