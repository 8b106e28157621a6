"""Processor seconds are counted once, for the part that runs."""

from __future__ import annotations

import importlib

import pytest


@pytest.fixture
def script(load_script):
    return load_script("cost_by_part")


@pytest.fixture
def clock(script, monkeypatch):
    """A clock of processor seconds that the test moves."""

    class Clock:
        now = 0.0

        def pass_time(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(script.time, "process_time", lambda: clock.now)
    return clock


def test_a_part_within_another_is_taken_off_it(script, clock):
    profile = script.Profile()
    inner = profile.timed("backward", lambda: clock.pass_time(2.0))

    def step() -> None:
        clock.pass_time(1.0)
        inner()
        clock.pass_time(4.0)

    outer = profile.timed("optimizer", step)
    clock.pass_time(8.0)
    outer()
    outer()
    profile.switch()
    assert dict(profile.seconds) == {"rest": 8.0, "optimizer": 10.0, "backward": 4.0}
    assert dict(profile.calls) == {"optimizer": 2, "backward": 2}
    assert "| all | 22.00 | 100 | |" in profile.table()


def test_a_whole_part_keeps_what_it_calls_and_an_error_ends_a_part(script, clock):
    profile = script.Profile()

    def fail() -> None:
        clock.pass_time(1.0)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        profile.timed("layers, forward", fail)()
    profile.timed("validation", profile.timed("layers, forward", lambda: clock.pass_time(2.0)))()
    clock.pass_time(4.0)
    profile.switch()
    assert dict(profile.seconds) == {"layers, forward": 1.0, "validation": 2.0, "rest": 4.0}


def test_parts_name_functions_that_are_there(script):
    for place in (place for places in script.PARTS.values() for place in places):
        module, name = place.split(":")
        found = importlib.import_module(module)
        for piece in name.split("."):
            found = getattr(found, piece)
        assert callable(found), place
