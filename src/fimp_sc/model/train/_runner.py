"""A training that succeeds, or leaves everything as it was."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from scvi.train import TrainRunner

from fimp_sc._logging import ONE_AT_A_TIME
from fimp_sc.model.train._plan import trained_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fimp_sc.model._fimp import FIMP


@contextmanager
def seeded(random_state: int) -> Iterator[None]:
    """Seed torch's global generators, which initialization and dropout draw from, and leave them as they were.

    One thread at a time: generators that threads share would give each the numbers that the others left.
    """
    with ONE_AT_A_TIME, torch.random.fork_rng():
        torch.manual_seed(random_state)
        yield


def continued(earlier: Mapping[str, pd.DataFrame], later: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return the curves of two trainings as one, its epochs numbered on: scvi-tools would number entries instead."""
    starts: dict[Any, int] = {}
    for frame in (curve for curve in earlier.values() if len(curve)):
        unit = frame.index.name  # epoch or step
        starts[unit] = max(starts.get(unit, 0), int(frame.index.max()) + 1)
    out = dict(earlier)
    for name, frame in later.items():
        frame = frame.set_axis(frame.index + starts.get(frame.index.name, 0))
        out[name] = pd.concat([earlier[name], frame]) if name in earlier else frame
    return out


# Signals whose handlers Lightning replaces.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class FIMPTrainRunner(TrainRunner):
    """The train runner of scvi-tools, from which exceptions come as they are, an interrupt by the user among them."""

    def _run_training_core(self) -> None:
        model, earlier = self.model, dict(self.model.history_ or {}) if self.model.is_trained else {}
        # Nothing but tensors and plain values is read from a file: no code in it is run.
        read = {} if self.ckpt_path is None else {"ckpt_path": self.ckpt_path, "weights_only": True}
        try:
            self.trainer.fit(self.training_plan, self.data_splitter, **read)
        except SystemExit as error:
            # Lightning's answer to an interrupt, which would end the user's session.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise
        found = getattr(self.trainer.logger, "history", None)
        model.history_ = continued(earlier, found if isinstance(found, dict) else {})
        splitter = self.data_splitter
        model.train_indices, model.validation_indices = splitter.train_idx, splitter.val_idx
        model.test_indices = splitter.test_idx
        model.module.eval()
        model.is_trained_ = True
        model.to_device(self.device)
        model.trainer = self.trainer


@contextmanager
def unchanged_if_it_fails(model: FIMP) -> Iterator[None]:
    """Give a model back its weights, mode, history and other attributes, and the process its handlers of signals.

    The handlers in any case; all else where what is done meanwhile raises, also for an interrupt by the user.
    """
    attributes, training, device = dict(model.__dict__), model.module.training, model.device
    weights = trained_weights(model.module)
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS} if main else {}
    # Those that were not set from Python cannot be either.
    handlers = {number: handler for number, handler in handlers.items() if handler is not None}
    try:
        yield
    except BaseException:
        if signal.SIGINT in handlers:
            # A second interrupt, by an impatient user, would leave half of it undone.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        model.to_device(device)
        model.module.load_state_dict(weights, strict=False)
        model.module.zero_grad()
        model.module.train(training)
        model.__dict__.clear()
        model.__dict__.update(attributes)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
