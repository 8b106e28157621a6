"""Several tables side by side, each on its own scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from fimp_sc.data import ExpressionReader
from fimp_sc.data.expression._reader import JoinedExpression, split_statistics

N, EVERY = 30, np.arange(30)
LACKING = np.arange(N) % 5 == 0


def tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of genes, counts of proteins with totals some hundred times as large, and real numbers."""
    rng = np.random.default_rng(0)
    rna, protein = rng.poisson(2.0, (N, 8)), rng.poisson(300.0 * rng.gamma(2, size=(1, 4)), (N, 4))
    return rna.astype(np.float32), protein.astype(np.float32), rng.normal(size=(N, 3)).astype(np.float32)


def joined(*, hidden=(None, None, None), statistics=None, absent=None) -> JoinedExpression:
    known = split_statistics(statistics, [8, 4, 3])
    scales = ["counts", "counts", "real"]
    own = [None, absent, None]
    sources = []
    for values, scale, own_hidden, one, missing in zip(tables(), scales, hidden, known, own, strict=True):
        values = values if missing is None else values * ~missing[:, None]
        matrix = sparse.csr_matrix(values)
        sources.append(ExpressionReader(matrix, np.arange(values.shape[1]), scale, one, None, own_hidden, missing))
    return JoinedExpression(sources)


def by_hand(values: np.ndarray) -> np.ndarray:
    """Counts of a table scaled to the median total of that table."""
    total = values.sum(1, keepdims=True)
    return np.log1p(values / total * np.median(total))


def dense() -> np.ndarray:
    rna, protein, real = tables()
    return np.hstack([by_hand(rna), by_hand(protein), real])


def test_rows_are_those_of_each_table_normalized_by_itself() -> None:
    source = joined(statistics=joined().gene_statistics(EVERY))
    np.testing.assert_allclose(source.rows(EVERY), dense(), rtol=1e-5, atol=1e-6)
    nodes = np.array([7, 2, 29])
    np.testing.assert_allclose(source.sparse_rows(nodes).toarray(), dense()[nodes], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(source.center, dense().mean(0)[None], rtol=1e-4, atol=1e-5)
    rna, protein, _ = tables()
    expected = [np.median(rna.sum(1)), np.median(protein.sum(1))]
    np.testing.assert_allclose(source.target_sum[:2], expected)
    assert (source.n_genes, source.absent) == (15, None)


def test_one_table_alone_has_the_same_rows() -> None:
    source = joined(statistics=joined().gene_statistics(EVERY))
    alone = ExpressionReader(sparse.csr_matrix(tables()[1]), np.arange(4), "counts", None)
    alone = ExpressionReader(sparse.csr_matrix(tables()[1]), np.arange(4), "counts", alone.gene_statistics(EVERY))
    np.testing.assert_array_equal(source.rows(EVERY)[:, 8:12], alone.rows(EVERY))
    np.testing.assert_array_equal(source.factors(EVERY, np.array([9]))[:, 0], alone.factor)


def test_what_is_hidden_in_one_table_does_not_act_on_the_other() -> None:
    statistics = joined().gene_statistics(EVERY)
    mask = np.zeros((N, 4), dtype=bool)
    mask[3, 1] = True
    plain, hiding = joined(statistics=statistics), joined(statistics=statistics, hidden=(None, mask, None))
    np.testing.assert_array_equal(hiding.rows(EVERY)[:, :8], plain.rows(EVERY)[:, :8])
    assert not np.array_equal(hiding.rows(EVERY)[3, 8:12], plain.rows(EVERY)[3, 8:12])
    patterns, pattern = hiding.observed(EVERY)
    expected = np.ones((N, 15), dtype=bool)
    expected[3, 9] = False
    np.testing.assert_array_equal(patterns[pattern], expected)
    complete = hiding.complete_rows(np.array([3]), statistics.mean).toarray()[0]
    np.testing.assert_allclose(complete[9], statistics.mean[9], rtol=1e-6)


def test_nodes_may_lack_a_table() -> None:
    first = joined(absent=LACKING)
    statistics = first.gene_statistics(EVERY)
    protein = tables()[1]
    there = np.log1p(protein / protein.sum(1, keepdims=True) * np.median(protein[~LACKING].sum(1)))[~LACKING]
    np.testing.assert_allclose(statistics.mean[8:12], there.mean(0), rtol=1e-5)
    source = joined(statistics=statistics, absent=LACKING)
    patterns, pattern = source.observed(EVERY)
    shown = patterns[pattern]
    assert shown[:, :8].all()
    np.testing.assert_array_equal(shown[:, 8:12], np.repeat(~LACKING[:, None], 4, 1))
    complete = source.complete_rows(EVERY, statistics.mean).toarray()
    np.testing.assert_allclose(complete[LACKING, 8:12], np.tile(statistics.mean[8:12], (LACKING.sum(), 1)), rtol=1e-6)
    np.testing.assert_array_equal(source.present(EVERY), EVERY)
    with pytest.raises(ValueError, match="one of the tables"):
        source.gene_statistics(np.flatnonzero(LACKING))


def test_masked_genes_of_a_table_leave_the_scale_of_the_others() -> None:
    source = joined(statistics=joined().gene_statistics(EVERY))
    visible = torch.ones((1, 15), dtype=torch.bool)
    visible[0, 8] = False
    rows = source.sparse_rows(EVERY)
    seen = source.as_seen(rows, EVERY, visible, torch.zeros(N, dtype=torch.int64)).toarray()
    np.testing.assert_allclose(seen[:, :8], rows.toarray()[:, :8], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(seen[:, 12:], rows.toarray()[:, 12:])
    # Proteins that are left sum to their expected share of the total of all.
    protein = tables()[1]
    share = 1 - (protein.sum(0) / protein.sum())[0]
    np.testing.assert_allclose(np.expm1(seen[:, 9:12]).sum(1), np.median(protein.sum(1)) * share, rtol=1e-3)
