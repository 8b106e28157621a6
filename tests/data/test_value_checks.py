"""`fimp_sc.data._value_checks`: values of a matrix in any form, and the scale that they are on."""

from __future__ import annotations

import tracemalloc

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from fimp_sc.data import _value_checks
from fimp_sc.data._checks import check_values

FORMATS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "csr_array": sparse.csr_array, "dense": np.asarray}
FORMATS["fortran"] = np.asfortranarray


def counts(n_obs=12, n_vars=7, seed=0) -> np.ndarray:
    matrix = np.random.default_rng(seed).poisson(1.5, size=(n_obs, n_vars)).astype(np.float32)
    matrix[np.arange(n_obs), np.arange(n_obs) % n_vars] += 1  # no empty cell, no empty gene
    return matrix


@pytest.fixture(params=[3, 1 << 20], ids=["many chunks", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(_value_checks, "CHUNK_VALUES", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"contains 2 values that are NaN, first at cell (4, gene 5|9, gene 2)"),
        (np.inf, r"contains 2 values that are infinite, first at cell (4, gene 5|9, gene 2)"),
        (-1.5, r"contains 2 values that are below zero \(lowest -1.5\), first at cell (4, gene 5|9, gene 2)"),
        (1.5, r"contains 2 values that are not whole numbers, first at cell (4, gene 5|9, gene 2).*raw counts"),
    ],
)
def test_bad_values_are_counted_and_located(form, value, message):
    matrix = counts()
    matrix[4, 5] = matrix[9, 2] = value
    with pytest.raises(ValueError, match=r"^adata\.X " + message):
        check_values(FORMATS[form](matrix), where="adata.X", input_scale="counts")


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 10_000),
    chunk_values=st.integers(1, 12),
    form=st.sampled_from(sorted(FORMATS)),
)
def test_position_is_of_the_damaged_entry(shape, seed, chunk_values, form):
    rng = np.random.default_rng(seed)
    matrix = rng.poisson(0.7, size=shape).astype(np.float64)
    cell, gene = int(rng.integers(shape[0])), int(rng.integers(shape[1]))
    matrix[cell, gene] = np.nan
    stored, before = FORMATS[form](matrix), _value_checks.CHUNK_VALUES
    _value_checks.CHUNK_VALUES = chunk_values
    try:
        with pytest.raises(ValueError, match=rf"1 value that is NaN, first at cell {cell}, gene {gene} "):
            check_values(stored, where="adata.X")
    finally:
        _value_checks.CHUNK_VALUES = before


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("form", FORMATS)
def test_empty_cells_and_genes_warn(form):
    matrix = counts()
    matrix[[3, 8]] = 0
    matrix[:, 6] = 0
    stored = FORMATS[form](matrix)
    cells = r"^2 of 12 cells are empty \(zero for every gene in adata\.X\), first at position 3\."
    genes = r"^1 of 7 genes are zero for every cell in adata\.X, first at position 6\."
    with pytest.warns(UserWarning, match=cells), pytest.warns(UserWarning, match=genes):
        assert check_values(stored, where="adata.X") == "counts"


def test_stored_zeros_are_zeros():
    matrix = sparse.csr_matrix(counts())
    matrix.data[:] = 0
    with pytest.raises(ValueError, match="zero everywhere"):
        check_values(matrix, where="adata.X")


@pytest.mark.parametrize("form", FORMATS)
def test_all_zero(form):
    with pytest.raises(ValueError, match=r"adata\.X is zero everywhere"):
        check_values(FORMATS[form](np.zeros((3, 4), dtype=np.float32)), where="adata.X")


def proportions(total: float) -> np.ndarray:
    matrix = counts(300, 40).astype(np.float64)
    return matrix / matrix.sum(axis=1, keepdims=True) * total


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("matrix", "scale"),
    [
        (counts(), "counts"),
        (counts().astype(np.int64), "counts"),
        (counts() > 0, "counts"),
        (np.log1p(proportions(1e4)), "log"),
        (np.log1p(counts() * 1.5), "log"),  # totals differ
        (proportions(1e4), "normalized"),
        (proportions(1.0), "normalized"),  # small values, equal totals
        (counts() * 40.5, "normalized"),
        (np.log1p(np.stack([np.roll([5, 0, 2, 1.5], i) for i in range(4)])), "log"),  # equal totals before and after
    ],
)
def test_auto_scale(form, matrix, scale):
    assert check_values(FORMATS[form](matrix), where="adata.X") == scale


