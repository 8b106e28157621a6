"""What the tools share: remembered models, silence, one log line."""

from __future__ import annotations

import gc
import logging
import re
import warnings
import weakref

import numpy as np
import pytest
import scanpy as sc

import fimp_sc
from fimp_sc.tl._call import _models


def test_model_is_that_of_the_last_call(tissue, quick) -> None:
    fimp_sc.tl.embed(tissue, **quick)
    first = fimp_sc.tl.get_model(tissue)
    assert first.classes == []
    fimp_sc.tl.annotate(tissue, "label", **quick)
    assert fimp_sc.tl.get_model(tissue).classes == ["B", "C", "T cell / naïve"]
    assert fimp_sc.tl.get_model(tissue) is fimp_sc.tl.get_model(tissue) is not first


def test_model_belongs_to_the_object_and_not_to_its_copies(tissue, quick) -> None:
    fimp_sc.tl.embed(tissue, **quick)
    for other in (tissue.copy(), tissue[:50], tissue[:50].copy()):
        with pytest.raises(KeyError, match=r"call fimp_sc\.tl\.embed\(adata\) first"):
            fimp_sc.tl.get_model(other)
    copied = fimp_sc.tl.embed(tissue, copy=True, **quick)
    assert fimp_sc.tl.get_model(copied) is not fimp_sc.tl.get_model(tissue)


def test_models_are_forgotten_with_their_object(tissue, quick) -> None:
    other = tissue.copy()
    gc.collect()  # objects of earlier tests
    before = len(_models._models)
    fimp_sc.tl.embed(other, **quick)
    assert len(_models._models) == before + 1
    del other
    gc.collect()
    assert len(_models._models) == before


def test_failed_call_keeps_the_former_model(tissue, quick) -> None:
    fimp_sc.tl.embed(tissue, **quick)
    model = fimp_sc.tl.get_model(tissue)
    with pytest.raises(KeyError):
        fimp_sc.tl.annotate(tissue, "missing", **quick)
    assert fimp_sc.tl.get_model(tissue) is model


def test_the_matrix_is_shared_and_never_copied_into_the_object(tissue, quick) -> None:
    data = tissue.X.data
    before = data.copy()
    fimp_sc.tl.embed(tissue, **quick)
    assert tissue.X.data is data
    np.testing.assert_array_equal(data, before)
    assert not [key for key in tissue.uns if key.startswith("_scvi")]
    assert not [key for key in tissue.obs if key.startswith("_scvi")]


def test_silent_on_request(tissue, quick, capfd, caplog) -> None:
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.NOTSET):
        warnings.simplefilter("always")
        fimp_sc.tl.embed(tissue, **quick)
        fimp_sc.tl.annotate(tissue, "label", **quick)
        fimp_sc.tl.impute(tissue, **quick)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""
    names = ("fimp_sc", "lightning", "scvi")
    assert [record for record in caplog.records if record.name.startswith(names)] == []
    assert [str(w.message) for w in caught if issubclass(w.category, UserWarning | FutureWarning)] == []


def test_one_line_says_what_is_done(tissue, quick, caplog) -> None:
    with caplog.at_level(logging.INFO):
        fimp_sc.tl.annotate(
            tissue, "label", **{**quick, "verbose": True, "train_kwargs": {"enable_progress_bar": False}}
        )
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("fimp_sc.tl")]
    assert len(ours) == 1
    pattern = r"100 cells, 30 genes, 6\.\d neighbors per cell, 3 classes; training on CPU, about \d+\.\d GB of memory\."
    assert re.fullmatch(pattern, ours[0]), ours[0]
    assert not [record for record in caplog.records if record.name.startswith("lightning")]


def test_progress_bar_shows_both_losses(tissue, quick, capfd) -> None:
    fimp_sc.tl.embed(tissue, **{**quick, "verbose": True})
    shown = "".join(capfd.readouterr())
    assert "Epoch 1/1" in shown
    assert "train_loss" in shown


