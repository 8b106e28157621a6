"""Configuration of the documentation: `python -m sphinx -W --keep-going docs docs/_build/html`."""

from __future__ import annotations

import inspect
import os
import sys
from importlib.metadata import metadata
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

_package = metadata("fimp-sc")
_urls = dict(entry.split(", ", 1) for entry in _package.get_all("Project-URL", []))

project = "fimp-sc"
author = "fimp-sc developers"
copyright = f"2026, {author}"  # noqa: A001 (Sphinx reads this name)
version = release = _package["Version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_autodoc_typehints",
    "scanpydoc.elegant_typehints",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
    "outside",  # of the folder _ext
]
exclude_patterns = ["_build", "generated/*.inc.md", "**.ipynb_checkpoints"]
needs_sphinx = "8.0"
nitpicky = True
# Whether a name of another package is found depends on inventories that may be out of reach.
# Types that are no public names are shown without a link.
nitpick_ignore_regex = [(r"py:.*", r"(?!fimp_sc\.).*"), (r"py:class", r"fimp_sc\..*\._.*")]

# Single backticks in docstrings are code.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
# Of each namespace what its __all__ has, each name on a page of its own.
autosummary_ignore_module_all = False
autosummary_imported_members = True
templates_path = ["_templates"]
python_maximum_signature_line_length = 100
# The line would be put behind the heading of the examples.
typehints_document_rtype_none = False
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = False
napoleon_attr_annotations = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# Tutorials are committed with their results.
nb_execution_mode = "off"
bibtex_bibfiles = ["references.bib"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Inventories of other packages come from the network: only where there is one for certain, so that a build without
# gives the same warnings as a build with it, none.
intersphinx_mapping = {}
if os.environ.get("READTHEDOCS") == "True" or os.environ.get("FIMP_SC_DOCS_ONLINE"):
    intersphinx_mapping = {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable/", None),
        "matplotlib": ("https://matplotlib.org/stable/", None),
        "mudata": ("https://mudata.readthedocs.io/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3/", None),
        "scanpy": ("https://scanpy.readthedocs.io/en/stable/", None),
        "scipy": ("https://docs.scipy.org/doc/scipy/", None),
        "scvi": ("https://docs.scvi-tools.org/en/stable/", None),
        "squidpy": ("https://squidpy.readthedocs.io/en/stable/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }

html_theme = "sphinx_book_theme"
html_title = f"fimp-sc {release}"
html_static_path = ["_static"]
html_theme_options = {
    "path_to_docs": "docs",
    "repository_url": _urls.get("Source", ""),
    "use_repository_button": "Source" in _urls,
    "show_navbar_depth": 1,
}


def _nearest_foreign_base(app: object, name: str, obj: type, options: object, bases: list) -> None:
    """Name the class of another package whose members a class has, rather than private classes in between."""
    bases[:] = [next(base for base in obj.__mro__ if not base.__module__.startswith("fimp_sc."))]


def _skip_foreign(app: object, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out members that other packages define, and fields of named tuples, which the docstring describes."""
    function = next((getattr(obj, inner) for inner in ("fget", "func", "__func__") if hasattr(obj, inner)), obj)
    defined_in = getattr(function, "__module__", None) or getattr(function, "__objclass__", object).__module__
    is_code = inspect.isroutine(function) or inspect.isdatadescriptor(function)
    return True if is_code and not defined_in.startswith("fimp_sc") else None


def setup(app) -> None:
    """Connect the functions above."""
    app.connect("autodoc-process-bases", _nearest_foreign_base)
    app.connect("autodoc-skip-member", _skip_foreign)
