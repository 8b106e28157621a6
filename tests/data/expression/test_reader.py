"""`ExpressionReader` against scanpy, in every format, on other gene lists, and with hidden entries."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from fimp_sc.data import ExpressionReader, GeneStatistics
from fimp_sc.data.expression import _reader as module
from fimp_sc.data.expression._reader import Panels
from fimp_sc.data.storage import _rows

FORMATS = {
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "dense": np.array,
    "fortran": np.asfortranarray,
    "integers": lambda x: np.array(x, dtype=np.int32),
}
N_OBS, N_GENES = 40, 11
EVERYTHING = np.arange(N_OBS)
ONE_BATCH = np.zeros(N_OBS, dtype=np.int64)
SAME = np.arange(N_GENES)


def counts(seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(1.0, 4.0, N_GENES) * rng.gamma(2.0, 0.5, (N_OBS, 1)) + 0.2).astype(np.float32)


def make_source(matrix, columns=SAME, scale="counts", **kwargs) -> ExpressionReader:
    """Source with the statistics of the whole of `counts()`."""
    first = ExpressionReader(counts(), SAME, "counts", None)
    return ExpressionReader(matrix, columns, scale, first.gene_statistics(EVERYTHING), **kwargs)


def read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all passes over a matrix see seven rows or so at a time."""
    stream = _rows._MemoryRows.stream
    monkeypatch.setattr(module, "_ROWS", 7)
    monkeypatch.setattr(_rows._MemoryRows, "stream", lambda self: stream(self, 7 * N_GENES))


def observed(source: ExpressionReader, nodes: np.ndarray) -> np.ndarray:
    """Which genes are seen in each of the nodes."""
    patterns, pattern = source.observed(nodes)
    assert patterns.dtype == bool
    assert pattern.dtype == np.int64
    assert pattern.shape == (len(nodes),)
    return patterns[pattern]


@pytest.mark.parametrize("kind", FORMATS)
def test_equals_scanpy_in_every_format(kind: str) -> None:
    reference = ad.AnnData(counts())
    sc.pp.normalize_total(reference)  # to the median total
    sc.pp.log1p(reference)
    stored = FORMATS[kind](counts())
    source = ExpressionReader(stored, SAME, "counts", None)
    values = source.rows(EVERYTHING)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, reference.X, rtol=1e-5, atol=1e-6)
    some = np.array([7, 3, 3, 39])
    np.testing.assert_allclose(source.rows(some), reference.X[some], rtol=1e-5, atol=1e-6)
    assert sparse.issparse(source.sparse_rows(some))
    np.testing.assert_array_equal(source.sparse_rows(some).toarray(), source.rows(some))
    dense = stored.toarray() if sparse.issparse(stored) else np.asarray(stored)
    np.testing.assert_array_equal(dense, counts(), "the user's matrix stays as it is")


def test_normalized_values_are_treated_like_counts_and_log_values_are_used_as_they_are() -> None:
    logged = np.log1p(counts())
    np.testing.assert_array_equal(ExpressionReader(logged, SAME, "log", None).rows(EVERYTHING), logged)
    scaled = counts() * 0.37
    np.testing.assert_allclose(
        make_source(scaled, scale="normalized").rows(EVERYTHING), make_source(counts()).rows(EVERYTHING), rtol=1e-5
    )


def test_statistics_equal_numpy_also_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    read_in_pieces(monkeypatch)
    cells = np.array([0, 5, 6, 9, 12, 13, 20, 31, 32, 33])
    source = ExpressionReader(sparse.csr_matrix(counts()), SAME, "counts", None)
    found = source.gene_statistics(cells)
    np.testing.assert_allclose(found.mean, source.rows(EVERYTHING)[cells].mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.fraction, counts()[cells].sum(0) / counts()[cells].sum(), rtol=1e-5)
    assert found.target_sum == np.median(counts().sum(1))
    np.testing.assert_array_equal(source.sparse_rows(EVERYTHING).toarray(), source.rows(EVERYTHING))


