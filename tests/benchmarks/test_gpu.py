"""Rows of the GPU benchmark: kept, resumed, and there too where a case fails, crashes or takes too long."""

from __future__ import annotations

import json
import sys

import pytest
import torch

# Prints rows for its arguments up to one that says how the process ends.
CHILD = """
import json, os, sys, time
for name in sys.argv[1:]:
    if name == "sleeps":
        time.sleep(60)
    if name == "crashes":
        print("no memory left", file=sys.stderr)
        os._exit(3)
    if name == "stops":
        break
    print("words of a library")
    print(json.dumps({"case": name, "seconds": 1.5}), flush=True)
"""


@pytest.fixture
def gpu(load_script):
    return load_script("gpu")


def rows_in(gpu, folder, **kwargs):
    return gpu.Rows(folder / "gpu.json", kwargs.pop("made_on", {"gpu": "one"}), again=kwargs.pop("again", False))


def run(gpu, rows, *names, limit=30.0):
    gpu.run_part("part", list(names), rows, limit, [sys.executable, "-c", CHILD])
    return rows.rows["part"]


def test_rows_are_kept_for_a_later_call(gpu, tmp_path):
    rows = rows_in(gpu, tmp_path)
    rows.add("part", "a", {"seconds": 2.0})
    rows.add("part", "b", {"error": "ValueError: no"})
    later = rows_in(gpu, tmp_path)
    assert later.missing("part", ["b", "a", "c"]) == ["c", "b"], "what failed is tried again, after what is new"
    assert later.failed() == ["part, b"]
    assert rows_in(gpu, tmp_path, again=True).missing("part", ["a"]) == ["a"]


def test_rows_of_another_machine_are_not_kept(gpu, tmp_path, capsys):
    rows_in(gpu, tmp_path).add("part", "a", {"seconds": 2.0})
    assert rows_in(gpu, tmp_path, made_on={"gpu": "another"}).missing("part", ["a"]) == ["a"]
    assert "another machine" in capsys.readouterr().out


def test_the_table_has_a_line_for_each_row_with_its_error(gpu, tmp_path):
    rows = rows_in(gpu, tmp_path)
    rows.add("speed", "a", {"seconds": 2.0, "passed": 3})
    rows.add("speed", "b", {"error": "ValueError: a | b"})
    lines = rows.table(["speed", "tests"]).splitlines()
    assert lines[0] == "gpu one"
    assert lines[-2:] == ["| speed | a | seconds 2, passed 3 |", "| speed | b | failed: ValueError: a \\| b |"]


def test_a_crash_is_a_row_and_the_other_cases_go_on(gpu, tmp_path):
    found = run(gpu, rows_in(gpu, tmp_path), "a", "crashes", "b", "stops", "c")
    assert found["a"] == found["b"] == found["c"] == {"seconds": 1.5}
    assert found["crashes"] == {"error": "exit status 3: no memory left"}
    assert found["stops"] == {"error": "exit status 0: "}


def test_a_case_that_takes_too_long_is_stopped_and_those_after_it_are_left_for_later(gpu, tmp_path):
    rows = rows_in(gpu, tmp_path)
    found = run(gpu, rows, "a", "sleeps", "b", limit=3.0)
    assert found == {"a": {"seconds": 1.5}, "sleeps": {"error": "out of time, 3 s for this part"}}
    assert rows.missing("part", ["a", "sleeps", "b"]) == ["b", "sleeps"]


def test_a_case_that_fails_is_a_row(gpu, monkeypatch, capsys):
    ran = []

    def fails(message):
        raise RuntimeError(message)

    cases = {
        "a": lambda: fails("Two\n lines."),
        "b": lambda: {"seconds": float("nan")},
        "c": lambda: fails("CUDA error: an illegal memory access"),
        "d": lambda: ran.append("d"),
    }
    monkeypatch.setattr(gpu, "cases", lambda part, sizes: cases)
    gpu.run_cases("part", gpu.TINY, list(cases))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["case"] for line in lines] == ["a", "b", "c"]
    assert lines[0]["error"] == "RuntimeError: Two lines."
    assert "out of memory" in lines[1]["error"]
    assert not ran, "after an error of CUDA nothing runs in the process"


def test_every_case_of_a_gpu_has_a_small_one_but_for_what_needs_cuda(gpu):
    def kinds(sizes):
        names = [name for part in gpu.SHARES for name in gpu.cases(part, sizes)]
        return [name.replace(str(sizes.cells), "N").replace(str(sizes.cells_embedded), "N") for name in names]

    missing = [name for name in kinds(gpu.GPU) if name not in kinds(gpu.TINY)]
    assert missing == [name for name in missing if "triton" in name or name.startswith(("flex", "tests/"))]


def test_an_error_beyond_rounding_fails(gpu, monkeypatch):
    from fimp_sc import nn

    exact = nn.cross_node_attention

    def wrong(*args, backend, **kwargs):
        return exact(*args, backend=backend, **kwargs) * (1 + 1e-3 * (backend != "dense"))

    assert gpu.errors("chunked", "float32", gpu.TINY)["result"] < 1e-6
    monkeypatch.setattr(nn, "cross_node_attention", wrong)
    with pytest.raises(ValueError, match=r"more than 1e-05: result 0\.00"):
        gpu.errors("chunked", "float32", gpu.TINY)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_attention_per_edge_is_ours_in_both_ways(gpu):
    """What is compared in speed is one function; on CPUs `flex_attention` has no gradient."""
    pytest.importorskip("torch.nn.attention.flex_attention", reason="of torch 2.5 and later")
    attention = gpu.attention
    graph = [torch.from_numpy(x) for x in attention.tissue(12, 3)]
    x = torch.randn(12, 5, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for method in (attention.OURS + "chunked", attention.SDPA, attention.FLEX):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(attention.build(method, 16, 2, "cpu", torch.float32)[0](x, *graph))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])
