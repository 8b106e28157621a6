"""What napoleon does not make of our docstrings by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sphinx.ext.napoleon import NumpyDocstring

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_lookup_annotation = NumpyDocstring._lookup_annotation


def _results(self: NumpyDocstring, section: str) -> list[str]:
    """Results are described in prose, where napoleon expects a type on the first line."""
    lines = self._dedent(self._consume_to_next_section())
    return [":returns:", *(f"    {line}" if line else "" for line in lines), ""]


def _annotation(self: NumpyDocstring, name: str) -> str:
    """Annotations are code: in ``NDArray[np.str_]`` docutils would see a link."""
    found = _lookup_annotation(self, name)
    return f"``{found}``" if found else found


def _attribute(self: NumpyDocstring) -> list[str]:
    """Leave alone what is below an attribute: napoleon takes what is before a colon for a type."""
    return self._consume_to_next_section()


def setup(app: Sphinx) -> dict[str, Any]:
    """Take the place of napoleon's methods."""
    NumpyDocstring._parse_returns_section = _results
    NumpyDocstring._parse_yields_section = _results
    NumpyDocstring._lookup_annotation = _annotation
    NumpyDocstring._parse_attribute_docstring = _attribute
    return {"parallel_read_safe": True, "parallel_write_safe": True}
