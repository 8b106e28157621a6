"""A trained model on an object with few of its genes: refused, or applied with a warning."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from fimp_sc.model import FIMP
from fimp_sc.model.registry._shared_genes import check_shared_genes

GENES = np.array([f"GENE{i}" for i in range(1020)], dtype=object)
# Two genes carry a third of the counts each, the others the rest.
WEIGHT = np.r_[1 / 3, 1 / 3, np.full(1018, 1 / 3 / 1018)]
NONE = np.zeros(1020)


def of(names, **columns) -> ad.AnnData:
    return ad.AnnData(np.ones((2, len(names)), np.float32), var=pd.DataFrame(columns, index=list(names)))


@pytest.mark.parametrize("weight", [WEIGHT, NONE])
def test_all_genes_and_most_are_silent(weight):
    check_shared_genes(GENES, weight, of(GENES))
    check_shared_genes(GENES, weight, of([*GENES[: 700 if weight is NONE else 2], "another"]))


@pytest.mark.parametrize(
    ("weight", "names", "message"),
    [
        (WEIGHT, GENES[:1], "Only 1 of the 1,020 genes"),
        (WEIGHT, GENES[2:4], r"Only 2 of the 1,020 genes .*with <0.1 % of the counts"),
        (WEIGHT, GENES[2:22], r"Only 20 of the 1,020 genes .*with 0.7 % of the counts"),
        (NONE, GENES[:2], "Only 2 of the 1,020 genes"),
        (NONE, [], "Only 0 of the 1,020 genes"),
    ],
)
def test_next_to_nothing_is_refused(weight, names, message):
    others = [f"other{i}" for i in range(500)]
    with pytest.raises(ValueError, match=rf"{message}.*too few to apply it.*symbols or Ensembl ids"):
        check_shared_genes(GENES, weight, of([*names, *others]))


@pytest.mark.parametrize(
    ("weight", "names", "message"),
    [
        (WEIGHT, GENES[1:100], r"Only 99 of the 1,020 genes of the model are in adata.var_names, with 36.5 % of the"),
        (WEIGHT, GENES[2:], r"Only 1,018 .* with 33.3 % of the counts of training\."),
        (NONE, GENES[:500], r"Only 500 of the 1,020 genes of the model are in adata.var_names\."),
    ],
)
def test_little_is_a_warning(weight, names, message):
    with pytest.warns(UserWarning, match=message):
        check_shared_genes(GENES, weight, of(names))


def test_the_message_says_what_would_match():
    for names, hint in (
        (
            [gene.capitalize() for gene in GENES],
            r"1,020 names match if case is ignored \('Gene0' here, 'GENE0' there\)",
        ),
        ([f"{gene}.1" for gene in GENES], "match without the number at the end"),
    ):
        with pytest.raises(ValueError, match=hint):
            check_shared_genes(GENES, WEIGHT, of(names))
    with pytest.raises(ValueError, match=r"adata.var_names = adata.var\['gene_name'\]\.astype\(str\)"):
        check_shared_genes(GENES, WEIGHT, of([f"ENSG{i:011}" for i in range(1020)], gene_name=GENES))


def test_every_way_to_apply_a_model_refuses_genes_of_another_species(trained, tissue, tmp_path) -> None:
    assert trained.module.gene_fraction.sum() == pytest.approx(1, abs=1e-5)
    tissue.var_names = tissue.var_names.str.capitalize()
    tissue = tissue[:, ~tissue.var_names.isin(trained.genes)].copy()
    trained.save_pretrained(tmp_path / "model")
    trained.save(tmp_path / "saved")
    message = "names match if case is ignored"
    for call in (
        lambda: FIMP.load_query_data(tissue, trained),
        lambda: FIMP.from_pretrained(tmp_path / "model", tissue),
        lambda: FIMP.load(tmp_path / "saved", tissue),
        lambda: trained.predict(tissue),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_few_genes_of_the_model_warn_once(trained, tissue) -> None:
    order = np.argsort(-trained.module.gene_fraction.numpy())
    light, heavy = (tissue[:, trained.genes[np.sort(some)]].copy() for some in (order[10:], order[:20]))
    for genes in (light, heavy):
        weight = trained.module.gene_fraction.numpy()[np.isin(trained.genes, genes.var_names)].sum()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            FIMP.load_query_data(genes, trained)
        ours = [str(w.message) for w in caught if "genes of the model are in adata.var_names" in str(w.message)]
        assert len(ours) == int(weight < 0.5)
        assert all(f"{100 * weight:.1f} %" in message for message in ours)
