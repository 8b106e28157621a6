"""Configuration files of checkpoints, checked as they are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fimp_sc.pretrained.files._files import CheckpointError, checkpoint_folder, find_weights, read_json, read_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fimp_sc.pretrained.files._files import Weights

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_REQUIRED: Any = object()


class Config:
    """Values of a configuration file, which say what file and what key is at fault.

    Parameters
    ----------
    path
        The file.
    values
        What it holds; nothing where there is no such file.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def count(self, key: str, default: int = _REQUIRED) -> int:
        """Return a whole number above zero."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, "expected a whole number above zero")
        return value

    def pair(self, key: str, default: Sequence[int] = _REQUIRED) -> tuple[int, int]:
        """Return (height, width); one number stands for both."""
        value = self._get(key, default)
        both = [value, value] if isinstance(value, int) else value
        if not isinstance(both, list | tuple) or len(both) != 2 or not all(type(n) is int and n > 0 for n in both):
            raise self.error(key, "expected one or two whole numbers above zero")
        return both[0], both[1]

    def eps(self, default: float) -> float:
        """Return what norms add to the variance."""
        value = self._get("layer_norm_eps", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self.error("layer_norm_eps", "expected a number that is not negative")
        return float(value)

    def must(self, key: str, allowed: Sequence[Any]) -> None:
        """Check that a value, where given, is one that is supported."""
        if key in self.values and self.values[key] not in allowed:
            raise self.error(key, f"supported: {' or '.join(map(repr, allowed))}")

    def agree(self, key: str, found: Any) -> None:
        """Check that a value, where given, is what the shapes of the weights say."""
        if key in self.values and self.values[key] != found:
            raise self.error(key, f"but its weights say {found!r}: the two files belong to different models")

    def error(self, key: str, problem: str) -> CheckpointError:
        """Return an error that names the file, the key and its value."""
        return CheckpointError(f"{str(self.path)!r} has {key!r}: {self.values.get(key)!r}, {problem}.")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is _REQUIRED:
            state = "has no" if self.path.is_file() else "is missing, which should hold"
            raise CheckpointError(f"{str(self.path)!r} {state} {key!r}: take it from where the weights are from.")
        return value


def open_checkpoint(checkpoint: str | Path) -> tuple[Weights, Config]:
    """Open the weights and the configuration beside them, as data only: nothing in them is run.

    Parameters
    ----------
    checkpoint
        Folder with ``model.safetensors`` or ``pytorch_model.bin``, one file of weights, or a name on the Hugging Face
        hub.

    Returns
    -------
    weights
        Tensors by name. ``take(name, shape)`` returns one as float32, where ``None`` stands for any length,
        ``shape(name)`` its shape, and ``unused()`` the names that were never taken.
    config
        What ``config.json`` says, nothing without it: ``count(key)`` returns a whole number above zero, ``must(key,
        allowed)`` and ``agree(key, found)`` check a value that is given, and ``values`` has all.

    Raises
    ------
    CheckpointError
        There are no weights, or one of the files cannot be read.
    """
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        path = find_weights(checkpoint_folder(checkpoint), WEIGHT_FILES)
    settings = path.parent / "config.json"
    return read_weights(path), Config(settings, read_json(settings) if settings.exists() else {})
