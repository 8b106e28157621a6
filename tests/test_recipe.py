"""The conda recipe asks for what the package asks for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {
    "dask": "dask-core",
    "matplotlib": "matplotlib-base",
    "torch": "pytorch",
    "torch_geometric": "pytorch_geometric",
}


@pytest.mark.skipif(not (ROOT / "recipe").is_dir(), reason="the recipe is not part of a source distribution")
def test_recipe_has_the_dependencies_of_the_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    expected = {CONDA_NAMES.get(name, name): bound for name, bound in (entry.split(">=") for entry in listed)}
    run = (ROOT / "recipe" / "recipe.yaml").read_text().split("\n  run:\n")[1].split("\n\n")[0]
    assert dict(re.findall(r"- ([\w-]+) >=([\d.]+)$", run, re.MULTILINE)) == expected
