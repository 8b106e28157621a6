"""A training that is interrupted or fails: the user's interrupt arrives, and the model is the one of before."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from fimp_sc.model import FIMP
from fimp_sc.model.module._module import FIMPModule

HOOKS = (
    "setup", "on_fit_start", "on_train_start", "on_train_batch_start", "on_after_backward",
    "on_validation_batch_start", "on_validation_end", "on_train_epoch_end", "on_train_end", "teardown",
)  # fmt: skip


class Pressed(Callback):
    """Ctrl-C at the n-th call of a hook."""

    def __init__(self, hook: str, n: int = 1) -> None:
        self.calls = 0

        def press(*args, **kwargs) -> None:
            self.calls += 1
            if self.calls == n:
                signal.raise_signal(signal.SIGINT)

        setattr(self, hook, press)


@pytest.fixture(autouse=True)
def _python_handles_interrupts():
    """As in a terminal or notebook: a shell that runs something in the background lets it ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def state(model: FIMP) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def assert_same(model: FIMP, before: dict[str, torch.Tensor]) -> None:
    now = model.module.state_dict()
    assert list(now) == list(before)
    assert [name for name in now if not torch.equal(now[name], before[name])] == []


def handlers() -> list:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


@pytest.mark.parametrize("hook", HOOKS)
def test_an_interrupted_training_leaves_an_untrained_model(tissue, make_model, train, capsys, hook) -> None:
    model = make_model(tissue, {"labels_key": "label"})
    before, training, set_handlers = state(model), model.module.training, handlers()
    pressed = Pressed(hook)
    with pytest.raises(KeyboardInterrupt):
        train(model, validation_size=0.3, callbacks=[pressed])
    assert pressed.calls >= 1
    assert_same(model, before)
    assert (model.is_trained, model.history, model.module.training) == (False, None, training)
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert handlers() == set_handlers
    assert "Exception raised" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(("hook", "n"), [("on_train_batch_start", 4), ("on_validation_batch_start", 2)])
def test_an_interrupted_further_training_leaves_the_model_as_it_was(tissue, make_model, train, hook, n) -> None:
    model = train(make_model(tissue, {"labels_key": "label"}), max_epochs=1, validation_size=0.3)
    before, embedding, history = state(model), model.get_latent_representation(), dict(model.history)
    cells, trainer = model.train_indices, model.trainer
    assert not model.module.training
    with pytest.raises(KeyboardInterrupt):
        train(model, validation_size=0.5, class_balance=1.0, callbacks=[Pressed(hook, n)])
    assert_same(model, before)
    assert not any(module.training for module in model.module.modules())
    assert model.is_trained
    assert {name: id(curve) for name, curve in model.history.items()} == {n: id(c) for n, c in history.items()}
    assert model.train_indices is cells
    assert model.trainer is trainer
    np.testing.assert_array_equal(model.get_latent_representation(), embedding)


@pytest.mark.parametrize("what", ["start_as_smoother", "set_class_weight"])
def test_an_interrupt_while_training_is_prepared(tissue, make_model, train, monkeypatch, what) -> None:
    model = make_model(tissue, {"labels_key": "label"})
    before, original = state(model), getattr(FIMPModule, what)

    def pressed(*args, **kwargs):
        original(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(FIMPModule, what, pressed)
        with pytest.raises(KeyboardInterrupt):
            train(model)
    assert_same(model, before)
    fresh = make_model(tissue.copy(), {"labels_key": "label"})
    assert_same(train(model, max_epochs=1), state(train(fresh, max_epochs=1)))


def test_an_interrupt_after_the_last_epoch(tissue, make_model, train, monkeypatch) -> None:
    """While it is fitted how much neighbors count in labels."""
    model = make_model(tissue, {"labels_key": "label"})
    before = state(model)
    monkeypatch.setattr("fimp_sc.model.train._train.fit_mixtures", lambda *args: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(model, max_epochs=1)
    assert_same(model, before)
    assert not model.is_trained
    assert model.history is None


def test_an_interrupt_while_results_are_computed(trained, monkeypatch) -> None:
    before, expected, original = state(trained), trained.get_latent_representation(), FIMPModule.inference
    calls = []

    def pressed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(FIMPModule, "inference", pressed)
        with pytest.raises(KeyboardInterrupt):
            trained.get_latent_representation(batch_size=16)
    assert_same(trained, before)
    np.testing.assert_array_equal(trained.get_latent_representation(), expected)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_a_handler_of_the_user_stays_and_decides(tissue, make_model, train) -> None:
    """One that asks for nothing but a note lets training go on."""
    noted = []
    signal.signal(signal.SIGINT, lambda *args: noted.append(args[0]))
    mine = signal.getsignal(signal.SIGINT)
    model = train(make_model(tissue), callbacks=[Pressed("on_train_batch_start", 2)])
    assert noted == [signal.SIGINT]
    assert model.is_trained
    assert signal.getsignal(signal.SIGINT) is mine


def test_a_second_interrupt_does_not_stop_the_clearing_up(tissue, make_model, train, monkeypatch) -> None:
    model = train(make_model(tissue), max_epochs=1)
    before, original = state(model), FIMPModule.load_state_dict

    def impatient(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    def pressed(*args) -> None:
        monkeypatch.setattr(FIMPModule, "load_state_dict", impatient)
        signal.raise_signal(signal.SIGINT)

    callback = Callback()
    callback.on_train_epoch_end = pressed
    with pytest.raises(KeyboardInterrupt):
        train(model, callbacks=[callback])
    assert_same(model, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), SystemExit(3)])
def test_any_other_exception_comes_as_it_is_and_changes_nothing(tissue, make_model, train, error, capsys) -> None:
    def fail(trainer, pl_module) -> None:
        raise error

    model = train(make_model(tissue, {"labels_key": "label"}), max_epochs=1)
    before, history = state(model), dict(model.history)
    callback = Callback()
    callback.on_train_epoch_end = fail
    with pytest.raises(type(error)) as found:
        train(model, class_balance=0.0, callbacks=[callback])
    assert found.value is error
    assert_same(model, before)
    assert not model.module.training
    assert list(model.history) == list(history)
    assert all(model.history[name] is curve for name, curve in history.items())
    assert "Exception raised" not in "".join(capsys.readouterr())
