"""One clear line for the user instead of the chatter of the libraries below."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

# Held by whoever uses what belongs to the whole process: torch's random numbers, filters of warnings, levels of
# loggers. A thread that holds it may take it again.
ONE_AT_A_TIME = RLock()

_CHATTER = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric", "scvi")
_PACKAGE = str(Path(__file__).parent) + os.sep
# What the call in progress has warned of.
_told: ContextVar[set[str] | None] = ContextVar("_told", default=None)
_told_about: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


@contextmanager
def user_messages(*, verbose: bool) -> Iterator[None]:
    """Show this package's log lines (or nothing) and hide routine messages of Lightning and scvi-tools.

    A log handler that the user has configured is left in charge. A warning that several steps give comes once. One
    thread at a time: levels are those of the process.
    """
    with ONE_AT_A_TIME, _levels(verbose=verbose):
        yield


@contextmanager
def no_chatter() -> Iterator[None]:
    """Hide routine messages of Lightning, such as its tips, and of scvi-tools; their warnings are shown."""
    levels = {name: logging.getLogger(name).level for name in _CHATTER}
    try:
        for name in _CHATTER:
            logging.getLogger(name).setLevel(logging.WARNING)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _levels(*, verbose: bool) -> Iterator[None]:
    ours = logging.getLogger("fimp_sc")
    level, handler = ours.level, None
    outer = _told.get()
    token = _told.set(set() if outer is None else outer)
    try:
        ours.setLevel(logging.INFO if verbose else logging.WARNING)
        if verbose and not ours.hasHandlers():
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("fimp-sc: %(message)s"))
            ours.addHandler(handler)
        with no_chatter():
            yield
    finally:
        _told.reset(token)
        ours.setLevel(level)
        if handler is not None:
            ours.removeHandler(handler)


def warn(message: str, *, about: Any = None) -> None:
    """Give a :class:`UserWarning` that points at the line of the user's code which called this package.

    However deep the call is, also through scvi-tools and Lightning: what counts is the outermost function of the
    package.

    Parameters
    ----------
    message
        Comes once in a call of :mod:`fimp_sc.tl`.
    about
        Object of which this is told once, whatever calls there are.
    """
    for told in (_told.get(), None if about is None else _told_about.setdefault(about, set())):
        if told is not None:
            if message in told:
                return
            told.add(message)
    # `skip_file_prefixes` of Python 3.12 would stop at the first library in between.
    level, depth = 1, 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        depth += 1
        if frame.f_code.co_filename.startswith(_PACKAGE):
            level = depth + 1
        frame = frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
