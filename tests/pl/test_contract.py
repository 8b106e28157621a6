"""Every figure has the arguments ``title``, ``ax``, ``show``, ``save`` and ``return_fig``, with one meaning."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from fimp_sc import pl

ARGUMENTS = {"title": None, "ax": None, "show": None, "save": None, "return_fig": False}
TEXTS = {
    "title": r"(Title of the axes; (none )?by default|Titles of the panels, in the order of the axes; by default).*",
    "ax": r"Axes to draw into(, one for each panel)?; by default a new figure\.",
    "show": r"Show the figure and return nothing; by default if none of `ax`, `save` and `return_fig` is given\.",
    "save": r"File to write the figure to\.",
    "return_fig": r"Return the figure instead of the axes\.",
}


FIGURES = [name for name in pl.__all__ if name != "report"]  # which is a page


@pytest.mark.parametrize("name", FIGURES)
def test_arguments_have_the_same_names_defaults_and_texts(name) -> None:
    function = getattr(pl, name)
    given = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert {p.name: p.default for p in given[-5:]} == ARGUMENTS, "the last ones, in this order"
    assert all(p.kind is p.KEYWORD_ONLY for p in given[-5:])
    text = inspect.getdoc(function)
    for argument, meaning in TEXTS.items():
        assert re.search(rf"^{argument}\n    {meaning}$", text, re.MULTILINE), argument
    returned = " ".join(re.search(r"Returns\n-+\n(.*?)(?:\n\n|\Z)", text, re.DOTALL)[1].split())
    assert returned.startswith("None if the figure is shown; else the figure if `return_fig`, else the axes")


@pytest.mark.parametrize("name", FIGURES)
def test_the_test_of_a_figure_checks_what_becomes_of_it(name) -> None:
    assert f"check_figure(pl.{name}, " in (Path(__file__).parent / f"test_{name}.py").read_text(encoding="utf-8")
