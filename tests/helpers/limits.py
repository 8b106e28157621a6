"""Calls in a forked process whose memory is measured and limited."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_ROOM, _SECONDS = 4 << 30, 300


def measured(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call gives, or its exception, and by how many MB the memory of the process grew.

    A process that asks for 4 GB more than it has, or that runs for minutes, fails.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def run() -> None:
        with open("/proc/self/statm") as file:  # noqa: PTH123
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, resource.RLIM_INFINITY))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            outcome: Any = call()
        except BaseException as error:
            outcome = error.with_traceback(None)
            outcome.__cause__ = None
            if not isinstance(error, ValueError):
                traceback.print_exc(file=sys.stderr)
        theirs.send((outcome, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 about forks beside threads
        process = context.Process(target=run)
        process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise AssertionError("the process was killed by its limits") from None
    finally:
        process.join()
