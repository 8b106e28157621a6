"""Threads that share work on CPUs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")
R = TypeVar("R")


class Run(Protocol):
    """What does a task on each of some parts at the same time, and returns the results in the order of parts."""

    def __call__(self, task: Callable[[T], R], parts: Sequence[T]) -> list[R]: ...


@contextmanager
def threads() -> Iterator[Run]:
    """Yield what runs tasks in as many threads as torch has."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:

        def run(task: Callable[[T], R], parts: Sequence[T]) -> list[R]:
            return [task(part) for part in parts] if len(parts) == 1 else list(pool.map(task, parts))

        yield run


def thread_ranges(n: int, least: int) -> list[slice]:
    """Cut ``n`` things into as many parts as there are threads, of at least so many things."""
    count = max(min(torch.get_num_threads(), n // least), 1)
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]
