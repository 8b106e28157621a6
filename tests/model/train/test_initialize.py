"""Components that training starts from, of models as they are trained."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

import fimp_sc
from fimp_sc._recipe import changed
from fimp_sc.model.module import _initialize


@pytest.mark.parametrize(
    ("labels_key", "few", "dropped"), [(None, 1000, True), ("label", 1000, False), (None, 50, False)]
)
def test_components_of_noise_start_empty_without_labels_on_few_cells(
    tissue, make_model, train, monkeypatch, labels_key, few, dropped
) -> None:
    """Shuffled within each gene, cells have nothing in common but chance. Principal components are those of noise."""
    rng = np.random.default_rng(0)
    tissue.X = sparse.csr_matrix(rng.permuted(tissue.X.toarray(), axis=0))
    model = make_model(tissue, {"labels_key": labels_key})
    started = []
    start = model.module.start_as_smoother

    def spy(*args, **kwargs) -> None:
        start(*args, **kwargs)
        started.append((model.module.network.embedding.loading.detach().abs().sum(0) == 0).numpy())

    monkeypatch.setattr(model.module, "start_as_smoother", spy)
    with changed(mostly_signal=0.0, few_cells=few):
        train(model, max_epochs=1)
    network = model.module.network
    free = started[0][network.n_neighborhood : network.n_own]
    assert free.any() == dropped
    assert not started[0][: network.n_neighborhood].any()


@pytest.mark.parametrize(("signal", "by_neighbors"), [(0.0, False), (1.1, True)])
def test_components_are_those_of_training_cells_and_their_neighbors(
    tissue, make_model, train, monkeypatch, signal, by_neighbors
) -> None:
    """`signal` decides; cells that are held out, and edges to them, take no part."""
    asked = []
    shared_components = _initialize.shared_components

    def spy(cells, near, *args):
        asked.append(near.toarray())
        return shared_components(cells, near, *args)

    monkeypatch.setattr(_initialize, "shared_components", spy)
    held_out = np.arange(0, tissue.n_obs, 7)
    with changed(mostly_signal=signal):
        model = train(make_model(tissue), max_epochs=1, validation_indices=held_out)
    assert np.isfinite(model.get_latent_representation()).all()
    assert len(asked) == by_neighbors
    if by_neighbors:
        rest = np.setdiff1d(np.arange(tissue.n_obs), held_out)
        joined = tissue.obsp["spatial_connectivities"].toarray()[np.ix_(rest, rest)] > 0
        np.testing.assert_allclose(asked[0], joined / np.maximum(joined.sum(1, keepdims=True), 1), rtol=1e-6)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_handful_of_cells_does_not_make_expression_explode(make_model, train, seed) -> None:
    """Three validation cells tell next to nothing about components."""
    few = fimp_sc.datasets.toy_tissue(60, random_state=seed)[:30].copy()
    few = few[:, np.asarray(few.X.sum(0)).ravel() > 0].copy()
    fimp_sc.pp.spatial_graph(few, library_key="section", n_neighbors=4)
    model = train(make_model(few, {"library_key": "section"}), max_epochs=1)
    assert len(model.validation_indices) == 3
    assert model.get_expression(scale="counts").max() < 3 * few.X.max()
    counts = few.X.toarray()
    true = np.log1p(counts / counts.sum(1, keepdims=True) * np.median(counts.sum(1)))
    assert np.square(model.get_expression() - true).mean() < true.var(0).mean(), "the mean of each gene is worse"
