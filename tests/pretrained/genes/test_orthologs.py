"""Tables of mouse and human genes: their forms, and the best partner of a gene."""

from __future__ import annotations

import subprocess

import pandas as pd
import pytest

from fimp_sc.pretrained.genes._orthologs import index_orthologs, read_orthologs

ROWS = [
    # mouse, human, mouse id, human id, type, confidence
    ("Aqp4", "AQP4", "ENSMUSG00000000001", "ENSG00000000001", "ortholog_one2one", 1.0),
    ("Aqp4", "AQP5", "ENSMUSG00000000001", "ENSG00000000005", None, 12.0),  # more confident, not one-to-one
    ("Defb1", "DEFB1", "ENSMUSG00000000002", "ENSG00000000002", "ortholog_one2many", 0.0),
    ("Defb1", "DEFB1", "ENSMUSG00000000002", "ENSG00000000002", None, 7.0),  # a second source for the same pair
    ("Defb1", "DEFB2", "ENSMUSG00000000002", "ENSG00000000003", None, 6.0),
    ("Cyp2d9", "CYP2D7", "ENSMUSG00000000003", "ENSG00000000007", None, 3.0),
    ("Cyp2d9", "CYP2D6", "ENSMUSG00000000003", "ENSG00000000006", None, 3.0),
]
COLUMNS = ["mouse_symbol", "human_symbol", "mouse_ensembl", "human_ensembl", "type", "confidence"]


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(ROWS, columns=COLUMNS)


@pytest.mark.parametrize(
    ("name", "separator"), [("t.tsv", "\t"), ("t.tsv.gz", "\t"), ("t.csv", ","), ("t.csv.gz", ",")]
)
def test_file_tells_what_the_data_frame_tells(table, tmp_path, name, separator):
    table.to_csv(tmp_path / name, sep=separator, index=False)
    pd.testing.assert_frame_equal(read_orthologs(tmp_path / name), read_orthologs(table))
    assert index_orthologs(read_orthologs(str(tmp_path / name))) == index_orthologs(read_orthologs(table))


def test_one_to_one_wins_then_confidence_and_equals_are_all_told(table):
    found = index_orthologs(read_orthologs(table))
    assert found.partners["Aqp4"] == found.partners["ENSMUSG00000000001"] == (("AQP4", "ENSG00000000001"),)
    assert found.partners["Defb1"] == (("DEFB1", "ENSG00000000002"),)
    assert [gene[0] for gene in found.partners["Cyp2d9"]] == ["CYP2D6", "CYP2D7"]
    assert found.one_to_one == {"Aqp4", "ENSMUSG00000000001"}
    assert found.symbols["ENSMUSG00000000003"] == ("Cyp2d9",)
    assert found.symbols["ENSG00000000005"] == ("AQP5",)


def test_order_of_rows_does_not_matter(table):
    shuffled = table.sample(frac=1, random_state=3)
    assert index_orthologs(read_orthologs(shuffled)) == index_orthologs(read_orthologs(table))


def test_two_columns_are_enough_and_the_frame_is_not_changed(table):
    small = table[["human_symbol", "mouse_symbol"]].assign(mouse_symbol=lambda t: " " + t["mouse_symbol"] + " ")
    before = small.copy()
    found = index_orthologs(read_orthologs(small))
    pd.testing.assert_frame_equal(small, before)
    assert found.partners["Aqp4"] == (("AQP4",), ("AQP5",))
    assert not found.one_to_one
    assert not found.symbols


def test_symbol_of_a_partner_may_be_told_in_another_row():
    rows = [("Gm1", None, "ENSG00000000001", "ortholog_one2one"), ("Gm2", "LOC1", "ENSG00000000001", None)]
    table = pd.DataFrame(rows, columns=["mouse_symbol", "human_symbol", "human_ensembl", "type"])
    assert index_orthologs(read_orthologs(table)).partners["Gm1"] == (("LOC1", "ENSG00000000001"),)


def test_dashes_and_blanks_are_no_symbols():
    table = pd.DataFrame({"mouse_symbol": ["A", "-", "B"], "human_symbol": ["X", "Y", ""]})
    assert set(index_orthologs(read_orthologs(table)).partners) == {"A"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="human_symbol"), "no column 'human_symbol'.*'mouse_symbol'"),
        (lambda t: t.assign(confidence="high"), "'confidence' must hold numbers"),
        (lambda t: t.head(0), "no pair"),
        (lambda t: t.assign(human_symbol=None), "no pair"),
    ],
)
def test_unusable_tables_say_what_is_wrong(table, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_orthologs(change(table))
    change(table).to_csv(tmp_path / "broken.tsv", sep="\t", index=False)
    with pytest.raises(ValueError, match=rf"broken\.tsv'.*{message}"):
        read_orthologs(tmp_path / "broken.tsv")


def test_unusable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.tsv"):
        read_orthologs(tmp_path / "none.tsv")
    for name, content in (
        ("empty.tsv", b""),
        ("no.tsv.gz", b"not compressed"),
        ("latin.tsv", b"mouse_symbol\xff\xfe\n"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}' cannot be read"):
            read_orthologs(tmp_path / name)


def test_headings_of_biomart_are_understood(tmp_path):
    (tmp_path / "mart_export.csv").write_text(
        "Gene stable ID,Gene name,Human gene name,Human gene stable ID,Human homology type,"
        '"Human orthology confidence [0 low, 1 high]",Human Gene-order conservation score\n'
        "ENSMUSG00000000001,Aqp4,AQP4,ENSG00000000001,ortholog_one2one,1,100\n"
        "ENSMUSG00000000002,Defb1,DEFB2,ENSG00000000003,ortholog_one2many,0,\n"
        "ENSMUSG00000000002,Defb1,DEFB1,ENSG00000000002,ortholog_one2many,1,\n"
        "ENSMUSG00000064336,mt-Tf,,,,,\n"
    )
    found = index_orthologs(read_orthologs(tmp_path / "mart_export.csv"))
    assert found.partners["Aqp4"] == found.partners["ENSMUSG00000000001"] == (("AQP4", "ENSG00000000001"),)
    assert found.one_to_one == {"Aqp4", "ENSMUSG00000000001"}
    assert found.partners["Defb1"] == (("DEFB1", "ENSG00000000002"),)
    assert "mt-Tf" not in found.partners


def test_real_table_has_a_one_to_one_partner_for_most_genes(shared_data):
    path = shared_data / "mouse_human_orthologs.tsv.gz"
    found = index_orthologs(read_orthologs(path))
    lines = subprocess.run(["gzip", "-dc", path], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    truth: dict[str, set[str]] = {}
    for row in rows:
        if row[4] == "ortholog_one2one":
            truth.setdefault(row[0], set()).add(row[1])
    single = {mouse: next(iter(humans)) for mouse, humans in truth.items() if len(humans) == 1}
    assert len(single) > 15_000
    assert {mouse: found.partners[mouse][0][0] for mouse in single} == single
    assert single["1700019D03Rik"] == "C2orf88"
