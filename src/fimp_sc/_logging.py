"""One clear line for the user instead of the chatter of the libraries below."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fimp_sc._threads import ONE_AT_A_TIME

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHATTER = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric", "scvi")


@contextmanager
def user_messages(*, verbose: bool) -> Iterator[None]:
    """Show this package's log lines (or nothing) and hide routine messages of Lightning and scvi-tools.

    A log handler that the user has configured is left in charge. One thread at a time: levels are those of the process.
    """
    with ONE_AT_A_TIME, _levels(verbose=verbose):
        yield


@contextmanager
def _levels(*, verbose: bool) -> Iterator[None]:
    ours = logging.getLogger("fimp_sc")
    levels = {name: logging.getLogger(name).level for name in (*_CHATTER, ours.name)}
    handler = None
    try:
        for name in _CHATTER:
            logging.getLogger(name).setLevel(logging.WARNING)
        ours.setLevel(logging.INFO if verbose else logging.WARNING)
        if verbose and not ours.hasHandlers():
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("fimp-sc: %(message)s"))
            ours.addHandler(handler)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if handler is not None:
            ours.removeHandler(handler)
