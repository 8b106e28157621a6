"""How parameters are grouped, and how the learning rate moves."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fimp_sc.model import FIMPModule, FIMPTrainingPlan
from fimp_sc.nn import FoundationNetwork, TransformerStack
from fimp_sc.pretrained._scgpt_modules import ScGPTDecoder, ScGPTTokens


def make_plan(steps: int = 200, *, module: FIMPModule | None = None, **kwargs):
    plan = FIMPTrainingPlan(module or FIMPModule(10, 3, n_latent=8, n_heads=2, n_layers=1), **kwargs)
    plan._trainer = SimpleNamespace(estimated_stepping_batches=steps)
    return plan, plan.configure_optimizers()


def test_every_parameter_is_optimised_once() -> None:
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
    # The first of 20 steps of warm-up.
    torch.testing.assert_close((loading - before).abs(), torch.full_like(before, 1e-2 * size / 20), rtol=1e-3, atol=0)


def test_loadings_that_start_at_zero_can_leave_it() -> None:
    module = FIMPModule(10, 3, n_latent=8, n_heads=2, n_layers=1)
    nn.init.zeros_(module.value_head.loading)
    _, configured = make_plan(module=module, lr_loadings=1e-2)
    rates = [group["initial_lr"] for group in configured["optimizer"].param_groups]
    assert min(rates) > 0


@pytest.mark.parametrize("steps", [1, 30, 400])
def test_rate_warms_up_and_decays(steps: int) -> None:
    _, configured = make_plan(steps, lr=1.0)
    scheduler = configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(steps):
        rates.append(configured["optimizer"].param_groups[0]["lr"])
        configured["optimizer"].step()
        scheduler.step()
    assert rates[0] == pytest.approx(1 / 20)
    assert all(0 < rate <= 1 for rate in rates)
    if steps == 400:
        peak = max(range(steps), key=rates.__getitem__)
        assert 15 <= peak <= 25
        assert rates[peak] > 0.95
        assert all(a >= b for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))
        assert rates[-1] == pytest.approx(0.05, abs=1e-3)


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
