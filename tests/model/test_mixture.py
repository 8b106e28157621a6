"""Labels with and without neighbours, smoothed over neighbours: the views, their mixture, what each teaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from module_toys import make_batch, make_module
from scipy import sparse

from fimp_sc.data import BlockDataset, Destinations, without_neighbours
from fimp_sc.model import FIMP

LABELS = {"labels_key": "label", "library_key": "section"}


def both_views(model, adata, indices) -> tuple[np.ndarray, np.ndarray]:
    """What the model predicts with neighbours, and without."""
    with_neighbours = model._with_neighbours(adata, indices, {}, model._graph_data(adata))
    return with_neighbours, model._alone(adata, indices, {})


@pytest.mark.parametrize("options", [{}, {"self_loops": False}, {"layer": "paper"}])
def test_destinations_by_themselves_are_those_of_a_graph_without_edges(tissue, make_model, options: dict) -> None:
    model = make_model(tissue, LABELS, **options)
    nodes = np.arange(7, 90, 3)
    how = {"n_layers": model.n_layers, "n_tokens": model.n_tokens}
    module = model.module.eval()
    with torch.inference_mode():
        batch = BlockDataset(model._graph_data(tissue), **how)[Destinations(nodes, 0)]
        without = BlockDataset(model._graph_data(tissue, messages=False), **how)[Destinations(nodes, 0)]
        alone = module.inference(batch, alone=True)["alone"]
        np.testing.assert_allclose(alone, module.inference(without)["embedding"], atol=1e-5)
        assert (alone - module.inference(batch)["embedding"]).abs().max() > 1e-2
    assert "edge_weight" not in without_neighbours({**batch, "edge_weight": [torch.ones(3)] * model.n_layers})
    assert without_neighbours(batch)["n_nodes"] == without["n_nodes"] == [len(nodes)] * (model.n_layers + 1)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_predictions_are_mixed_by_the_share(tissue, make_model, train, share: float) -> None:
    model = train(make_model(tissue, LABELS), max_epochs=1)
    for head in (model.module.label_head, model.module.label_head_alone):
        torch.nn.init.normal_(head.score.weight)
    model.module.smoothed_share.zero_()
    model.module.neighbour_share.fill_(share)
    assert model.neighbour_share == pytest.approx(share)
    mixed = model.predict(soft=True).to_numpy()
    np.testing.assert_allclose(mixed.sum(1), 1, rtol=1e-5)
    model.module.neighbour_share.fill_(1.0)
    first = model.predict(soft=True).to_numpy()
    model.module.neighbour_share.fill_(0.0)
    second = model.predict(soft=True).to_numpy()
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_allclose(mixed, share * first + (1 - share) * second, atol=1e-6)
    rewired = tissue.copy()
    section = rewired.obs["section"].to_numpy()
    rng = np.random.default_rng(0)
    # Other neighbours, of the same section.
    order = np.arange(120)
    for name in np.unique(section):
        order[section == name] = rng.permutation(order[section == name])
    rewired.obsp["spatial_connectivities"] = rewired.obsp["spatial_connectivities"][order][:, order]
    np.testing.assert_allclose(model.predict(rewired, soft=True), second, atol=1e-5)
    model.module.neighbour_share.fill_(1.0)
    assert np.abs(model.predict(rewired, soft=True).to_numpy() - first).max() > 0.1


@pytest.mark.filterwarnings("ignore:.*have no neighbours")
@pytest.mark.parametrize("options", [{}, {"self_loops": False}])
@pytest.mark.parametrize("share", [0.35, 1.0])
def test_predictions_are_smoothed_over_cells_and_their_neighbours(
    tissue, make_model, train, share: float, options: dict
) -> None:
    graph = tissue.obsp["spatial_connectivities"].toarray()
    graph[5], graph[:, 5] = 0, 0
    tissue.obsp["spatial_connectivities"] = sparse.csr_matrix(graph)
    model = train(make_model(tissue, LABELS, **options), max_epochs=1)
    for head in (model.module.label_head, model.module.label_head_alone):
        torch.nn.init.normal_(head.score.weight)
    model.module.smoothed_share.zero_()
    own = model.predict(soft=True).to_numpy()
    model.module.smoothed_share.fill_(share)
    assert model.smoothed_share == pytest.approx(share)
    found = model.predict(soft=True).to_numpy()
    joined = ((graph != 0) | np.eye(len(graph), dtype=bool)).astype(float)
    expected = share * (joined / joined.sum(1, keepdims=True)) @ own + (1 - share) * own
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found[5], own[5], atol=1e-6, err_msg="a cell without neighbours is its own mean")
    assert np.abs(found - own).max() > 0.05
    some = [70, 3, 5, 3]
    np.testing.assert_allclose(model.predict(indices=some, soft=True), found[some], atol=1e-6)
    np.testing.assert_allclose(model.predict(soft=True, batch_size=17, strategy="blocks"), found, atol=1e-5)
    np.testing.assert_array_equal(model.predict(), np.array(model.classes)[found.argmax(1)])


def test_share_follows_from_the_validation_cells(tissue, make_model, train) -> None:
    model = train(make_model(tissue, LABELS), max_epochs=1)
    known = np.flatnonzero(tissue.obs["label"].isin(model.classes))
    first, second = both_views(model, tissue, known)
    for view, expected in ((first, 1.0), (second, 0.0)):
        # Classes for which this view gives more than the other, everywhere.
        label = (view - (first + second - view)).argmax(1)
        model._fit_shares(known, label)
        assert model.neighbour_share == expected


def test_smoothing_follows_from_the_validation_cells(tissue, make_model, train) -> None:
    model = train(make_model(tissue, LABELS), max_epochs=1)
    joined = tissue.obsp["spatial_connectivities"].toarray() != 0
    np.fill_diagonal(joined, True)
    mean = joined / joined.sum(1, keepdims=True)
    known = np.flatnonzero(tissue.obs["label"].isin(model.classes))
    first, second = both_views(model, tissue, None)
    found = []
    for sign in (1, -1):
        # Classes that are more, or less, probable around a cell than in itself.
        label = (sign * (mean @ first - first)).argmax(1)[known]
        model._fit_shares(known, label)
        own = model.neighbour_share * first + (1 - model.neighbour_share) * second
        pair = [part[known, label] for part in (mean @ own, own)]
        losses = [-np.log(share * pair[0] + (1 - share) * pair[1]).sum() for share in np.linspace(0, 1, 21)]
        assert model.smoothed_share == pytest.approx(np.argmin(losses) / 20)
        found.append(model.smoothed_share)
    assert found[0] > 0.5 > found[1]


def test_share_of_a_training_is_the_best_of_its_validation_cells(tissue, make_model, train) -> None:
    held = np.arange(40)
    model = train(make_model(tissue, LABELS), validation_indices=held)
    smoothed = model.smoothed_share
    known = held[tissue.obs["label"].isin(model.classes).to_numpy()[held]]
    code = np.array([model.classes.index(name) for name in tissue.obs["label"].iloc[known]])
    pair = [part[np.arange(len(known)), code].astype(float) for part in both_views(model, tissue, known)]
    losses = [-np.log(share * pair[0] + (1 - share) * pair[1]).sum() for share in np.linspace(0, 1, 21)]
    assert model.neighbour_share == pytest.approx(np.argmin(losses) / 20)
    model._fit_shares(known, code)
    assert model.smoothed_share == smoothed, "training fits it to the same cells"
    unvalidated = train(make_model(tissue, LABELS), validation_size=0)
    assert (unvalidated.neighbour_share, unvalidated.smoothed_share) == (0.5, 0.0)


def test_shares_are_saved(tissue, make_model, train, tmp_path) -> None:
    model = train(make_model(tissue, LABELS), max_epochs=1)
    model.module.neighbour_share.fill_(0.7)
    model.module.smoothed_share.fill_(0.45)
    model.save_pretrained(tmp_path / "pretrained")
    model.save(str(tmp_path / "model"))
    again = (
        FIMP.from_pretrained(tmp_path / "pretrained"),
        FIMP.load_query_data(tissue, model),
        FIMP.load(str(tmp_path / "model"), adata=tissue, accelerator="cpu"),
    )
    for other in again:
        assert other.neighbour_share == model.neighbour_share == pytest.approx(0.7)
        assert other.smoothed_share == model.smoothed_share == pytest.approx(0.45)
    np.testing.assert_allclose(again[-1].predict(soft=True), model.predict(soft=True), atol=1e-6)


def test_without_messages_there_is_one_prediction(tissue, make_model, train) -> None:
    model = train(make_model(tissue, LABELS, messages=False))
    assert model.module.label_head_alone is None
    assert (model.neighbour_share, model.smoothed_share) == (0.0, 0.0)


def module_with_both() -> tuple:
    module, batch = make_module(alone=True, dropout=0.0).train(), make_batch()
    batch["n_nodes"] = [6, 4]
    for head in (module.label_head, module.label_head_alone):
        torch.nn.init.normal_(head.score.weight)
    return module, batch


@pytest.mark.parametrize(("share", "learns"), [(0.0, 0.3), (0.25, 0.3), (0.5, 0.5), (1.0, 1.0)])
def test_network_learns_from_either_prediction_as_much_as_it_counts(share: float, learns: float) -> None:
    """The gradient is that of the cross-entropies weighted with the shares; neighbours have a floor."""
    module, batch = module_with_both()
    module.value_head = None
    module.neighbour_share.fill_(share)
    weights = list(module.network.parameters())
    module(batch)[2].loss.backward()
    found = [torch.zeros_like(weight) if weight.grad is None else weight.grad.clone() for weight in weights]
    module.zero_grad()
    views = (
        (module.label_head, module.network(batch), learns),
        (module.label_head_alone, module.network(without_neighbours(batch)), 1 - learns),
    )
    loss = sum(
        part * torch.nn.functional.cross_entropy(head(embedding), batch["label"], ignore_index=-1)
        for head, embedding, part in views
    )
    loss.backward()
    for weight, gradient in zip(weights, found, strict=True):
        expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_heads_learn_whatever_counts() -> None:
    module, batch = module_with_both()
    module.neighbour_share.fill_(1.0)
    module(batch)[2].loss.backward()
    assert module.label_head_alone.score.weight.grad.abs().max() > 1e-3
    assert module.label_head.score.weight.grad.abs().max() > 1e-3


def test_validation_loss_is_that_of_the_best_mixture() -> None:
    module, batch = module_with_both()
    module.eval()
    _, generative, losses = module(batch)
    known = [0, 2, 3]
    first, second = (
        torch.log_softmax(generative[name], 1).exp().detach().numpy()[known, [2, 0, 2]]
        for name in ("logits", "logits_alone")
    )
    expected = [-np.log(share * first + (1 - share) * second).mean() for share in np.linspace(0, 1, 21)]
    assert losses.extra_metrics["label_loss"].item() == pytest.approx(min(expected), rel=1e-5)
