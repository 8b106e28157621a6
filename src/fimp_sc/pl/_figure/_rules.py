"""Rules of options that only figures have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fimp_sc._option_rules import ColorMap, Place, Real, Rule


@dataclass(frozen=True)
class Limit(Rule):
    """End of the range of colors: a number, or a percentile as text."""

    @property
    def allowed(self) -> str:
        return "a finite number, or a percentile such as 'p99' or 'p1.5'"

    def read(self, value: Any, name: str) -> Any:
        if not isinstance(value, str):
            return Real().read(value, name)
        return str(value)

    def holds(self, value: float | str) -> bool:
        if not isinstance(value, str):
            return Real().holds(value)
        try:
            return value.startswith("p") and 0 <= float(value[1:]) <= 100
        except ValueError:
            return False


@dataclass(frozen=True)
class Palette(Rule):
    """Colors of categories: a list, a dictionary by category, or a color map of matplotlib."""

    @property
    def allowed(self) -> str:
        return "a list of colors, a dictionary from categories to colors, or the name of a color map of matplotlib"

    def read(self, value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {str(category): color for category, color in value.items()}
        if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes):
            return list(value)
        return ColorMap().read(value, name)

    def holds(self, value: Any) -> bool:
        from matplotlib.colors import is_color_like

        if isinstance(value, dict | list):
            return bool(value) and all(map(is_color_like, value.values() if isinstance(value, dict) else value))
        return value != ""


@dataclass(frozen=True)
class ReportFile(Place):
    """A file of HTML in a folder that exists."""

    def accept(self, value: Any, name: str, *, none: bool = False) -> Any:
        path = Path(super().accept(value, name, none=none))
        if path.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"{name} must end in .html, found {path.name!r}.")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{name}: the folder {str(path.parent)!r} does not exist; create it first.")
        if path.is_dir():
            raise IsADirectoryError(f"{name}: {str(path)!r} is a folder; name a file.")
        return path
