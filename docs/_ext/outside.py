"""What lives outside of this folder, copied into it: tutorials, benchmarks, changelog, how to contribute."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sphinx.application import Sphinx

# Tutorials in the order in which they are best read; others follow.
_ORDER = (
    "quick_start",
    "visium_layers",
    "imaging_panel",
    "several_sections",
    "dissociated_reference",
    "foundation_models",
    "attention",
    "fmri",
    "image_graph",
    "large_data",
)
_PICTURES = (".png", ".svg")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_NONE = "There are none in this copy.\n"


def copy_all(app: Sphinx) -> None:
    """Write the copies to `generated/`; those that have not changed stay, so that they are not read again."""
    docs = Path(app.srcdir)
    root, made = docs.parent, docs / "generated"
    wanted: dict[Path, bytes] = {}

    notebooks = {path.stem: path.read_bytes() for path in (root / "tutorials").glob("*.ipynb")}
    wanted |= {made / "tutorials" / f"{name}.ipynb": content for name, content in notebooks.items()}
    ordered = sorted(notebooks, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
    listing = _toctree(f"generated/tutorials/{name}" for name in ordered) if notebooks else _NONE
    wanted[made / "tutorials.inc.md"] = listing.encode()

    for name in ("CHANGELOG", "CONTRIBUTING"):
        wanted[made / f"{name}.inc.md"] = _linked((root / f"{name}.md").read_text(encoding="utf-8"), {}).encode()

    # The first page is included by a page of its own, the others are pages.
    folder = root / "benchmarks"
    pages = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    first = pages.pop("README.md")
    text = _linked(first, {name: f"generated/benchmarks/{name}" for name in pages})
    text = _with_pictures(text, "generated/benchmarks/")
    if pages:
        text += "\n" + _toctree(f"generated/benchmarks/{Path(name).stem}" for name in sorted(pages))
    wanted[made / "benchmarks.inc.md"] = text.encode()
    own = {name: name for name in pages} | {"README.md": "../../benchmarks.md"}
    wanted |= {made / "benchmarks" / name: _linked(content, own).encode() for name, content in pages.items()}
    for path in folder.rglob("*"):
        if path.suffix in _PICTURES:
            wanted[made / "benchmarks" / path.relative_to(folder)] = path.read_bytes()

    for path in [path for path in made.rglob("*") if path.is_file() and path not in wanted]:
        path.unlink()
    for path, content in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


def _linked(text: str, known: dict[str, str]) -> str:
    """Keep links to pages, under their new name; what else they point at is not among the pages."""

    def replace(match: re.Match[str]) -> str:
        label, target, anchor = match.groups()
        return f"[{label}]({known[target]}{anchor or ''})" if target in known else label

    return _LINK.sub(replace, text)


def _with_pictures(text: str, folder: str) -> str:
    return re.sub(r"(!\[[^\]]*\]\()(?!\w+:)", rf"\g<1>{folder}", text)


def _toctree(pages: Iterable[str]) -> str:
    return "\n".join(["```{toctree}", ":maxdepth: 1", ":hidden:", "", *pages, "```", ""])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("builder-inited", copy_all)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
