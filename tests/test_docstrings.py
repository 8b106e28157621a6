"""Everything public says what it takes and what it gives."""

from __future__ import annotations

import doctest
import inspect
import re
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING

import pytest
from matplotlib import pyplot as plt
from text_toys import write_tokenizer

import fimp_sc
from fimp_sc.model import FIMP

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FunctionType

NAMESPACES = [name for name in fimp_sc.__all__ if name != "__version__"]
PUBLIC = [(namespace, name) for namespace in NAMESPACES for name in import_module(f"fimp_sc.{namespace}").__all__]


def sections(docstring: str) -> dict[str, str]:
    """Return the text of a numpydoc docstring by section; what comes first is under an empty name."""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def documented(docstring: str) -> set[str]:
    """Return the names that have an entry in one of the sections for parameters."""
    found = sections(docstring)
    text = "\n".join(found.get(section, "") for section in ("Parameters", "Other Parameters", "Attributes"))
    names = re.findall(r"^(\S.*?)(?: : .*)?$", text, flags=re.MULTILINE)
    return {name.strip().lstrip("*") for entry in names for name in entry.split(",")}


def parameters(function: FunctionType | type) -> set[str]:
    """Return the names of parameters that a caller can give."""
    return set(inspect.signature(function).parameters) - {"self", "cls"}


def own_methods(cls: type) -> Iterator[tuple[str, FunctionType]]:
    """Yield public methods that this package defines, functions behind class methods and properties included."""
    for base in cls.__mro__:
        if base.__module__.startswith("fimp_sc."):
            for name, value in vars(base).items():
                function = getattr(value, "fget", None) or getattr(value, "__func__", value)
                if not name.startswith("_") and inspect.isfunction(function):
                    yield f"{base.__name__}.{name}", function


def test_docstrings_are_read_as_people_read_them() -> None:
    text = """Do it.

    Parameters
    ----------
    first, second
        Two.
    third : int
        One, with a comma: it counts.
    **kwargs
        More.

    Returns
    -------
    The result.
    """
    assert documented(text) == {"first", "second", "third", "kwargs"}
    assert sections(text)["Returns"].strip() == "The result."
    assert sections(text)[""].strip() == "Do it."


@pytest.mark.parametrize(("namespace", "name"), PUBLIC)
def test_public_names_are_documented(namespace: str, name: str) -> None:
    thing = getattr(import_module(f"fimp_sc.{namespace}"), name)
    text = thing.__doc__
    assert text, "no docstring"
    assert inspect.cleandoc(text).splitlines()[0].endswith("."), "the first line is a sentence"
    if inspect.isclass(thing):
        if issubclass(thing, dict | tuple | Exception) or inspect.isabstract(thing) or hasattr(thing, "_is_protocol"):
            return  # made by name, or never
        # `registry` is how scvi-tools makes models of saved ones.
        assert parameters(thing) - documented(text) <= {"args", "kwargs", "registry"}
        return
    assert parameters(thing) <= documented(text)
    if inspect.signature(thing).return_annotation not in (None, "None"):
        known = sections(text)
        assert {"Returns", "Yields"} & set(known) or re.match(r"(Return|Yield|Use|Read|Build)", known[""])


@pytest.mark.parametrize(("namespace", "name"), PUBLIC)
def test_methods_are_documented(namespace: str, name: str) -> None:
    thing = getattr(import_module(f"fimp_sc.{namespace}"), name)
    if not inspect.isclass(thing):
        return
    for where, method in own_methods(thing):
        # Hooks of Lightning, torch and scvi-tools are called by them, not by people.
        if where.split(".")[0] in ("BlockSplitter", "FIMPModule", "FIMPTrainingPlan"):
            continue
        assert method.__doc__, where
        # Methods of FIMP are functions whose first parameter is the model.
        given = set(list(inspect.signature(method).parameters)[1:]) - {"self", "cls"}
        if "Parameters" in sections(method.__doc__):
            told = documented(method.__doc__) | set(re.findall(r"``(\w+)``", method.__doc__))
            assert given - told <= {"args", "kwargs"}, where


# The same argument of these tools is described in the same words.
WITH_MODEL = ("embed", "annotate", "impute", "attention")
SHARED = {
    "layer", "library_key", "batch_key", "spatial_key", "connectivities_key", "input_scale", "center", "n_tokens",
    "n_layers", "max_epochs", "accelerator", "verbose", "overwrite", "copy", "model_kwargs", "train_kwargs",
}  # fmt: skip


