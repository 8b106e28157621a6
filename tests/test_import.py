from __future__ import annotations

import subprocess
import sys
from pkgutil import iter_modules

import pytest

import fimp_sc

NAMESPACES = ("data", "datasets", "metrics", "model", "nn", "pl", "pp", "pretrained", "tl")
HEAVY = ("anndata", "lightning", "matplotlib", "pandas", "scanpy", "scvi", "squidpy", "torch", "torch_geometric")


def test_import_loads_nothing_heavy() -> None:
    code = f"import sys, fimp_sc; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cli_help_loads_nothing_heavy() -> None:
    code = f"import sys, fimp_sc.cli; fimp_sc.cli._parser(); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_dir_lists_the_namespaces_before_they_are_loaded() -> None:
    code = "import fimp_sc; print(*dir(fimp_sc))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(NAMESPACES) <= set(done.stdout.split())


@pytest.mark.parametrize("name", NAMESPACES)
def test_namespace_loads(name: str) -> None:
    module = getattr(fimp_sc, name)
    assert module.__name__ == f"fimp_sc.{name}"
    # What completion in a notebook offers.
    rooms = {found.name for found in iter_modules(module.__path__) if found.ispkg}
    assert {public for public in dir(module) if not public.startswith("_")} - rooms == {*module.__all__}


def test_version_is_a_string() -> None:
    assert isinstance(fimp_sc.__version__, str)


def test_unknown_attribute_is_named() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fimp_sc.nothing  # noqa: B018
