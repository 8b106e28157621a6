"""Labels with and without neighbors, smoothed over neighbors: the views, their mixture, what each teaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graph_toys import data_of
from module_toys import make_batch, make_module
from scipy import sparse

from fimp_sc._recipe import changed
from fimp_sc.data import BlockDataset, Destinations, without_neighbors
from fimp_sc.model import FIMP
from fimp_sc.model.predict._inference import collect
from fimp_sc.model.predict._labels import _probability, _probability_alone, _shifts, fit_mixtures, use_mixture
from fimp_sc.model.predict._linear_labels import linear_labels
from fimp_sc.model.registry._graph_data import without_messages

LABELS = {"labels_key": "label", "library_key": "section"}


def draw_heads(module: torch.nn.Module) -> None:
    """Let both heads have a say."""
    generator = torch.Generator().manual_seed(0)
    for head in (module.label_head, module.label_head_alone):
        torch.nn.init.normal_(head.score.weight, generator=generator)


def both_views(model, adata, indices) -> tuple[np.ndarray, np.ndarray]:
    """What the model predicts with neighbors, and without."""
    with_neighbors = collect(model, data_of(model, adata), indices, _probability, {})
    return with_neighbors, collect(model, without_messages(data_of(model, adata)), indices, _probability_alone, {})


def smooth(graph: np.ndarray, probability: np.ndarray, share: float) -> np.ndarray:
    """Geometric means over cells and their neighbors, twice: one cell after the other."""
    logs = np.log(np.maximum(probability.astype(float), 1e-6))
    for _ in range(2):
        before = logs.copy()
        for i in range(len(graph)):
            near = [i, *np.flatnonzero(graph[i])]
            logs[i] = share * before[near].mean(0) + (1 - share) * before[i]
    out = np.exp(logs)
    return out / out.sum(1, keepdims=True)


def pool(probability: np.ndarray, linear: np.ndarray, weight: float) -> np.ndarray:
    """Weighted geometric means of what network and linear model predict."""
    return np.maximum(probability, 1e-6) ** (1 - weight) * np.maximum(linear.astype(float), 1e-6) ** weight


def grid(graph, first, second, rows, label, linear, weight) -> np.ndarray:
    """Log loss of every mixture."""
    shares = np.linspace(0, 1, 21)
    found = np.zeros((21, 21))
    for i, share in enumerate(shares):
        mixed = pool(share * first.astype(float) + (1 - share) * second, linear, weight)
        for j, smoothing in enumerate(shares):
            found[i, j] = -np.log(smooth(graph, mixed, smoothing)[rows, label]).sum()
    return found


@pytest.mark.parametrize("options", [{}, {"self_loops": False}, {"layer": "paper"}])
def test_destinations_by_themselves_are_those_of_a_graph_without_edges(tissue, make_model, options: dict) -> None:
    model = make_model(tissue, LABELS, **options)
    nodes = np.arange(7, 90, 3)
    how = {"n_layers": model.n_layers, "n_tokens": model.n_tokens}
    module = model.module.eval()
    with torch.inference_mode():
        batch = BlockDataset(data_of(model, tissue), **how)[Destinations(nodes, 0)]
        without = BlockDataset(without_messages(data_of(model, tissue)), **how)[Destinations(nodes, 0)]
        alone = module.inference(batch, alone=True)["alone"]
        np.testing.assert_allclose(alone, module.inference(without)["embedding"], atol=1e-5)
        assert (alone - module.inference(batch)["embedding"]).abs().max() > 1e-2
    assert "edge_weight" not in without_neighbors({**batch, "edge_weight": [torch.ones(3)] * model.n_layers})
    assert without_neighbors(batch)["n_nodes"] == without["n_nodes"] == [len(nodes)] * (model.n_layers + 1)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_predictions_are_mixed_by_the_share(tissue, make_model, train, share: float) -> None:
    model = train(make_model(tissue, LABELS), max_epochs=1)
    draw_heads(model.module)
    model.module.smoothing_weight.zero_()
    model.module.linear_weight.zero_()
    # Of other objects, such as the rewired one.
    model.module.mixtures.zero_()
    model.module.neighbor_weight.fill_(share)
    assert model.neighbor_weight == pytest.approx(share)
    mixed = model.predict(soft=True).to_numpy()
    np.testing.assert_allclose(mixed.sum(1), 1, rtol=1e-5)
    model.module.neighbor_weight.fill_(1.0)
    first = model.predict(soft=True).to_numpy()
    model.module.neighbor_weight.fill_(0.0)
    second = model.predict(soft=True).to_numpy()
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_allclose(mixed, share * first + (1 - share) * second, atol=1e-6)
    rewired = tissue.copy()
    section = rewired.obs["section"].to_numpy()
    rng = np.random.default_rng(0)
    # Other neighbors, of the same section.
    order = np.arange(120)
    for name in np.unique(section):
        order[section == name] = rng.permutation(order[section == name])
    rewired.obsp["spatial_connectivities"] = rewired.obsp["spatial_connectivities"][order][:, order]
    np.testing.assert_allclose(model.predict(rewired, soft=True), second, atol=1e-5)
    model.module.neighbor_weight.fill_(1.0)
    assert np.abs(model.predict(rewired, soft=True).to_numpy() - first).max() > 0.1


@pytest.mark.filterwarnings("ignore:.*have no neighbors")
@pytest.mark.parametrize("options", [{}, {"self_loops": False}])
@pytest.mark.parametrize("share", [0.35, 1.0])
def test_predictions_are_smoothed_over_cells_and_their_neighbors(
    tissue, make_model, train, share: float, options: dict
) -> None:
    graph = tissue.obsp["spatial_connectivities"].toarray()
    graph[5], graph[:, 5] = 0, 0
    tissue.obsp["spatial_connectivities"] = sparse.csr_matrix(graph)
    model = train(make_model(tissue, LABELS, **options), max_epochs=1)
    draw_heads(model.module)
    model.module.smoothing_weight.zero_()
    own = model.predict(soft=True).to_numpy()
    model.module.smoothing_weight.fill_(share)
    assert model.smoothing_weight == pytest.approx(share)
    found = model.predict(soft=True).to_numpy()
    expected = smooth(graph, own, share)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Smoothed are logarithms of at least 1e-6.
    alone = np.maximum(own[5], 1e-6) / np.maximum(own[5], 1e-6).sum()
    np.testing.assert_allclose(found[5], alone, atol=1e-6, err_msg="a cell without neighbors is its own mean")
    assert np.abs(found - own).max() > 0.05
    some = [70, 3, 5, 3]
    np.testing.assert_allclose(model.predict(indices=some, soft=True), found[some], atol=1e-6)
    np.testing.assert_allclose(model.predict(soft=True, batch_size=17, strategy="blocks"), found, atol=1e-5)
    np.testing.assert_array_equal(model.predict(), np.array(model.classes)[found.argmax(1)])


def test_mixture_is_the_best_of_the_validation_cells(tissue, make_model, train) -> None:
    held = np.arange(40)
    model = train(make_model(tissue, LABELS), validation_indices=held)
    shares = (model.neighbor_weight, model.smoothing_weight)
    known = held[tissue.obs["label"].isin(model.classes).to_numpy()[held]]
    code = np.array([model.classes.index(name) for name in tissue.obs["label"].iloc[known]])
    graph = tissue.obsp["spatial_connectivities"].toarray() != 0
    first, second = both_views(model, tissue, None)
    linear = np.exp(linear_labels(model, data_of(model, tissue), np.arange(120)))
    without = grid(graph, first, second, known, code, linear, 0.0)
    share, smoothing = np.array(np.unravel_index(without.argmin(), without.shape)) / 20
    mixed = share * first.astype(float) + (1 - share) * second
    losses = [
        -np.log(smooth(graph, pool(mixed, linear, weight), smoothing)[known, code]).sum()
        for weight in np.linspace(0, 1, 21)
    ]
    assert model.linear_weight == pytest.approx(np.argmin(losses) / 20) != 0
    loss = grid(graph, first, second, known, code, linear, model.linear_weight)
    best = np.array(np.unravel_index(loss.argmin(), loss.shape)) / 20
    assert shares == pytest.approx(tuple(best))
    unvalidated = train(make_model(tissue, LABELS), validation_size=0)
    assert (unvalidated.neighbor_weight, unvalidated.smoothing_weight, unvalidated.linear_weight) == (0.5, 0.0, 0.0)


@pytest.mark.parametrize(("view", "expected"), [(0, 1.0), (1, 0.0)])
def test_the_better_view_is_chosen(tissue, make_model, train, view: int, expected: float) -> None:
    model = train(make_model(tissue, LABELS), max_epochs=1)
    draw_heads(model.module)
    known = np.flatnonzero(tissue.obs["label"].isin(model.classes))
    views = both_views(model, tissue, known)
    # Classes for which this view gives more than the other, everywhere.
    fit_mixtures(model, data_of(model), np.arange(120), known, (views[view] - views[1 - view]).argmax(1))
    assert model.neighbor_weight == expected


def test_the_mixture_for_other_sections_stands_shifts(tissue, make_model, train) -> None:
    """It is the best under the very shifts, which have the covariance of cells."""
    model = train(make_model(tissue, LABELS), max_epochs=2)
    draw_heads(model.module)
    data = data_of(model, tissue)
    everything = np.arange(120)
    rows = data.expression.rows(everything).astype(float)
    mean = model.module.gene_mean.numpy()
    with changed(shifts=4000):
        drawn = np.stack(list(_shifts(data.expression, everything, mean, 0)))
    covariance = np.cov(rows.T, ddof=0)
    strong = np.argsort(np.diag(covariance))[-10:]
    expected = 0.25 * covariance[np.ix_(strong, strong)]
    np.testing.assert_allclose(np.cov(drawn[:, strong].T), expected, atol=0.12 * expected.max())
    known = np.flatnonzero(tissue.obs["label"].isin(model.classes))
    code = np.array([model.classes.index(name) for name in tissue.obs["label"].iloc[known]])
    with changed(shifts=3):
        fit_mixtures(model, data_of(model), everything, known, code)
        shifts = list(_shifts(data.expression, everything, mean, model.random_state))
    graph = tissue.obsp["spatial_connectivities"].toarray() != 0
    loss = 0.0
    for shift in shifts:
        sources = [data_of(model, tissue), without_messages(data_of(model, tissue))]
        for part in sources:
            part.expression.center = part.expression.center + shift
        first = collect(model, sources[0], None, _probability, {})
        second = collect(model, sources[1], None, _probability_alone, {})
        linear = np.exp(linear_labels(model, sources[0], everything))
        loss = loss + grid(graph, first, second, known, code, linear, model.linear_weight)
    best = np.array(np.unravel_index(loss.argmin(), loss.shape)) / 20
    np.testing.assert_allclose(model.module.mixtures[1].numpy(), best, atol=1e-6)
    np.testing.assert_allclose(model.module.mixtures[0].numpy(), (model.neighbor_weight, model.smoothing_weight))


def test_other_sections_have_the_other_mixture(tissue, make_model, train) -> None:
    model = train(make_model(tissue, LABELS), max_epochs=1)
    model.module.mixtures.copy_(torch.tensor([[0.7, 0.45], [0.2, 0.9]]))
    same = FIMP.load_query_data(tissue.copy(), model)
    assert (same.neighbor_weight, same.smoothing_weight) == pytest.approx((0.7, 0.45))
    other = tissue.copy()
    other.obs_names = [f"other_{name}" for name in other.obs_names]
    other = FIMP.load_query_data(other, model)
    assert (other.neighbor_weight, other.smoothing_weight) == pytest.approx((0.2, 0.9))
    barcodes = tissue.copy()
    barcodes.X = barcodes.X[np.random.default_rng(0).permutation(120)]
    barcodes = FIMP.load_query_data(barcodes, model)
    assert barcodes.neighbor_weight == pytest.approx(0.2), "the same names of other cells"
    again = FIMP.load_query_data(tissue.copy(), other)
    assert again.neighbor_weight == pytest.approx(0.7), "a model remembers its training"


def test_an_object_that_is_passed_has_its_own_mixture(tissue, make_model, train) -> None:
    model = train(make_model(tissue, LABELS), max_epochs=1)
    for head in (model.module.label_head, model.module.label_head_alone):
        torch.nn.init.normal_(head.score.weight, generator=torch.Generator().manual_seed(0))
    model.module.mixtures.copy_(torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    use_mixture(model, elsewhere=False)
    other = tissue.copy()
    other.obs_names = [f"other_{name}" for name in other.obs_names]
    bound = FIMP.load_query_data(other.copy(), model)
    np.testing.assert_allclose(model.predict(other.copy(), soft=True), bound.predict(soft=True), atol=1e-6)
    np.testing.assert_allclose(model.predict(tissue.copy(), soft=True), model.predict(soft=True), atol=1e-6)
    np.testing.assert_allclose(bound.predict(tissue.copy(), soft=True), model.predict(soft=True), atol=1e-6)
    assert np.abs(bound.predict(soft=True).to_numpy() - model.predict(soft=True).to_numpy()).max() > 0.01


def test_a_training_without_labeled_validation_cells_forgets_the_fractions(tissue, make_model, train) -> None:
    model = train(make_model(tissue, LABELS), max_epochs=1)
    model.module.mixtures.copy_(torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    use_mixture(model, elsewhere=True)
    train(model, max_epochs=1, validation_size=0)
    assert (model.neighbor_weight, model.smoothing_weight) == (0.5, 0.0)


def test_shares_are_saved(tissue, make_model, train, tmp_path) -> None:
    model = train(make_model(tissue, LABELS), max_epochs=1)
    model.module.mixtures.copy_(torch.tensor([[0.7, 0.45], [0.2, 0.9]]))
    use_mixture(model, elsewhere=False)
    model.save_pretrained(tmp_path / "pretrained")
    model.save(str(tmp_path / "model"))
    again = (
        FIMP.from_pretrained(tmp_path / "pretrained"),
        FIMP.load_query_data(tissue, model),
        FIMP.load(str(tmp_path / "model"), adata=tissue, accelerator="cpu"),
    )
    for other in again:
        assert other.neighbor_weight == model.neighbor_weight == pytest.approx(0.7)
        assert other.smoothing_weight == model.smoothing_weight == pytest.approx(0.45)
    np.testing.assert_allclose(again[-1].predict(soft=True), model.predict(soft=True), atol=1e-6)


def test_without_messages_there_is_one_prediction(tissue, make_model, train) -> None:
    model = train(make_model(tissue, LABELS, messages=False))
    assert model.module.label_head_alone is None
    assert (model.neighbor_weight, model.smoothing_weight) == (0.0, 0.0)


def module_with_both() -> tuple:
    module, batch = make_module(alone=True, dropout=0.0).train(), make_batch()
    batch["n_nodes"] = [6, 4]
    draw_heads(module)
    return module, batch


@pytest.mark.parametrize(("share", "learns"), [(0.0, 0.3), (0.25, 0.3), (0.5, 0.5), (1.0, 1.0)])
def test_network_learns_from_either_prediction_as_much_as_it_counts(share: float, learns: float) -> None:
    """The gradient is that of the cross-entropies weighted with the shares; neighbors have a floor."""
    module, batch = module_with_both()
    module.value_head = None
    module.neighbor_weight.fill_(share)
    weights = list(module.network.parameters())
    module(batch)[2].loss.backward()
    found = [torch.zeros_like(weight) if weight.grad is None else weight.grad.clone() for weight in weights]
    module.zero_grad()
    views = (
        (module.label_head, module.network(batch), learns),
        (module.label_head_alone, module.network(without_neighbors(batch)), 1 - learns),
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
    module.neighbor_weight.fill_(1.0)
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
