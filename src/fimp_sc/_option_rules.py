"""Rules of options: types and ranges, and what to say where a value breaks one."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

_LONGEST = 80


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Rule for the values of an option.

    Attributes
    ----------
    none
        Whether ``None`` is allowed although it is not the default.
    hint
        What to do otherwise, a sentence for the end of the message.
    """

    none: bool = False
    hint: str = ""

    @property
    def allowed(self) -> str:
        """Allowed values, as they follow "must be"."""
        raise NotImplementedError

    def accept(self, value: Any, name: str, *, none: bool = False) -> Any:
        """Return the value as functions read it.

        Parameters
        ----------
        value
            What the caller passed.
        name
            Name of the argument, for messages.
        none
            Whether its default is ``None``.

        Raises
        ------
        TypeError
            It is of another type.
        ValueError
            It is out of range.
        """
        if value is None and (none or self.none):
            return None
        found = self.read(value, name)
        if found is NotImplemented or (found is None and value is None):
            raise self.refused(TypeError, value, name, none=none)
        if not self.holds(found):
            raise self.refused(ValueError, value, name, none=none)
        return found

    def read(self, value: Any, name: str) -> Any:
        """Return the value as functions read it, ``NotImplemented`` if it is of another type."""
        raise NotImplementedError

    def holds(self, value: Any) -> bool:
        """Tell whether a value of the right type is in range."""
        return True

    def refused(self, kind: type[Exception], value: Any, name: str, *, none: bool = False) -> Exception:
        """Return the exception for a value that is not allowed."""
        default = " (or None)" if none or self.none else ""
        return kind(f"{name} must be {self.allowed}{default}, found {shown(value)}.{self.hint and ' ' + self.hint}")


@dataclass(frozen=True)
class Integer(Rule):
    """A whole number from ``low`` to ``high``."""

    low: int = 0
    high: int | None = None

    @property
    def allowed(self) -> str:
        if self.high is None:
            return f"a whole number of at least {self.low}"
        return f"a whole number from {self.low} to {self.high}"

    def read(self, value: Any, name: str) -> Any:
        value = _scalar(value)
        return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else NotImplemented

    def holds(self, value: int) -> bool:
        return self.low <= value and (self.high is None or value <= self.high)


@dataclass(frozen=True)
class Real(Rule):
    """A finite number from ``low`` to ``high``, or between them."""

    low: float = -math.inf
    high: float = math.inf
    open_left: bool = False
    open_right: bool = False

    @property
    def allowed(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"above {self.low:g}" if self.open_left else f"of at least {self.low:g}")
        if self.high < math.inf:
            parts.append(f"below {self.high:g}" if self.open_right else f"at most {self.high:g}")
        return " ".join(["a finite number", " and ".join(parts)]).strip()

    def read(self, value: Any, name: str) -> Any:
        value, kinds = _scalar(value), int | float | np.integer | np.floating
        if not isinstance(value, kinds) or isinstance(value, bool):
            return NotImplemented
        try:
            return float(value)
        except OverflowError:
            return math.inf

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_left else value >= self.low
        below = value < self.high if self.open_right else value <= self.high
        return math.isfinite(value) and above and below


@dataclass(frozen=True)
class Flag(Rule):
    """True or False."""

    @property
    def allowed(self) -> str:
        return "True or False"

    def read(self, value: Any, name: str) -> Any:
        value = _scalar(value)
        return bool(value) if isinstance(value, bool | np.bool_) else NotImplemented


@dataclass(frozen=True)
class Choice(Rule):
    """One of some texts."""

    choices: tuple[str, ...] = ()
    by_modality: bool = False

    @property
    def allowed(self) -> str:
        return f"one of {', '.join(map(repr, self.choices))}" + (
            ", or a dictionary of these by modality" if self.by_modality else ""
        )

    def read(self, value: Any, name: str) -> Any:
        if self.by_modality and isinstance(value, Mapping):
            texts = all(isinstance(text, str) for item in value.items() for text in item)
            return {str(key): str(text) for key, text in value.items()} if texts else NotImplemented
        return str(value) if isinstance(value, str) else NotImplemented

    def holds(self, value: str | dict[str, str]) -> bool:
        given = list(value.values()) if isinstance(value, dict) else [value]
        return bool(given) and set(given) <= set(self.choices)


