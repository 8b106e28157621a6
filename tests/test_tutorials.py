"""The tutorials run, in small, and are committed as they should be."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from fimp_sc.data._modality import quiet_mudata
from fimp_sc.model import FIMP

TUTORIALS = Path(__file__).parents[1] / "tutorials"
# What replaces the parameters of each notebook.
SMALL = {
    "quick_start": {"n_obs": 240},
    "visium_layers": {"n_obs": 240, "min_spots": 20},
    "imaging_panel": {"n_obs": 600, "n_permutations": 10},
    "several_sections": {"n_obs": 240, "min_spots": 20},
    "dissociated_reference": {"n_obs": 500},
    "foundation_models": {"n_obs": 120},
    "attention": {"n_obs": 400, "n_permutations": 10},
    "fmri": {"n_times": 120},
    "image_graph": {"n_images": 200},
    "large_data": {"n_obs": 240, "n_tiles": 2},
}
REAL = ("visium_layers", "imaging_panel", "several_sections", "dissociated_reference")  # read files with real sections
LARGEST = 1_000_000  # bytes
# Folders of a machine, at the beginning of a text or after anything that is no part of an address or name.
PATHS = re.compile(r"(?<![\w./:])/(?:home|root|tmp|usr|opt|var|srv|Users|mnt|private)/\w|[A-Z]:\\\\\w")


def notebook(name: str) -> dict:
    return json.loads((TUTORIALS / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_cells(content: dict) -> list[dict]:
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def run(content: dict, small: dict) -> dict:
    """Execute the code cells one after another; small values replace the parameters in the cell that sets them."""
    names: dict = {"__name__": "__main__"}
    replaced = 0
    for i, cell in enumerate(code_cells(content)):
        exec(compile("".join(cell["source"]), f"cell {i}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(small) <= set(names), "a parameter that the notebook does not have"
            names |= small
            replaced += 1
        plt.close("all")
    assert replaced == 1, "one cell has the tag `parameters`"
    return names


@pytest.fixture
def _short(tmp_path, monkeypatch) -> None:
    """One epoch, no windows, no progress bars, and files in a folder that goes away."""
    train = FIMP.train
    short = {"max_epochs": 1, "enable_progress_bar": False}
    monkeypatch.setattr(FIMP, "train", lambda self, *args, **kwargs: train(self, **kwargs | short))
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: None)
    monkeypatch.chdir(tmp_path)


def test_all_notebooks_are_known() -> None:
    assert {path.stem for path in TUTORIALS.glob("*.ipynb")} == set(SMALL)


def test_the_page_of_tutorials_tells_real_from_simulated() -> None:
    page = (TUTORIALS.parent / "docs" / "tutorials.md").read_text(encoding="utf-8")
    halves = page.split("| on simulated data")
    real, simulated = (set(re.findall(r"generated/tutorials/(\w+)`", half)) for half in halves)
    assert real == set(REAL)
    assert real | simulated == set(SMALL)
    for name in simulated:
        assert "simulated" in "".join(notebook(name)["cells"][0]["source"]), name


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("_short")
def test_notebook_runs(name: str, request, monkeypatch) -> None:
    if name in REAL:
        monkeypatch.setenv("FIMP_SC_DATA", str(request.getfixturevalue("shared_data")))
    with ExitStack() as stack:
        if name in ("fmri", "image_graph"):
            stack.enter_context(quiet_mudata())  # as readers make their own objects
        run(notebook(name), SMALL[name])


def test_a_cell_that_raises_is_noticed() -> None:
    cells = [
        {"cell_type": "code", "source": ["n = 3"], "metadata": {"tags": ["parameters"]}},
        {"cell_type": "markdown", "source": ["n = 'text'"], "metadata": {}},
        {"cell_type": "code", "source": ["if n == 1:\n", "    1 / 0"], "metadata": {}},
    ]
    assert run({"cells": cells}, {})["n"] == 3
    with pytest.raises(ZeroDivisionError):
        run({"cells": cells}, {"n": 1})
    with pytest.raises(AssertionError, match="does not have"):
        run({"cells": cells}, {"m": 1})
    with pytest.raises(AssertionError, match="one cell"):
        run({"cells": cells[1:2]}, {})


@pytest.mark.parametrize("name", SMALL)
def test_notebook_is_executed_in_order_and_clean(name: str) -> None:
    path = TUTORIALS / f"{name}.ipynb"
    assert path.stat().st_size < LARGEST
    content = notebook(name)
    cells = code_cells(content)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no figure"
    assert not [output for output in outputs if output["output_type"] == "error"]
    printed = "".join("".join(output.get("text", ())) for output in outputs)
    assert "Warning" not in printed
    assert "it/s" not in printed
    for cell in content["cells"]:
        assert set(cell["metadata"]) <= {"tags"}, "times and other traces of the run"
    assert set(content["metadata"]) <= {"kernelspec", "language_info"}


@pytest.mark.parametrize("name", SMALL)
def test_notebook_names_no_folder_of_a_machine(name: str) -> None:
    content = notebook(name)
    for cell in content["cells"]:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/png", None)
    assert not PATHS.findall(json.dumps(content, ensure_ascii=False))


@pytest.mark.parametrize("text", ["/home/me/a.h5ad", "in /tmp/x", "C:\\data", "'/srv/x'", "(/usr/lib)"])
def test_folders_of_a_machine_are_recognized(text: str) -> None:
    assert PATHS.search(json.dumps({"source": [f"read {text}"]}))


@pytest.mark.parametrize("text", ["https://x.org/home/me", "a/tmp/b", "mean / work", "and/or"])
def test_other_slashes_are_not(text: str) -> None:
    assert not PATHS.search(json.dumps({"source": [f"read {text}"]}))
