"""The graph of the Gene Ontology hides what is to be found, and scores are what they say."""

from __future__ import annotations

import csv
import gzip

import numpy as np
import pytest
from scipy import sparse


@pytest.fixture(scope="module")
def rows(shared_data):
    found = {}
    for name in ("go_terms", "go_edges"):
        path = shared_data / f"{name}.tsv.gz"
        if not path.exists():
            pytest.skip(f"{path} is not here")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found[name] = list(csv.DictReader(file, delimiter="\t"))
    return found


def test_terms_classes_and_hidden_edges(load_script, shared_data, rows) -> None:
    ontology = load_script("ontology")
    graph = ontology.graph(shared_data, 20)
    names, n = list(graph.texts), len(graph.label)
    definitions = {row["id"]: row["definition"] for row in rows["go_terms"]}
    pairs = {(row["child"], row["parent"]) for row in rows["go_edges"] if row["relation"] == "isa"}
    above: dict[str, list[str]] = {}
    for child, parent in pairs:
        above.setdefault(child, []).append(parent)
    tops = {child for child, parent in pairs if parent == ontology.ROOT}
    assert graph.texts == {name: definitions[name] for name in names}
    assert not tops & set(names)
    seen = {}
    for name, label in zip(names, graph.label, strict=False):
        reached, ahead = set(), [name]
        while ahead:
            reached |= {term := ahead.pop()}
            ahead += above.get(term, [])
        (top,) = reached & tops
        assert seen.setdefault(label, top) == top
    assert len(set(seen.values())) == len(seen) >= 10
    joined, degree = graph.joined, np.diff(graph.joined.indptr)
    assert degree[:n].min() >= 1
    assert degree.max() <= ontology.NEIGHBORS
    row, column = joined.nonzero()
    edges = {(names[i], names[j]) for i, j in zip(row, column, strict=True)}
    assert all((a, b) in pairs or (b, a) in pairs for a, b in edges)
    hidden = {(names[i], names[j]) for i, j in enumerate(graph.hidden) if j >= 0}
    assert len(hidden) > n // 4
    assert all((a, b) in pairs or (b, a) in pairs for a, b in hidden)
    assert not edges & (hidden | {(b, a) for a, b in hidden})
    assert all(graph.related[i, j] for i, j in enumerate(graph.hidden) if j >= 0)


def test_ranks_leave_out_what_a_term_is_joined_with(load_script) -> None:
    ontology = load_script("ontology")
    # Term 0 is joined with 1 and with 3, which is hidden; term 2 with 4, which is hidden.
    related = sparse.csr_matrix((np.ones(3), ([0, 0, 2], [1, 3, 4])), shape=(5, 5))
    known = ontology.Graph({}, np.zeros(0), related, np.array([3, -1, 4]), related)
    likeness = np.array([[9.0, 8, 3, 5, 1], [1, 2, 9, 4, 3]])
    found = ontology.ranked(likeness, known, np.array([0, 2]))
    # Of the first only 3 and 2 and 4 count, of which the hidden one is nearest; of the second 3 is before it.
    assert found == {"mrr": pytest.approx(0.75), "hits10": 1.0}


def test_means_of_neighbors(load_script) -> None:
    ontology = load_script("ontology")
    graph = sparse.csr_matrix(np.array([[0, 1, 1], [0, 0, 0], [1, 0, 0]], dtype=np.float32))
    alone = np.array([[1.0, 0], [3, 0], [0, 6]])
    problem = ontology.Terms(
        alone,
        graph,
        np.zeros(3),
        np.zeros(3, bool),
        np.zeros(3, bool),
        None,
        {"alone": (alone, 0.0)},
        np.zeros(0),
        None,
    )
    np.testing.assert_allclose(ontology.of_neighbors(problem, "", own=False), [[1.5, 3], [3, 0], [1, 0]])
    np.testing.assert_allclose(ontology.of_neighbors(problem, "", own=True), [[4 / 3, 2], [3, 0], [0.5, 3]])
