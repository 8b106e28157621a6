"""Signals shown differently every time: what varies, and that nothing leaks of what is masked."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_toys import ALL, VISIBLE, N, P, make_source, some_nodes, statistics

from fimp_sc.data import SequenceReader, SequenceShape
from fimp_sc.data.sequences._kinds import segments

N_TIMES = 103


def times(seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(N, N_TIMES)) * rng.uniform(0.1, 50, (N, 1)) + 300).astype(np.float32)


class Recorder:
    """Signals as tokens of 4 time points, which remember where the first token started."""

    def __init__(self, length=N_TIMES, signals=None) -> None:
        self.signals = (times() if signals is None else signals)[:, :length]
        self.start = 0

    def __call__(self, nodes, start=0):
        self.start = start
        return segments(self.signals[nodes, start:], P)

    def source(self, **kwargs) -> SequenceReader:
        return SequenceReader(self, SequenceShape(self.signals.shape[1] // P, P), N, by_node=True, **kwargs)


def test_varied_signals_are_segments_cut_anywhere_of_either_sign() -> None:
    starts, signs, counts, places = set(), set(), set(), set()
    for seed in range(40):
        read = Recorder()
        made = read.source().fields(ALL, 5, vary=True, seed=seed)
        cut = segments(times()[:, read.start :], P)
        n_shown = made["value"].shape[1]
        assert n_shown < cut.shape[1] <= N_TIMES // P
        standard = (cut - cut.mean((1, 2), keepdims=True)) / cut.std((1, 2), keepdims=True)
        # Which segment each token is, with which sign, in all nodes alike.
        far = [np.abs(made["value"].numpy()[:, :, None] - s * standard[:, None]).max((0, 3)) for s in (-1, 1)]
        sign = 1 if far[1].min(1).max() < far[0].min(1).max() else -1
        near = far[sign > 0]
        assert near.min(1).max() < 1e-3, "one sign for a whole block, as neighbors move together"
        segment = near.argmin(1)
        assert len(set(segment)) == n_shown
        back = made["target"] * made["std"] + made["mean"]
        np.testing.assert_allclose(back, sign * cut[:5, segment], rtol=1e-4)
        position = made["position"].tolist()
        assert len(position) == len(set(position)) == n_shown
        assert set(position) <= set(range(N_TIMES // P))
        starts.add(read.start)
        signs.add(sign)
        counts.add(n_shown)
        places.add(tuple(position))
    assert starts == set(range(P))
    assert signs == {-1, 1}
    assert counts == {20}
    assert len(places) == 40


@given(seed=st.integers(0, 2**32 - 1), length=st.sampled_from([5, 30, N_TIMES]))
@settings(max_examples=30, deadline=None)
def test_masked_numbers_of_varied_signals_do_not_leak(seed: int, length: int) -> None:
    """All numbers change where they were masked, in whatever is not shown too."""
    absent = some_nodes(seed=seed)
    how = {"ratio": (0.3, 0.6), "vary": True, "seed": seed}
    read = Recorder(length)
    first = read.source(absent=absent).fields(ALL, N, **how)
    n_shown = first["value"].shape[1]
    spoilt = times()[:, :length].copy()
    n_cut = (length - read.start) // P
    if n_shown == n_cut:  # all segments are shown, in order
        unseen = np.repeat((first["masked"] | first["padding"]).numpy(), P, 1)
        inside = spoilt[:, read.start : read.start + n_cut * P]
        inside[unseen] = 7e4
        spoilt[:, : read.start] = spoilt[:, read.start + n_cut * P :] = 7e4
    else:
        spoilt[absent] = 7e4
    second = Recorder(length, spoilt).source(absent=absent).fields(ALL, N, **how)
    for key in VISIBLE:
        assert torch.equal(first[key], second[key]), key
    assert first["target_mask"].any() == (n_cut > 1 and bool((~absent).any()))


def test_varied_signals_come_from_the_seed() -> None:
    def fields(seed: int):
        return Recorder().source().fields(ALL, 5, (0.3, 0.6), vary=True, seed=seed)

    first, again, other = fields(1), fields(1), fields(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["value"], other["value"])


def test_images_are_always_shown_as_they_are() -> None:
    source = make_source(statistics=statistics())
    first, second = (source.fields(ALL, 5, (0.3, 0.6), vary=vary, seed=2) for vary in (False, True))
    assert all(torch.equal(first[key], second[key]) for key in first)
