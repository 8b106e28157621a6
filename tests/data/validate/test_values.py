"""`fimp_sc.data.validate._values`: values of a matrix in any form, and the scale that they are on."""

from __future__ import annotations

import tracemalloc

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from fimp_sc.data.validate import _values
from fimp_sc.data.validate._checks import check_values
from fimp_sc.data.validate._values import Samples, inspect_values

FORMATS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "csr_array": sparse.csr_array, "dense": np.asarray}
FORMATS["fortran"] = np.asfortranarray


def counts(n_obs=12, n_vars=7, seed=0) -> np.ndarray:
    matrix = np.random.default_rng(seed).poisson(1.5, size=(n_obs, n_vars)).astype(np.float32)
    matrix[np.arange(n_obs), np.arange(n_obs) % n_vars] += 1  # no empty cell, no empty gene
    return matrix


@pytest.fixture(params=[3, 1 << 20], ids=["many chunks", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(_values, "CHUNK_VALUES", request.param)


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
    shape=st.tuples(st.integers(2, 9), st.integers(1, 9)),
    seed=st.integers(0, 10_000),
    chunk_values=st.integers(1, 12),
    form=st.sampled_from(sorted(FORMATS)),
)
def test_position_is_of_the_damaged_entry(shape, seed, chunk_values, form):
    rng = np.random.default_rng(seed)
    matrix = rng.poisson(0.7, size=shape).astype(np.float64)
    cell, gene = int(rng.integers(shape[0])), int(rng.integers(shape[1]))
    matrix[cell, gene] = np.nan
    stored, before = FORMATS[form](matrix), _values.CHUNK_VALUES
    _values.CHUNK_VALUES = chunk_values
    try:
        with pytest.raises(ValueError, match=rf"1 value that is NaN, first at cell {cell}, gene {gene} "):
            check_values(stored, where="adata.X")
    finally:
        _values.CHUNK_VALUES = before


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
        (np.sqrt(counts(300, 40)) ** 2 / 7, "normalized"),
        (np.log1p(counts(300, 400) / counts(300, 400).sum(1, keepdims=True) * 50)[:, :40], "log"),  # of some genes
        (np.log2(1 + proportions(50.0)), "log"),
        (np.log10(1 + proportions(50.0)), "log"),
        (counts(300, 40) / np.random.default_rng(0).uniform(1, 9, (300, 1)), "normalized"),  # volumes
        (np.log1p(counts(300, 40)), "log"),
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
    monkeypatch.setattr(_values, "CHUNK_VALUES", 1 << 14)
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


# Guesses --------------------------------------------------------------------------------------------------------------


def corrected() -> np.ndarray:
    """Sparse counts less a part of each, as tools against ambient molecules leave them."""
    rng = np.random.default_rng(0)
    return rng.poisson(0.3, (300, 60)) * rng.uniform(0.7, 1.0, (300, 60))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("matrix", "scale", "message"),
    [
        (corrected(), "normalized", "do not tell whether logarithms were taken: they are taken for corrected counts"),
        (np.log1p(corrected() * 20), "log", "they are taken for logarithms"),
        (np.sqrt(counts(300, 40)), "log", "look like square roots"),
        (np.sqrt(counts(300, 40)) * 30, "log", "look like square roots"),
        (np.random.default_rng(0).random((30, 40)), "normalized", "confirm with input_scale='normalized'"),
        (np.random.default_rng(0).random((30, 40)) + 1, "log", "otherwise say 'normalized'"),
        (np.log1p(np.stack([np.roll([5, 0, 2, 1.5], i) for i in range(4)])), "log", "taken for logarithms"),
    ],
)
def test_a_guess_is_announced(form, matrix, scale, message):
    with pytest.warns(UserWarning, match=message):
        assert check_values(FORMATS[form](matrix), where="adata.X") == scale
    assert check_values(FORMATS[form](matrix), where="adata.X", input_scale=scale) == scale


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("form", ["csr", "csc", "csr_array"])
@pytest.mark.parametrize(
    ("matrix", "scale"),
    [(counts(40, 30), "counts"), (np.log1p(proportions(1e4)), "log"), (counts(40, 30) * 40.5, "normalized")],
)
def test_entries_that_are_stored_in_parts_are_judged_by_their_sum(form, matrix, scale):
    whole = FORMATS[form](matrix)
    parts = type(whole)(
        (np.repeat(whole.data, 2) / 2, np.repeat(whole.indices, 2), 2 * whole.indptr), shape=whole.shape
    )
    assert not parts.has_canonical_format
    assert check_values(parts, where="adata.X") == scale
    assert parts.nnz == 2 * whole.nnz, "the matrix stays as it is"


# Genes that some samples lack -----------------------------------------------------------------------------------------