def test_permuted_genes_and_extra_genes_change_nothing() -> None:
    order = np.random.default_rng(1).permutation(N_GENES)
    extra = np.full((N_OBS, 3), 50.0, dtype=np.float32)
    query = np.hstack([extra, counts()[:, order]])
    columns = 3 + np.argsort(order)
    reference, moved = make_source(counts()), make_source(sparse.csc_matrix(query), columns)
    np.testing.assert_allclose(moved.rows(EVERYTHING), reference.rows(EVERYTHING), rtol=1e-5)
    np.testing.assert_allclose(moved.center, reference.center, rtol=1e-5)


@given(kept=st.sets(st.integers(0, N_GENES - 1), min_size=1), seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_missing_genes_change_the_scale_by_the_documented_factor_only(kept: set[int], seed: int) -> None:
    genes = np.array(sorted(kept))
    columns = np.full(N_GENES, -1)
    columns[genes] = np.arange(len(genes))
    full = counts(seed) + 1
    statistics = ExpressionReader(full, SAME, "counts", None).gene_statistics(EVERYTHING)
    part = ExpressionReader(sparse.csr_matrix(full[:, genes]), columns, "counts", statistics)
    values = part.rows(EVERYTHING)
    share = full[:, genes].sum() / full.sum()
    total = full[:, genes].sum(1, keepdims=True)
    expected = np.log1p(full[:, genes] / total * np.median(full.sum(1)) * share)
    np.testing.assert_allclose(values[:, genes], expected, rtol=1e-4, atol=1e-6)
    assert (np.delete(values, genes, axis=1) == 0).all()
    seen = observed(part, EVERYTHING)
    assert seen[:, genes].all()
    assert not np.delete(seen, genes, axis=1).any()


def test_a_cell_whose_genes_have_their_usual_share_looks_the_same_on_a_smaller_panel() -> None:
    typical = np.tile(np.arange(1.0, N_GENES + 1), (4, 1)) * np.array([[1], [2], [3], [10]])
    statistics = ExpressionReader(typical, SAME, "counts", None).gene_statistics(np.arange(4))
    whole = ExpressionReader(typical, SAME, "counts", statistics).rows(np.arange(4))
    columns = np.where(SAME < 5, SAME, -1)
    part = ExpressionReader(typical[:, :5], columns, "counts", statistics).rows(np.arange(4))
    np.testing.assert_allclose(part[:, :5], whole[:, :5], rtol=1e-5)


@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_centers_are_the_shrunken_means_of_batches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = (EVERYTHING >= 30).astype(np.int64)
    shifted = FORMATS[kind](counts())
    source = make_source(shifted, batch=batch)
    values = source.rows(EVERYTHING)
    mean = ExpressionReader(counts(), SAME, "counts", None).gene_statistics(EVERYTHING).mean
    for code, n in ((0, 30), (1, 10)):
        expected = (values[batch == code].sum(0) + 20 * mean) / (n + 20)
        np.testing.assert_allclose(source.center[code], expected, rtol=1e-5)
    read_in_pieces(monkeypatch)
    np.testing.assert_allclose(make_source(shifted, batch=batch).center, source.center, rtol=1e-5)


def test_centering_takes_a_batch_effect_out() -> None:
    batch = np.repeat([0, 1], N_OBS // 2)
    logged = np.log1p(counts())
    logged[batch == 1] += 2.0
    many = np.tile(logged, (50, 1))
    statistics = ExpressionReader(many, SAME, "log", None).gene_statistics(np.arange(len(many)))
    source = ExpressionReader(many, SAME, "log", statistics, batch=np.tile(batch, 50))
    centered = source.rows(np.arange(len(many))) - source.center[source.batch]
    assert np.abs(centered[source.batch == 0].mean(0) - centered[source.batch == 1].mean(0)).max() < 0.05


def test_center_of_a_gene_that_is_not_measured_is_the_training_mean() -> None:
    columns = np.where(SAME == 4, -1, SAME)
    source = make_source(counts(), columns)
    mean = ExpressionReader(counts(), SAME, "counts", None).gene_statistics(EVERYTHING).mean
    np.testing.assert_allclose(source.center[0, 4], mean[4], rtol=1e-6)


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
@pytest.mark.parametrize("hidden_kind", ["csr", "dense"])
def test_hidden_entries_are_not_observed_and_do_not_move_the_centers(kind: str, hidden_kind: str) -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(N_GENES)
    hidden = rng.random((N_OBS, N_GENES)) < 0.3
    values = np.log1p(counts())
    other = np.where(hidden, rng.random(values.shape) * 9, values)
    statistics = ExpressionReader(values, SAME, "log", None).gene_statistics(EVERYTHING)

    def make(matrix):
        mask = sparse.csr_matrix(hidden) if hidden_kind == "csr" else hidden
        return ExpressionReader(
            FORMATS[kind](matrix[:, order]), np.argsort(order), "log", statistics, ONE_BATCH, mask[:, order]
        )

    a, b = make(values), make(other)
    np.testing.assert_array_equal(observed(a, EVERYTHING), ~hidden)
    np.testing.assert_array_equal(observed(a, np.array([5, 2])), ~hidden[[5, 2]])
    np.testing.assert_array_equal(observed(a, np.array([7])), ~hidden[[7]])
    np.testing.assert_allclose(a.center, b.center, rtol=1e-6)
    visible = np.where(hidden, 0, values)
    expected = (visible.sum(0) + 20 * statistics.mean) / ((~hidden).sum(0) + 20)
    np.testing.assert_allclose(a.center[0], expected, rtol=1e-5)


def test_without_hidden_entries_all_cells_share_one_pattern() -> None:
    patterns, pattern = make_source(counts(), np.where(SAME == 4, -1, SAME)).observed(np.array([8, 3, 3]))
    np.testing.assert_array_equal(patterns, [SAME != 4])
    np.testing.assert_array_equal(pattern, [0, 0, 0])


def test_hidden_entries_of_genes_that_are_not_measured_or_not_known_do_not_matter() -> None:
    """Genes of the object: one that the model does not know, then ten of eleven that it knows."""
    columns = np.where(SAME == 4, -1, 1 + SAME)
    matrix = np.hstack([counts()[:, :1], counts()])
    hidden = np.random.default_rng(0).random(matrix.shape) < 0.3
    source = make_source(matrix, columns, hidden=sparse.csr_matrix(hidden))
    np.testing.assert_array_equal(observed(source, EVERYTHING), ~hidden[:, 1:] & (SAME != 4))
    hidden[:, [0, 5]] = ~hidden[:, [0, 5]]
    other = make_source(matrix, columns, hidden=sparse.csr_matrix(hidden))
    np.testing.assert_array_equal(observed(other, EVERYTHING), observed(source, EVERYTHING))
    np.testing.assert_array_equal(other.center, source.center)


@pytest.mark.parametrize("scale", ["counts", "log"])
def test_entries_stored_more_than_once_count_by_their_sum(scale: str) -> None:
    values = counts() if scale == "counts" else np.log1p(counts())
    whole = sparse.csr_matrix(values)
    halves = sparse.csr_matrix(
        (np.repeat(whole.data, 2) / 2, np.repeat(whole.indices, 2), 2 * whole.indptr), shape=whole.shape
    )
    assert not halves.has_canonical_format
    a, b = make_source(whole, scale=scale), make_source(halves, scale=scale)
    np.testing.assert_allclose(b.rows(EVERYTHING), a.rows(EVERYTHING), rtol=1e-5)
    np.testing.assert_allclose(b.sparse_rows(EVERYTHING).toarray(), a.rows(EVERYTHING), rtol=1e-5)
    np.testing.assert_allclose(b.center, a.center, rtol=1e-5)
    first, second = (s.gene_statistics(EVERYTHING) for s in (a, b))
    np.testing.assert_allclose(second.fraction, first.fraction, rtol=1e-5)
    assert halves.nnz == 2 * whole.nnz, "the user's matrix stays as it is"


@pytest.mark.parametrize("shape", [(N_OBS, N_GENES + 1), (N_OBS + 1, N_GENES)])
def test_hidden_of_another_shape_is_an_error(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="hidden"):
        make_source(counts(), hidden=np.zeros(shape, dtype=bool))


def test_empty_cells_are_zero_and_finite() -> None:
    matrix = counts()
    matrix[3] = 0
    source = make_source(sparse.csr_matrix(matrix))
    assert (source.rows(np.array([3])) == 0).all()
    assert np.isfinite(source.factor).all()


def test_total_of_a_log_normalized_object_is_the_one_that_it_was_normalized_to() -> None:
    """A model trained on log-normalized values can be applied to counts: both end on the same scale."""
    reference = ad.AnnData(counts())
    sc.pp.normalize_total(reference, target_sum=321.0)
    sc.pp.log1p(reference)
    statistics = ExpressionReader(reference.X, SAME, "log", None).gene_statistics(EVERYTHING)
    assert statistics.target_sum == pytest.approx(321.0, rel=1e-4)
    np.testing.assert_allclose(
        ExpressionReader(counts(), SAME, "counts", statistics).rows(EVERYTHING), reference.X, rtol=1e-4, atol=1e-6
    )


def test_statistics_are_plain_values() -> None:
    found = make_source(counts()).gene_statistics(EVERYTHING)
    assert isinstance(found, GeneStatistics)
    assert found.mean.dtype == found.fraction.dtype == np.float32
    assert found.fraction.sum() == pytest.approx(1.0)


# Absent nodes and real numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csr", "dense"])
@pytest.mark.parametrize("scale", ["counts", "real"])
def test_absent_nodes_count_nowhere(kind: str, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches have the centers that they have in an object without these nodes."""
    read_in_pieces(monkeypatch)
    values = counts() if scale == "counts" else counts() - 5
    absent, batch = EVERYTHING % 3 == 1, (EVERYTHING >= 25).astype(np.int64)
    absent[7:14] = True  # all that is read at once
    values[absent] = 0
    hidden = np.random.default_rng(0).random(values.shape) < 0.3
    for mask in (None, hidden):
        without = {"batch": batch[~absent], "hidden": None if mask is None else mask[~absent]}
        expected = make_source(FORMATS[kind](values[~absent]), scale=scale, **without)
        source = make_source(FORMATS[kind](values), scale=scale, batch=batch, hidden=mask, absent=absent)
        np.testing.assert_allclose(source.center, expected.center, rtol=1e-5)
        present = source.present(np.array([9, 13, 3, 4, 25]))
        np.testing.assert_array_equal(present, [3])
        np.testing.assert_array_equal(source.present(EVERYTHING), np.flatnonzero(~absent))
        wanted = expected.gene_statistics(np.arange((~absent).sum())).mean
        np.testing.assert_allclose(source.gene_statistics(source.present(EVERYTHING)).mean, wanted, rtol=1e-5)
    np.testing.assert_array_equal(make_source(counts()).present(EVERYTHING), EVERYTHING)


def test_nothing_of_absent_nodes_is_observed() -> None:
    absent, columns = EVERYTHING % 4 == 0, np.where(SAME == 4, -1, SAME)
    source = make_source(counts(), columns, absent=absent)
    np.testing.assert_array_equal(observed(source, EVERYTHING), ~absent[:, None] & (SAME != 4))
    np.testing.assert_array_equal(observed(source, np.array([8, 0])), np.zeros((2, N_GENES), dtype=bool))
    patterns, _ = source.observed(np.array([5, 3, 3]))
    assert len(patterns) == 1, "nodes that are all there share one pattern"
    hidden = np.random.default_rng(0).random((N_OBS, N_GENES)) < 0.3
    both = make_source(counts(), columns, hidden=hidden, absent=absent)
    np.testing.assert_array_equal(observed(both, EVERYTHING), ~absent[:, None] & (SAME != 4) & ~hidden)


@pytest.mark.parametrize("kind", ["csr", "csc", "dense", "fortran"])
def test_real_numbers_are_used_as_they_are(kind: str) -> None:
    values = (counts() - 4.25).astype(np.float32)
    stored = FORMATS[kind](values)
    first = ExpressionReader(stored, SAME, "real", None)
    some = np.array([7, 3, 3, 39])
    np.testing.assert_array_equal(first.rows(some), values[some])
    np.testing.assert_array_equal(first.sparse_rows(some).toarray(), values[some])
    found = first.gene_statistics(EVERYTHING)
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-5)
    assert (found.fraction == 0).all(), "real numbers are no shares of anything"
    assert found.target_sum == 1.0
    order = np.random.default_rng(1).permutation(N_GENES)
    second = ExpressionReader(FORMATS[kind](values[:, order]), np.argsort(order), "real", found)
    np.testing.assert_array_equal(second.rows(some), values[some])
    np.testing.assert_allclose(second.center[0], values.mean(0), rtol=1e-5)


def test_a_missing_feature_does_not_change_the_scale_of_real_numbers() -> None:
    values = counts() - 4
    found = ExpressionReader(values, SAME, "real", None).gene_statistics(EVERYTHING)
    part = ExpressionReader(values[:, :5], np.where(SAME < 5, SAME, -1), "real", found)
    np.testing.assert_array_equal(part.rows(EVERYTHING), np.where(SAME < 5, values, 0))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("total", [1e4, 1e6])
def test_logarithms_of_another_total_are_those_of_counts_to_a_model_of_counts(kind: str, total: float) -> None:
    """Of all genes, and of some beside others that the model does not know."""
    scaled = np.log1p(counts() / counts().sum(1, keepdims=True) * total)
    for columns in (SAME, np.where(SAME < 4, -1, SAME)):
        expected = make_source(counts(), columns)
        if kind == "integers":
            continue
        found = make_source(FORMATS[kind](scaled), columns, "log", trained_scale="counts")
        np.testing.assert_allclose(found.rows(EVERYTHING), expected.rows(EVERYTHING), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found.center, expected.center, rtol=1e-3, atol=1e-5)


def test_logarithms_of_another_total_are_announced_to_a_model_of_logarithms() -> None:
    values = np.log1p(counts() / counts().sum(1, keepdims=True) * 1e4)
    statistics = ExpressionReader(values, SAME, "log", None).gene_statistics(EVERYTHING)
    other = np.log1p(np.expm1(values) * 100)
    with pytest.warns(UserWarning, match="median total of 1e\\+06.*trained on 1e\\+04"):
        ExpressionReader(other, SAME, "log", statistics, trained_scale="log")


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_statistics_do_not_depend_on_what_is_hidden(kind: str) -> None:
    rng = np.random.default_rng(0)
    hidden, values = rng.random((N_OBS, N_GENES)) < 0.3, np.log1p(counts())
    hidden[:, 3] = True
    other = np.where(hidden, rng.random(values.shape) * 9, values)
    a, b = (ExpressionReader(FORMATS[kind](x), SAME, "log", None, hidden=hidden) for x in (values, other))
    found, same = a.gene_statistics(EVERYTHING), b.gene_statistics(EVERYTHING)
    expected = np.where(hidden, 0, values).sum(0) / np.maximum((~hidden).sum(0), 1)
    np.testing.assert_allclose(found.mean, expected, rtol=1e-5)
    np.testing.assert_allclose(found.mean, same.mean, rtol=1e-6)
    np.testing.assert_allclose(found.fraction, same.fraction, rtol=1e-6)
    complete = np.where(hidden, expected, values)
    for source in (a, b):
        np.testing.assert_allclose(source.complete_rows(EVERYTHING, found.mean).toarray(), complete, rtol=1e-5)


# Totals of what is visible ------------------------------------------------------------------------------------------


def normalized(matrix: np.ndarray, visible: np.ndarray, fraction: np.ndarray, target: float) -> np.ndarray:
    """Dense reference: ``log1p`` of values scaled so that visible ones have their expected part of the target."""
    total, share = np.where(visible, matrix, 0).sum(1, keepdims=True), (visible * fraction).sum(1, keepdims=True)
    there = (total > 0) & (share > 0)
    return np.log1p(matrix * np.where(there, target * share / np.where(there, total, 1), 1))


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
@pytest.mark.parametrize("scale", ["counts", "log"])
def test_cells_are_scaled_by_what_is_visible(kind: str, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = np.random.default_rng(1).random((N_OBS, N_GENES)) < 0.4
    hidden[3] = True
    columns = np.where(SAME == 4, -1, SAME)
    statistics = ExpressionReader(counts(), SAME, "counts", None).gene_statistics(EVERYTHING)
    stored = FORMATS[kind](counts() if scale == "counts" else np.log1p(counts() / 7))
    expected = normalized(counts(), ~hidden & (SAME != 4), statistics.fraction, statistics.target_sum)
    read_in_pieces(monkeypatch)
    source = ExpressionReader(stored, columns, scale, statistics, hidden=hidden, trained_scale="counts")
    visible = ~hidden & (SAME != 4)
    np.testing.assert_allclose(source.rows(EVERYTHING)[visible], expected[visible], rtol=1e-4)
    assert source.factor[3] == 1.0, "nothing to go by"


@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.9), kind=st.sampled_from(["csr", "csc", "dense"]))
@settings(max_examples=40, deadline=None)
def test_hidden_counts_change_nothing_anywhere(seed: int, share: float, kind: str) -> None:
    """Neither totals, statistics, means nor what is seen; also where zeros are hidden, or become so."""
    rng = np.random.default_rng(seed)
    hidden = rng.random((N_OBS, N_GENES)) < share
    other = np.where(hidden, rng.poisson(rng.choice([0.3, 50.0], (N_OBS, N_GENES))), counts(seed))
    batch = rng.integers(0, 2, N_OBS)
    batch[:2] = 0, 1
    found = []
    for matrix in (counts(seed), other):
        first = ExpressionReader(FORMATS[kind](matrix), SAME, "counts", None, hidden=hidden)
        statistics = first.gene_statistics(EVERYTHING)
        second = ExpressionReader(FORMATS[kind](matrix), SAME, "counts", statistics, batch, hidden)
        visible = [np.where(hidden, 0, source.rows(EVERYTHING)) for source in (first, second)]
        arrays = [statistics.mean, statistics.fraction, statistics.target_sum, first.factor, second.factor]
        complete = second.complete_rows(EVERYTHING, statistics.mean).toarray()
        found.append([*arrays, second.center, complete, *visible, *second.observed(EVERYTHING)])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_statistics_of_partly_hidden_cells_are_near_those_of_whole_ones() -> None:
    many = np.tile(counts(), (50, 1))
    nodes = np.arange(len(many))
    hidden = np.random.default_rng(0).random(many.shape) < 0.3
    whole = ExpressionReader(many, SAME, "counts", None).gene_statistics(nodes)
    part = ExpressionReader(many, SAME, "counts", None, hidden=hidden).gene_statistics(nodes)
    np.testing.assert_allclose(part.fraction, whole.fraction, rtol=0.15)
    np.testing.assert_allclose(part.target_sum, whole.target_sum, rtol=0.15)
    np.testing.assert_allclose(part.mean, whole.mean, rtol=0.1)


@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_rows_as_seen_under_masks_equal_a_dense_reference(kind: str) -> None:
    rng = np.random.default_rng(0)
    visible, pattern = rng.random((5, N_GENES)) < 0.6, rng.integers(0, 5, N_OBS)
    visible[4] = False
    source = make_source(FORMATS[kind](counts()))
    found = source.as_seen(
        source.sparse_rows(EVERYTHING), EVERYTHING, torch.from_numpy(visible), torch.from_numpy(pattern)
    )
    fraction = counts().sum(0) / counts().sum()
    expected = normalized(counts(), visible[pattern], fraction, float(np.median(counts().sum(1))))
    seen = visible[pattern]
    np.testing.assert_allclose(found.toarray()[seen], expected[seen], rtol=1e-4, atol=1e-6)
    logged = ExpressionReader(np.log1p(counts()), SAME, "log", None)
    rows = logged.sparse_rows(EVERYTHING)
    assert logged.as_seen(rows, EVERYTHING, torch.from_numpy(visible), torch.from_numpy(pattern)) is rows


# Panels ---------------------------------------------------------------------------------------------------------------

SAMPLE = (EVERYTHING >= 15).astype(np.int64)
LACKING = np.stack([SAME < 3, SAME >= 9])


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
@pytest.mark.parametrize("filled", [0.0, np.nan])
@pytest.mark.parametrize("with_hidden", [False, True])
def test_an_outer_join_equals_its_sections(kind: str, filled: float, with_hidden: bool) -> None:
    """Each read with the genes that it has, by the same model; in another order, beside one that it does not know."""
    statistics = ExpressionReader(counts(), SAME, "counts", None).gene_statistics(EVERYTHING)
    hidden = (
        np.random.default_rng(0).random((N_OBS, N_GENES)) < 0.3 if with_hidden else np.zeros((N_OBS, N_GENES), bool)
    )
    order = np.random.default_rng(1).permutation(N_GENES)

    def moved(table: np.ndarray) -> np.ndarray:
        return np.hstack([table[:, :1], table[:, order]])

    joined = np.where(LACKING[SAMPLE], filled, counts())
    source = ExpressionReader(
        FORMATS[kind](moved(joined)), 1 + np.argsort(order), "counts", statistics, SAMPLE,
        moved(hidden) if with_hidden else None, panels=Panels(SAMPLE, moved(LACKING)),
    )  # fmt: skip
    for code in (0, 1):
        cells, genes = np.flatnonzero(code == SAMPLE), np.flatnonzero(~LACKING[code])
        columns = np.full(N_GENES, -1)
        columns[genes] = np.arange(len(genes))
        own = ExpressionReader(
            FORMATS[kind](counts()[np.ix_(cells, genes)]), columns, "counts", statistics, np.zeros(len(cells), int),
            hidden=hidden[np.ix_(cells, genes)] if with_hidden else None,
        )  # fmt: skip
        here = np.arange(len(cells))
        seen = observed(own, here)
        np.testing.assert_array_equal(observed(source, cells), seen)
        np.testing.assert_allclose(source.rows(cells)[seen], own.rows(here)[seen], rtol=1e-5)
        np.testing.assert_allclose(source.center[code], own.center[0], rtol=1e-5)
        assert not source.rows(cells)[:, LACKING[code]].any()
    both = np.array([20, 3, 16, 4])
    assert observed(source, both).shape == (4, N_GENES)
    if not with_hidden:
        assert len(source.observed(both)[0]) == 2
        assert len(source.observed(both[[0, 2]])[0]) == 1


def test_statistics_of_panels_are_those_of_whole_cells_where_counts_are_depth_times_share() -> None:
    share = counts().sum(0) / counts().sum()
    depth = np.where(SAMPLE == 0, 40.0, 900.0)  # sections of very different depth
    whole = depth[:, None] * share
    joined = np.where(LACKING[SAMPLE], 0, whole)
    first = ExpressionReader(joined, SAME, "normalized", None, panels=Panels(SAMPLE, LACKING))
    found = first.gene_statistics(EVERYTHING)
    expected = ExpressionReader(whole, SAME, "normalized", None).gene_statistics(EVERYTHING)
    np.testing.assert_allclose(found.fraction, expected.fraction, rtol=1e-4)
    np.testing.assert_allclose(found.target_sum, expected.target_sum, rtol=1e-4)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-4)
    np.testing.assert_allclose(first.complete_rows(EVERYTHING, found.mean).toarray()[3], found.mean, rtol=1e-4)


def test_numbers_that_a_sample_lacks_are_not_seen() -> None:
    values = counts() - 4.0
    joined = np.where(LACKING[SAMPLE], np.nan, values)
    source = ExpressionReader(joined, SAME, "real", None, panels=Panels(SAMPLE, LACKING))
    mean = source.gene_statistics(EVERYTHING).mean
    np.testing.assert_allclose(mean, np.nanmean(joined, axis=0), rtol=1e-5)
    np.testing.assert_array_equal(observed(source, EVERYTHING), ~LACKING[SAMPLE])
