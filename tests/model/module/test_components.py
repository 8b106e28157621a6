"""Components that training starts from, against dense algebra."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA

from fimp_sc.model.module._linear_smoother import principal_components, shared_components

GENES = 60


def on_a_line(n: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expression (n, GENES), averages over both neighbors (n, n), and the direction in which neighbors are alike.

    Most of the variance is that of strong factors of single cells.
    """
    rng = np.random.default_rng(seed)
    alike, *private = np.linalg.qr(rng.standard_normal((GENES, 9)))[0].T
    wave, factors = np.sin(np.arange(n) / 20), rng.standard_normal((n, 8)) @ np.stack(private)
    near = np.eye(n, k=1) + np.eye(n, k=-1)
    values = np.outer(wave, alike) + 0.9 * factors + 0.1 * rng.standard_normal((n, GENES))
    return values.astype(np.float32), near / near.sum(1, keepdims=True), alike


def compressed(*arrays: np.ndarray) -> list[sparse.csr_matrix]:
    return [sparse.csr_matrix(array.astype(np.float32)) for array in arrays]


@pytest.mark.parametrize(("seed", "weight"), [(0, 1.0), (1, 1.0), (2, 4.0)])
def test_shared_components_are_leading_eigenvectors(seed: int, weight: float) -> None:
    values, near, _ = on_a_line(seed=seed)
    centered = (values - values.mean(0)).astype(float)
    expected, vectors = np.linalg.eigh(centered.T @ (np.eye(len(near)) + weight * (near + near.T) / 2) @ centered)
    directions, variance = shared_components(*compressed(values, near), weight, 5, 0)
    assert directions.shape == (5, GENES)
    np.testing.assert_allclose(directions @ directions.T, np.eye(5), atol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(directions * vectors.T[::-1][:5], axis=1)), 1.0, atol=1e-3)
    np.testing.assert_allclose(variance, (centered @ directions.T).var(0, ddof=1), rtol=1e-3)
    assert (np.diff(expected[::-1][:5]) < 0).all()


def test_they_find_what_neighbors_share_under_noise_that_is_stronger() -> None:
    values, near, alike = on_a_line(n=2000)
    cells, *graphs = compressed(values, near, near[np.random.default_rng(0).permutation(len(near))])
    of_cells = principal_components(cells, 1, 0).directions[0]
    of_neighbors, of_strangers = (shared_components(cells, graph, 1.0, 1, 0).directions[0] for graph in graphs)
    assert abs(of_neighbors @ alike) > 0.85
    assert max(abs(of_cells @ alike), abs(of_strangers @ alike)) < 0.5


def test_without_neighbors_they_are_principal_components() -> None:
    values, near, _ = on_a_line()
    cells, nothing = compressed(values, 0 * near)
    shared, principal = shared_components(cells, nothing, 1.0, 4, 0), principal_components(cells, 4, 0)
    np.testing.assert_allclose(np.abs(shared.directions @ principal.directions.T), np.eye(4), atol=1e-3)
    np.testing.assert_allclose(shared.variance, principal.variance, rtol=1e-3)


def test_principal_components_are_those_of_scikit_learn() -> None:
    values, *_ = on_a_line()
    found = principal_components(sparse.csr_matrix(values), 4, 0)
    expected = PCA(4).fit(values)
    np.testing.assert_allclose(np.abs(found.directions), np.abs(expected.components_), atol=1e-3)
    np.testing.assert_allclose(found.variance, expected.explained_variance_, rtol=1e-3)


def test_a_seed_gives_the_same_directions_again() -> None:
    values, near, _ = on_a_line()
    first, second = (shared_components(*compressed(values, near), 1.0, 4, 7) for _ in range(2))
    np.testing.assert_array_equal(first.directions, second.directions)


def test_the_order_of_cells_and_genes_does_not_matter_to_components() -> None:
    values, near, _ = on_a_line()
    cell, gene = (np.random.default_rng(0).permutation(n) for n in values.shape)
    first = shared_components(*compressed(values, near), 1.0, 4, 7)
    other = shared_components(*compressed(values[cell][:, gene], near[cell][:, cell]), 1.0, 4, 7)
    np.testing.assert_allclose(other.directions, first.directions[:, gene], atol=1e-4)
    a, b = (principal_components(sparse.csr_matrix(x), 4, 7) for x in (values, values[cell][:, gene]))
    np.testing.assert_allclose(b.directions, a.directions[:, gene], atol=1e-4)