SAMPLES = Samples(np.arange(240) // 80, ["a", "b", "c"], "section")
FEW = pytest.mark.filterwarnings("ignore:.*(genes are zero for every cell|cells are empty):UserWarning")


def panels(rate=2.0, n_genes=60, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Counts of three samples, the first of which lacks ten genes and the second five others; and what they lack."""
    rng = np.random.default_rng(seed)
    matrix = rng.poisson(rate * rng.gamma(2.0, 0.5, (240, 1)) * rng.uniform(0.5, 2, n_genes)).astype(np.float64)
    lacking = np.zeros((3, n_genes), dtype=bool)
    lacking[0, 3:13] = lacking[1, 20:25] = True
    return matrix, lacking


def shown(matrix: np.ndarray, scale: str) -> np.ndarray:
    if scale == "counts":
        return matrix
    scaled = matrix / np.maximum(matrix.sum(1, keepdims=True), 1) * 1e4
    return scaled if scale == "normalized" else np.log1p(scaled)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("scale", ["counts", "normalized", "log"])
@pytest.mark.parametrize("filled", [0.0, np.nan])
def test_genes_that_a_sample_never_shows_are_not_measured_in_it(form, scale, filled):
    matrix, lacking = panels()
    gone = lacking[SAMPLES.code]
    stored = np.where(gone, filled, shown(np.where(gone, 0, matrix), scale))
    expected = "zero or NaN in adata.X throughout a sample of obs\\['section'\\].* 10 in 'a', 5 in 'b'\\. They count as"
    with pytest.warns(UserWarning, match=expected):
        found = inspect_values(FORMATS[form](stored), where="adata.X", samples=SAMPLES)
    assert found.scale == scale
    np.testing.assert_array_equal(found.lacking, lacking)


@pytest.mark.parametrize(
    "silent",
    [
        pytest.param({"genes": slice(0, 10), "rate": 0.002}, id="rare genes, seen nowhere by chance"),
        pytest.param({"genes": slice(0, 1), "n_genes": 150, "rate": 2.0}, id="one gene of many"),
    ],
)
@FEW
def test_genes_that_are_silent_for_other_reasons_are_measured(silent):
    matrix, _ = panels(silent["rate"], silent.get("n_genes", 60))
    matrix[:80, silent["genes"]] = 0
    matrix[:, -1] = 3  # no cell is empty
    assert inspect_values(matrix, where="adata.X", samples=SAMPLES).lacking is None
    assert inspect_values(matrix - 0.5, where="adata.X", samples=SAMPLES, input_scale="real").lacking is None


def test_samples_of_one_class_each_lack_nothing():
    """Ten genes of each class are ten times as high there, as in crops of one layer each."""
    rng = np.random.default_rng(0)
    rate = np.full((3, 90), 0.2)
    for i in range(3):
        rate[i, 10 * i : 10 * i + 10] = 2.0
    assert inspect_values(rng.poisson(rate[SAMPLES.code]), where="adata.X", samples=SAMPLES).lacking is None


@pytest.mark.parametrize("key", ["section", "cell_type", "bregma"])
@pytest.mark.parametrize(
    "name", ["dlpfc_visium_151673", "dlpfc_visium_151674", "merfish_hypothalamus_animal1", "her2st_patients_A-F"]
)
@FEW
def test_no_gene_of_a_real_panel_is_said_to_be_lacking(shared_data, name, key):
    """Crops of one class each, and thirty small sections of six patients."""
    adata = ad.read_h5ad(shared_data / f"{name}.h5ad")
    if key not in adata.obs:
        pytest.skip("no such column")
    column = pd.Categorical(adata.obs[key])
    samples = Samples(column.codes.astype(np.int64), list(column.categories), key)
    assert inspect_values(adata.X, where="adata.X", samples=samples).lacking is None


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("form", FORMATS)
def test_nan_that_do_not_fill_a_sample_are_an_error(form):
    matrix, _ = panels()
    matrix[:80, 3:13] = np.nan
    matrix[100, 50] = np.nan
    stored = FORMATS[form](matrix)
    with pytest.raises(
        ValueError, match=r"1 value that is NaN, first at cell 100, gene 50 .*by 'section'.*join='inner'"
    ):
        inspect_values(stored, where="adata.X", samples=SAMPLES)
    with pytest.raises(ValueError, match=r"801 values that are NaN, first at cell 0, gene 3 .*library_key="):
        inspect_values(stored, where="adata.X")


def test_genes_that_are_nan_throughout_are_not_measured_at_all():
    matrix = counts()
    matrix[:, 2] = np.nan
    with pytest.warns(UserWarning, match="1 of 7 genes are NaN in adata.X throughout: they count as not measured"):
        found = inspect_values(matrix, where="adata.X")
    np.testing.assert_array_equal(found.lacking, [np.arange(7) == 2])


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("form", FORMATS)
def test_cells_that_do_not_matter_are_of_no_sample(form):
    matrix, lacking = panels()
    matrix[lacking[SAMPLES.code]] = 0
    code = np.where(np.arange(240) % 7 == 0, -1, SAMPLES.code)
    matrix[code < 0, 3] = np.nan
    matrix[code < 0, 4] = 99
    with pytest.warns(UserWarning, match="10 in 'a', 5 in 'b'"):
        found = inspect_values(FORMATS[form](matrix), where="adata.X", samples=SAMPLES._replace(code=code))
    np.testing.assert_array_equal(found.lacking, lacking)


def test_values_that_no_logarithm_has() -> None:
    values = np.array([[0.5, 100.0], [2.0, 3.0]])
    assert check_values(values, where="adata.X", input_scale="normalized") == "normalized"
    with pytest.raises(ValueError, match=r'adata\.X has 100 as its largest value.* input_scale="log"'):
        check_values(values, where="adata.X", input_scale="log")


def test_half_precision_is_read_as_any_other() -> None:
    values = np.random.default_rng(0).gamma(1.0, 3.0, (40, 12))
    half, single = (inspect_values(values.astype(dtype), where="adata.X") for dtype in (np.float16, np.float32))
    assert half.scale == single.scale == "normalized"
