"""Expression that a model predicts: of which genes, on which scale, and blind to what is hidden."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from section_toys import other_section, restrict

from fimp_sc.model import FIMP


def test_genes_are_columns_of_the_full_result(trained: FIMP) -> None:
    genes = list(trained.adata.var_names[[30, 2, 7]])
    np.testing.assert_allclose(
        trained.get_expression(genes=genes), trained.get_expression()[:, [30, 2, 7]], rtol=1e-5, atol=1e-5
    )


def test_unknown_genes_are_an_error_when_asked_for(trained: FIMP) -> None:
    with pytest.raises(KeyError, match=r"Not among the 40 genes of the model: \['NOTHING'\]"):
        trained.get_expression(genes=[trained.adata.var_names[0], "NOTHING"])


def test_unknown_genes_of_a_section_are_nan(trained: FIMP) -> None:
    query = other_section()
    expression = trained.get_expression(query)
    known = query.var_names.isin(trained.genes)
    assert np.isnan(expression[:, ~known]).all()
    assert np.isfinite(expression[:, known]).all()


def test_counts_are_scaled_to_the_total_of_each_cell(trained: FIMP) -> None:
    total = np.asarray(trained.adata.X.sum(axis=1)).ravel()
    target = float(trained.module.target_sum)
    assert target == np.median(total)
    expected = np.expm1(trained.get_expression()) * (total / target)[:, None]
    np.testing.assert_allclose(trained.get_expression(scale="counts"), expected, rtol=1e-4, atol=1e-5)


def test_prediction_is_near_what_was_measured(tissue, make_model, train) -> None:
    model = train(make_model(tissue), max_epochs=15, plan_kwargs={"lr": 1e-3})
    counts = tissue.X.toarray()
    logged = np.log1p(counts / counts.sum(1, keepdims=True) * np.median(counts.sum(1)))
    predicted = model.get_expression()
    assert np.corrcoef(predicted.mean(0), logged.mean(0))[0, 1] > 0.9
    error = np.mean((predicted - logged) ** 2)
    assert error < np.mean((logged.mean(0) - logged) ** 2), "better than the means of genes"


def test_log_input_counts_are_expm1_also_on_a_smaller_panel(tissue, make_model, train) -> None:
    tissue.X = tissue.X.log1p()
    model = train(make_model(tissue, {"input_scale": "log"}), max_epochs=1)
    for adata in (tissue, restrict(tissue, tissue.var_names[:25])):
        np.testing.assert_allclose(
            model.get_expression(adata, scale="counts"), np.expm1(model.get_expression(adata)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["csr", "dense"])
@pytest.mark.parametrize("scale", ["log", "counts"])
def test_hidden_entries_have_no_influence(tissue, make_model, train, kind: str, scale: str) -> None:
    """Change what is hidden: nothing moves, counts of the cell included."""
    if scale == "log":
        tissue.X = tissue.X.log1p()
    model = train(make_model(tissue, {"input_scale": scale, "batch_key": "section"}), max_epochs=1)
    mask = np.random.default_rng(0).random(tissue.shape) < 0.3
    hidden = sparse.csr_matrix(mask) if kind == "csr" else mask
    other = tissue.copy()
    other.X = sparse.csr_matrix(np.where(mask, 1.0 if scale == "log" else 9.0, tissue.X.toarray()).astype(np.float32))
    a, b = model.get_expression(tissue, hidden=hidden), model.get_expression(other, hidden=hidden)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        *(model.get_expression(adata, hidden=hidden, scale="counts") for adata in (tissue, other))
    )
    assert np.abs(a - model.get_expression(tissue)).max() > 1e-3, "hiding does hide"
    assert np.abs(model.get_expression(tissue) - model.get_expression(other)).max() > 1e-2


def test_hidden_of_another_shape_is_an_error(trained: FIMP) -> None:
    with pytest.raises(ValueError, match="hidden"):
        trained.get_expression(hidden=np.zeros((120, 39), dtype=bool))


PANELS = "ignore:Some of the .* genes are zero or NaN:UserWarning"


@pytest.fixture
def sections(tissue):
    """The tissue with at least one count of each gene in each cell, so that none can be zero throughout by chance."""
    tissue.obs["section"] = tissue.obs["section"].astype("category")
    tissue.X = tissue.X.toarray() + 1
    return tissue


def outer_join(adata, filled: float = 0.0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Values where the first section lacks the last ten genes and the second the first five; and the genes of each."""
    values = adata.X.copy()
    second = (adata.obs["section"] == adata.obs["section"].cat.categories[1]).to_numpy()
    values[np.ix_(~second, np.arange(30, 40))] = filled
    values[np.ix_(second, np.arange(5))] = filled
    names = list(adata.obs["section"].cat.categories)
    return values, {names[0]: adata.var_names[:30], names[1]: adata.var_names[5:]}


@pytest.mark.filterwarnings(PANELS)
@pytest.mark.parametrize("filled", [0.0, np.nan])
def test_a_query_of_joined_panels_equals_its_sections(sections, make_model, train, filled: float) -> None:
    model = train(make_model(sections, {"library_key": "section", "labels_key": "label"}), max_epochs=1)
    joined = sections.copy()
    values, genes = outer_join(sections, filled)
    joined.X = values if np.isnan(filled) else sparse.csr_matrix(values)
    found, expression, labels = (
        call(joined) for call in (model.get_latent_representation, model.get_expression, model.predict)
    )
    for name, own in genes.items():
        mine = (sections.obs["section"] == name).to_numpy()
        section = restrict(sections[mine], own)
        np.testing.assert_allclose(model.get_latent_representation(section), found[mine], atol=1e-4)
        np.testing.assert_allclose(model.get_expression(section, genes=list(model.genes)), expression[mine], atol=1e-4)
        np.testing.assert_array_equal(model.predict(section), labels[mine])


@pytest.mark.filterwarnings(PANELS)
def test_training_on_joined_panels_does_not_learn_that_genes_are_absent(sections, make_model, train) -> None:
    whole = sections.X.copy()
    logged = np.log1p(whole / whole.sum(1, keepdims=True) * np.median(whole.sum(1)))
    values, genes = outer_join(sections)
    sections.X = values
    model = train(make_model(sections, {"library_key": "section"}), max_epochs=10)
    predicted = model.get_expression()
    for name, own in genes.items():
        mine = (sections.obs["section"] == name).to_numpy()
        gone = ~sections.var_names.isin(own)
        error = np.square(predicted[np.ix_(mine, gone)].mean(0) - logged[np.ix_(mine, gone)].mean(0)).mean()
        assert error < 0.25 * np.square(logged[np.ix_(mine, gone)].mean(0)).mean(), "zeros would be off by all of it"


@pytest.mark.filterwarnings(PANELS)
def test_zeros_and_nan_of_joined_panels_train_the_same_model(sections, make_model, train) -> None:
    found = []
    for filled in (0.0, np.nan):
        adata = sections.copy()
        adata.X = outer_join(sections, filled)[0]
        found.append(train(make_model(adata, {"library_key": "section"}), max_epochs=1).get_expression())
    np.testing.assert_array_equal(*found)
