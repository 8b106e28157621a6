"""A call that is interrupted changes nothing, and the model of the call before stays known."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from lightning.pytorch import Callback

import fimp_sc
from fimp_sc.model.module._module import FIMPModule


@pytest.fixture(autouse=True)
def _python_handles_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press(*args, **kwargs) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("when", ["training", "inference"])
def test_an_interrupted_call_changes_nothing(tissue, quick, unchanged, monkeypatch, when) -> None:
    fimp_sc.tl.embed(tissue, **quick)
    model, embedding = fimp_sc.tl.get_model(tissue), tissue.obsm["X_fimp"].copy()
    callback = Callback()
    if when == "training":
        callback.on_train_epoch_end = press
    else:
        monkeypatch.setattr(FIMPModule, "inference", press)
    again = {**quick, "train_kwargs": {**quick["train_kwargs"], "callbacks": [callback]}, "random_state": 5}
    with unchanged(tissue), pytest.raises(KeyboardInterrupt):
        fimp_sc.tl.embed(tissue, **again)
    monkeypatch.undo()
    assert fimp_sc.tl.get_model(tissue) is model
    np.testing.assert_array_equal(model.get_latent_representation(), embedding)