def test_levels_and_handlers_of_the_user_are_restored(tissue, quick) -> None:
    names = ("fimp_sc", "lightning.pytorch", "scvi")
    before = [(logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in names]
    fimp_sc.tl.embed(tissue, **{**quick, "verbose": True, "train_kwargs": {"enable_progress_bar": False}})
    with pytest.raises(KeyError):
        fimp_sc.tl.embed(tissue, layer="missing", **{**quick, "verbose": True})
    assert before == [(logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in names]


def test_nothing_is_left_in_the_working_directory(tissue, quick, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    fimp_sc.tl.embed(tissue, **quick)
    assert list(tmp_path.iterdir()) == []


def test_real_section(shared_data, quick) -> None:
    """STARmap: graph, embedding and labels on part of a real section; labels better than the most frequent one."""
    import anndata as ad

    adata = ad.read_h5ad(shared_data / "starmap_visual_cortex_1020.h5ad")
    adata = adata[adata.obs["cell_type"] != "Unlabelled"]
    genes = np.asarray(adata.X.sum(axis=0)).ravel().argsort()[::-1][:100]
    frequent = adata.obs["cell_type"].value_counts().index[:4]
    adata = adata[adata.obs["cell_type"].isin(frequent), np.sort(genes)].copy()
    block = fimp_sc.data.spatial_tiles(adata.obsm["spatial"], 60, random_state=0)
    test = block % 4 == 0
    truth = adata.obs["cell_type"].astype(str)
    adata.obs["known"] = truth.where(~test)
    fimp_sc.tl.annotate(adata, "known", **{**quick, "max_epochs": 12, "train_kwargs": {"batch_size": 64}})
    accuracy = (adata.obs["fimp_known"].astype(str) == truth)[test].mean()
    assert accuracy > truth[test].value_counts(normalize=True).iloc[0] + 0.2


def test_keys_of_the_call_hold_for_a_given_model(tissue, quick, unchanged) -> None:
    """Whatever keys, or none, the model was trained with."""
    one = tissue[tissue.obs["section"] == "section_1"].copy()
    fimp_sc.tl.embed(one, **quick)
    how = {"model": fimp_sc.tl.get_model(one), "center": "batch", "accelerator": "cpu", "verbose": False}
    fimp_sc.tl.embed(tissue, library_key="section", key_added="centered", **how)
    setup = fimp_sc.tl.get_model(tissue).adata_manager.registry["setup_args"]
    assert setup["library_key"] == "section"
    rows = (tissue.obs["section"] == "section_2").to_numpy()
    together = tissue.copy()
    del together.uns["centered"]
    fimp_sc.tl.embed(together, key_added="together", **how)
    assert np.abs(tissue.obsm["centered"] - together.obsm["together"])[rows].max() > 1e-3
    alone = tissue[rows].copy()
    fimp_sc.tl.embed(alone, **how)
    np.testing.assert_allclose(tissue.obsm["centered"][rows], alone.obsm["X_fimp"], rtol=1e-3, atol=1e-4)
    joined = tissue.copy()
    del joined.obsp["spatial_connectivities"]
    joined.obsm["spatial"][joined.obs["section"] == "section_2", 0] -= 1000  # over each other
    with pytest.warns(UserWarning, match="library_key='section'"):
        fimp_sc.pp.spatial_graph(joined)
    with unchanged(joined), pytest.raises(ValueError, match="join samples"):
        fimp_sc.tl.embed(joined, library_key="section", **how)


def test_scale_of_the_call_holds_for_a_given_model(tissue, quick) -> None:
    fimp_sc.tl.embed(tissue, input_scale="counts", **quick)
    logged = tissue.copy()
    sc.pp.normalize_total(logged, target_sum=1e4)
    sc.pp.log1p(logged)
    how = {"model": fimp_sc.tl.get_model(tissue), "accelerator": "cpu", "verbose": False}
    fimp_sc.tl.embed(logged, input_scale="log", key_added="again", **how)
    np.testing.assert_allclose(logged.obsm["again"], tissue.obsm["X_fimp"], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="counts"):
        fimp_sc.tl.embed(logged, input_scale="auto", **how)


def test_another_model_is_trained_where_the_one_before_had_other_settings(tissue, quick) -> None:
    fimp_sc.tl.embed(tissue, random_state=3, **quick)
    first = fimp_sc.tl.get_model(tissue)
    how = {"accelerator": "cpu", "verbose": False}
    for same in ({}, {"max_epochs": 1}, {"random_state": 3}):
        fimp_sc.tl.impute(tissue, **same, **how)
        assert fimp_sc.tl.get_model(tissue) is first
    fimp_sc.tl.attention(tissue, "label", n_permutations=10, random_state=4, **how)
    assert fimp_sc.tl.get_model(tissue) is first
    fimp_sc.tl.impute(tissue, max_epochs=2, **how)
    second = fimp_sc.tl.get_model(tissue)
    assert (second.random_state, len(second.history["train_loss"])) == (3, 2)
    assert second.module.network.width == first.module.network.width
    fimp_sc.tl.impute(tissue, random_state=5, **how)
    third = fimp_sc.tl.get_model(tissue)
    assert (third.random_state, len(third.history["train_loss"])) == (5, 2)


def test_epochs_may_be_among_the_arguments_of_training(tissue, quick) -> None:
    quick = quick | {"train_kwargs": quick["train_kwargs"] | {"max_epochs": quick.pop("max_epochs")}}
    fimp_sc.tl.embed(tissue, **quick)
    first = fimp_sc.tl.get_model(tissue)
    how = {"accelerator": "cpu", "verbose": False}
    fimp_sc.tl.impute(tissue, max_epochs=1, **how)
    assert fimp_sc.tl.get_model(tissue) is first
    fimp_sc.tl.impute(tissue, max_epochs=2, **how)
    assert len(fimp_sc.tl.get_model(tissue).history["train_loss"]) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda a, k: fimp_sc.tl.embed(a, key_added=k),
        lambda a, k: fimp_sc.tl.impute(a, key_added=k),
        lambda a, k: fimp_sc.tl.annotate(a, "label", key_added=k),
        lambda a, k: fimp_sc.tl.attention(a, "label", key_added=k),
        lambda a, k: fimp_sc.tl.gene_pairs(a, "label", key_added=k),
        lambda a, k: fimp_sc.tl.niches(a, 3, key_added=k),
        lambda a, k: fimp_sc.pp.spatial_graph(a, key_added=k),
    ],
)
def test_a_slash_in_the_name_of_results_is_refused(tissue, unchanged, call) -> None:
    with unchanged(tissue), pytest.raises(ValueError, match="has a slash"):
        call(tissue, "my/result")


def test_results_of_a_column_with_a_slash_have_none(tissue, quick, unchanged) -> None:
    tissue.obs["cell/type"] = tissue.obs.pop("label")
    fimp_sc.pp.spatial_graph(tissue)
    obs = {"fimp_cell_type", "fimp_cell_type_confidence"}
    with unchanged(tissue, obs=obs, obsm={"fimp_cell_type_probabilities"}, uns={"fimp_cell_type"}):
        fimp_sc.tl.annotate(tissue, "cell/type", **quick)


def test_values_are_freed_with_the_object(tissue, quick) -> None:
    """Also those that a given model was applied to; a model that someone holds keeps its own."""
    fimp_sc.tl.embed(tissue, **quick)
    model = fimp_sc.tl.get_model(tissue)
    alive = []
    for _ in range(2):
        section = tissue.copy()
        fimp_sc.tl.embed(section, model=model, accelerator="cpu", verbose=False)
        alive.append(weakref.ref(section.X))
        del section
    other = tissue.copy()
    fimp_sc.tl.embed(other, **quick)
    held = fimp_sc.tl.get_model(other)
    del other
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    assert held.get_latent_representation().shape == (100, 16)
