"""Segments of signals and patches of images, and that they can be joined again."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fimp_sc.data.sequences._kinds import patches, picture, segments, series


@given(n=st.integers(0, 3), n_times=st.integers(1, 30), length=st.integers(1, 12), seed=st.integers(0, 99))
@settings(deadline=None)
def test_segments_are_consecutive_times_and_can_be_joined(n, n_times, length, seed) -> None:
    signal = np.random.default_rng(seed).normal(size=(n, n_times))
    cut = segments(signal, length)
    assert cut.shape == (n, n_times // length, length)
    assert cut.dtype == np.float32
    for i in range(cut.shape[1]):
        np.testing.assert_array_equal(cut[:, i], signal[:, i * length : (i + 1) * length].astype(np.float32))
    back = series(cut, n_times)
    whole = n_times // length * length
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back[:, :whole], signal[:, :whole].astype(np.float32))
    assert back.shape == signal.shape
    assert np.isnan(back[:, whole:]).all()


@given(
    n=st.integers(0, 3), height=st.integers(1, 9), width=st.integers(1, 9), channels=st.integers(1, 3),
    side=st.integers(1, 5), seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None)
def test_patches_are_squares_row_by_row_and_can_be_joined(n, height, width, channels, side, seed) -> None:
    shape = height, width, channels
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *shape)).astype(np.uint8)
    cut = patches(pixels, side)
    rows, columns = height // side, width // side
    assert cut.shape == (n, rows * columns, side * side * channels)
    assert cut.dtype == np.float32
    for i in range(rows * columns):
        top, left = i // columns * side, i % columns * side
        square = pixels[:, top : top + side, left : left + side]
        np.testing.assert_array_equal(cut[:, i].reshape(square.shape), square)
    back = picture(cut, shape, side)
    assert back.shape == (n, *shape)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back[:, : rows * side, : columns * side], pixels[:, : rows * side, : columns * side])
    assert np.isnan(back[:, rows * side :]).all()
    assert np.isnan(back[:, :, columns * side :]).all()
