"""Configuration of the documentation: `python -m sphinx -W --keep-going docs docs/_build/html`."""

from __future__ import annotations

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
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
    # Of this folder.
    "api_pages",
    "docstrings",
    "outside",
]
exclude_patterns = ["_build", "generated/*.inc.md", "**.ipynb_checkpoints"]
needs_sphinx = "8.0"
nitpicky = True
# Whether a name of another package is found depends on inventories that may be out of reach.
nitpick_ignore_regex = [(r"py:.*", r"(?!fimp_sc\.).*")]

# Single backticks in docstrings are code.
default_role = "literal"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = False
napoleon_use_rtype = False

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
