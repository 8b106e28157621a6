"""Names of genes against vocabularies: each step, contests for one id, and real vocabularies."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fimp_sc.pretrained.files._files import CheckpointError
from fimp_sc.pretrained.genes._match import advice, match_names
from fimp_sc.pretrained.genes._vocabulary import read_aliases, read_vocabulary

HUMAN = {"AQP4": 7, "GFAP": 0, "C1orf112": 3, "MYL11": 9, "MBP": 4, "C3": 11, "<pad>": 100, "<cls>": 101}
ORTHOLOGS = pd.DataFrame(
    [
        ("Aqp4", "AQP4", "ENSMUSG00000000001", "ENSG00000000001", "ortholog_one2one", 1.0),
        ("Gfap", "GFAP", "ENSMUSG00000000002", "ENSG00000000002", "ortholog_one2one", 1.0),
        ("Gfap2", "GFAP", "ENSMUSG00000000003", "ENSG00000000002", "ortholog_one2many", 1.0),
        ("Elfn2", "ELFN2", "ENSMUSG00000000004", "ENSG00000000004", "ortholog_one2one", 1.0),
        ("Elfn2", "MBP", "ENSMUSG00000000004", "ENSG00000000005", None, 3.0),
        ("Mylpf", "MYLPF", "ENSMUSG00000000006", "ENSG00000000006", "ortholog_one2one", 1.0),
        ("Two", "MBP", "ENSMUSG00000000007", "ENSG00000000005", None, 2.0),
        ("Two", "C3", "ENSMUSG00000000007", "ENSG00000000008", None, 2.0),
    ],
    columns=["mouse_symbol", "human_symbol", "mouse_ensembl", "human_ensembl", "type", "confidence"],
)


def row(table, name):
    found = table[table["name"] == name]
    assert len(found) == 1
    return found.iloc[0][["symbol", "id", "method", "status"]].tolist()


def test_human_steps_in_order():
    names = ["GFAP", "aqp4", "C1ORF112", "MYLPF", "<pad>", "NOVEL", None, " MBP "]
    table = match_names(names, HUMAN, aliases={"MYLPF": "MYL11", "GFAP": "AQP4"})
    assert row(table, "GFAP") == ["GFAP", 0, "exact", "matched"]
    assert row(table, "aqp4") == ["AQP4", 7, "case", "matched"]
    assert row(table, "C1ORF112") == ["C1orf112", 3, "case", "matched"]
    assert row(table, "MYLPF") == ["MYL11", 9, "alias", "matched"]
    assert row(table, "MBP") == ["MBP", 4, "exact", "matched"]
    assert row(table, "<pad>") == row(table, "NOVEL") == [None, -1, "", "lost"]
    assert table["name"].isna().tolist() == [False] * 6 + [True, False]
    assert table["status"].tolist()[6] == "lost"
    assert table["id"].dtype == np.int64


def test_case_is_not_ignored_where_several_names_fit():
    table = match_names(["ABC", "abc", "aBC"], {"Abc": 0, "abc": 1})
    assert table["method"].tolist() == ["", "exact", ""]


def test_alias_of_several_symbols_is_ambiguous_unless_one_is_known():
    vocabulary = {"A": 0, "B": 1, "C": 1}
    table = match_names(["X", "Y", "Z"], vocabulary, aliases={"X": ["B", "A"], "Y": ["B", "D"], "Z": ["B", "C"]})
    assert row(table, "X") == ["A", 0, "alias", "ambiguous"]
    assert "A, B" in table["note"][0]
    assert row(table, "Y") == ["B", 1, "alias", "matched"]  # B and C share an id, so that Z is as sure as Y, and later
    assert row(table, "Z") == [None, -1, "alias", "ambiguous"]
    assert table["note"][2] == "B went to Y"


def test_mouse_goes_through_the_table():
    names = ["Aqp4", "Gfap", "Gfap2", "Elfn2", "Mylpf", "Two", "Gm1", "mbp"]
    table = match_names(names, HUMAN, species="mouse", orthologs=ORTHOLOGS, counts=[1, 1, 50, 1, 1, 1, 1, 1])
    assert row(table, "Aqp4") == ["AQP4", 7, "ortholog", "matched"]
    assert row(table, "Gfap") == ["GFAP", 0, "ortholog", "matched"]
    assert row(table, "Gfap2") == [None, -1, "ortholog", "ambiguous"]  # one-to-one counts more than counts
    assert table["note"][2] == "GFAP went to Gfap"
    assert row(table, "Elfn2") == [None, -1, "", "lost"]  # not its paralogue MBP
    assert "ELFN2" in table["note"][3]
    assert row(table, "Mylpf") == [None, -1, "", "lost"]
    assert row(table, "Two") == ["C3", 11, "ortholog", "ambiguous"]
    assert row(table, "Gm1") == row(table, "mbp") == [None, -1, "", "lost"]  # no upper case behind the user's back


def test_aliases_serve_outdated_names_on_both_sides():
    aliases = {"Aquaporin": "Aqp4", "MYLPF": "MYL11"}
    table = match_names(["Aquaporin", "Mylpf"], HUMAN, species="mouse", orthologs=ORTHOLOGS, aliases=aliases)
    assert row(table, "Aquaporin") == ["AQP4", 7, "ortholog", "matched"]
    assert row(table, "Mylpf") == ["MYL11", 9, "ortholog", "matched"]


def test_upper_case_on_request_only():
    with pytest.raises(ValueError, match="pass orthologs=, a table with columns mouse_symbol and human_symbol"):
        match_names(["Aqp4"], HUMAN, species="mouse")
    table = match_names(["Aqp4", "Mylpf"], HUMAN, species="mouse", orthologs="uppercase")
    assert row(table, "Aqp4") == ["AQP4", 7, "uppercase", "matched"]
    assert row(table, "Mylpf") == [None, -1, "", "lost"]


def test_mouse_names_are_not_taken_for_human_ones():
    table = match_names(["Aqp4", "Gfap", "C3"], HUMAN)
    assert table["method"].tolist() == ["", "", "exact"]
    assert 'species="mouse"' in advice(table, read_vocabulary(HUMAN), "human")


def test_mouse_vocabulary_needs_no_orthologs():
    table = match_names(["Aqp4", "GFAP", "Mbp"], ["Aqp4", "Gfap", "Mbp"], species="mouse")
    assert table["method"].tolist() == ["exact", "case", "exact"]


def test_of_equal_orthologs_that_of_the_same_name_is_chosen_and_wins():
    pairs = [(mouse, human) for mouse in ("Pcdhb1", "Pcdhb2", "Pcdhb9") for human in ("PCDHB1", "PCDHB2")]
    table = pd.DataFrame(pairs, columns=["mouse_symbol", "human_symbol"])
    found = match_names(
        ["Pcdhb9", "Pcdhb1", "Pcdhb2"], ["PCDHB1", "PCDHB2"], species="mouse", orthologs=table, counts=[9, 1, 1]
    )
    assert found["id"].tolist() == [-1, 0, 1]
    assert found["status"].tolist() == ["ambiguous"] * 3


@pytest.mark.parametrize("version", ["", ".1", ".12"])
def test_ensembl_ids(version):
    human, mouse = f"ENSG00000000001{version}", f"ENSMUSG00000000001{version}"
    for vocabulary in (["ENSG00000000001", "ENSG00000000002"], ["ENSG00000000001.5", "ENSG00000000002.3"]):
        assert match_names([human], vocabulary)["id"].tolist() == [0]
        assert match_names([mouse], vocabulary, species="mouse", orthologs=ORTHOLOGS)["id"].tolist() == [0]
    assert match_names([human], HUMAN)["status"].tolist() == ["lost"]
    assert row(match_names([human], HUMAN, ensembl_symbols={"ENSG00000000001": "GFAP"}), human)[:3] == [
        "GFAP",
        0,
        "exact",
    ]
    assert row(match_names([human], HUMAN, orthologs=ORTHOLOGS), human) == ["AQP4", 7, "exact", "matched"]
    found = match_names([mouse], HUMAN, species="mouse", orthologs=ORTHOLOGS)
    assert row(found, mouse) == ["AQP4", 7, "ortholog", "matched"]
    assert row(match_names([mouse], ["Aqp4", "Gfap"], species="mouse", orthologs=ORTHOLOGS), mouse)[1:3] == [0, "exact"]


def test_better_evidence_then_more_counts_keeps_an_id():
    names = pd.Series(["aqp4", "AQP4", "old", "Gfap", "GFAp"], index=list("abcde"))
    table = match_names(names, HUMAN, aliases={"old": "AQP4"}, counts=[9, 1, 9, 1, 2])
    assert table["id"].tolist() == [-1, 7, -1, -1, 0]
    assert table["note"].tolist() == ["AQP4 went to b", "", "AQP4 went to b", "GFAP went to e", ""]
    assert table["fraction_of_counts"].sum() == pytest.approx(1)


GENES = st.lists(
    st.sampled_from([f"{p}{i}" for p in ("GENE", "C1orf", "Abc") for i in range(12)]), unique=True, min_size=1
)


@settings(max_examples=60, deadline=None)
@given(genes=GENES, data=st.data())
def test_permuted_genes_give_the_permuted_result(genes, data):
    names = pd.Series([data.draw(st.sampled_from([g, g.lower(), g.upper()])) for g in genes], index=genes)
    counts = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(genes), max_size=len(genes))), dtype=float)
    vocabulary = {g: i for i, g in enumerate(data.draw(GENES))}
    order = data.draw(st.permutations(range(len(genes))))
    aliases = {"GENE1": "GENE2", "GENE3": ["GENE4", "GENE5"]}
    table = match_names(names, vocabulary, aliases=aliases, counts=counts)
    permuted = match_names(names.iloc[order], vocabulary, aliases=aliases, counts=counts[order])
    pd.testing.assert_frame_equal(table.iloc[order], permuted)
    used = table.loc[table["id"] >= 0, "id"]
    assert used.is_unique
    assert set(used) <= set(vocabulary.values())


@settings(max_examples=60, deadline=None)
@given(genes=GENES, data=st.data())
def test_case_of_names_changes_the_method_only(genes, data):
    upper = [gene.upper() for gene in genes]
    vocabulary = {gene: 2 * i for i, gene in enumerate(upper)}
    names = [data.draw(st.sampled_from([g, g.lower()])) for g in upper]
    table = match_names(names, vocabulary)
    assert table["id"].tolist() == list(vocabulary.values())
    assert table["method"].tolist() == ["exact" if n == g else "case" for n, g in zip(names, upper, strict=True)]


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(0, 10**6), unique=True, min_size=1, max_size=20), data=st.data())
def test_versions_change_nothing(ids, data):
    vocabulary = [f"ENSG{i:011d}" for i in ids]
    suffix = st.sampled_from(["", ".1", ".27"])
    names = [name + data.draw(suffix) for name in vocabulary]
    stored = [name + data.draw(suffix) for name in vocabulary]
    assert match_names(names, stored)["id"].tolist() == list(range(len(ids)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"species": "rat"}, ValueError, "'rat' is unknown.*'human', 'mouse'"),
        ({"vocabulary": 5}, TypeError, "found int"),
        ({"vocabulary": {"A": 1.5}}, TypeError, "'A': 1.5"),
        ({"vocabulary": {"A": -1}}, ValueError, "id -1"),
        ({"vocabulary": {"<pad>": 0}}, ValueError, "no genes"),
        ({"vocabulary": ["A", "B", "A"]}, ValueError, "'A' more than once"),
        ({"vocabulary": "nowhere.json"}, CheckpointError, "nowhere.json"),
        ({"counts": [1.0, 2.0]}, ValueError, "each of the 1 names"),
        ({"counts": [np.nan]}, ValueError, "finite"),
        ({"aliases": 3}, TypeError, "found int"),
        (
            {"aliases": {"old": 1}},
            TypeError,
            "aliases must map an alias to a symbol or a list of symbols, found 'old': 1",
        ),
        ({"aliases": {"old": ["AQP4", None]}}, TypeError, "aliases must map an alias"),
        (
            {"orthologs": ["Aqp4"], "species": "mouse"},
            TypeError,
            "orthologs must be a data frame or a path, found list",
        ),
        ({"aliases": "nowhere.tsv"}, FileNotFoundError, "nowhere.tsv"),
        ({"orthologs": "nowhere.tsv"}, FileNotFoundError, "nowhere.tsv"),
    ],
)
def test_unusable_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        match_names(**{"names": ["A"], "vocabulary": HUMAN} | arguments)


def test_aliases_from_a_file(tmp_path):
    (tmp_path / "a.tsv").write_text("FIRRM\tC1orf112\nNA\tGFAP\nFIRRM\tAQP4\n\n")
    assert read_aliases(tmp_path / "a.tsv") == {"FIRRM": ("C1orf112", "AQP4"), "NA": ("GFAP",)}
    (tmp_path / "a.csv").write_text("FIRRM,C1orf112,x\n")
    with pytest.raises(ValueError, match=r"a\.csv. must have two columns.*found 3"):
        read_aliases(tmp_path / "a.csv")


def test_real_vocabularies(shared_data, tmp_path):
    for name, n in (("scgpt_default_census_vocab.json", 60_694), ("scgpt_tiny_checkpoint", 3_000)):
        vocabulary = read_vocabulary(shared_data / name)
        assert len(vocabulary) == n
        assert not [gene for gene in vocabulary if gene.startswith("<")]
        sample = list(vocabulary)[::17]
        assert match_names(sample, vocabulary)["id"].tolist() == [vocabulary[gene] for gene in sample]
        upper = match_names([gene.upper() for gene in sample], vocabulary)
        assert upper["symbol"].tolist() == sample
    stored = json.loads((shared_data / "scgpt_tiny_checkpoint" / "vocab.json").read_text())
    assert {k: v for k, v in stored.items() if k not in {"<pad>", "<cls>", "<eoc>"}} == vocabulary
