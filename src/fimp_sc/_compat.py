"""The places where supported versions of dependencies differ."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# What the former `squidpy.gr.spatial_neighbors` needs to act as each of the functions that replaced it.
_LEGACY_ARGUMENTS: dict[str, dict[str, Any]] = {
    "knn": {"coord_type": "generic", "delaunay": False},
    "radius": {"coord_type": "generic", "delaunay": False},
    "delaunay": {"coord_type": "generic", "delaunay": True},
    "grid": {"coord_type": "grid", "delaunay": False},
}


def squidpy_graph_builder(method: str) -> Callable[..., Any]:
    """Return squidpy's function that builds the spatial graph ``method`` ("knn", "radius", "delaunay" or "grid")."""
    with warnings.catch_warnings():
        # docrep complains, on import, of keys in squidpy's own docstrings.
        warnings.simplefilter("ignore", SyntaxWarning)
        import squidpy

    builder = getattr(squidpy.gr, f"spatial_neighbors_{method}", None)
    return builder if builder is not None else partial(squidpy.gr.spatial_neighbors, **_LEGACY_ARGUMENTS[method])


@contextmanager
def quiet_squidpy() -> Iterator[None]:
    """Keep squidpy's own progress lines, which it prints through spatialdata's logger, off the console."""
    logger = logging.getLogger("spatialdata._logging")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)
