"""Random numbers of torch that neither depend on those of the user nor change them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from fimp_sc._logging import ONE_AT_A_TIME

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def seeded(random_state: int) -> Iterator[None]:
    """Seed torch's global generators, which initialization and dropout draw from, and leave them as they were.

    One thread at a time: generators that threads share would give each the numbers that the others left.
    """
    with ONE_AT_A_TIME, torch.random.fork_rng():
        torch.manual_seed(random_state)
        yield
