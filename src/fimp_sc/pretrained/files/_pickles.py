"""Pickles of dictionaries of numbers, text and numpy arrays, read without running anything that they name."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fimp_sc.pretrained.files._files import CheckpointError, check_file

if TYPE_CHECKING:
    from pathlib import Path

# Numbers, text and bytes; in particular no objects, no records and no text without a length.
_PLAIN = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248]|[US][1-9][0-9]{0,8})")
# A number, and those that follow it without anything between.
_FLOATS = re.compile(rb"(?s:.{8}(?:G.{8})*+)")
_MARKED_FLOAT = np.dtype([("value", ">f8"), ("mark", "u1")])
_LARGEST_KEY = 1 << 60  # whole numbers up to here have hashes of their own
_OPERATIONS = """PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE SHORT_BINUNICODE
BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT
LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL
APPEND APPENDS"""


class _Refusal(pickle.UnpicklingError):
    """Stand-in for a class that a pickle names and does not get."""


def _dtype(spec: Any, *_: Any) -> np.dtype[Any]:
    if not (isinstance(spec, str) and _PLAIN.fullmatch(spec)):
        what = repr(spec[:30]) if isinstance(spec, str) else type(spec).__name__
        raise _Refusal(f"an array of dtype {what}; numbers and text alone are read")
    return np.dtype(spec)


def _values(data: Any, dtype: Any) -> np.ndarray[Any, Any]:
    if not (isinstance(dtype, np.dtype) and isinstance(data, bytes)):
        raise _Refusal("an array that is not made of bytes; numbers and text alone are read")
    return np.frombuffer(data, dtype)


def _named_alone(*_: Any) -> Any:
    raise _Refusal("an array without its values")


def _encode(text: Any, encoding: Any) -> bytes:
    """Bytes as protocol 2 writes them; other encodings would import modules."""
    if encoding != "latin1":
        raise _Refusal("text in another encoding than that of bytes")
    return text.encode("latin1")


# Stand in for the functions that a pickle names.
_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda *_: {},
    "_codecs.encode": _encode,
    "numpy.ndarray": _named_alone,
    "numpy.dtype": _dtype,
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _KNOWN[f"{_core}.multiarray._reconstruct"] = lambda *_: np.ndarray((0,), np.uint8)
    _KNOWN[f"{_core}.multiarray.scalar"] = lambda dtype, data: _values(data, dtype)[0]
    _KNOWN[f"{_core}.numeric._frombuffer"] = lambda data, dtype, shape, order: _values(data, dtype).reshape(
        shape, order=order
    )


class _Unpickler(pickle._Unpickler):
    """Python's reader of pickles that is written in Python, with the few operations that such tables need.

    The one in C makes room for as much as a pickle states. This one makes nothing before it has read the bytes for it,
    so that memory and time are bounded by the size of the file.
    """

    # Of the class above, which type checkers do not know.
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, content: bytes) -> None:
        self._content, self._stream = content, io.BytesIO(content)
        super().__init__(self._stream)

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _KNOWN:
            raise _Refusal(repr(f"{module}.{name}"))
        return _KNOWN[f"{module}.{name}"]

    def _load_frame(self) -> None:
        self.read(8)  # the length of what follows: all of the file is in memory

    def _load_floats(self) -> None:
        run = _FLOATS.match(self._content, self._stream.tell())
        if run is None:
            raise EOFError
        self._stream.seek(run.end())
        self.stack.extend(np.frombuffer(run[0] + b"G", _MARKED_FLOAT)["value"].tolist())

    def _load_pairs(self) -> None:
        self._put(self.pop_mark())

    def _load_pair(self) -> None:
        value = self.stack.pop()
        self._put([self.stack.pop(), value])

    def _put(self, items: list[Any]) -> None:
        # Other keys could be made to collide, or be nested deeper than they can be hashed.
        keys = items[::2]
        if not all(type(key) is str or (type(key) is int and abs(key) < _LARGEST_KEY) for key in keys):
            raise _Refusal("a dictionary whose keys are neither text nor whole numbers")
        self.stack[-1].update(zip(keys, items[1::2], strict=True))

    def _load_call(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.stack[-1](*arguments)  # which is one of the functions above, or cannot be called

    def _load_state(self) -> None:
        target, state = self.stack[-2], self.stack.pop()
        if isinstance(target, np.ndarray) and type(state) is tuple:
            _, shape, dtype, fortran, data = state
            _values(data, dtype)
            # Numpy compares the number of bytes with the shape.
            target.__setstate__((1, shape, dtype, bool(fortran), data))  # type: ignore[arg-type]
        elif not isinstance(target, np.dtype) or type(state) is not tuple or state[1] not in ("<", "|"):
            raise _Refusal("a change of what it was given, or numbers with their most significant byte first")

    dispatch: ClassVar[dict[int, Any]] = {
        **{
            code: pickle._Unpickler.dispatch[code]
            for code in (getattr(pickle, name)[0] for name in _OPERATIONS.split())
        },
        pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]],  # written alike
        pickle.FRAME[0]: _load_frame,
        pickle.BINFLOAT[0]: _load_floats,
        pickle.SETITEM[0]: _load_pair,
        pickle.SETITEMS[0]: _load_pairs,
        pickle.REDUCE[0]: _load_call,
        pickle.BUILD[0]: _load_state,
    }


def read_pickle(path: Path) -> Any:
    """Read a pickle made of dictionaries, lists, tuples, text, numbers and numpy arrays of these.

    Nothing that the file names is imported or called: the few names that numpy writes are answered by functions of this
    module, all others are refused. Memory and time are bounded by the size of the file: a table of lists takes about 40
    bytes of memory per number while it is read.

    Parameters
    ----------
    path
        The file, of protocol 2 or later. Ordered dictionaries in it become plain ones.

    Raises
    ------
    CheckpointError
        The file is missing or damaged, or asks for anything else: the message names it.
    """
    check_file(path)
    try:
        return _Unpickler(path.read_bytes()).load()
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
