"""The restricted unpickler against what numpy and Python write, and against files that try to do more."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fimp_sc.pretrained.files._files import CheckpointError
from fimp_sc.pretrained.files._pickles import read_pickle

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_text_and_numbers_come_back(tmp_path: Path, protocol: int) -> None:
    content = {"A": [1.5, -2, True, None], "B": (1, "ü", b"\x00\xff"), "C": {"D": {}}, 3: 2**70, "E": [0.5] * 3000}
    assert read_pickle(write(tmp_path / "x.pickle", content, protocol)) == content


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["<f4", "f8", "f2", "i8", "u1", "bool", "U7", "S7"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_back(tmp_path: Path, protocol: int, dtype: str, order: Any) -> None:
    array = np.array(np.arange(6).reshape(2, 3).astype(dtype), order=order)
    content = OrderedDict(x=array, scalar=array[1, 2], again=array)
    path = write(tmp_path / "x.pickle", content, protocol)
    found, expected = read_pickle(path), pickle.loads(path.read_bytes())
    np.testing.assert_array_equal(found["x"], array)
    assert found["x"].dtype == expected["x"].dtype
    assert found["scalar"] == array[1, 2]
    assert found["again"] is found["x"]


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_arrays_of_old_and_new_numpy_come_back(tmp_path: Path, core: str) -> None:
    here = np.ndarray.__reduce__(np.zeros(1))[0].__module__.rpartition(".")[0]
    raw = pickle.dumps([np.arange(3.0), np.float32(7)], 2)
    assert here.encode() in raw
    (tmp_path / "x.pickle").write_bytes(raw.replace(f"c{here}.".encode(), f"c{core}.".encode()))
    array, scalar = read_pickle(tmp_path / "x.pickle")
    np.testing.assert_array_equal(array, [0.0, 1.0, 2.0])
    assert scalar == 7


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_code_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "created"
    path = write(tmp_path / "x.pickle", {"A": [1.0], "B": Calls(Path.touch, target)}, protocol)
    with pytest.raises(CheckpointError, match=r"asks for '.*'.*nothing was executed"):
        read_pickle(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())  # which would have done it
    assert target.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (Calls(eval, "1"), r"builtins\.eval"),
        (Calls(io.BytesIO), r"io\.BytesIO"),
        (Calls(np.fromfile, "x"), r"numpy.*fromfile"),
        ({1, 2}, r"builtins\.set"),
        (np.array([1, "a"], dtype=object), "dtype 'O8'"),
        (np.zeros(2, dtype=[("a", "f4"), ("b", "O")]), "dtype 'V12'"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), "dtype 'M8'"),
        (np.zeros(2, dtype=">f8"), "numbers with their most significant byte first"),
    ],
)
def test_everything_else_is_refused_by_name(tmp_path: Path, content: Any, named: str) -> None:
    path = write(tmp_path / "x.pickle", content, 3)
    with pytest.raises(CheckpointError, match=named):
        read_pickle(path)


@pytest.mark.parametrize(
    "raw",
    [
        # `encode` with a codec that is a module, and `ndarray` called with a size.
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.",
        b"cnumpy\nndarray\n(J\x10\x00\x00\x00tR.",
        # States given to what a pickle may name: a plain one, and one that sets attributes.
        b"cnumpy\ndtype\n}X\x04\x00\x00\x00specK\x01sb.",
        b"cnumpy\ndtype\nN}X\x05\x00\x00\x00_makeK\x01s\x86b.",
    ],
)
def test_what_is_allowed_cannot_be_bent(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.pickle").write_bytes(raw)
    with pytest.raises(CheckpointError, match="nothing was executed"):
        read_pickle(tmp_path / "x.pickle")
    array = np.arange(3.0)
    np.testing.assert_array_equal(read_pickle(write(tmp_path / "y.pickle", array)), array)


def test_an_array_with_fewer_bytes_than_elements_is_refused(tmp_path: Path) -> None:
    raw = pickle.dumps(np.zeros(5), 4)
    assert raw.count(b"K\x05\x85") == 1
    (tmp_path / "x.pickle").write_bytes(raw.replace(b"K\x05\x85", b"K\xff\x85"))
    with pytest.raises(CheckpointError, match="damaged"):
        read_pickle(tmp_path / "x.pickle")


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pickle", {"A": [1.0] * 100})
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"x\.pickle.*cut short"):
        read_pickle(path)