def test_float32_log_values_of_unequal_counts():
    assert check_values(sparse.csr_matrix(np.log1p(proportions(1e4)).astype(np.float32)), where="adata.X") == "log"


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fractions_are_no_logarithms(form, dtype):
    """They are so small that undoing a logarithm, too, leaves totals within 1 %."""
    rng = np.random.default_rng(0)
    level, depth = rng.gamma(0.5, 2.0, size=3000) + 0.01, rng.uniform(0.5, 2.0, size=(60, 1))
    matrix = rng.poisson(level * depth).astype(np.float64)
    matrix = matrix[:, matrix.any(axis=0)]
    matrix /= matrix.sum(axis=1, keepdims=True)
    assert np.ptp(np.expm1(matrix).sum(axis=1)) < 0.01
    for total, logarithm, scale in (
        (1, False, "normalized"), (100, False, "normalized"), (1, True, "log"), (100, True, "log"), (1e4, True, "log"),
    ):  # fmt: skip
        values = np.log1p(matrix * total) if logarithm else matrix * total
        assert check_values(FORMATS[form](values.astype(dtype)), where="adata.X") == scale, (total, logarithm)


@pytest.mark.parametrize("scale", ["counts", "normalized", "log"])
def test_given_scale_is_kept(scale):
    assert check_values(counts(), where="adata.X", input_scale=scale) == scale


def test_unknown_scale():
    with pytest.raises(ValueError, match=r"input_scale='raw' is unknown: choose one of 'auto', 'counts'"):
        check_values(counts(), where="adata.X", input_scale="raw")


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (sparse.coo_matrix(counts()), r"found a sparse COO matrix: convert it with \.tocsr\(\)"),
        (pd.DataFrame(counts()), "found DataFrame"),
        (np.ones(3), "two dimensions"),
        (np.full((2, 2), "a"), "real numbers"),
        (np.full((2, 2), 1, dtype=object), "real numbers"),
        (sparse.csr_matrix(np.ones((2, 2), dtype=complex)), "real numbers, found dtype complex128"),
    ],
)
def test_other_kinds_of_matrix(matrix, message):
    with pytest.raises(TypeError, match=message):
        check_values(matrix, where="adata.X")


def test_anndata_views_are_matrices():
    adata = ad.AnnData(sparse.csr_matrix(counts()))
    assert check_values(adata[:, :6].X, where="adata.X") == "counts"
    adata.X = adata.X.toarray()
    assert check_values(adata[2:, :6].X, where="adata.X") == "counts"


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_memory_is_bounded_and_matrix_untouched(form, monkeypatch):
    monkeypatch.setattr(_value_checks, "CHUNK_VALUES", 1 << 14)
    matrix = FORMATS[form](np.random.default_rng(0).poisson(3, size=(2000, 1000)).astype(np.float32) + 1)
    copy = matrix.copy()
    tracemalloc.start()
    check_values(matrix, where="adata.X")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # the matrix takes 8e6 bytes or more
    assert abs(matrix - copy).sum() == 0


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("form", FORMATS)
def test_real_numbers_may_be_negative_and_zero_throughout(form):
    matrix = counts() - 2.5
    matrix[3] = 0
    matrix[:, 6] = -1
    assert check_values(FORMATS[form](matrix), where="adata.X", input_scale="real") == "real"
    assert check_values(FORMATS[form](-counts()), where="adata.X", input_scale="real") == "real"
    with pytest.raises(ValueError, match=r'below zero.*For numbers that are no expression pass input_scale="real"'):
        check_values(FORMATS[form](matrix), where="adata.X")


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "1 value that is NaN"), (-np.inf, "1 value that is inf"), (0, "zero everywhere")]
)
def test_bad_real_numbers(value, message):
    matrix = np.zeros((3, 4)) if value == 0 else counts() - 2.5
    matrix[1, 2] = value
    with pytest.raises(ValueError, match=message):
        check_values(matrix, where="adata.X", input_scale="real")
