"""Imports between the rooms of the package: none upward, and no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fimp_sc

ROOT = Path(fimp_sc.__file__).parent
# Each may import those before it.
ORDER = ("data", "nn", "pretrained", "model", "pp", "tl", "metrics", "datasets", "pl")
LONGEST = 700


def runtime_imports(path: Path) -> Iterator[str]:
    """Yield the modules of this package that a file imports when it is loaded."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fimp_sc"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    """Return the package, at most two deep, in which a module or a name of one stands; single files are rooms, too."""
    parts = module.split(".")[1:]
    if ROOT.joinpath(f"{parts[0]}.py").is_file():
        return parts[0]
    while parts and not ROOT.joinpath(*parts).is_dir():
        parts.pop()
    return ".".join(parts[:2])


def rooms() -> dict[str, set[str]]:
    """Return by room the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        if path.name == "__init__.py":
            continue
        here = room(".".join(("fimp_sc", *path.relative_to(ROOT).with_suffix("").parts)))
        found.setdefault(here, set()).update({room(name) for name in runtime_imports(path)} - {here})
    return found


def test_nothing_imports_upward() -> None:
    for here, others in rooms().items():
        namespace = here.split(".")[0]
        if namespace in ORDER:
            above = set(ORDER[ORDER.index(namespace) + 1 :]) | {"cli", "_demo"}
            assert not {other.split(".")[0] for other in others} & above, here


def test_rooms_form_no_circle() -> None:
    left = rooms()
    while left:
        free = [name for name, others in left.items() if not others & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_folders_and_files_stay_small() -> None:
    for folder in [ROOT, *(path for path in ROOT.rglob("*") if path.is_dir() and path.name != "__pycache__")]:
        files = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
        assert len(files) <= 12, folder
        assert not [path for path in files if len(path.read_text().splitlines()) > LONGEST]
