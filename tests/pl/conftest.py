"""Small modalities to draw."""

from __future__ import annotations

import numpy as np
import pytest

from fimp_sc import pp


@pytest.fixture
def brain():
    """Two recordings of five regions, 30 time points every 2 s, and a reconstruction that misses the last two."""
    rng = np.random.default_rng(0)
    mdata = pp.fmri(
        rng.normal(size=(2, 5, 30)).cumsum(-1),
        coordinates=rng.normal(size=(5, 3)),
        region_names=list("ABCDE"),
        recordings=["first", "second"],
        sampling_interval=2.0,
        n_neighbors=2,
    )
    made = mdata["fmri"].X * 2
    made[:, 28:] = np.nan
    mdata["fmri"].layers["fimp"] = made
    return mdata


@pytest.fixture
def photos():
    """Four images of 4 × 8 pixels at the corners of a square of a degree at 60° north; edges along a path."""
    rng = np.random.default_rng(0)
    path = np.diag(np.ones(3), 1)
    return pp.images(
        rng.integers(0, 256, (4, 4, 8, 3)).astype(np.uint8),
        coordinates=[[59.5, 10], [60.5, 10], [60.5, 11], [59.5, 11]],
        adjacency=path + path.T,
        labels={"country": ["x", "x", "y", "z"], "height": [1.0, 2.0, np.nan, 5.0]},
    )
