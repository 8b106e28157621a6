"""The model class: embeddings, options, isolated and empty cells, and what it refuses."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fimp_sc.model import FIMP

# Results --------------------------------------------------------------------------------------------------------------


def test_shapes_and_types(trained: FIMP) -> None:
    adata = trained.adata
    z = trained.get_latent_representation()
    assert z.shape == (120, 16)
    assert z.dtype == np.float32
    assert np.isfinite(z).all()
    hard, soft, expression = trained.predict(), trained.predict(soft=True), trained.get_expression()
    assert hard.shape == (120,)
    assert set(hard) <= set(trained.classes)
    assert list(soft.columns) == trained.classes
    assert list(soft.index) == list(adata.obs_names)
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(soft.columns.to_numpy()[soft.to_numpy().argmax(1)], hard)
    assert expression.shape == adata.shape
    assert expression.dtype == np.float32
    assert (expression >= 0).all()


@pytest.mark.parametrize("batch_size", [1, 17, 1000])
def test_batch_size_does_not_change_results(trained: FIMP, batch_size: int) -> None:
    np.testing.assert_allclose(
        trained.get_latent_representation(batch_size=batch_size), trained.get_latent_representation(), atol=2e-5
    )


@pytest.mark.parametrize("kind", ["list", "mask", "repeated"])
def test_indices_are_rows_of_the_full_result(trained: FIMP, kind: str) -> None:
    rows = {"list": [40, 3, 119], "repeated": [5, 5, 2]}.get(kind)
    indices = rows
    if kind == "mask":
        indices = np.zeros(120, dtype=bool)
        indices[[4, 90]] = True
        rows = [4, 90]
    np.testing.assert_allclose(
        trained.get_latent_representation(indices=indices), trained.get_latent_representation()[rows], atol=2e-5
    )
    soft = trained.predict(indices=indices, soft=True)
    np.testing.assert_allclose(soft, trained.predict(soft=True).iloc[rows], atol=2e-5)
    assert list(soft.index) == list(trained.adata.obs_names[rows])
    np.testing.assert_array_equal(trained.predict(indices=indices), trained.predict()[rows])
    for scale in ("log", "counts"):
        np.testing.assert_allclose(
            trained.get_expression(indices=indices, scale=scale),
            trained.get_expression(scale=scale)[rows],
            rtol=1e-5,
            atol=1e-4,
        )


def test_results_do_not_depend_on_the_order_of_cells_and_genes(trained: FIMP) -> None:
    rng = np.random.default_rng(0)
    cells, genes = rng.permutation(120), rng.permutation(40)
    moved = trained.adata[cells, genes].copy()
    np.testing.assert_allclose(
        trained.get_latent_representation(moved), trained.get_latent_representation()[cells], atol=1e-4
    )
    np.testing.assert_allclose(trained.get_expression(moved), trained.get_expression()[cells][:, genes], atol=1e-4)


@pytest.mark.parametrize("kind", ["csc", "dense", "layer"])
def test_results_do_not_depend_on_how_the_matrix_is_stored(tissue, make_model, train, kind: str) -> None:
    stored = tissue.copy()
    if kind == "layer":
        stored.layers["counts"] = stored.X.copy()
        stored.X = sparse.csr_matrix(stored.shape, dtype=np.float32)
    else:
        stored.X = sparse.csc_matrix(stored.X) if kind == "csc" else stored.X.toarray()
    setup = {"layer": "counts"} if kind == "layer" else {}
    a = train(make_model(tissue), max_epochs=1)
    b = train(make_model(stored, setup), max_epochs=1)
    np.testing.assert_allclose(a.get_latent_representation(), b.get_latent_representation(), atol=1e-5)


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"layer": "paper"},
        {"layer": "paper", "self_loops": False, "reduce": "sum"},
        {"reduce": "sum"},
        {"self_loops": False, "n_layers": 1},
        {"n_layers": 3},
        {"n_tokens": 1000},
        {"n_tokens": 1},
        {"n_latent": 64, "n_heads": 4},
    ],
)
def test_options_train_and_change_the_result(tissue, make_model, train, trained: FIMP, options: dict) -> None:
    model = make_model(tissue, {"labels_key": "label", "library_key": "section"}, **options)
    train(model, max_epochs=1)
    z = model.get_latent_representation()
    assert z.shape == (120, options.get("n_latent", 16))
    assert np.isfinite(z).all()
    assert np.isfinite(model.get_expression()).all()
    if z.shape[1] == 16:
        assert np.abs(z - trained.get_latent_representation()).max() > 1e-3


def test_paper_and_practical_layers_differ_only_by_choice(tissue, make_model) -> None:
    paper = make_model(tissue, layer="paper").module.network.layers
    assert all(type(layer).__name__ == "PaperLayer" for layer in paper)
    with pytest.raises(ValueError, match="layer must be one of 'practical', 'paper', found 'gcn'"):
        make_model(tissue, layer="gcn")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "max"}, "reduce must be one of"),
        ({"n_layers": 0}, "n_layers must be a whole number from 1 to 100, found 0"),
        ({"n_tokens": 0}, "n_tokens must be a whole number of at least 1"),
        ({"n_latent": 10, "n_heads": 4}, "10 is not a multiple of 4"),
        ({"messages": False, "self_loops": False}, "messages=False .* and self_loops=False nothing"),
    ],
)
def test_wrong_options_are_named(tissue, make_model, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(tissue, **options)


def test_without_coordinates_the_graph_is_enough(tissue, make_model, train) -> None:
    with_coordinates = train(make_model(tissue.copy()), max_epochs=1)
    del tissue.obsm["spatial"]
    model = train(make_model(tissue), max_epochs=1)
    assert np.isfinite(model.get_latent_representation(batch_size=9)).all()
    moved = with_coordinates.get_latent_representation(tissue, batch_size=9)
    np.testing.assert_allclose(moved, with_coordinates.get_latent_representation(), atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"layer": "paper"}])
def test_without_messages_neighbors_have_no_influence(tissue, make_model, train, options: dict, tmp_path) -> None:
    model = train(make_model(tissue, {"labels_key": "label"}, messages=False, **options), max_epochs=1)
    z = model.get_latent_representation()
    rewired = tissue.copy()
    order = np.random.default_rng(0).permutation(120)
    rewired.obsp["spatial_connectivities"] = rewired.obsp["spatial_connectivities"][order][:, order]
    np.testing.assert_allclose(model.get_latent_representation(rewired), z, atol=2e-5)
    with_messages = train(make_model(tissue, {"labels_key": "label"}, **options), max_epochs=1)
    assert np.abs(with_messages.get_latent_representation() - z).max() > 1e-3
    model.save_pretrained(tmp_path / "model")
    assert "no messages between cells" in (tmp_path / "model" / "README.md").read_text()
    again = FIMP.from_pretrained(tmp_path / "model", adata=rewired)
    np.testing.assert_allclose(again.get_latent_representation(), z, atol=2e-5)
    with pytest.raises(ValueError, match=r"passes no messages \(messages=False\)"):
        model.get_edge_influence()


def isolate(adata: ad.AnnData, cells) -> ad.AnnData:
    graph = adata.obsp["spatial_connectivities"].tolil()
    graph[cells] = 0
    graph[:, cells] = 0
    adata.obsp["spatial_connectivities"] = sparse.csr_matrix(graph)
    return adata


@pytest.mark.filterwarnings("ignore:.*have no neighbors:UserWarning")
@pytest.mark.parametrize("options", [{}, {"layer": "paper", "self_loops": False}])
def test_isolated_cells_are_described_by_their_own_genes(tissue, make_model, train, options: dict) -> None:
    isolate(tissue, [0, 1, 60])
    model = train(make_model(tissue, {"labels_key": "label"}, **options), max_epochs=1)
    z = model.get_latent_representation()
    assert np.isfinite(z).all()
    assert np.isfinite(model.predict(soft=True)).all(axis=None)
    rewired = tissue.copy()
    rest = np.setdiff1d(np.arange(120), [0, 1, 60])
    order = np.arange(120)
    order[rest] = np.roll(rest, 5)
    rewired.obsp["spatial_connectivities"] = rewired.obsp["spatial_connectivities"][order][:, order]
    moved = model.get_latent_representation(rewired)
    np.testing.assert_allclose(moved[[0, 1, 60]], z[[0, 1, 60]], atol=2e-5)
    assert (np.abs(moved - z).max(1)[rest] > 1e-4).all()


def test_isolated_cells_are_announced(tissue) -> None:
    with pytest.warns(UserWarning, match="2 of 120 nodes have no neighbors"):
        FIMP.setup_anndata(isolate(tissue, [3, 4]))


@pytest.mark.filterwarnings("ignore:.* are empty:UserWarning")
def test_empty_cells_and_genes_are_finite(tissue, make_model, train) -> None:
    matrix = tissue.X.tolil()
    matrix[7] = 0
    tissue.X = sparse.csr_matrix(matrix)
    model = train(make_model(tissue, {"labels_key": "label"}), max_epochs=1)
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(model.get_expression()).all()
    assert np.isfinite(model.get_expression(scale="counts")).all()


# Refusals -------------------------------------------------------------------------------------------------------------


def test_untrained_models_have_no_results(tissue, make_model) -> None:
    model = make_model(tissue, {"labels_key": "label"})
    for result in (model.get_latent_representation, model.predict, model.get_expression):
        with pytest.raises(RuntimeError, match="train"):
            result()


def test_models_without_labels_do_not_predict_them(tissue, make_model, train) -> None:
    with pytest.raises(ValueError, match="trained without labels"):
        train(make_model(tissue), max_epochs=1).predict()


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 120], IndexError, r"indices must be in \[0, 120\), found 0 to 120"),
        ([-1], IndexError, "found -1 to -1"),
        ([], ValueError, "indices is empty"),
        (np.zeros(120, dtype=bool), ValueError, "indices is empty"),
        (np.zeros(119, dtype=bool), IndexError, "119"),
    ],
)
def test_bad_indices(trained: FIMP, indices, error, message: str) -> None:
    for result in (trained.get_latent_representation, trained.predict, trained.get_expression):
        with pytest.raises(error, match=message):
            result(indices=indices)


def test_unknown_scale(trained: FIMP) -> None:
    with pytest.raises(ValueError, match="scale must be one of 'log', 'counts', found 'raw'"):
        trained.get_expression(scale="raw")


def test_results_leave_the_object_alone(tissue, make_model, train) -> None:
    model = train(make_model(tissue, {"labels_key": "label"}), max_epochs=1)
    obs, data = tissue.obs.copy(), tissue.X.data.copy()
    keys = [sorted(getattr(tissue, kind)) for kind in ("obsm", "layers", "uns", "obsp", "varm")]
    model.get_latent_representation()
    model.predict()
    model.get_expression()
    pd.testing.assert_frame_equal(tissue.obs, obs)
    np.testing.assert_array_equal(tissue.X.data, data)
    assert keys == [sorted(getattr(tissue, kind)) for kind in ("obsm", "layers", "uns", "obsp", "varm")]


def test_two_models_on_one_object(tissue, make_model, train) -> None:
    first = train(make_model(tissue, {"labels_key": "label"}), max_epochs=1)
    expected = first.predict(soft=True)
    second = train(make_model(tissue, {"labels_key": "region"}), max_epochs=1)
    assert second.classes == list(tissue.obs["region"].cat.categories)
    pd.testing.assert_frame_equal(first.predict(soft=True), expected)
    assert list(second.predict(soft=True).columns) == second.classes
