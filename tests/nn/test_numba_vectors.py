"""Products and softmax in vectors, beside NumPy and SciPy, for matrices of any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax as reference

from fimp_sc.nn._numba_vectors import add_product, product, softmax, softmax_backward

SIZES = st.integers(1, 70)
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(m=SIZES, n=SIZES, depth=st.integers(0, 40), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_products(dtype: str, m: int, n: int, depth: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((m, depth)).astype(dtype), rng.standard_normal((depth, n)).astype(dtype)
    memory = rng.standard_normal((m, n + 3)).astype(dtype)
    before, out = memory.copy(), memory[:, 1 : n + 1]
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * 10}
    add_product(a, b, out, out.dtype.type(-1.5))
    np.testing.assert_allclose(out, before[:, 1 : n + 1] - 1.5 * (a @ b), **near)
    product(np.asfortranarray(a), b, out)
    np.testing.assert_allclose(out, a @ b, **near)
    # Nothing beside the columns is touched.
    np.testing.assert_array_equal(memory[:, [0, -2, -1]], before[:, [0, -2, -1]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(m=SIZES, n=SIZES, scale=st.floats(-6, 3), shift=st.floats(-1e3, 1e3), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_softmax(dtype: str, m: int, n: int, scale: float, shift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = (rng.standard_normal((m, n)) * 10**scale + shift).astype(dtype)
    attention, gradient = scores.copy(), rng.standard_normal((m, n)).astype(dtype)
    softmax(attention)
    expected = reference(scores.astype(np.float64), axis=0)
    # Products with log2(e) are rounded, by as much as the scores are far from the largest.
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * 10}
    np.testing.assert_allclose(attention, expected, rtol=near["rtol"], atol=1e-12)
    of_scores, mean = gradient.copy(), np.empty(n, dtype)
    softmax_backward(attention, of_scores, mean)
    np.testing.assert_allclose(mean, (expected * gradient).sum(0), **near)
    np.testing.assert_allclose(of_scores, expected * (gradient - (expected * gradient).sum(0)), **near)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softmax_of_what_is_not_finite(dtype: str) -> None:
    nan, inf = np.nan, np.inf
    scores = np.array([[nan, 0.0, -inf, -inf, 1.0], [0.0, inf, 2.0, -inf, 1.0]], dtype)
    softmax(scores)
    expected = [[nan, nan, 0.0, 0.0, 0.5], [nan, nan, 1.0, 0.0, 0.5]]
    for column in (1, 3):  # infinity less infinity; nothing to attend to
        assert (scores[:, column] == 0).all() if column == 3 else np.isnan(scores[:, column]).any()
    np.testing.assert_allclose(np.delete(scores, 1, 1), np.delete(np.array(expected), 1, 1), rtol=1e-6)
