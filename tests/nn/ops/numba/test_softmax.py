"""Softmax in vectors, beside SciPy, for matrices of any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax as reference

from fimp_sc.nn.ops.numba._softmax import exponentials, largest, softmax_backward

SIZES = st.integers(1, 70)
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}


def softmax(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exponentials and shares."""
    found, top, share = scores.copy(), *np.empty((2, scores.shape[1]), scores.dtype)
    largest(found, top)
    exponentials(found, top, share)
    return found, share


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(m=SIZES, n=SIZES, scale=st.floats(-6, 3), shift=st.floats(-1e3, 1e3), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_softmax(dtype: str, m: int, n: int, scale: float, shift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = (rng.standard_normal((m, n)) * 10**scale + shift).astype(dtype)
    exponential, share = softmax(scores)
    expected = reference(scores.astype(np.float64), axis=0)
    # Products with log2(e) are rounded, by as much as the scores are far from the largest.
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * 10}
    np.testing.assert_allclose(exponential * share, expected, rtol=near["rtol"], atol=1e-12)
    gradient = rng.standard_normal((m, n)).astype(dtype)
    mean = (expected * gradient).sum(0)
    of_scores = gradient * share
    softmax_backward(exponential, of_scores, share, mean.astype(dtype))
    np.testing.assert_allclose(of_scores, expected * (gradient - mean), **near)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_largest_and_what_is_far_below(dtype: str) -> None:
    scores = np.array([[1.0, -3.0], [1e4, -1e9], [1e4 - 5, -4.0]], dtype)
    top = np.empty(2, dtype)
    largest(scores, top)
    np.testing.assert_array_equal(top, scores.max(0))
    exponential, share = softmax(scores)
    assert exponential[0, 0] == exponential[1, 1] == 0
    np.testing.assert_allclose(exponential * share, reference(scores, axis=0), rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softmax_of_what_is_not_finite(dtype: str) -> None:
    nan, inf = np.nan, np.inf
    scores = np.array([[nan, 0.0, -inf, -inf, 1.0], [0.0, inf, 2.0, -inf, 1.0]], dtype)
    exponential, share = softmax(scores)
    found = exponential * share
    assert np.isnan(found[:, 0]).all()
    assert np.isnan(found[:, 1]).any()  # infinity less infinity
    assert (found[:, 3] == 0).all()  # nothing to attend to
    np.testing.assert_allclose(found[:, [2, 4]], [[0.0, 0.5], [1.0, 0.5]], rtol=1e-6)
