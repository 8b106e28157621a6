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
    """What does a task on each of some items at the same time, and returns the results in the order of items."""

    def __call__(self, task: Callable[[T], R], items: Sequence[T]) -> list[R]: ...


@contextmanager
def threads() -> Iterator[Run]:
    """Yield what runs tasks in as many threads as torch has."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:

        def run(task: Callable[[T], R], items: Sequence[T]) -> list[R]:
            return [task(item) for item in items] if len(items) == 1 else list(pool.map(task, items))

        yield run


def thread_ranges(n: int, least: int) -> list[slice]:
    """Cut ``n`` things into as many ranges as there are threads, of at least so many things."""
    count = max(min(torch.get_num_threads(), n // least), 1)
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]