METHODS = [
    *("setup_anndata", "setup_mudata", "train", "predict", "get_latent_representation", "get_expression"),
    *("get_reconstruction", "get_edge_influence", "get_gene_attention", "save", "save_pretrained", "load"),
    *("load_query_data", "from_pretrained", "load_registry"),
]
WITH_EXAMPLES = [found for found in PUBLIC if found[0] in ("tl", "pp", "pl", "metrics", "datasets")]
WITH_EXAMPLES += [("model", "FIMP"), *(("model", f"FIMP.{name}") for name in METHODS)]
PLACES = {
    "adata", "modality", "layer", "library_key", "batch_key", "spatial_key", "connectivities_key", "input_scale",
    "center", "reference",
}  # fmt: skip


def entries(docstring: str) -> dict[str, str]:
    """Return the text of each parameter by its name."""
    text = "\n" + sections(docstring)["Parameters"]
    parts = re.split(r"^(\S.*)$", text, flags=re.MULTILINE)
    return {
        name.strip(): " ".join(body.split())
        for names, body in zip(parts[1::2], parts[2::2], strict=True)
        for name in names.split(",")
    }


@pytest.mark.parametrize("name", fimp_sc.tl.__all__)
def test_docstrings_of_tools_are_complete_where_they_stand(name: str) -> None:
    text = getattr(fimp_sc.tl, name).__doc__
    assert {"Parameters", "Returns", "Raises", "Examples"} <= set(sections(text))
    for parameter, told in entries(text).items():
        assert len(told) > 15, parameter
        assert not re.match(r"(As in|See) ", told), parameter


@pytest.mark.parametrize("name", METHODS)
def test_docstrings_of_methods_are_complete_where_they_stand(name: str) -> None:
    method = getattr(FIMP, name)
    given = set(list(inspect.signature(getattr(method, "__func__", method)).parameters)[1:]) - {"kwargs"}
    told = entries(method.__doc__)
    assert given <= {parameter.lstrip("*") for parameter in told} | {"kwargs"}
    assert {"Raises", "Examples"} <= set(sections(method.__doc__))
    assert "Returns" in sections(method.__doc__) or inspect.signature(method).return_annotation == "None"
    for parameter, text in told.items():
        assert len(text) > 15, parameter
        assert not re.match(r"(As in|See) ", text), parameter


@pytest.mark.parametrize("parameter", ["indices", "batch_size", "strategy", "distribute"])
def test_predictions_describe_what_they_share_in_the_same_words(parameter: str) -> None:
    predictions = ("predict", "get_latent_representation", "get_expression", "get_reconstruction")
    assert len({entries(getattr(FIMP, name).__doc__)[parameter] for name in predictions}) == 1


@pytest.mark.parametrize("parameter", sorted(SHARED))
def test_tools_describe_what_they_share_in_the_same_words(parameter: str) -> None:
    # tl.attention reads one object, whose cells have neighbors.
    tools = [tool for tool in WITH_MODEL if tool != "attention" or parameter not in ("connectivities_key", "copy")]
    assert len({entries(getattr(fimp_sc.tl, tool).__doc__)[parameter] for tool in tools}) == 1


@pytest.mark.parametrize("tool", ["niches", "gene_pairs"])
def test_tools_have_few_parameters_beside_the_places_of_data(tool: str) -> None:
    assert len(parameters(getattr(fimp_sc.tl, tool)) - PLACES) <= 14


@pytest.mark.parametrize(("namespace", "name"), WITH_EXAMPLES)
def test_examples_run(namespace: str, name: str, tmp_path, monkeypatch) -> None:
    thing = attrgetter(name)(import_module(f"fimp_sc.{namespace}"))
    monkeypatch.chdir(tmp_path)
    if name == "text":
        pytest.importorskip("tokenizers")
        write_tokenizer(tmp_path / "all-MiniLM-L6-v2")
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: None)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(recurse=False).find(thing, name, globs={}):
        runner.run(test, out=report.append)
    plt.close("all")
    assert not runner.failures, "".join(report)
    assert runner.tries or namespace not in ("tl", "model")
