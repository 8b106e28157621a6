"""The harness: rows are kept, replaced and not computed twice; methods run apart and are measured."""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import pandas as pd
import pytest


@pytest.fixture
def common(load_script, tmp_path, monkeypatch):
    common = load_script("_common")
    monkeypatch.setattr(common, "HERE", tmp_path)
    return common


@pytest.fixture
def harness(common, load_script):
    return load_script("_harness")


def arguments(**changed) -> argparse.Namespace:
    return argparse.Namespace(**{"quick": False, "max_epochs": None, **changed})


def table(common, name="task") -> pd.DataFrame:
    return pd.read_csv(common.HERE / "results" / f"{name}.csv")


def test_rows_are_written_as_they_come_and_replace_older_ones(common):
    results = common.Results("task", arguments())
    assert not results.has("a", "m", 0)
    results.add("a", "m", 0, {"score": 1.0})
    results.add("a", "m", 1, {"score": 2.0}, note="lr 1")
    common.Results("task", arguments()).add("a", "m", 0, {"score": 3.0})
    assert results.has("a", "m", 1)
    assert not results.has("b", "m", 1)
    rows = table(common).set_index("seed")
    assert rows.score.to_dict() == {0: 3.0, 1: 2.0}
    assert rows.note[1] == "lr 1"


def test_the_printed_table_covers_rows_of_earlier_runs(common, capsys):
    common.Results("task", arguments()).add("a", "m", 0, {"score": 1.0})
    results = common.Results("task", arguments())
    results.add("a", "m", 1, {"score": 3.0})
    results.finish()
    assert "| a | m | 2.000 ± 1.000 |" in capsys.readouterr().out


def task(harness, monkeypatch, *words: str, methods=None, calls=None):
    """Run a task whose score is the seed plus what the method returns."""

    def problem(data, args, seed):
        if calls is not None:
            calls.append((data, seed))
        return data, lambda values: {"score": seed + float(values[0])}

    methods = methods or {"one": lambda p, run: harness.Fit(np.ones(1), 7, 2, 4.0, 0.5, "lr 1")}
    monkeypatch.setattr(sys, "argv", ["task", "--data", ".", "--seeds", "2", *words])
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")  # which the harness sets: put back after the test
    harness.main("task", "", ("a", "b"), problem, {"simple": methods, "none": {}}, default=("simple",))


def test_a_task_runs_what_is_missing(harness, common, monkeypatch):
    calls = []
    task(harness, monkeypatch, "--datasets", "a", calls=calls)
    task(harness, monkeypatch, calls=calls)
    assert calls == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    rows = table(common)
    assert rows.score.tolist() == [1.0, 2.0, 1.0, 2.0]
    assert (rows.parameters == 7).all()
    assert (rows.epoch_s == 2.0).all()
    assert (rows.validation == 0.5).all()
    assert (rows.note == "lr 1").all()
    task(harness, monkeypatch, "--again", "--datasets", "b", calls=calls)
    assert calls[4:] == [("b", 0), ("b", 1)]
    assert len(table(common)) == 4


def test_quick_runs_one_seed_into_another_file(harness, common, monkeypatch):
    seen = {}
    methods = {"one": lambda p, run: harness.Fit(np.full(1, 5.0 * run.quick))}
    task(harness, monkeypatch, "--quick", "--datasets", "a", methods=methods, calls=(calls := []))
    assert calls == [("a", 0)]
    assert table(common, "task_quick").score.tolist() == [5.0]
    assert not seen
    assert not (common.HERE / "results" / "task.csv").exists()


def test_a_missing_package_skips_and_a_failure_is_told_at_the_end(harness, common, monkeypatch, capfd):
    def absent(p, run):
        raise ImportError("pip install peer")

    def broken(p, run):
        raise ValueError("no such thing")

    methods = {"absent": absent, "broken": broken, "one": lambda p, run: harness.Fit(np.ones(1))}
    with pytest.raises(SystemExit) as stopped:
        task(harness, monkeypatch, "--datasets", "a", methods=methods)
    assert stopped.value.code == 1
    out, err = capfd.readouterr()
    assert "absent: skipped, pip install peer" in out
    assert "no such thing" in err
    assert set(table(common).method) == {"one"}


def test_an_unknown_method_is_named(harness, monkeypatch):
    with pytest.raises(SystemExit, match=r"no method \['two'\]; there are one"):
        task(harness, monkeypatch, "--only", "two")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked on Linux only")
def test_memory_and_cpu_time_are_those_of_the_method(harness):
    def large():
        values = np.ones(25_000_000)  # 200 MB
        started = time.process_time()
        while time.process_time() - started < 0.3:
            values[:1000].sum()
        return harness.Fit(values[:1])

    _, small_costs = harness.apart(lambda: harness.Fit(np.ones(1)), 1)
    fit, costs = harness.apart(large, 1)
    assert fit.values.tolist() == [1.0]
    assert 180 < costs["peak_mb"] - small_costs["peak_mb"] < 260
    assert costs["cpu_s"] >= 0.3 > small_costs["cpu_s"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked on Linux only")
def test_a_process_that_dies_is_an_error(harness):
    import os

    with pytest.raises(RuntimeError, match="ended without a result"):
        harness.apart(lambda: os._exit(9), 1)