@dataclass(frozen=True)
class Text(Rule):
    """A text that is not empty: a key, a column, a name."""

    what: str = "a text"

    @property
    def allowed(self) -> str:
        return f"{self.what} that is not empty"

    def read(self, value: Any, name: str) -> Any:
        return str(value) if isinstance(value, str) else NotImplemented

    def holds(self, value: str) -> bool:
        return bool(value)


@dataclass(frozen=True)
class Label(Rule):
    """A word or a number that stands for a class."""

    @property
    def allowed(self) -> str:
        return "a text or a number"

    def read(self, value: Any, name: str) -> Any:
        if isinstance(value, str):
            return str(value)
        plain = isinstance(value, int | float | np.integer | np.floating | np.bool_)
        return value if plain else NotImplemented


@dataclass(frozen=True)
class Names(Rule):
    """A name or several."""

    one: bool = True

    @property
    def allowed(self) -> str:
        return f"{'a name or ' if self.one else ''}a list of names that is not empty"

    def read(self, value: Any, name: str) -> Any:
        if isinstance(value, str):
            return str(value) if self.one else NotImplemented
        if isinstance(value, Mapping | bytes) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) != 1:
            return NotImplemented
        items = list(value)
        plain = all(isinstance(item, str | int | float | np.generic) and item == item for item in items)
        return [item if not isinstance(item, str) else str(item) for item in items] if plain else NotImplemented

    def holds(self, value: Any) -> bool:
        return len(value) > 0


@dataclass(frozen=True)
class Pair(Rule):
    """Two numbers in increasing order."""

    of: Rule = Real()

    @property
    def allowed(self) -> str:
        return f"a pair (smallest, largest), each {self.of.allowed}, in increasing order"

    def read(self, value: Any, name: str) -> Any:
        if not isinstance(value, tuple | list | np.ndarray) or len(np.shape(value)) != 1 or len(value) != 2:
            return NotImplemented
        pair = tuple(self.of.read(item, name) for item in value)
        return NotImplemented if any(item is NotImplemented for item in pair) else pair

    def holds(self, value: tuple[Any, Any]) -> bool:
        return all(self.of.holds(item) for item in value) and value[0] <= value[1]


@dataclass(frozen=True)
class Place(Rule):
    """A file or a folder."""

    @property
    def allowed(self) -> str:
        return "a path"

    def read(self, value: Any, name: str) -> Any:
        if isinstance(value, str):
            return str(value) or NotImplemented
        return value if isinstance(value, os.PathLike) else NotImplemented


@dataclass(frozen=True)
class FigureFile(Place):
    """A file that a figure can be written to."""

    def accept(self, value: Any, name: str, *, none: bool = False) -> Any:
        found = super().accept(value, name, none=none)
        if found is None:
            return None
        from matplotlib.backend_bases import FigureCanvasBase

        path, known = Path(found), FigureCanvasBase.filetypes
        if path.suffix and path.suffix[1:].lower() not in known:
            raise ValueError(f"{name} must end in one of {', '.join(sorted(known))}; found {shown(value)}.")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{name}: the folder {str(path.parent)!r} does not exist; create it first.")
        return found


@dataclass(frozen=True)
class ColorMap(Rule):
    """A color map of matplotlib."""

    @property
    def allowed(self) -> str:
        return "the name of a color map of matplotlib such as 'viridis', or a color map"

    def read(self, value: Any, name: str) -> Any:
        from matplotlib import colormaps
        from matplotlib.colors import Colormap

        if isinstance(value, Colormap):
            return value
        if not isinstance(value, str):
            return NotImplemented
        return str(value) if value in colormaps else ""

    def holds(self, value: Any) -> bool:
        return value != ""


@dataclass(frozen=True)
class Color(Rule):
    """Colors of points: a name, or a key of ``obsm`` and a column of it; or several of these."""

    several: bool = False

    @property
    def allowed(self) -> str:
        one = "a name, or a pair (key of obsm, column)"
        return f"{one}, or a list of these that is not empty" if self.several else one

    def read(self, value: Any, name: str) -> Any:
        if isinstance(value, str):
            return str(value) or NotImplemented
        if isinstance(value, tuple):
            column = Integer().read(value[1], name) if len(value) == 2 and isinstance(value[0], str) else NotImplemented
            return NotImplemented if column is NotImplemented else (str(value[0]), column)
        listed = isinstance(value, Iterable) and not isinstance(value, bytes | Mapping | set)
        if not self.several or not listed or getattr(value, "ndim", 1) != 1:
            return NotImplemented
        found = [Color().read(item, name) for item in value]
        return NotImplemented if any(item is NotImplemented for item in found) else found

    def holds(self, value: Any) -> bool:
        return len(value) > 0


