"""Nodes with random tokens, as the tests of sequences use them."""

from __future__ import annotations

import numpy as np

from fimp_sc.data import SequenceReader, SequenceShape, SequenceStatistics

N, F, P = 14, 6, 4
ALL = np.arange(N)
VISIBLE = ("value", "masked", "padding", "position", "coordinates", "mean", "std", "target_mask")


def numbers(seed=0) -> np.ndarray:
    """Tokens ``(N, F, P)`` of nodes that each have a scale of their own."""
    rng = np.random.default_rng(seed)
    scale, level = rng.uniform(0.1, 50, (2, N, 1, 1))
    return (rng.normal(size=(N, F, P)) * scale + 10 * level).astype(np.float32)


def make_source(values=None, **kwargs) -> SequenceReader:
    values = numbers() if values is None else values
    return SequenceReader(lambda nodes: values[nodes], SequenceShape(F, P), N, **kwargs)


def statistics(mean=3.0, std=2.0) -> SequenceStatistics:
    return SequenceStatistics(mean, std, np.zeros(0, np.float32), np.ones(0, np.float32))


def some_nodes(share=0.3, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).random(N) < share
