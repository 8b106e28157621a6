"""One table, written in every format by others, read back the same."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from fimp_sc.pretrained import CheckpointError, GeneVectors, read_gene_vectors, write_gene_vectors

NAMES = ["TP53", "NA", "C1orf112", "nan"]
VALUES = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
FRAME = pd.DataFrame(VALUES, index=NAMES, columns=["a", "b", "c"])


def check(vectors: GeneVectors, rtol: float = 1e-6) -> None:
    assert vectors.names.tolist() == NAMES
    assert vectors.values.dtype == np.float32
    np.testing.assert_allclose(vectors.values, VALUES, rtol=rtol)


@pytest.mark.parametrize("name", ["GenePT.pickle", "GenePT.pkl", "GenePT_large.", "GenePT_v2.5_large"])
@pytest.mark.parametrize("as_list", [True, False])
def test_pickles(tmp_path: Path, name: str, as_list: bool) -> None:
    content = {gene: row.tolist() if as_list else row for gene, row in zip(NAMES, VALUES, strict=True)}
    (tmp_path / name).write_bytes(pickle.dumps(content))
    check(read_gene_vectors(tmp_path / name))
    check(read_gene_vectors(content))


@pytest.mark.parametrize("names", [np.array(NAMES), np.array(NAMES, dtype="S")])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_npz(tmp_path: Path, names: Any, dtype: Any) -> None:
    np.savez(tmp_path / "x.npz", symbols=names, vectors=VALUES.astype(dtype), median=np.zeros(4))
    check(read_gene_vectors(str(tmp_path / "x.npz")), rtol=2e-3 if dtype == np.float16 else 1e-7)


@pytest.mark.parametrize("columns", [["a", "b", "c"], [0, 1, 2], [1, 2, 3], None, "R"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz", "TSV.gz"])
def test_text(tmp_path: Path, ending: str, columns: Any) -> None:
    separator = "," if "csv" in ending else "\t"
    if columns == "R":  # its header does not count the names
        text = separator.join(["V1", "V2", "V3"]) + "\n" + FRAME.to_csv(sep=separator, header=False)
    else:
        text = FRAME.set_axis(columns or FRAME.columns, axis=1).to_csv(sep=separator, header=columns is not None)
    raw = text.encode()
    (tmp_path / f"x.{ending}").write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    check(read_gene_vectors(tmp_path / f"x.{ending}"))


@pytest.mark.parametrize("beside", [None, ".genes.txt", ".txt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors(tmp_path: Path, beside: str | None, dtype: torch.dtype) -> None:
    metadata = {"genes": json.dumps(NAMES)} if beside is None else None
    tensors = {"table": torch.from_numpy(VALUES).to(dtype), "counts": torch.zeros(4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    if beside is not None:
        (tmp_path / f"x{beside}").write_text("\n".join(NAMES) + "\n")
    check(read_gene_vectors(tmp_path / "x.safetensors"), rtol=1e-2 if dtype == torch.bfloat16 else 1e-7)


def test_data_frame_is_copied() -> None:
    frame = FRAME.copy()
    vectors = read_gene_vectors(frame)
    check(vectors)
    vectors.values[:] = 0
    pd.testing.assert_frame_equal(frame, FRAME)


def test_written_vectors_are_read_back_and_replace_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    vectors = read_gene_vectors(FRAME)
    write_gene_vectors(vectors, path)
    again = read_gene_vectors(path)
    assert again.names.tolist() == NAMES
    np.testing.assert_array_equal(again.values, VALUES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]
    with pytest.raises(ValueError, match="safetensors"):
        write_gene_vectors(vectors, tmp_path / "x.npz")


def scgpt(folder: Path, key: str = "encoder.embedding.weight", ids: Any = (0, 2, 1, 4, 3)) -> Path:
    folder.mkdir(exist_ok=True)
    vocabulary = dict(zip(["TP53", "<pad>", "ACTB", "<cls>", "MT-CO1"], ids, strict=True))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    torch.save({f"module.{key}": torch.arange(1.0, 11.0).reshape(5, 2)}, folder / "best_model.pt")
    return folder


@pytest.mark.parametrize("key", ["encoder.embedding.weight", "gene_encoder.embedding.weight", "embedding.weight"])
def test_scgpt_folder(tmp_path: Path, key: str) -> None:
    vectors = read_gene_vectors(scgpt(tmp_path / "scgpt", key))
    assert vectors.names.tolist() == ["TP53", "ACTB", "MT-CO1"]
    np.testing.assert_array_equal(vectors.values, [[1, 2], [3, 4], [7, 8]])


@pytest.mark.parametrize(
    "ids", [(0, 2, 1, 5, 3), (0, 2, 1, -1, 3), (0, 2, 1, 1, 3), (0, 2, 1, "4", 3), (0, 2, 1, True, 3)]
)
def test_scgpt_vocabulary_that_does_not_fit(tmp_path: Path, ids: Any) -> None:
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        read_gene_vectors(scgpt(tmp_path / "scgpt", ids=ids))


def test_scgpt_table_of_another_model(tmp_path: Path) -> None:
    folder = scgpt(tmp_path / "scgpt")
    torch.save({"encoder.embedding.weight": torch.ones(80, 2)}, folder / "best_model.pt")
    with pytest.raises(CheckpointError, match="different checkpoints"):
        read_gene_vectors(folder)


def test_rows_of_genes() -> None:
    vectors = read_gene_vectors({"TP53": [1.0, 5.0], "ACTB": [3.0, 6.0]})
    values, found = vectors.rows(np.array([1, -1, 0, 1]))
    assert found.tolist() == [True, False, True, True]
    assert values.dtype == np.float32
    assert values.tolist() == [[3.0, 6.0], [0.0, 0.0], [1.0, 5.0], [3.0, 6.0]]
    values, found = vectors.rows(np.array([], dtype=np.int64))
    assert values.shape == (0, 2)
    assert found.shape == (0,)


def test_missing_and_repeated_genes_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    frame = pd.DataFrame([[0.0], [1.0], [2.0], [3.0], [0.0]], index=["A", "B", "A", "B", "C"])
    with caplog.at_level("INFO", logger="fimp_sc"):
        vectors = read_gene_vectors(frame)
    assert vectors.names.tolist() == ["B", "A"]
    assert vectors.values[:, 0].tolist() == [1.0, 2.0]
    assert "2 of 5 genes have no vector" in caplog.text
    assert "1 rows repeat an earlier name and were left out: 'B'" in caplog.text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"A": [1.0, 2.0], "B": [1.0]}, "'B' has 1 numbers, that of 'A' 2"),
        ({"A": [1.0], "B": [float("nan")]}, "1 of 2 genes, first 'B'"),
        ({"A": [1.0], "B": [1e300]}, "infinite.*'B'"),
        ({"A": [1.0], "B": ["1.0"]}, "'B' is not a list of numbers"),
        ({"A": [1.0], "B": [[1.0], 2.0]}, "'B' is not a list of numbers"),
        ({"A": [1.0], "B": None}, "'B' is not a list of numbers"),
        ({"A": [1.0], 7: [1.0]}, "gene 2 is 7"),
        ({"A": [1.0], " ": [1.0]}, "gene 2 is ' '"),
        ({"A": [0.0], "B": [0.0]}, "all 2 rows are zero"),
        ({"A": []}, r"shape \(1, 0\)"),
        ({}, "0 gene names"),
        (pd.DataFrame({"gene": ["A"], "x": [1.0]}), "column 'gene' does not hold numbers for gene 0: 'A'"),
        (pd.DataFrame({"x": [1.0]}), "gene 1 is 0, expected text"),
        (FRAME.assign(b=[1, 2, "x", 4]), "column 'b' does not hold numbers for gene 'C1orf112': 'x'"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(source: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_gene_vectors(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"gene,a,b\nA,1,2\nB,3\n", "infinite.*'B'"),
        ("x.csv", b"A,1,\nB,3,4\n", "infinite.*'A'"),
        ("x.csv", b"gene,a,b\nA,1,2\nB,3,4,5\n", "cannot be read as a table"),
        ("x.csv", b"gene,a,b\nA,1,2\nB,three,4\n", "column 'a' .* gene 'B': 'three'"),
        ("x.csv", b"gene,a,b\n", "no genes"),
        ("x.csv", b"gene,a\n\xff\xfe,1\n", "cannot be read as a table"),
        ("x.csv.gz", b"gene,a\nA,1\n", "cannot be read as a table"),
        ("x.csv", b"", "is empty"),
        ("x.npz", b"PK\x03\x04 and so on", "cannot be read as .npz"),
        ("x.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{", "cannot be read as weights"),
        ("x.pickle", pickle.dumps([1.0]), "holds list"),
        ("x.pickle", pickle.dumps((["A", "B"],)), "holds tuple, expected a dictionary"),
        ("x.pickle", pickle.dumps((["A"], 1.0, 2.0)), "holds tuple, expected a dictionary"),
        ("x.pickle", pickle.dumps(FRAME), "asks for 'pandas"),
        ("x.txt", b"A 1 2", "no known table"),
        ("x.pt", b"PK\x03\x04", "folder of a foundation model"),
        ("x.csv", b"<!DOCTYPE html><html>", "a web page"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_gene_vectors(tmp_path / name)
    assert name in str(raised.value)


def test_names_as_objects_are_refused_in_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", names=np.array(NAMES, dtype=object), values=VALUES)
    with pytest.raises(CheckpointError, match=r"names\.astype\(str\)"):
        read_gene_vectors(tmp_path / "x.npz")


def test_ambiguous_archives_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", names=np.array(NAMES), a=VALUES, b=VALUES)
    with pytest.raises(CheckpointError, match=r"found 'names' .*'a' .*'b'"):
        read_gene_vectors(tmp_path / "x.npz")
    save_file({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="one tensor"):
        read_gene_vectors(tmp_path / "x.safetensors")
    save_file({"a": torch.ones(2, 2)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"y\.genes\.txt"):
        read_gene_vectors(tmp_path / "y.safetensors")
    save_file({"a": torch.ones(2, 2)}, tmp_path / "z.safetensors", {"genes": json.dumps(["A"])})
    with pytest.raises(CheckpointError, match="1 gene names and vectors of shape"):
        read_gene_vectors(tmp_path / "z.safetensors")


def test_absent_files_and_other_types() -> None:
    with pytest.raises(CheckpointError, match="There is no file 'nowhere"):
        read_gene_vectors("nowhere/x.csv")
    with pytest.raises(TypeError, match="found int"):
        read_gene_vectors(1)  # type: ignore[arg-type]


def test_real_tables(shared_data: Path) -> None:
    path = shared_data / "spatialformer_gene_embeddings_512.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with np.load(path) as archive:
        names, expected = archive["gene_symbols"], archive["embeddings"].astype(np.float32)
    vectors, there = read_gene_vectors(path), expected.any(axis=1)
    np.testing.assert_array_equal(vectors.names, names[there])
    np.testing.assert_array_equal(vectors.values, expected[there])