@dataclass(frozen=True)
class Axes(Rule):
    """Axes of matplotlib, one or (``several``) any number of them."""

    several: bool = False

    @property
    def allowed(self) -> str:
        return "matplotlib axes"

    def read(self, value: Any, name: str) -> Any:
        from matplotlib.axes import Axes as MatplotlibAxes

        items = [value]
        if self.several and isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
            items = list(np.ravel(np.asarray(value, dtype=object)))
        return value if items and all(isinstance(item, MatplotlibAxes) for item in items) else NotImplemented


@dataclass(frozen=True)
class Indices(Rule):
    """Positions of nodes, or a mask of them."""

    @property
    def allowed(self) -> str:
        return "a list of positions (whole numbers from 0), or a mask"

    def read(self, value: Any, name: str) -> Any:
        if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping | set):
            return NotImplemented
        found = np.asarray(value if hasattr(value, "dtype") else list(value))
        if found.ndim != 1 or (found.dtype.kind not in "iub" and found.size):
            return NotImplemented
        return found if found.size else found.astype(np.int64)


@dataclass(frozen=True)
class Mask(Rule):
    """An array that is True where values are hidden; also the name of one, or one by modality."""

    named: bool = False
    by_modality: bool = False

    @property
    def allowed(self) -> str:
        named = ", or the name of one in the object" if self.named else ""
        return "a boolean array with an entry for each value" + (", or a dictionary" if self.by_modality else named)

    def read(self, value: Any, name: str) -> Any:
        if (self.named and isinstance(value, str)) or (self.by_modality and isinstance(value, Mapping)):
            return value
        array = value if hasattr(value, "dtype") and hasattr(value, "ndim") else np.asarray(value)
        return value if array.dtype.kind in "biuf" and array.ndim >= 2 else NotImplemented


@dataclass(frozen=True)
class Values(Rule):
    """A value for each of something."""

    what: str = "a list of names"

    @property
    def allowed(self) -> str:
        return self.what

    def read(self, value: Any, name: str) -> Any:
        listed = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | set)
        return value if listed and getattr(value, "ndim", 1) == 1 else NotImplemented


@dataclass(frozen=True)
class Source(Rule):
    """A file, or what would be in it."""

    @property
    def allowed(self) -> str:
        return "a path, a dictionary, a list or a data frame"

    def read(self, value: Any, name: str) -> Any:
        import pandas as pd

        kinds = str | os.PathLike | Mapping | list | tuple | pd.DataFrame | pd.Series | pd.Index
        array = isinstance(value, np.ndarray) and value.ndim > 0
        ours = type(value).__module__.startswith("fimp_sc.")
        return value if isinstance(value, kinds) or array or ours else NotImplemented


@dataclass(frozen=True)
class Object(Rule):
    """An AnnData or MuData object."""

    def accept(self, value: Any, name: str, *, none: bool = False) -> Any:
        from anndata import AnnData

        if not (isinstance(value, AnnData) or (value is None and none)):
            from fimp_sc.data._study import is_mudata
            from fimp_sc.data.validate._checks import check_object

            if is_mudata(value):
                return value
            check_object(value)  # which says what to do with objects of other packages
        return value


@dataclass(frozen=True)
class Model(Rule):
    """A model of this package, or the place of a saved one."""

    @property
    def allowed(self) -> str:
        return "a fimp_sc.model.FIMP, or the folder of a saved one"

    def read(self, value: Any, name: str) -> Any:
        from fimp_sc.model import FIMP

        if isinstance(value, FIMP):
            return value
        return Place().read(value, name)


@dataclass(frozen=True)
class FoundationModel(Rule):
    """A handle of a foundation model, or what a saved model keeps of one."""

    @property
    def allowed(self) -> str:
        return "a foundation model from fimp_sc.pretrained.load"

    def read(self, value: Any, name: str) -> Any:
        from fimp_sc.pretrained import Foundation

        if isinstance(value, Mapping):
            fields = set(Foundation.__dataclass_fields__)
            return Foundation(**value) if {"name"} <= set(value) <= fields else NotImplemented
        return value if isinstance(value, Foundation) else NotImplemented

    def refused(self, kind: type[Exception], value: Any, name: str, *, none: bool = False) -> Exception:
        error = super().refused(kind, value, name, none=none)
        given = repr(str(value)) if isinstance(value, str) else "name"
        return kind(f"{error} Write {name}=fimp_sc.pretrained.load({given}, checkpoint).")


