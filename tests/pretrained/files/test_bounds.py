"""Small files that would take much memory or time: refused, and within bounds that their size sets."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from limits import measured
from safetensors.numpy import save_file

from fimp_sc.pretrained import CheckpointError, read_gene_vectors
from fimp_sc.pretrained.files._files import read_json, read_weights
from fimp_sc.pretrained.files._pickles import read_pickle
from fimp_sc.pretrained.genes._orthologs import read_orthologs
from fimp_sc.pretrained.genes._vectors import GeneVectors
from fimp_sc.pretrained.genes._vocabulary import read_aliases

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures a forked process")
N_FLIPS = int(os.environ.get("FIMP_SC_FLIPS", "60"))
MOST = 150  # MB, of files that have a few MB at most


def test_memory_is_measured() -> None:
    assert measured(lambda: float(np.ones(30 << 20).sum())) > (30 << 20, 200)
    assert isinstance(measured(lambda: np.zeros(1 << 40))[0], MemoryError)


def nested(n: int, inner: bytes = b"]") -> bytes:
    """Lists in lists, each in the next, without recursion."""
    return b"\x80\x04" + b"]" * n + inner + b"a" * n + b"."


def doubled(n: int, start: bytes) -> bytes:
    """A list of twice a list of twice a list ...: its numbers are 2**n."""
    steps = b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(n))
    return b"\x80\x04}\x8c\x01A" + start + b"\x94" + steps + b"s."


PICKLES = {
    "a far place in the memory": b"\x80\x02}r" + struct.pack("<I", 2 * 10**8) + b".",
    "the farthest": b"\x80\x02}r\xff\xff\xff\xff.",
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 10**11) + b"a.",
    "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 10**11) + b"a.",
    "long bytes that may change": b"\x80\x05\x96" + struct.pack("<Q", 10**11) + b"a.",
    "a long frame": b"\x80\x04\x95" + struct.pack("<Q", 10**11) + b"}.",
    "a long number": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",
    "a negative length": b"\x80\x04\x8b" + struct.pack("<i", -1) + b"1.",
    "deep lists": nested(10**6),
    "deep lists as a vector": b"\x80\x04}\x8c\x01A" + nested(10**5)[2:-1] + b"s.",
    "deep tuples as a key": b"\x80\x04})" + b"\x85" * 10**6 + b"K\x01s.",
    "doubled lists": doubled(60, b"]G\x00\x00\x00\x00\x00\x00\x00\x00a"),
    "doubled numbers": doubled(60, b"](K\x01K\x02e"),
    "doubled in a type": b"\x80\x04cnumpy\ndtype\n" + doubled(60, b"]")[5:-2] + b"\x85R.",
    "colliding keys": b"\x80\x04}(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N"
                                               for i in range(20_000)) + b"u.",
    "one vector for many names": b"\x80\x04}(\x8c\x01A](" + b"K\x01" * 50_000 + b"e\x94"
    + b"".join(b"X\x06\x00\x00\x00%06dh\x00" % i for i in range(50_000)) + b"u.",
    "text without width": pickle.dumps({"A": np.zeros(3, "U1")}, 4).replace(b"U1", b"U0"),
    "an array without numbers": pickle.dumps({"A": np.zeros((0, 3))}, 4).replace(
        b"K\x00K\x03\x86", b"K\x00J\xff\xff\xff\x7f\x86"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.pickle"
    path.write_bytes(PICKLES[name])
    found, grown = measured(lambda: read_gene_vectors(path))
    assert isinstance(found, CheckpointError)
    assert grown < MOST
    assert len(str(found)) < 1000


def npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(array: Any, shape: Any = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    if shape is None:
        return file.getvalue()
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": array.dtype.str, "fortran_order": False, "shape": shape})
    return head.getvalue() + array.tobytes()


NAMES, TABLE = npy(np.array(["A", "B"])), npy(np.ones((2, 3), np.float32))
ARCHIVES = {
    "numbers that are not there": npz(names=NAMES, table=npy(np.ones((2, 3)), (2, 10**10))),
    "names that are not there": npz(names=npy(np.array(["A"]), (10**10,)), table=npy(np.ones(1), (10**10, 1))),
    "zeros without end": npz(names=NAMES, table=npy(np.zeros((2, 2 * 10**8), np.float16))),
    "empty vectors": npz(names=npy(np.array([]).astype("U1"), (10**10,)), table=npy(np.ones(0), (10**10, 0))),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.npz").write_bytes(ARCHIVES[name])
    assert (tmp_path / "x.npz").stat().st_size < 10**6
    found, grown = measured(lambda: read_gene_vectors(tmp_path / "x.npz"))
    assert isinstance(found, CheckpointError)
    assert grown < MOST


def test_arrays_that_nobody_asked_for_are_not_read(tmp_path: Path) -> None:
    objects = npy(np.array([None, {}], dtype=object))
    huge = npy(np.zeros(10**9, np.uint8))
    (tmp_path / "x.npz").write_bytes(
        npz(names=NAMES, table=TABLE, extra=huge, more=objects, odd=npy(np.ones(2), (10**12,)))
    )
    found, grown = measured(lambda: read_gene_vectors(tmp_path / "x.npz"))
    assert found.names.tolist() == ["A", "B"]
    assert grown < MOST


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz"])
@pytest.mark.parametrize("header", [True, False])
def test_one_row_of_very_many_columns(tmp_path: Path, ending: str, header: bool) -> None:
    separator = "\t" if ending == "tsv" else ","
    rows = [separator.join(["A", *map(str, np.random.default_rng(0).integers(0, 10**6, 200_000))])]
    rows = ["gene", *rows] if header else rows
    content = "\n".join(rows).encode()
    (tmp_path / f"x.{ending}").write_bytes(gzip.compress(content) if ending == "csv.gz" else content)
    found, grown = measured(lambda: read_gene_vectors(tmp_path / f"x.{ending}"))
    assert isinstance(found, CheckpointError)
    assert "200,000 columns" in str(found)
    assert grown < MOST
    for read in (read_aliases, read_orthologs):
        found, grown = measured(lambda read=read: read(tmp_path / f"x.{ending}"))
        assert isinstance(found, ValueError)
        assert "200,000 columns" in str(found)
        assert grown < MOST


def test_text_that_unpacks_without_end(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "x.csv.gz", "wb") as file:
        for _ in range(100):
            file.write(b"A,1,2\n" * 10**6)
    found, grown = measured(lambda: read_gene_vectors(tmp_path / "x.csv.gz"))
    assert isinstance(found, CheckpointError)
    assert "unpacked" in str(found)
    assert grown < 3 * MOST


SAFETENSORS = {
    "a long header": struct.pack("<Q", 10**11) + b"{}",
    "a deep header": struct.pack("<Q", 10**6) + b"[" * 10**6,
    "numbers that are not there": {"a": {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}},
    "a size that is too large": {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}},
    "deep names": {
        "__metadata__": {"genes": "[" * 10**6},
        "a": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
    },
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors(tmp_path: Path, name: str) -> None:
    content = SAFETENSORS[name]
    if isinstance(content, dict):
        header = json.dumps(content).encode()
        content = struct.pack("<Q", len(header)) + header + bytes(4)
    (tmp_path / "x.safetensors").write_bytes(content)
    found, grown = measured(lambda: read_gene_vectors(tmp_path / "x.safetensors"))
    assert isinstance(found, CheckpointError)
    assert grown < MOST


@pytest.mark.parametrize(
    "content", [b"[" * 10**6, b'{"a":' * 10**6, b'{"a": ' + b"1" * 10**6 + b"}", b"{" + b" " * (200 << 20) + b"}"]
)
def test_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    found, grown = measured(lambda: read_json(tmp_path / "x.json"))
    assert isinstance(found, CheckpointError)
    assert grown < MOST


def test_one_number_stated_as_a_large_tensor(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(10**10)}, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 10**4
    found, grown = measured(lambda: read_weights(tmp_path / "x.pt"))
    assert isinstance(found, CheckpointError)
    assert "contiguous" in str(found)
    assert grown < MOST


def test_weights_that_unpack_without_end(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        archive.writestr("x/data/1", bytes(10**9))
    found, grown = measured(lambda: read_weights(tmp_path / "x.pt"))
    assert isinstance(found, CheckpointError)
    assert grown < MOST


# Files that are in order, with bits that are not ----------------------------------------------------------------------


def good_files(folder: Path) -> dict[str, Callable[[Path], Any]]:
    """Write a file of each kind, and return its reader by its name."""
    rng = np.random.default_rng(0)
    values = {f"G{i}": rng.normal(size=40).astype(np.float32) for i in range(50)}
    lists = {name: value.tolist() for name, value in values.items()}
    scalars = {name: value[0] for name, value in values.items()}
    (folder / "lists.pickle").write_bytes(pickle.dumps(lists, 4))
    (folder / "arrays.pickle").write_bytes(pickle.dumps(values, 4))
    (folder / "arrays5.pickle").write_bytes(pickle.dumps(values, 5))
    (folder / "old.pickle").write_bytes(pickle.dumps(values, 2))
    (folder / "scalars.pickle").write_bytes(pickle.dumps(scalars, 4))
    table = np.stack([*values.values()])
    np.savez_compressed(folder / "table.npz", names=np.array([*values]), table=table)
    save_file({"table": table}, folder / "table.safetensors", metadata={"genes": json.dumps([*values])})
    text = "".join(f"{name},{','.join(map(str, value))}\n" for name, value in lists.items()).encode()
    (folder / "table.csv").write_bytes(text)
    (folder / "table.csv.gz").write_bytes(gzip.compress(text))
    torch.save({"a": torch.from_numpy(table), "b": torch.ones(3)}, folder / "weights.pt")
    torch.save({"a": torch.from_numpy(table)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    readers: dict[str, Callable[[Path], Any]] = {"scalars.pickle": read_pickle}
    readers |= dict.fromkeys(("weights.pt", "old.pt"), read_weights)
    return {path.name: readers.get(path.name, read_gene_vectors) for path in sorted(folder.iterdir())}


FILES = [
    "arrays.pickle", "arrays5.pickle", "lists.pickle", "old.pickle", "old.pt", "scalars.pickle", "table.csv",
    "table.csv.gz", "table.npz", "table.safetensors", "weights.pt",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")
def test_changed_bits_are_an_error_or_harmless(tmp_path: Path, name: str) -> None:
    readers = good_files(tmp_path)
    assert [*readers] == FILES
    read, content = readers[name], (tmp_path / name).read_bytes()
    path = tmp_path / f"changed-{name}"
    rng = np.random.default_rng(FILES.index(name))

    def read_all() -> dict[str, int]:
        seen = {"read": 0, "refused": 0, "told at length": 0}
        # Where a file says what follows: its first bytes, and any others.
        places = [*range(min(len(content), N_FLIPS)), *rng.integers(0, len(content), N_FLIPS)]
        for place in places:
            changed = bytearray(content)
            changed[place] ^= 1 << int(rng.integers(8)) if rng.random() < 0.5 else int(rng.integers(1, 256))
            path.write_bytes(changed[: place + 1] if rng.random() < 0.05 else changed)
            try:
                read(path)
                seen["read"] += 1
            except CheckpointError as error:
                seen["refused" if len(str(error)) < 2000 else "told at length"] += 1
        return seen

    found, grown = measured(read_all)
    assert isinstance(found, dict), found
    assert sum(found.values()) == N_FLIPS + min(len(content), N_FLIPS)
    assert found["refused"] > 0
    assert found["told at length"] == 0
    assert grown < MOST


def test_real_files_are_read(shared_data: Path) -> None:
    for path in sorted((shared_data / "geneformer_dictionaries").glob("*.pkl")):
        found, wanted = read_pickle(path), pickle.loads(path.read_bytes())
        assert found == wanted
        assert [*map(type, found.values())] == [*map(type, wanted.values())]
    for name in ("gene_text_minilm_384.npz", "spatialformer_gene_embeddings_512.npz"):
        archive = np.load(shared_data / name)
        vectors: GeneVectors = read_gene_vectors(shared_data / name)
        table = next(archive[key] for key in archive.files if archive[key].ndim == 2)
        assert vectors.values.shape[1] == table.shape[1]
    assert read_weights(shared_data / "scgpt_tiny_checkpoint" / "best_model.pt").keys()
    assert read_weights(shared_data / "brainlm_tiny_checkpoint" / "pytorch_model.bin").keys()
    for path in sorted(shared_data.glob("*.json")):
        assert read_json(path) == json.loads(path.read_text())
