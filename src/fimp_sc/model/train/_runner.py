"""A training that succeeds, or leaves everything as it was."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from scvi.train import TrainRunner

from fimp_sc.model.train._history import continued
from fimp_sc.model.train._plan import trained_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fimp_sc.model._fimp import FIMP

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
