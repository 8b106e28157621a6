"""Several objects in one call: what one object of all of them gives, written to each."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import fimp_sc
from fimp_sc import tl
from fimp_sc.tl._call import _several as several

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
        (lambda a, b: ([], {}), ValueError, "Pass one AnnData object or more"),
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


def test_values_of_any_type_are_read_as_in_one_object(halves, quick) -> None:
    other = {name: adata.copy() for name, adata in halves.items()}
    tl.embed(halves, **quick)
    first, second = other.values()
    first.X = first.X.toarray().astype(np.float16)
    first.obs.index = pd.Index(range(first.n_obs))  # which anndata itself holds until it copies
    second.X = second.X.tocsc().astype(np.int64)
    first.obs["kit"] = "a"
    tl.embed(other, **quick)
    for name, adata in other.items():
        np.testing.assert_allclose(adata.obsm["X_fimp"], halves[name].obsm["X_fimp"], rtol=1e-4, atol=1e-5)


def test_views_become_objects_of_their_own_without_a_word(halves, quick) -> None:
    views = [adata[:40] for adata in halves.values()]
    tl.embed(views, **quick)
    again = [view[:35] for view in views]
    tl.niches(again, 2, n_seeds=2, verbose=False)
    assert all("fimp_niche" in view.obs for view in again)
    assert not any("X_fimp" in adata.obsm or "fimp_niche" in adata.obs for adata in halves.values())


def test_each_object_needs_genes_of_a_given_model(section, reference, unchanged) -> None:
    strange = section.copy()
    strange.var_names = [f"other_{gene}" for gene in strange.var_names]
    with unchanged(section), unchanged(strange), pytest.raises(ValueError, match="Of the object 'b': Only 0 of the 30"):
        tl.annotate({"a": section, "b": strange}, "label", model=reference, **HOW)


def test_what_is_uncertain_of_one_object_is_said_with_its_name(halves, quick) -> None:
    first, second = halves.values()
    second.var["feature_types"] = ["Gene Expression"] * 28 + ["Negative Control Probe"] * 2
    with pytest.warns(
        UserWarning, match=r"Of the object 'b': .*tells 2 'Negative Control Probe' from 28 genes"
    ) as told:
        tl.embed({"a": first, "b": second}, **quick)
    assert len(told) == 1


def test_objects_without_a_common_gene_are_told(halves, quick) -> None:
    first, second = halves.values()
    three = {"a": first[:, :20].copy(), "b": second[:, 10:].copy(), "c": second[:, :5].copy()}
    three["c"].var_names = [f"ENSG{i}" for i in range(5)]
    with pytest.warns(UserWarning, match="^'c' of 3 objects have no gene in common with any other"):
        tl.embed(three, **quick)


@pytest.mark.parametrize("tool", [tl.annotate, tl.gene_pairs])
def test_a_column_that_no_object_has_is_looked_for_in_all(halves, tool) -> None:
    halves["section_2"].obs["kind"] = "x"
    with pytest.raises(KeyError, match=r"'kinds' is not in adata.obs of any object .*'kind'"):
        tool(halves, "kinds", verbose=False)


def test_samples_of_two_objects_are_never_one(halves, quick) -> None:
    first, second = halves.values()
    first.obs["section"], second.obs["section"] = "b c", "c"
    with pytest.raises(ValueError, match=r"samples of one name.*\['a', 'a b'\]"):
        tl.embed({"a": first, "a b": second}, library_key="section", **quick)


@pytest.mark.parametrize("kind", ["sparse", "frame"])
def test_representations_of_any_kind_are_clustered_by_name_of_columns(kind) -> None:
    rng = np.random.default_rng(0)
    values = [6 * np.eye(3)[rng.integers(0, 3, 40)] * [1, 2, 3] + rng.normal(size=(40, 3)) for _ in range(2)]
    objects = [ad.AnnData(obs=pd.DataFrame(index=[f"{i}{k}" for k in range(40)])) for i in "ab"]
    for adata, own in zip(objects, values, strict=True):
        adata.obsm["rep"] = own
        adata.obsm["aside"] = sparse.csr_matrix(own)  # is not read
    how = {"smooth": 0, "n_seeds": 2, "verbose": False}
    tl.niches(objects, 3, use_rep="rep", **how)
    expected = [adata.obs["fimp_niche"].astype(str) for adata in objects]
    for adata, own in zip(objects, values, strict=True):
        adata.obsm["rep"] = sparse.csr_matrix(own) if kind == "sparse" else pd.DataFrame(own, adata.obs_names, [*"xyz"])
    if kind == "frame":
        objects[1].obsm["rep"] = objects[1].obsm["rep"][["z", "x", "y"]]
    tl.niches(objects, 3, use_rep="rep", **how)
    for adata, own in zip(objects, expected, strict=True):
        assert (adata.obs["fimp_niche"].astype(str) == own).all()
    if kind == "frame":
        objects[1].obsm["rep"] = objects[1].obsm["rep"].rename(columns={"z": "w"})
        with pytest.raises(ValueError, match=r"obsm\['rep'\] has other columns in some objects"):
            tl.niches(objects, 3, use_rep="rep", **how)
    objects[1].obsm["rep"] = values[1][:, :2]
    with pytest.raises(ValueError, match=r"other numbers of columns in some objects, \{'0': 3, '1': 2\}"):
        tl.niches(objects, 3, use_rep="rep", **how)


def test_niches_of_several_objects_are_a_reference_in_each_of_them(halves, quick, tmp_path) -> None:
    first, second = halves.values()
    second.obs_names = first.obs_names[: second.n_obs]  # names that another object has, too
    tl.embed([first, second], **quick)
    tl.niches([first, second], 4, n_seeds=2, verbose=False)
    other = first.copy()
    other.obsm["X_fimp"] = first.obsm["X_fimp"][::-1].copy()
    second.write_h5ad(tmp_path / "b.h5ad")
    found = []
    for reference in (first, second, ad.read_h5ad(tmp_path / "b.h5ad")):
        tl.niches(other, reference=reference, verbose=False, overwrite=True)
        found.append(other.obsm["fimp_niche_probabilities"])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], found[2], rtol=1e-6)
    # Of a niche without a cell in one of them, too.
    code = second.obs["fimp_niche"].cat.codes.to_numpy()
    assert [cell == "" for cell in second.uns["fimp_niche"]["mixture"]["typical"]] == [i not in code for i in range(4)]


def test_nothing_is_written_to_any_if_results_of_one_cannot_be_made(halves, quick, unchanged, monkeypatch) -> None:
    first, second = halves.values()
    made, make = [], several._results

    def fail(*arguments):
        made.append(make(*arguments))
        if len(made) == 2:
            raise MemoryError
        return made[-1]

    monkeypatch.setattr(several, "_results", fail)
    with unchanged(first), unchanged(second), pytest.raises(MemoryError):
        tl.embed([first, second], **quick)
    with pytest.raises(KeyError, match="No model is known"):
        tl.get_model(first)
