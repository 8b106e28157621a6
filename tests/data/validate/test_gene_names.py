"""Hints where names of genes do not match."""

from __future__ import annotations

import pandas as pd
import pytest

from fimp_sc.data.validate._gene_names import naming_hint

HUMAN = ["ACTB", "GAPDH", "HLA-A", "MT-CO1", "CD8A", "AQP4"]
ENSEMBL = [f"ENSG0000000000{i}" for i in range(6)]


@pytest.mark.parametrize(
    ("known", "names", "found"),
    [
        (HUMAN, ["Actb", "Gapdh", "Aqp4", "Xist"], "3 names match if case is ignored ('Actb' here, 'ACTB' there)"),
        (["Actb", "Gapdh", "Aqp4"], HUMAN, "adata.var_names = adata.var_names.str.capitalize()"),
        (ENSEMBL, [f"{name}.7" for name in ENSEMBL], "6 names match without the number at the end"),
        ([f"{name}.7" for name in ENSEMBL], [f"{name}.8" for name in ENSEMBL], "the version of Ensembl ids"),
        (HUMAN, ["HLA.A", "MT.CO1", "other"], "2 names match if signs are ignored ('HLA.A' here, 'HLA-A' there)"),
        (["7SK", "5S-rRNA", "A"], ["X7SK", "X5S.rRNA"], "2 names match if signs are ignored"),
        (HUMAN, ["ACTB-1", "GAPDH-1", "AQP4-2"], "3 names match without the number at the end ('ACTB-1' here"),
        (HUMAN, ["ACTB.1", "GAPDH.1", "AQP4.2"], "as var_names_make_unique() and R give them to duplicates"),
        (HUMAN, ["GRCh38_ACTB", "GRCh38_AQP4"], "adata.var_names.str.removeprefix('GRCh38_')"),
        (HUMAN, ["hg19___ACTB", "hg19___AQP4"], "adata.var_names.str.removeprefix('hg19___')"),
        (["GRCh38_ACTB", "GRCh38_AQP4"], HUMAN, "2 names match without the name of the genome ('ACTB' here"),
        (HUMAN, ["x", "y", "z"], ""),
        (HUMAN, ["ACTB", "GAPDH", "aqp4"], ""),  # hardly more than as they are
    ],
)
def test_what_would_match(known, names, found):
    hint = naming_hint(known, names)
    assert found in hint
    assert bool(found) == bool(hint)


def test_the_line_for_versions_mends_them():
    adata_names = pd.Index([f"{name}.{i}" for i, name in enumerate(ENSEMBL)])
    line = naming_hint(ENSEMBL, adata_names).split("adata.var_names = ")[1].rstrip(".")
    assert list(eval(line.replace("adata.var_names", "names"), {"names": adata_names})) == ENSEMBL


def test_columns_with_other_names_are_found():
    var = pd.DataFrame({"n_cells": range(6), "gene_ids": ENSEMBL, "length": "short"}, index=HUMAN)
    assert "adata.var['gene_ids'] holds 6 of them" in naming_hint(ENSEMBL, HUMAN, var)
    assert not naming_hint(["x"], HUMAN, var)
    few = pd.DataFrame({"other": ["a0", "a1", *[f"c{i}" for i in range(998)]]}, index=[f"b{i}" for i in range(1000)])
    assert not naming_hint([f"a{i}" for i in range(1000)], few.index, few), "2 of 1,000 are no other names"
