"""Threads that share work on CPUs, while the libraries of products start none of their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from threadpoolctl import ThreadpoolController

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")
R = TypeVar("R")


class Run(Protocol):
    """What does a task on each of some parts at the same time, and returns the results in the order of parts."""

    def __call__(self, task: Callable[[T], R], parts: Sequence[T]) -> list[R]: ...


@contextmanager
def threads() -> Iterator[Run]:
    """Yield what runs tasks in as many threads as torch has; BLAS has one for each of them in the meantime."""
    with _one_thread_of_blas(), ThreadPoolExecutor(torch.get_num_threads()) as pool:

        def run(task: Callable[[T], R], parts: Sequence[T]) -> list[R]:
            return [task(part) for part in parts] if len(parts) == 1 else list(pool.map(task, parts))

        yield run


def shares(n: int, least: int) -> list[slice]:
    """Cut ``n`` things into as many parts as there are threads, of at least so many things."""
    count = max(min(torch.get_num_threads(), n // least), 1)
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]


class _Limited:
    """How many are within :func:`_one_thread_of_blas`, and what is undone when the last of them leaves."""

    lock = Lock()
    users = 0
    limits: Any = None


@contextmanager
def _one_thread_of_blas() -> Iterator[None]:
    with _Limited.lock:
        if _Limited.users == 0:
            _Limited.limits = _libraries().limit(limits=1, user_api="blas")
        _Limited.users += 1
    try:
        yield
    finally:
        with _Limited.lock:
            _Limited.users -= 1
            if _Limited.users == 0:
                _Limited.limits.restore_original_limits()


@cache
def _libraries() -> ThreadpoolController:
    import scipy.linalg.cython_blas  # noqa: F401 -- what compiled loops call: loaded now, so that it is found

    return ThreadpoolController()
