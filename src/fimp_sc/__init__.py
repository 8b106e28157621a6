"""Gene-level message passing between cells (FIMP) for spatial transcriptomics.

The namespaces load when first used, so that ``import fimp_sc`` stays cheap:

- ``pp``: things done once to the object (spatial graph, genes matched with a vocabulary);
- ``tl``: embed, annotate, impute, niches; each writes its result to the object;
- ``pl``: figures;
- ``metrics``: scores of labels, niches and imputed values;
- ``model``: the class behind ``tl``;
- ``pretrained``: readers of foundation models and of gene vectors;
- ``data``, ``nn``: tokens, graph blocks and layers for those who build on them;
- ``datasets``: an offline toy tissue.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from fimp_sc import data, datasets, metrics, model, nn, pl, pp, pretrained, tl

__all__ = ["__version__", "data", "datasets", "metrics", "model", "nn", "pl", "pp", "pretrained", "tl"]

try:
    __version__ = version("fimp-sc")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

_NAMESPACES = frozenset(__all__) - {"__version__"}


def __getattr__(name: str) -> ModuleType:
    if name in _NAMESPACES:
        return import_module(f"{__name__}.{name}")
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted(set(globals()) | _NAMESPACES)