@dataclass(frozen=True)
class Trained(Text):
    """Trained part of a foundation model."""

    @property
    def allowed(self) -> str:
        return "'frozen', 'full', 'last:N', 'lora' or 'lora:RANK'"

    def holds(self, value: str) -> bool:
        return re.fullmatch(r"frozen|full|last:\d+|lora(?::\d+)?", value) is not None


@dataclass(frozen=True)
class Accelerator(Rule):
    """A kind of device that torch finds here."""

    @property
    def allowed(self) -> str:
        return f"one of {', '.join(map(repr, ('auto', 'gpu', *_accelerators())))}"

    def read(self, value: Any, name: str) -> Any:
        return str(value) if isinstance(value, str) else NotImplemented

    def holds(self, value: str) -> bool:
        return value in ("auto", "cpu", "gpu") or value in _accelerators()

    def accept(self, value: Any, name: str, *, none: bool = False) -> Any:
        found = super().accept(value, name, none=none)
        if found in (None, "auto", "cpu"):
            return found
        kinds = ("cuda", "mps") if found == "gpu" else (found,)
        if not any(_accelerators()[kind].is_available() for kind in kinds if kind in _accelerators()):
            raise ValueError(
                f"{name}={found!r}, but torch finds no such device on this machine: pass {name}='cpu', or 'auto' for "
                "whatever there is."
            )
        return found


@cache
def _accelerators() -> dict[str, Any]:
    from lightning.pytorch.accelerators import AcceleratorRegistry

    return {name: entry["accelerator"] for name, entry in AcceleratorRegistry.items()}


@dataclass(frozen=True)
class Devices(Rule):
    """Number of devices, or their names."""

    @property
    def allowed(self) -> str:
        return "'auto', a number of devices (-1 for all), or a list of their indices"

    def read(self, value: Any, name: str) -> Any:
        if isinstance(value, str):
            return str(value)
        items = value if isinstance(value, list | tuple) else [value]
        whole = [Integer().read(item, name) for item in items]
        if any(item is NotImplemented for item in whole):
            return NotImplemented
        return whole if isinstance(value, list | tuple) else whole[0]

    def holds(self, value: Any) -> bool:
        if isinstance(value, list):
            return bool(value) and min(value) >= 0
        if isinstance(value, str):
            return value == "auto" or all(part.strip().isdigit() for part in value.split(","))
        return bool(value == -1 or value > 0)


FOREIGN = {
    "trainer": "lightning.pytorch.Trainer",
    "scatter": "matplotlib.axes.Axes.scatter",
    "plot": "matplotlib.axes.Axes.plot",
}


@cache
def foreign_parameters(of: str) -> tuple[str, ...]:
    """Return the names of the keywords that a function of another package takes."""
    functions: list[Any]
    found: dict[str, None] = {}
    if of == "trainer":
        import lightning.pytorch as pl
        from scvi.train import Trainer

        functions, found = [Trainer, pl.Trainer], {"ckpt_path": None}
    else:
        from matplotlib.artist import ArtistInspector
        from matplotlib.axes import Axes
        from matplotlib.collections import PathCollection
        from matplotlib.lines import Line2D

        functions = [getattr(Axes, of)]
        inspector = ArtistInspector(Line2D if of == "plot" else PathCollection)
        found |= dict.fromkeys(
            [*inspector.get_setters(), *(alias for some in inspector.aliasd.values() for alias in some)]
        )
    for function in functions:
        found |= dict.fromkeys(inspect.signature(function).parameters)
    return tuple(name for name in found if name not in ("self", "args", "kwargs"))


def shown(value: Any) -> str:
    """Return a value for a message; objects and long values by their type."""
    plain = value is None or isinstance(value, str | bool | int | float | np.generic | tuple | list | dict | Path)
    text = repr(value)
    if plain and "\n" not in text and len(text) <= _LONGEST:
        return text
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def _scalar(value: Any) -> Any:
    """Return the scalar of an array without axes, as numpy's own files hold single numbers."""
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value
