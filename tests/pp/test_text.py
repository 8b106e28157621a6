"""Texts as tokens, and graphs of them from pairs of names."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pandas as pd
import pytest
from mudata import read_h5mu
from scipy import sparse
from text_toys import SPECIAL, WORDS, write_tokenizer

from fimp_sc.data import describe_modality
from fimp_sc.data._modality import quiet_mudata
from fimp_sc.pp import text
from fimp_sc.pretrained import CheckpointError

TEXTS = {"GO:1": "Programmed cell death", "GO:2": "cell death", "GO:3": "cells", "GO:4": "unheard"}
EDGES = [("GO:1", "GO:2"), ("GO:3", "GO:2")]


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("tokenizers")
    return write_tokenizer(tmp_path / "model")


def numbers(*words: str) -> list[int]:
    return [WORDS.index(word) for word in ("[CLS]", *words, "[SEP]")]


@pytest.mark.filterwarnings("ignore:.*no neighbors:UserWarning")
def test_tokens_are_those_of_the_vocabulary(folder) -> None:
    adata = text(TEXTS, edges=EDGES, tokenizer=folder)["text"]
    expected = [numbers("programmed", "cell", "death"), numbers("cell", "death"), numbers("cell", "##s")]
    expected.append(numbers("[UNK]"))
    ids = adata.obsm["token_ids"]
    assert ids.dtype == np.int32
    assert [row[row >= 0].tolist() for row in ids] == expected
    assert ids.shape[1] == 5
    assert list(adata.obs_names) == list(TEXTS)
    assert list(adata.obs["text"]) == list(TEXTS.values())
    assert describe_modality(adata)["size"] == [5, len(WORDS), adata.uns["fimp_modality"]["vocabulary"]]


@pytest.mark.filterwarnings("ignore:.*no neighbors:UserWarning")
@pytest.mark.parametrize("form", [list, np.array, pd.DataFrame, iter])
def test_edges_join_both_ways_unless_directed(folder, form) -> None:
    both = np.zeros((4, 4))
    both[[0, 1, 2, 1], [1, 0, 1, 2]] = 1
    found = text(TEXTS, edges=form(EDGES + EDGES[:1] + [("GO:3", "GO:3")]), tokenizer=folder)["text"]
    graph = found.obsp["spatial_connectivities"]
    assert graph.dtype == np.float32
    np.testing.assert_array_equal(graph.toarray(), both)
    found = text(TEXTS, edges=form(EDGES), directed=True, tokenizer=folder)["text"]
    received = np.zeros((4, 4))
    received[1, [0, 2]] = 1  # the second of a pair is the destination, a row
    np.testing.assert_array_equal(found.obsp["spatial_connectivities"].toarray(), received)


def test_lists_are_numbered_or_named(folder) -> None:
    values = list(TEXTS.values())
    ring = sparse.csr_matrix(np.roll(np.eye(4), 1, 1) * 0.5)
    labels = {"kind": list("abab")}
    plain = text(values, adjacency=ring, tokenizer=folder, labels=labels, modality="term")["term"]
    assert list(plain.obs_names) == ["text_0", "text_1", "text_2", "text_3"]
    assert (plain.obsp["spatial_connectivities"] != ring).nnz == 0
    assert list(plain.obs["kind"]) == list("abab")
    by_number = text(values, edges=[(0, 1), (2, 3)], tokenizer=folder)["text"]
    assert by_number.obsp["spatial_connectivities"].nnz == 4
    series = pd.Series(TEXTS)
    found = text(series, edges=[("GO:1", "GO:2"), ("GO:3", "GO:4")], tokenizer=folder / "tokenizer.json")["text"]
    named = text(values, names=list(TEXTS), edges=[("GO:1", "GO:2"), ("GO:3", "GO:4")], tokenizer=folder)["text"]
    np.testing.assert_array_equal(found.obsm["token_ids"], named.obsm["token_ids"])
    assert list(found.obs_names) == list(named.obs_names)


def test_long_and_empty_texts_are_told(folder) -> None:
    texts = {"a": "cell " * 9, "b": "death"}
    with pytest.warns(UserWarning, match=r"1 of 2 texts are longer than 6 tokens.*max_tokens="):
        ids = text(texts, edges=[("a", "b")], tokenizer=folder, max_tokens=6)["text"].obsm["token_ids"]
    assert ids[0].tolist() == numbers(*["cell"] * 4)
    with pytest.warns(UserWarning, match="1 of 2 texts are empty: 'b'"):
        text({"a": "cell", "b": " "}, edges=[("a", "b")], tokenizer=folder)


def test_survives_a_file(folder, tmp_path) -> None:
    mdata = text({"a": "cell", "b": "death"}, edges=[("a", "b")], tokenizer=folder)
    with quiet_mudata():
        mdata.write(tmp_path / "terms.h5mu")
        again = read_h5mu(tmp_path / "terms.h5mu")
    assert describe_modality(again) == describe_modality(mdata)
    np.testing.assert_array_equal(again["text"].obsm["token_ids"], mdata["text"].obsm["token_ids"])


WRONG = {
    "no graph": ({"edges": None}, ValueError, "A graph is needed"),
    "two graphs": ({"adjacency": np.eye(4)}, ValueError, "one of the two"),
    "unknown names": ({"edges": [("GO:1", "GO:9")]}, ValueError, "1 of 1 edges lead to names without a text: 'GO:9'"),
    "no pairs": ({"edges": [("GO:1", "GO:2", "is_a")]}, ValueError, r"pairs of names, \(e, 2\), found .*\(1, 3\)"),
    "no list": ({"edges": 3}, TypeError, "pairs of names, found int"),
    "ragged": ({"edges": [("GO:1", "GO:2"), ("GO:1",)]}, ValueError, "pairs of names"),
    "loops": ({"edges": [("GO:1", "GO:1")]}, ValueError, "no edge between different texts"),
    "names": ({"names": list("abcd")}, ValueError, "has its own names"),
    "one text": ({"texts": "cell"}, TypeError, "found one text"),
    "no text": ({"texts": {}}, ValueError, "texts is empty"),
    "NaN": ({"texts": TEXTS | {"GO:2": np.nan}}, TypeError, "1 of 4 are not, such as that of 'GO:2': nan"),
    "labels": ({"labels": ["a"]}, ValueError, r"4 texts need \(4,\)"),
    "column": ({"labels": {"text": list("abcd")}}, ValueError, "'text', a name that is used for something else"),
    "directed": ({"edges": None, "adjacency": np.eye(4), "directed": True}, ValueError, "directed= is for edges="),
    "max_tokens": ({"max_tokens": 0}, ValueError, "max_tokens must be"),
    "no folder": ({"tokenizer": "nowhere/model"}, CheckpointError, "nowhere"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_said(folder, case: str) -> None:
    how, error, message = WRONG[case]
    arguments = {"texts": TEXTS, "edges": EDGES, "tokenizer": folder} | how
    with pytest.raises(error, match=message):
        text(arguments.pop("texts"), **arguments)


def test_files_of_tokenizers_are_checked(folder) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for change, message in (
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "no vocabulary of words"),
        ({"pre_tokenizer": {"type": "Unknown"}}, "cannot be read as a tokenizer"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(CheckpointError, match=message):
            text(TEXTS, edges=EDGES, tokenizer=folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no 'tokenizer.json'.*AutoTokenizer"):
        text(TEXTS, edges=EDGES, tokenizer=folder)
    (folder / "vocab.txt").write_text("\n".join(SPECIAL))
    with pytest.raises(CheckpointError, match=r"has no 'tokenizer.json'"):
        text(TEXTS, edges=EDGES, tokenizer=folder)


def test_without_the_package_its_line_is_told(tmp_path, monkeypatch) -> None:
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        text(TEXTS, edges=EDGES, tokenizer=write_tokenizer(tmp_path / "model"))


def test_broken_characters_and_lengths_without_room(folder) -> None:
    texts = {"a": "cell \ud800", "b": "death"}
    with pytest.raises(ValueError, match=r"1 of 2 texts have characters that are none of Unicode .*'a'"):
        text(texts, edges=[("a", "b")], tokenizer=folder)
    for few in (1, 2):
        with pytest.raises(ValueError, match=f"max_tokens={few} has no room for text: 2 tokens"):
            text(["a", "b"], edges=[(0, 1)], tokenizer=folder, max_tokens=few)
