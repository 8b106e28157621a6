"""Pages of the API: one per public name, made from ``__all__`` of each namespace, so that none is forgotten."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fimp_sc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from docutils import nodes
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

# In the order in which people meet them; others follow.
_ORDER = ("pp", "tl", "pl", "metrics", "model", "datasets", "pretrained", "data", "nn")
_FOLDER = "api"
_INTRODUCTION = """\
Import the package as ``import fimp_sc as fimp``. Functions of ``pp`` and ``tl`` write their results to the object, and
leave it as it was when they fail; methods of :class:`fimp_sc.model.FIMP` return arrays. Names with a leading underscore
may change at any time.
"""


def public_names() -> dict[str, list[str]]:
    """Return the public names of each namespace."""
    namespaces = [name for name in fimp_sc.__all__ if inspect.ismodule(getattr(fimp_sc, name))]
    ordered = sorted(namespaces, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    return {name: list(getattr(fimp_sc, name).__all__) for name in ordered}


def write_pages(app: Sphinx) -> None:
    """Write the pages; those that have not changed stay, so that they are not read again."""
    pages = {f"{_FOLDER}/index.rst": _index(public_names())}
    for namespace, names in public_names().items():
        pages[f"{_FOLDER}/{namespace}.rst"] = _namespace(namespace, names)
        for name in names:
            pages[f"{_FOLDER}/{namespace}.{name}.rst"] = _object(namespace, name)
    folder = Path(app.srcdir, _FOLDER)
    folder.mkdir(exist_ok=True)
    for path in set(folder.glob("*.rst")) - {Path(app.srcdir, page) for page in pages}:
        path.unlink()
    for page, text in pages.items():
        path = Path(app.srcdir, page)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _index(namespaces: dict[str, list[str]]) -> str:
    rows = [(f":mod:`fimp_sc.{name}`", getattr(fimp_sc, name)) for name in namespaces]
    return "\n".join([*_title("API"), _INTRODUCTION, *_table(rows), *_toctree(list(namespaces))])


def _namespace(namespace: str, names: list[str]) -> str:
    module = getattr(fimp_sc, namespace)
    rows = [(f":obj:`{name} <{module.__name__}.{name}>`", getattr(module, name)) for name in names]
    head = [*_title(module.__name__), f".. automodule:: {module.__name__}", "", f".. currentmodule:: {module.__name__}"]
    return "\n".join([*head, "", *_table(rows), *_toctree([f"{namespace}.{name}" for name in names])])


def _table(rows: list[tuple[str, Any]]) -> list[str]:
    """Return a table of names and the first lines of their docstrings."""
    # Not that of autosummary, which takes what is before the first full stop, be it in the middle of a formula.
    lines = [".. list-table::", "   :widths: 30 70", ""]
    for name, thing in rows:
        first = (inspect.getdoc(thing) or "").partition("\n")[0]
        lines += [f"   * - {name}", f"     - {first}"]
    return [*lines, ""]


def _toctree(pages: list[str]) -> list[str]:
    return [".. toctree::", "   :hidden:", "", *(f"   {page}" for page in pages), ""]


def _object(namespace: str, name: str) -> str:
    thing = getattr(import_module(f"fimp_sc.{namespace}"), name)
    lines = [*_title(f"{namespace}.{name}"), f".. currentmodule:: fimp_sc.{namespace}", ""]
    if not inspect.isclass(thing):
        return "\n".join([*lines, f".. autofunction:: {name}", ""])
    lines.append(f".. autoclass:: {name}")
    members = list(_members(thing))
    if members:
        lines.append(f"   :members: {', '.join(members)}")
    others = [f":class:`{base.__module__}.{base.__qualname__}`" for base in _foreign_bases(thing)]
    if others:
        lines += ["", f"   Also has the members of {', '.join(others)}."]
    return "\n".join([*lines, ""])


def _members(cls: type) -> Iterator[str]:
    """Yield public methods and properties that this package defines, and documented fields of batches."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("fimp_sc.")]
    seen = set()
    for base in own:
        for name, value in vars(base).items():
            if name.startswith("_") or name in seen or not _is_member(value):
                continue
            seen.add(name)
            if getattr(cls, name).__doc__:
                yield name
    if hasattr(cls, "__total__"):  # a TypedDict
        yield from cls.__annotations__


def _is_member(value: Any) -> bool:
    function = getattr(value, "func", value)  # of cached properties
    return isinstance(value, property | classmethod | staticmethod) or inspect.isfunction(function)


def _foreign_bases(cls: type) -> list[type]:
    """Return the nearest bases from other packages that people may want to look up."""
    foreign = [base for base in cls.__mro__ if base.__module__.split(".")[0] in ("lightning", "scvi", "torch")]
    return [base for base in foreign if not any(issubclass(other, base) for other in foreign if other is not base)]


def _title(text: str) -> list[str]:
    return [text, "=" * len(text), ""]


def resolve_private(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """Find ``fimp_sc.nn._stack.TransformerStack``, as annotations call it, under its public name."""
    parts = node.get("reftarget", "").split(".")
    if node.get("refdomain") != "py" or parts[0] != "fimp_sc" or not any(part.startswith("_") for part in parts):
        return None
    public = ".".join(part for part in parts if not part.startswith("_"))
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, content)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("builder-inited", write_pages)
    app.connect("missing-reference", resolve_private)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
