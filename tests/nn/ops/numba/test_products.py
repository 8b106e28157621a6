"""Products in vectors, beside NumPy, for matrices of any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fimp_sc.nn.ops.numba._products import add_product, product, scores, weighted_product

SIZES = st.integers(1, 70)
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(m=SIZES, n=SIZES, depth=st.integers(0, 40), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_products(dtype: str, m: int, n: int, depth: int, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    a, b, weights, row = random(m, depth), random(depth, n), random(m, n), random(n + 3)
    memory = random(m, n + 3)
    before, out = memory.copy(), memory[:, 1 : n + 1]
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * 10}
    add_product(a, b, out, row)
    np.testing.assert_allclose(out, before[:, 1 : n + 1] + row[:n] * (a @ b), **near)
    product(np.asfortranarray(a), b, out, row)
    np.testing.assert_allclose(out, a @ b + row[:n], **near)
    top, total = row.copy(), row.copy()
    scores(a[::-1], b, out, top)
    np.testing.assert_allclose(out, a[::-1] @ b, **near)
    np.testing.assert_array_equal(top[:n], out.max(0))
    weighted_product(a, b, out, weights, total)
    np.testing.assert_allclose(out, a @ b, **near)
    np.testing.assert_allclose(total[:n], (weights * (a @ b)).sum(0), rtol=near["rtol"], atol=near["atol"] * 10)
    # Nothing beside the columns is touched.
    np.testing.assert_array_equal(memory[:, [0, -2, -1]], before[:, [0, -2, -1]])
    for found in (top, total):
        np.testing.assert_array_equal(found[n:], row[n:])
