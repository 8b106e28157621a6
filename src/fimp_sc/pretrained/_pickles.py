"""Pickles of plain containers and numpy arrays, read without running anything that they name."""

from __future__ import annotations

import pickle
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc.pretrained._files import CheckpointError, check_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Booleans, numbers, text and bytes; in particular no objects and no records.
_PLAIN = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248]|[US][0-9]{1,9})")


class _Refusal(pickle.UnpicklingError):
    """What a pickle wanted and does not get."""


class _DType:
    """Stands in for ``numpy.dtype``, whose state could pass bytes off as objects."""

    __slots__ = ("spec",)

    def __init__(self, spec: Any, *_: Any) -> None:
        if not (isinstance(spec, str) and _PLAIN.fullmatch(spec)):
            raise _Refusal(f"an array of dtype {spec!r}; numbers and text alone are read")
        self.spec = spec

    def __setstate__(self, state: Any) -> None:
        _version, order, *parts = state
        if order not in ("<", ">", "|", "=") or any(part is not None for part in parts[:3]):
            raise _Refusal("an array of records; numbers and text alone are read")
        self.spec = order + self.spec.lstrip("<>|=")


class _Array(np.ndarray[Any, Any]):
    """An array that is filled from bytes only; numpy compares their number with the shape."""

    def __setstate__(self, state: Any, /) -> None:
        _version, shape, dtype, fortran, data = state
        plain = _plain(dtype, data)
        super().__setstate__((1, shape, plain, bool(fortran), data))  # type: ignore[arg-type]


def _plain(dtype: Any, data: Any) -> np.dtype[Any]:
    if not (isinstance(dtype, _DType) and isinstance(data, bytes)):
        raise _Refusal("an array that is not made of bytes; numbers and text alone are read")
    return np.dtype(dtype.spec)


def _new_array(*_: Any) -> _Array:
    return _Array((0,))


def _from_buffer(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    data = bytes(data) if isinstance(data, bytearray) else data
    return np.frombuffer(data, _plain(dtype, data)).reshape(shape, order=order)  # type: ignore[call-overload]


def _scalar(dtype: Any, data: Any) -> Any:
    return np.frombuffer(data, _plain(dtype, data))[0]


def _encode(text: str, encoding: str) -> bytes:
    """Bytes as protocols 0 to 2 write them; other encodings would import modules."""
    if encoding != "latin1":
        raise _Refusal(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


def _no_call(*_: Any) -> Any:
    raise _Refusal("an array without its values")


class _Stub:
    """Stands for a class or function that a pickle may name, and that it can call but not change."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: Any) -> None:
        raise _Refusal("a change of what it was given")


_KNOWN = {
    ("collections", "OrderedDict"): _Stub(dict),
    ("_codecs", "encode"): _Stub(_encode),
    ("numpy", "ndarray"): _Stub(_no_call),
    ("numpy", "dtype"): _Stub(_DType),
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _KNOWN[f"{_core}.multiarray", "_reconstruct"] = _Stub(_new_array)
    _KNOWN[f"{_core}.multiarray", "scalar"] = _Stub(_scalar)
    _KNOWN[f"{_core}.numeric", "_frombuffer"] = _Stub(_from_buffer)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        stub = _KNOWN.get((module, name))
        if stub is None:
            raise _Refusal(repr(f"{module}.{name}"))
        return stub


def read_pickle(path: Path) -> Any:
    """Read a pickle made of dictionaries, lists, tuples, text, numbers and numpy arrays of these.

    Nothing that the file names is imported or called: the few names that numpy writes are answered by functions of this
    module, all others are refused. A table of lists takes about 40 bytes of memory per number while it is read. A file
    made to do harm can still ask for more memory than there is.

    Parameters
    ----------
    path
        The file. Ordered dictionaries in it become plain ones.

    Raises
    ------
    CheckpointError
        The file is missing or damaged, or asks for anything else: the message names it.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except _Refusal as refusal:
        raise CheckpointError(
            f"{str(path)!r} asks for {refusal}. It was refused, and nothing was executed: such files can run code. If "
            "you trust its origin, save the table as .npz or .csv with the program that wrote it."
        ) from None
    except Exception as error:  # damaged pickles raise anything
        raise CheckpointError(
            f"{str(path)!r} cannot be read as a pickle: it is damaged, cut short or of another kind "
            f"({type(error).__name__}). Download it again and compare its size with the original."
        ) from None
