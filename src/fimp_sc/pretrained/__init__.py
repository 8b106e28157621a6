"""Foundation models and gene vectors made by others: read, checked, and mapped onto this package."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fimp_sc.pretrained._backbone import Backbone, GeneTokens, SequenceTokens, copy_layer, copy_weights
    from fimp_sc.pretrained._registry import Foundation, FoundationReader, foundation_names, load, register
    from fimp_sc.pretrained.files._files import CheckpointError
    from fimp_sc.pretrained.files._settings import open_checkpoint
    from fimp_sc.pretrained.genes._vectors import GeneVectors, read_gene_vectors, write_gene_vectors

# Loaded when asked for: the registry alone needs neither torch nor pandas.
_MODULES = {
    "_registry": ("Foundation", "FoundationReader", "foundation_names", "load", "register"),
    "_backbone": ("Backbone", "GeneTokens", "SequenceTokens", "copy_layer", "copy_weights"),
    "files._files": ("CheckpointError",),
    "files._settings": ("open_checkpoint",),
    "genes._vectors": ("GeneVectors", "read_gene_vectors", "write_gene_vectors"),
}

__all__ = [
    "Backbone",
    "CheckpointError",
    "Foundation",
    "FoundationReader",
    "GeneTokens",
    "GeneVectors",
    "SequenceTokens",
    "copy_layer",
    "copy_weights",
    "foundation_names",
    "load",
    "open_checkpoint",
    "read_gene_vectors",
    "register",
    "write_gene_vectors",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return [*__all__, "files", "genes"]
