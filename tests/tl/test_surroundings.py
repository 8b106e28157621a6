from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.neighbors import kneighbors_graph

from fimp_sc.data import NodeGraph
from fimp_sc.tl._statistics._surroundings import alike, surroundings


@pytest.fixture(scope="module")
def waves() -> tuple[np.ndarray, NodeGraph, np.ndarray, np.ndarray]:
    """Places, graph, strata and noisy expression of 40 genes that follow one wave, more than groups differ."""
    rng = np.random.default_rng(0)
    places = rng.random((900, 2))
    strata = rng.integers(0, 3, 900)
    wave = np.sin(4 * places[:, 0])
    value = wave[:, None] * rng.normal(size=40) + 3 * rng.normal(size=(3, 40))[strata] + rng.normal(size=(900, 40))
    return places, NodeGraph(kneighbors_graph(places, 6), self_loops=False), strata, value.astype(np.float32)


def test_surroundings_tell_the_trend_and_not_the_group(waves) -> None:
    places, graph, strata, value = waves
    found = surroundings(value, graph, strata)
    assert found.shape == (900, 10)
    assert abs(np.corrcoef(found[:, 0], np.sin(4 * places[:, 0]))[0, 1]) > 0.95
    between = np.var([found[strata == i, 0].mean() for i in range(3)])
    assert between < 0.01 * found[:, 0].var()


def test_cells_are_compared_with_those_like_them(waves) -> None:
    places, graph, strata, value = waves
    strata = np.where(np.arange(900) < 20, -1, strata)
    weight = alike(places, surroundings(value, graph, strata), strata)
    coo = weight.tocoo()
    np.testing.assert_array_equal(np.diff(weight.indptr)[20:], 12)
    assert not weight[:20].nnz
    np.testing.assert_allclose(weight[20:].sum(1), 1, rtol=1e-6)
    assert (coo.row != coo.col).all()
    np.testing.assert_array_equal(strata[coo.row], strata[coo.col])
    # Subtracting their mean leaves little of the trend, and the noise.
    trend = np.sin(4 * places[20:, 0])
    left = value[20:] - (weight @ value)[20:]
    assert np.abs(np.corrcoef(left.T, trend)[-1, :-1]).max() < 0.15
    assert left.std(0).mean() == pytest.approx(np.sqrt(1 + 1 / 12), rel=0.05)


def test_few_cells_and_cells_at_one_place() -> None:
    strata = np.array([0, 1, 1, 2, 2, 2, 2, -1])
    weight = alike(np.zeros((8, 2)), np.arange(8, dtype=np.float32)[:, None] ** 2, strata)
    n = np.diff(weight.indptr)
    np.testing.assert_array_equal(n, [0, 1, 1, 2, 2, 2, 2, 0])
    assert sparse.csr_array(weight)[1, 2] == weight[2, 1] == 1
    # Two fifths of three others, rounded up: the two nearest squares.
    assert weight[3].toarray().ravel().nonzero()[0].tolist() == [4, 5]
    assert weight[6].toarray().ravel().nonzero()[0].tolist() == [4, 5]
