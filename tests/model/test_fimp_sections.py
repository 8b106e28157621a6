"""Saved models, and trained models on other sections."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from section_toys import other_section, restrict

from fimp_sc.data.validate._values import inspect_values
from fimp_sc.model import FIMP
from fimp_sc.model.registry import _fields


@pytest.mark.parametrize("layer", ["practical", "paper"])
def test_saved_models_are_the_same(tissue, make_model, train, tmp_path, layer: str) -> None:
    model = make_model(tissue, {"labels_key": "label", "library_key": "section"}, layer=layer, random_state=7)
    train(model, max_epochs=1)
    model.save(str(tmp_path / "model"))
    again = FIMP.load(str(tmp_path / "model"), adata=tissue, accelerator="cpu")
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())
    pd.testing.assert_frame_equal(again.predict(soft=True), model.predict(soft=True))
    np.testing.assert_array_equal(again.get_expression(), model.get_expression())
    assert again.is_trained
    assert again.random_state == 7
    np.testing.assert_array_equal(again.history["train_loss"], model.history["train_loss"])


def test_saved_beside_its_object(trained: FIMP, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"without cells: write these with adata\.write_h5ad\(file\), and pass"):
        trained.save(tmp_path / "model", save_anndata=True)
    trained.save(tmp_path / "model")
    trained.adata.write_h5ad(tmp_path / "cells.h5ad")
    again = FIMP.load(tmp_path / "model", ad.read_h5ad(tmp_path / "cells.h5ad"), accelerator="cpu")
    np.testing.assert_array_equal(again.get_latent_representation(), trained.get_latent_representation())


def gene_lists(genes: np.ndarray) -> dict[str, list[str]]:
    rng = np.random.default_rng(0)
    extra = [g for g in other_section().var_names if g not in set(genes)][:9]
    return {
        "same": list(genes),
        "permuted": list(rng.permutation(genes)),
        "subset": list(genes[5:30]),
        "extra": [*extra, *genes],
        "one": [genes[3]],
    }


def test_labels_of_a_query_are_those_that_it_has(trained: FIMP) -> None:
    """It needs none, but a column that is named for it must be there."""
    query = other_section()
    assert "label" not in query.obs
    FIMP.load_query_data(query, trained)
    query.obs["labels"] = "B"
    with pytest.raises(KeyError, match=r"'label' is not in adata\.obs.*'labels'.*Leave labels_key out"):
        FIMP.load_query_data(query, trained, labels_key="label")
    FIMP.load_query_data(query, trained, labels_key="labels")


@pytest.mark.parametrize("kind", ["same", "permuted", "subset", "extra"])
def test_sections_with_another_gene_list(trained: FIMP, kind: str) -> None:
    full = other_section()
    genes = gene_lists(trained.genes)[kind]
    query = restrict(full, genes)
    before = query.X.copy()
    bound = FIMP.load_query_data(query, trained)
    assert bound.is_trained
    z = bound.get_latent_representation()
    assert z.shape == (70, 16)
    assert np.isfinite(z).all()
    assert bound.classes == trained.classes
    np.testing.assert_array_equal(bound.genes, trained.genes)
    np.testing.assert_allclose(bound.predict(soft=True).sum(axis=1), 1, rtol=1e-5)
    assert bound.get_expression().shape == query.shape
    assert np.isfinite(bound.get_expression(genes=list(trained.genes))).all(), "also genes that are not measured"
    assert (before != query.X).nnz == 0
    np.testing.assert_allclose(trained.get_latent_representation(query.copy()), z, atol=1e-5)
    reference = FIMP.load_query_data(restrict(full, trained.genes), trained).get_latent_representation()
    if kind == "subset":
        assert np.abs(z - reference).max() > 1e-3
        assert np.corrcoef(z.ravel(), reference.ravel())[0, 1] > 0.7
    else:
        np.testing.assert_allclose(z, reference, atol=1e-4)


def test_an_object_is_registered_once(trained: FIMP, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    read = []
    monkeypatch.setattr(_fields, "inspect_values", lambda *a, **k: read.append(k["where"]) or inspect_values(*a, **k))
    with caplog.at_level(logging.INFO, logger="fimp_sc"):
        bound = FIMP.load_query_data(restrict(other_section(), list(trained.genes[::2])), trained)
        bound.get_latent_representation()
    assert read == ["adata.X"]
    assert caplog.text.count("genes are known to the model") == 1


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_query_data_from_a_folder(trained: FIMP, tmp_path, as_path) -> None:
    trained.save(str(tmp_path / "model"))
    query = other_section()
    bound = FIMP.load_query_data(query, as_path(tmp_path / "model"))
    np.testing.assert_array_equal(
        bound.get_latent_representation(), FIMP.load_query_data(query.copy(), trained).get_latent_representation()
    )


def test_reference_and_query_do_not_share_weights(trained: FIMP) -> None:
    bound = FIMP.load_query_data(other_section(), trained)
    before = trained.get_latent_representation()
    for parameter in bound.module.parameters():
        parameter.data.zero_()
    np.testing.assert_array_equal(trained.get_latent_representation(), before)


def test_section_without_labels_or_with_other_labels(trained: FIMP) -> None:
    query = other_section()
    assert "label" not in query.obs
    bound = FIMP.load_query_data(query, trained)
    predicted = bound.predict()
    query.obs["label"] = "something else"
    np.testing.assert_array_equal(FIMP.load_query_data(query, trained).predict(), predicted)


def test_section_without_shared_genes_is_an_error(trained: FIMP) -> None:
    query = other_section()
    query.var_names = [f"ENSG{i}" for i in range(query.n_vars)]
    with pytest.raises(
        ValueError, match=r"Only 0 of the 40 genes of the model are in adata\.var_names, with 0\.0 %.*ENSG0"
    ):
        FIMP.load_query_data(query, trained)
    with pytest.raises(ValueError, match=r"Only 0 of the 40 genes of the model"):
        trained.get_latent_representation(query)


@pytest.mark.parametrize("missing", ["graph", "library"])
def test_section_without_graph_or_library_is_an_error(trained: FIMP, missing: str) -> None:
    query = other_section()
    if missing == "graph":
        del query.obsp["spatial_connectivities"]
    else:
        del query.obs["section"]
    with pytest.raises(KeyError, match="spatial_connectivities" if missing == "graph" else "section"):
        trained.get_latent_representation(query)


def test_model_trained_on_log_values_fits_counts_of_the_same_cells(tissue, make_model, train) -> None:
    """`auto` resolves per object: both scales must end on the same values."""
    counts = tissue.copy()
    total = np.asarray(tissue.X.sum(axis=1))
    tissue.X = sparse.csr_matrix(np.log1p(tissue.X.toarray() / total * 1000.0).astype(np.float32))
    model = train(make_model(tissue), max_epochs=1)
    with pytest.warns(UserWarning, match="taken for counts, and the model was trained on log-normalized values"):
        found = model.get_latent_representation(counts)
    np.testing.assert_allclose(found, model.get_latent_representation(), atol=1e-3)


@pytest.mark.filterwarnings("ignore:`var_names` for the loaded:UserWarning")
def test_a_saved_model_reads_another_gene_list_by_name(trained: FIMP, tmp_path) -> None:
    """Also one that was bound to another section before, and one that is given another object."""
    trained.save(str(tmp_path / "model"))
    query = restrict(other_section(), gene_lists(trained.genes)["subset"][::-1])
    bound = FIMP.load_query_data(query.copy(), trained)
    expected = bound.get_latent_representation()
    loaded = FIMP.load(str(tmp_path / "model"), query.copy(), accelerator="cpu")
    np.testing.assert_array_equal(loaded.genes, trained.genes)
    np.testing.assert_allclose(loaded.get_latent_representation(), expected, atol=1e-5)
    bound.save(tmp_path / "bound")
    again = FIMP.load(tmp_path / "bound", query.copy(), accelerator="cpu")
    np.testing.assert_allclose(again.get_latent_representation(), expected, atol=1e-5)
    loaded = FIMP.load(str(tmp_path / "model"), trained.adata.copy(), accelerator="cpu")
    loaded.adata = query
    np.testing.assert_allclose(loaded.get_latent_representation(), expected, atol=1e-5)


def test_training_goes_on_from_the_history_of_the_reference(trained: FIMP) -> None:
    query = other_section()
    query.obs["label"] = np.resize(trained.classes, query.n_obs)
    bound = FIMP.load_query_data(query, trained)
    assert len(bound.history["train_loss"]) == 2
    bound.train(max_epochs=4, accelerator="cpu", enable_progress_bar=False, check_val_every_n_epoch=2)
    epochs = {name: list(curve.index) for name, curve in bound.history.items()}
    assert epochs["train_loss"] == [0, 1, 2, 3, 4, 5]
    assert epochs["validation_loss"] == [0, 1, 3, 5]
    assert bound.history["train_loss"].index.name == "epoch"
    assert len(trained.history["train_loss"]) == 2


def test_a_model_without_an_object_says_so(trained: FIMP, tmp_path) -> None:
    trained.save_pretrained(tmp_path / "model")
    model = FIMP.from_pretrained(tmp_path / "model", accelerator="cpu")
    for call in (model.train, model.get_latent_representation, model.predict, model.get_expression):
        with pytest.raises(ValueError, match=r"bound to no object.*FIMP\.load_query_data"):
            call()
