"""Which losses are logged, how parameters are grouped, and how the learning rate moves."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from validation_toys import make_splitter, validation_losses

from fimp_sc.model import FIMPModule, FIMPTrainingPlan
from fimp_sc.nn import TransformerStack
from fimp_sc.nn._foundation import FoundationNetwork
from fimp_sc.pretrained._scgpt import ScGPTDecoder, ScGPTTokens


def make_plan(steps: int = 200, *, module: FIMPModule | None = None, **kwargs):
    plan = FIMPTrainingPlan(module or FIMPModule(10, 3, n_latent=8, n_heads=2, n_layers=1), **kwargs)
    plan._trainer = SimpleNamespace(estimated_stepping_batches=steps)
    return plan, plan.configure_optimizers()


def test_every_parameter_is_optimized_once() -> None:
    plan, configured = make_plan()
    grouped = [id(p) for group in configured["optimizer"].param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in plan.module.parameters()}


def test_rates_and_decays_of_loadings_tables_head_and_other_weights() -> None:
    sizes = {"network.embedding.loading": 0.05, "value_head.loading": 0.5}
    module = FIMPModule(10, 3, n_latent=8, n_heads=2, n_layers=1)
    with torch.no_grad():
        for name, size in sizes.items():
            loading = module.get_parameter(name)
            loading.mul_(size / np.sqrt(np.mean(np.square(loading.numpy()))))
    _, configured = make_plan(module=module, lr=1e-2, lr_loadings=1e-3, lr_head=0.1, weight_decay=0.5)
    group_of = {id(p): group for group in configured["optimizer"].param_groups for p in group["params"]}
    rates = {}
    for name, parameter in module.named_parameters():
        group = group_of[id(parameter)]
        rates[name] = (group["initial_lr"], group["weight_decay"])
    for name, size in sizes.items():
        assert rates.pop(name) == pytest.approx((1e-3 * size, 0.0), rel=1e-4), name
    for name in ("network.embedding.identity", "value_head.bias"):
        assert rates.pop(name) == (1e-2, 0.0), name
    for name in ("label_head.score.weight", "label_head.score.bias"):
        assert rates.pop(name) == (0.1, 0.5), name
    assert {"network.layers.0.attention.query.weight", "value_head.project.weight"} < set(rates)
    assert set(rates.values()) == {(1e-2, 0.5)}


def test_the_first_step_moves_loadings_by_a_share_of_their_size() -> None:
    """Adam moves every entry by the learning rate: the share is the same however small the loadings are."""
    module = FIMPModule(10, 3, n_latent=8, n_heads=2, n_layers=1)
    loading = module.network.embedding.loading
    with torch.no_grad():
        loading.mul_(0.5)
    before = loading.detach().clone()
    _, configured = make_plan(module=module, lr_loadings=1e-2)
    loading.grad = torch.randn_like(loading)
    configured["optimizer"].step()
    size = float(before.square().mean().sqrt())
    torch.testing.assert_close((loading - before).abs(), torch.full_like(before, 1e-2 * size), rtol=1e-3, atol=0)


def test_loadings_that_start_at_zero_can_leave_it() -> None:
    module = FIMPModule(10, 3, n_latent=8, n_heads=2, n_layers=1)
    nn.init.zeros_(module.value_head.loading)
    _, configured = make_plan(module=module, lr_loadings=1e-2)
    rates = [group["initial_lr"] for group in configured["optimizer"].param_groups]
    assert min(rates) > 0


@pytest.mark.parametrize("steps", [1, 30, 400])
def test_rate_decays(steps: int) -> None:
    _, configured = make_plan(steps, lr=1.0)
    scheduler = configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(steps):
        rates.append(configured["optimizer"].param_groups[0]["lr"])
        configured["optimizer"].step()
        scheduler.step()
    assert rates[0] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates))
    assert rates[-1] == pytest.approx(0.05 + 0.475 * (1 + np.cos(np.pi * (steps - 1) / steps)))


def test_gradients_are_clipped_by_their_norm() -> None:
    plan, _ = make_plan(gradient_clip=0.5)
    asked = {}
    plan.clip_gradients = lambda optimizer, **kwargs: asked.update(kwargs)
    plan.configure_gradient_clipping(torch.optim.SGD(plan.module.parameters(), lr=1.0))
    assert asked == {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "norm"}


def foundation_module(trained: str, *, decoder: bool = True) -> FIMPModule:
    network = FoundationNetwork(
        ScGPTTokens(8, 10),
        TransformerStack(8, 2, 2, d_feedforward=8),
        ScGPTDecoder(8) if decoder else None,
        trained=trained,
        n_bins=5,
    )
    return FIMPModule(10, 3, network=network)


@pytest.mark.parametrize("trained", ["frozen", "full", "last:1", "lora:2"])
def test_what_trains_of_a_foundation_model_has_a_rate_of_its_own(trained: str) -> None:
    module = foundation_module(trained)
    plan, configured = make_plan(module=module, lr=1e-2, lr_head=0.1, lr_foundation=3e-3, weight_decay=0.5)
    group_of = {id(p): group for group in configured["optimizer"].param_groups for p in group["params"]}
    assert len(group_of) == sum(len(group["params"]) for group in configured["optimizer"].param_groups)
    for name, parameter in plan.module.named_parameters():
        assert (id(parameter) in group_of) == parameter.requires_grad, name
        if name.startswith("network.") and parameter.requires_grad:
            group = group_of[id(parameter)]
            assert (group["initial_lr"], group["weight_decay"]) == (3e-3, 0.5), name
    rates = {group["initial_lr"] for group in configured["optimizer"].param_groups}
    assert (3e-3 in rates) == (trained != "frozen")
    # Heads are trained as those of FIMP-base are.
    heads = {name for name, _ in module.named_parameters() if not name.startswith("network.")}
    assert {"value_head.loading", "value_head.bias", "label_head.score.weight"} < heads
    for name in heads:
        initial = group_of[id(module.get_parameter(name))]["initial_lr"]
        assert initial != 3e-3, name
        assert name != "label_head.score.weight" or initial == 0.1
        assert name != "value_head.bias" or initial == 1e-2


@pytest.fixture
def partly(tissue, make_model):
    """Make a model, with heads that know something, of two sections: one is labeled in part and the other is not."""
    section = tissue.obs["section"].to_numpy()
    labels = tissue.obs["label"].where(section == "section_1")
    # Two blocks of the first section differ in how many of their cells are labeled.
    left = tissue.obsm["spatial"][:, 0] < np.median(tissue.obsm["spatial"][section == "section_1", 0])
    tissue.obs["label"] = labels.mask(left & (np.arange(120) % 3 > 0))

    def make(**kwargs):
        model = make_model(tissue, {"labels_key": "label", "library_key": "section"}, **kwargs)
        for head in (model.module.label_head, model.module.label_head_alone):
            if head is not None:
                nn.init.normal_(head.score.weight)
        return model, np.flatnonzero(section == "section_1"), np.flatnonzero(section == "section_2")

    return make


def validate(model, val_idx: np.ndarray) -> dict[str, float]:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    loader = make_splitter(model, val_idx, 16).val_dataloader()
    return pl.Trainer(accelerator="cpu", **off).validate(FIMPTrainingPlan(model.module), loader, verbose=False)[0]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("messages", [True, False])
def test_validation_losses_are_those_of_all_cells_at_once(partly, messages: bool) -> None:
    model, labeled, others = partly(messages=messages, label_weight=0.3)
    both = np.concatenate([labeled, others])
    loader = make_splitter(model, both, 16).val_dataloader()
    numbers = sorted(int((batch["label"] >= 0).sum()) for batch in loader)
    assert numbers[0] == 0
    assert 0 < numbers[-2] < numbers[-1], "the test needs blocks without labels, with few and with many"
    found = validate(model, both)
    assert found == pytest.approx(validation_losses(model, both, 16), rel=1e-5)
    with torch.no_grad():
        losses = [model.module(batch)[2].loss for batch in loader]
    assert found["validation_loss"] > np.mean(losses) + 1e-3, "no block counts as 0, or by a mixture of its own"


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_unlabeled_validation_cells_do_not_change_the_label_loss(partly) -> None:
    model, labeled, others = partly()
    alone, joined, none = (validate(model, cells) for cells in (labeled, np.arange(120), others))
    assert joined["label_loss_validation"] == pytest.approx(alone["label_loss_validation"], rel=1e-6)
    assert joined["masked_loss_validation"] != alone["masked_loss_validation"]
    assert "label_loss_validation" not in none
    assert none["validation_loss"] == none["masked_loss_validation"]


def test_training_without_labeled_validation_cells(partly, train) -> None:
    model, _, others = partly()
    train(model, validation_indices=others, early_stopping_patience=1)
    assert "label_loss_validation" not in model.history
    loss, masked = (model.history[name].to_numpy(float) for name in ("validation_loss", "masked_loss_validation"))
    assert np.isfinite(loss).all()
    np.testing.assert_allclose(loss, masked, rtol=1e-6)
    assert (model.neighbor_weight, model.smoothing_weight) == (0.5, 0.0)


def test_label_loss_of_training_is_a_mean_over_labeled_cells(partly, train, monkeypatch) -> None:
    seen, loss = [], FIMPModule.loss

    def spy(module, batch, *args):
        out = loss(module, batch, *args)
        seen.append((out.extra_metrics["label_loss"].item(), int((batch["label"] >= 0).sum())))
        return out

    monkeypatch.setattr(FIMPModule, "loss", spy)
    model, *_ = partly()
    train(model, max_epochs=3, batch_size=8, validation_size=0)
    epochs = np.array(seen).reshape(3, -1, 2)
    assert (epochs[..., 1] == 0).any()
    assert len(np.unique(epochs[..., 1])) > 2
    expected = [np.average(epoch[:, 0], weights=epoch[:, 1]) for epoch in epochs]
    np.testing.assert_allclose(model.history["label_loss_train"].to_numpy(float).ravel(), expected, rtol=1e-5)
    assert list(model.history["label_loss_train"].index) == list(model.history["train_loss"].index)


def test_epochs_without_labels_have_no_label_loss(partly, train) -> None:
    model, *_ = partly()
    train(model, max_epochs=6, batch_size=4, validation_size=0, limit_train_batches=1)
    curve = model.history["label_loss_train"].to_numpy(float)
    assert 0 < len(curve) < len(model.history["train_loss"]) == 6
    assert np.isfinite(curve).all()
