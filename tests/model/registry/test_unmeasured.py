"""Another object with genes that no panel of its section had: zeros of an outer join are not measured values."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from fimp_sc import tl
from fimp_sc.model import FIMP
from fimp_sc.model.registry._unmeasured import MOST_SILENT

# A fifth of the counts is missing, measured or not.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the cells are unlike all cells:UserWarning")

QUICK = {"max_epochs": 1, "accelerator": "cpu", "verbose": False, "model_kwargs": {"n_latent": 16, "n_heads": 2}}
SAID = "are zero for every cell here, as genes are that a panel lacks after an outer join"


@pytest.fixture
def panels(small_toy):
    """A model of two sections, the second of which lacks every fifth gene; and the second, with zeros for these."""
    lacked = np.arange(small_toy.n_vars) % 5 == 0
    values = small_toy.X.toarray()
    values[np.ix_((small_toy.obs["section"] == "section_2").to_numpy(), lacked)] = 0
    small_toy.X = values
    first, second = (small_toy[small_toy.obs["section"] == f"section_{i}"].copy() for i in (1, 2))
    tl.embed(first, **QUICK)
    return tl.get_model(first), second, second[:, ~lacked].copy()


def embedded(adata: ad.AnnData, model: FIMP) -> np.ndarray:
    tl.embed(adata, model=model, verbose=False)
    return adata.obsm["X_fimp"]


@pytest.mark.parametrize("way", ["tool", "query", "model"])
def test_zeros_of_an_outer_join_are_as_good_as_no_gene(panels, way):
    model, zeros, without = panels
    ways = {
        "tool": lambda adata: embedded(adata, model),
        "query": lambda adata: FIMP.load_query_data(adata, model).get_latent_representation(),
        "model": lambda adata: model.get_latent_representation(adata),
    }
    expected = embedded(without, model)
    if way != "tool":
        zeros.obsp["spatial_connectivities"] = without.obsp["spatial_connectivities"]
    with pytest.warns(UserWarning, match=SAID) as record:
        found = ways[way](zeros)
    assert sum(SAID in str(warning.message) for warning in record) == 1
    np.testing.assert_array_equal(found, expected)


def test_they_stay_so_when_another_model_has_read_the_object(panels):
    model, zeros, _ = panels
    zeros.obsp["spatial_connectivities"] = sparse.identity(zeros.n_obs, format="csr")[::-1].tocsr()
    with pytest.warns(UserWarning, match=SAID):
        bound = FIMP.load_query_data(zeros, model)
    before = bound.get_latent_representation()
    with pytest.warns(UserWarning, match=SAID):
        np.testing.assert_array_equal(model.get_latent_representation(zeros), before)
    np.testing.assert_array_equal(bound.get_latent_representation(), before)


def test_they_are_imputed_as_genes_that_are_not_there(panels):
    model, zeros, without = panels
    genes = list(set(zeros.var_names) - set(without.var_names))
    with pytest.warns(UserWarning, match=SAID):
        tl.impute(zeros, genes=genes, model=model, verbose=False)
    tl.impute(without, genes=genes, model=model, verbose=False)
    np.testing.assert_array_equal(zeros.obsm["fimp"], without.obsm["fimp"])
    assert not set(genes) & set(zeros.uns["fimp"]["measured"])


def test_few_cells_and_few_genes_are_silent_by_themselves(panels):
    model, zeros, without = panels
    few = zeros[:99].copy()
    rare = without.copy()
    gene = int(np.argmin(model.module.gene_fraction.numpy()[[list(model.genes).index(g) for g in rare.var_names]]))
    rare.X[:, gene] = 0
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        embedded(few, model)
        embedded(rare, model)
    assert not any(SAID in str(warning.message) for warning in record)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("starmap_visual_cortex_1020", "cell_type"),
        ("merfish_hypothalamus_animal1", "cell_type"),
        ("dlpfc_visium_151673", "cell_type"),
        ("her2st_patients_A-F", "label"),
    ],
)
def test_real_cells_of_one_class_show_nearly_all_that_training_counts(shared_data, name, column):
    adata = ad.read_h5ad(shared_data / f"{name}.h5ad")
    values, labels, rng = adata.X.tocsr(), adata.obs[column].astype(str).to_numpy(), np.random.default_rng(0)
    fraction = np.asarray(values.sum(0)).ravel() / values.sum()
    for label in np.unique(labels):
        cells = np.flatnonzero(labels == label)
        if len(cells) >= 100:
            some = rng.choice(cells, 100, replace=False)
            assert fraction[np.asarray(values[some].sum(0)).ravel() == 0].sum() < 0.7 * MOST_SILENT
