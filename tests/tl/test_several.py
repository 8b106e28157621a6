"""Several objects in one call: what one object of all of them gives, written to each."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import fimp_sc
from fimp_sc import tl

HOW = {"accelerator": "cpu", "verbose": False}


@pytest.fixture
def halves(tissue) -> dict[str, ad.AnnData]:
    """The two sections of the tissue, as objects of their own."""
    return {name: tissue[tissue.obs["section"] == name].copy() for name in ("section_1", "section_2")}


@pytest.fixture
def whole(halves) -> ad.AnnData:
    """The same sections as one object."""
    return ad.concat(halves, label="section")


@pytest.fixture
def panels(halves) -> dict[str, ad.AnnData]:
    """Sections with genes of their own: 22 that both have, in another order, and four of each."""
    first, second = halves.values()
    return {"a": first[:, :26].copy(), "b": second[:, np.r_[29:25:-1, 0:22]].copy()}


def as_one(panels: dict[str, ad.AnnData]) -> ad.AnnData:
    """The panels as one object, in which NaN says what was not measured."""
    genes = list(dict.fromkeys(gene for adata in panels.values() for gene in adata.var_names))
    tables = {name: adata.to_df().reindex(columns=genes) for name, adata in panels.items()}
    one = ad.AnnData(pd.concat(tables.values()).astype(np.float32))
    one.obs["sample"] = np.repeat(list(tables), [len(table) for table in tables.values()])
    for column in ("label", "cell_type"):
        one.obs[column] = np.concatenate([adata.obs[column].astype(object) for adata in panels.values()])
    one.obsm["spatial"] = np.concatenate([adata.obsm["spatial"] for adata in panels.values()])
    return one


def test_objects_with_equal_genes_are_one_object_with_samples(halves, whole, quick, unchanged) -> None:
    tl.embed(whole, library_key="section", **quick)
    first, second = halves.values()
    written = {"obsm": {"X_fimp"}, "obsp": {"spatial_connectivities", "spatial_distances"},
               "uns": {"X_fimp", "spatial_neighbors"}}  # fmt: skip
    with unchanged(first, **written), unchanged(second, **written):
        assert tl.embed([first, second], **quick) is None
    found = np.concatenate([first.obsm["X_fimp"], second.obsm["X_fimp"]])
    np.testing.assert_array_equal(found, whole.obsm["X_fimp"])
    assert first.obsp["spatial_connectivities"].nnz == 6 * first.n_obs
    params = second.uns["X_fimp"]["params"]
    assert "library_key" not in params
    assert list(second.uns["X_fimp"]["objects"]) == ["0", "1"]
    assert tl.get_model(first) is tl.get_model(second)

    tl.niches(whole, 3, n_seeds=2, library_key="section", labels_key="cell_type", verbose=False)
    tl.niches([first, second], 3, n_seeds=2, labels_key="cell_type", verbose=False)
    niche = np.concatenate([first.obs["fimp_niche"].astype(str), second.obs["fimp_niche"].astype(str)])
    assert (niche == whole.obs["fimp_niche"].astype(str)).all()
    assert list(first.obs["fimp_niche"].cat.categories) == list(second.obs["fimp_niche"].cat.categories)
    table = whole.uns["fimp_niche"]["composition"]
    pd.testing.assert_frame_equal(second.uns["fimp_niche"]["composition"], table)


def test_genes_that_an_object_does_not_have_were_not_measured_there(panels, quick, recwarn, unchanged) -> None:
    written = {
        "obs": {"fimp_label", "fimp_label_confidence"},
        "obsm": {"fimp_label_probabilities"},
        "obsp": {"spatial_connectivities", "spatial_distances"},
        "uns": {"fimp_label", "spatial_neighbors"},
    }
    with unchanged(panels["a"], **written), unchanged(panels["b"], **written):
        tl.annotate(panels, "label", **quick)
    assert not [w for w in recwarn if "not measured" in str(w.message)], "it is known, not guessed"
    one = as_one(panels)
    with pytest.warns(UserWarning, match="They count as not measured"):
        tl.annotate(one, "label", library_key="sample", **quick)
    key = "fimp_label_probabilities"
    found = np.concatenate([adata.obsm[key] for adata in panels.values()])
    np.testing.assert_allclose(found, one.obsm[key], rtol=1e-4, atol=1e-6)
    assert list(panels["b"].obs["fimp_label"].cat.categories) == list(one.obs["fimp_label"].cat.categories)

    # The model of the call before serves, also for what only one of them measured.
    gene = panels["b"].var_names[0]
    assert gene not in panels["a"].var_names
    tl.impute(panels, genes=[gene], **HOW)
    assert tl.get_model(panels["a"]) is tl.get_model(panels["b"])
    tl.impute(one, genes=[gene], library_key="sample", **HOW)
    found = np.concatenate([adata.obsm["fimp"] for adata in panels.values()])
    np.testing.assert_allclose(found, one.obsm["fimp"], rtol=1e-4, atol=1e-6)


def test_imputation_of_all_genes_is_on_the_genes_of_each(panels, quick, caplog) -> None:
    tl.embed(panels, **quick)
    model = tl.get_model(panels["a"])
    with caplog.at_level(logging.INFO, logger="fimp_sc"):
        tl.impute(panels, accelerator="cpu")
    assert "Using the model of the call before" in caplog.text
    for adata in panels.values():
        record = adata.uns["fimp"]
        assert adata.layers["fimp"].shape == adata.shape
        assert list(record["genes"]) == list(record["measured"]) == list(adata.var_names)
        assert record["fraction"].sum() == pytest.approx(1, rel=1e-5)
        assert record["total"] < record["target_sum"]
    assert tl.get_model(panels["b"]) is model
    fimp_sc.pl.imputation(panels["a"], list(panels["a"].var_names[:2]), show=False)


def test_a_dissociated_reference_and_a_section_are_trained_together(halves, quick, recwarn) -> None:
    reference, section = halves.values()
    del reference.obsm["spatial"]
    fimp_sc.pp.spatial_graph(reference, n_neighbors=0)
    truth = section.obs.pop("label")
    found = tl.annotate([reference, section], "label", copy=True, **quick)
    assert not [w for w in recwarn if "no neighbors" in str(w.message)]
    assert "fimp_label" not in section.obs
    assert [type(adata) for adata in found] == [ad.AnnData, ad.AnnData]
    assert not found[1].obs["fimp_label"].isna().any()
    assert set(found[1].obs["fimp_label"]) <= set(truth.dropna()) | set(reference.obs["label"].dropna())
    assert tl.get_model(found[0]).messages


def test_a_model_is_applied_to_several(reference, section, tissue) -> None:
    alone = [section.copy(), tissue.copy()]
    for adata in alone:
        tl.annotate(adata, "label", model=reference, **HOW)
    found = tl.annotate({"a": section, "b": tissue}, "label", model=reference, copy=True, **HOW)
    assert list(found) == ["a", "b"]
    for adata, expected in zip(found.values(), alone, strict=True):
        key = "fimp_label_probabilities"
        np.testing.assert_allclose(adata.obsm[key], expected.obsm[key], rtol=1e-3, atol=1e-5)


def test_samples_and_batches_within_objects(tissue, quick) -> None:
    tissue.obs["kit"] = np.where(np.arange(tissue.n_obs) % 2, "x", "y")
    other = tissue[::2].copy()
    tl.embed([tissue, other], library_key="section", batch_key="kit", center="batch", **quick)
    setup = tl.get_model(other).adata_manager.adata.obs
    assert setup["fimp_library"].nunique() == 4
    assert setup["fimp_batch"].nunique() == 2
    params = tissue.uns["X_fimp"]["params"]
    assert (params["library_key"], params["batch_key"], params["center"]) == ("section", "kit", "batch")
    assert tl.get_model(other).adata_manager.adata.obs_names.is_unique


def test_pairs_of_genes_are_tested_in_all_of_them(quick) -> None:
    tissue = fimp_sc.datasets.toy_communication(n_obs=400, n_genes=20)
    halves = [tissue[tissue.obs["section"] == name].copy() for name in tissue.obs["section"].unique()]
    tl.gene_pairs(halves, "cell_type", n_permutations=10, verbose=False)
    one = ad.concat(halves)
    tl.gene_pairs(one, "cell_type", n_permutations=10, library_key="section", verbose=False)
    for adata in halves:
        pd.testing.assert_frame_equal(adata.uns["fimp_gene_pairs"]["pairs"], one.uns["fimp_gene_pairs"]["pairs"])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda a, b: ([], {}), ValueError, "Pass one object or more"),
        (lambda a, b: ([a, a], {}), ValueError, "'0' is there more than once"),
        (lambda a, b: ([a, "b.h5ad"], {}), TypeError, "Of the object '1': Expected an AnnData.*read_h5ad"),
        (lambda a, b: ({"a": a, "b": b}, {"layer": "counts"}), KeyError, "Of the object 'b': .*counts"),
        (lambda a, b: ([a, b], {"modality": "rna"}), ValueError, "modality= is for a MuData object"),
        (lambda a, b: ([a, b], {"max_epochs": 0}), ValueError, "max_epochs must be"),
        (lambda a, b: ([a, b], {"nothing": 0}), TypeError, "nothing"),
        (lambda a, b: ([a, b], {"key_added": "mine"}), ValueError, "Of the object '1': key_added='mine' would replace"),
        (lambda a, b: ([a, b[:, :0].copy()], {}), ValueError, "Of the object '1': adata has no genes"),
    ],
)
def test_nothing_is_written_when_one_of_them_cannot_be_used(halves, quick, unchanged, spoil, error, message) -> None:
    first, second = halves.values()
    first.layers["counts"] = first.X.copy()
    second.obsm["mine"] = np.zeros((second.n_obs, 2))
    given, arguments = spoil(first, second)
    with unchanged(first), unchanged(second), pytest.raises(error, match=message):
        tl.embed(given, **{**quick, **arguments})


def test_values_of_different_kinds_are_refused(halves, quick) -> None:
    halves["section_2"].X = halves["section_2"].X.log1p()
    with pytest.raises(ValueError, match=r"different kinds, \{'section_1': 'counts', 'section_2': 'log'\}"):
        tl.embed(halves, **quick)


def test_embeddings_of_different_models_are_not_clustered_together(halves, quick) -> None:
    first, second = halves.values()
    tl.embed(first, **quick)
    with pytest.raises(KeyError, match=r"Of the object '1': 'X_fimp' is not in .*embed\(\[a, b\]\)"):
        tl.niches([first, second], 2)
    tl.embed(second, **quick)
    with pytest.raises(ValueError, match="made by 2 models"):
        tl.niches([first, second], 2)
    tl.embed(second, model=tl.get_model(first), **HOW)
    tl.niches([first, second], 2, n_seeds=2, verbose=False)
    assert first.obs["fimp_niche"].cat.categories.equals(second.obs["fimp_niche"].cat.categories)


def test_objects_in_files_are_refused(halves, quick, tmp_path) -> None:
    first, second = halves.values()
    second.write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(ValueError, match=r"Of the object '1': its expression is not in memory.*to_memory\(\)"):
        tl.embed([first, ad.read_h5ad(tmp_path / "b.h5ad", backed="r")], **quick)
