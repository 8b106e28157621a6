"""How parameters are grouped, and how the learning rate moves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fimp_sc.model import FIMPModule, FIMPTrainingPlan


def make_plan(steps: int = 200, **kwargs):
    plan = FIMPTrainingPlan(FIMPModule(10, 3, n_latent=8, n_heads=2, n_layers=1), **kwargs)
    plan._trainer = SimpleNamespace(estimated_stepping_batches=steps)
    return plan, plan.configure_optimizers()


def test_every_parameter_is_optimised_once() -> None:
    plan, configured = make_plan()
    grouped = [id(p) for group in configured["optimizer"].param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in plan.module.parameters()}


def test_loadings_move_slowly_and_tables_of_genes_do_not_decay() -> None:
    plan, configured = make_plan(lr=1e-2, lr_loadings=1e-4, lr_head=0.1, weight_decay=0.5)
    group_of = {id(p): group for group in configured["optimizer"].param_groups for p in group["params"]}
    module = plan.module
    rates = {}
    for name, parameter in module.named_parameters():
        group = group_of[id(parameter)]
        rates[name] = (group["initial_lr"], group["weight_decay"])
    for name in ("network.embedding.loading", "value_head.loading", "value_head.bias"):
        assert rates[name] == (1e-4, 0.0), name
    assert rates["network.embedding.identity"] == (1e-2, 0.0)
    for name in ("network.layers.0.attention.query.weight", "value_head.project.weight"):
        assert rates[name] == (1e-2, 0.5), name
    for name in (name for name in rates if name.startswith("label_head")):
        assert rates[name] == (0.1, 0.5), name


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
