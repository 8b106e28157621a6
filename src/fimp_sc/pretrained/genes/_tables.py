"""Files with gene vectors, each format opened in one place; what they hold is checked by the caller."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from fimp_sc.data.storage._elements import shorten
from fimp_sc.pretrained._registry import foundation_names, foundation_reader
from fimp_sc.pretrained.files._files import (
    CheckpointError,
    check_file,
    read_safetensors,
)
from fimp_sc.pretrained.files._pickles import read_pickle
from fimp_sc.pretrained.files._text_tables import check_unpacked, open_text_table

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read_table(path: Path) -> Any:
    """Return what a file, or the folder of a foundation model, says about genes.

    Returns
    -------
    Names and vectors, a data frame with the names as index, or what a pickle holds.

    Raises
    ------
    CheckpointError
        There is no such file, or it cannot be read as any of the formats.
    """
    if path.is_dir():
        return _read_folder(path)
    check_file(path)
    kind = _kind(path)
    if kind == "pickle":
        return read_pickle(path)
    if kind == "npz":
        return _read_npz(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    return _read_text(path, "," if kind == "csv" else "\t")


def _read_folder(folder: Path) -> tuple[list[str], NDArray[Any]]:
    found = [foundation_reader(name).gene_vectors(folder) for name in foundation_names()]
    table = next((table for table in found if table is not None), None)
    if table is None:
        raise CheckpointError(
            f"{str(folder)!r} is a folder, and not that of a foundation model whose gene vectors are known here: name "
            "a file."
        )
    return table


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else path.suffix.lower()
    kinds = {".pickle": "pickle", ".pkl": "pickle", ".npz": "npz", ".safetensors": "safetensors"}
    if last in (".csv", ".tsv"):
        return last[1:]
    if path.suffix.lower() in kinds:
        return kinds[path.suffix.lower()]
    with path.open("rb") as file:
        head = file.read(16)
    # Names end in a bare dot, or have no ending at all.
    if path.suffix.lower() not in (".pt", ".pth", ".bin", ".ckpt"):
        if head[:1] == b"\x80":
            return "pickle"
        if head[:4] == b"PK\x03\x04":
            return "npz"
        if head[8:9] == b"{":
            return "safetensors"
    raise CheckpointError(
        f"{str(path)!r} is no known table of gene vectors: expected .safetensors, .npz, .csv, .tsv, a pickle, or the "
        "folder of a foundation model."
    )


def _read_npz(path: Path) -> tuple[list[str], NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            found = [(info, *_npy_header(archive, info)) for info in members]
            names = [entry for entry in found if len(entry[1]) == 1 and entry[2].kind in "US"]
            tables = [entry for entry in found if len(entry[1]) == 2 and entry[2].kind == "f"]
            pairs = [(n, t) for n in names for t in tables if n[1][0] == t[1][0]]
            if len(pairs) == 1:
                chosen = [entry[0] for entry in pairs[0]]
                check_unpacked(path, sum(info.file_size for info in chosen))
                name, table = (_read_npy(archive, *entry) for entry in pairs[0])
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read as .npz ({type(error).__name__}): download it again."
        ) from None
    if len(pairs) != 1:
        objects = [info.filename for info, _, dtype in found if dtype.hasobject]
        if objects and not names:
            raise CheckpointError(
                f"{objects[0]!r} in {str(path)!r} holds Python objects, which can run code: save names as text with "
                "names.astype(str)."
            )
        shown = [f"{info.filename.removesuffix('.npy')!r} {dtype} {shape}" for info, shape, dtype in found]
        raise CheckpointError(
            f"{str(path)!r} must hold one array of names (n,) and one of real numbers (n, width); found "
            f"{shorten(shown, 10) or 'nothing'}."
        )
    try:
        return _text(name), table
    except UnicodeDecodeError:
        raise CheckpointError(f"The names in {str(path)!r} are not UTF-8 text.") from None


def _npy_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of an array whose values are not read."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, dtype


def _read_npy(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Return an array after a look at whether its bytes are there: numpy makes room for it first."""
    if math.prod(shape) * dtype.itemsize > info.file_size:
        raise EOFError
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _text(names: NDArray[Any]) -> list[str]:
    return [name.decode() for name in names.tolist()] if names.dtype.kind == "S" else names.tolist()


def _read_safetensors(path: Path) -> tuple[list[Any], NDArray[np.float32]]:
    tensors, metadata = read_safetensors(path)
    tables = [key for key, tensor in tensors.items() if tensor.ndim == 2 and tensor.is_floating_point()]
    if len(tables) != 1:
        found = shorten([f"{key!r} {tuple(tensor.shape)}" for key, tensor in tensors.items()], 10) or "nothing"
        raise CheckpointError(f"{str(path)!r} must hold one tensor of real numbers (n, width); found {found}.")
    return _safetensors_names(path, metadata), tensors[tables[0]].to(torch.float32).numpy()


def _safetensors_names(path: Path, metadata: dict[str, str]) -> list[Any]:
    if "genes" in metadata:
        try:
            names = json.loads(metadata["genes"])
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, list):
            raise CheckpointError(f'The metadata "genes" of {str(path)!r} must be a JSON list of gene names.')
        return names
    beside = [path.with_suffix(".genes.txt"), path.with_suffix(".txt")]
    for file in beside:
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError:
                raise CheckpointError(f"{str(file)!r} is not UTF-8 text.") from None
    raise CheckpointError(
        f"{str(path)!r} does not name its genes: put one name per line into {str(beside[0])!r}, or a JSON list into "
        'its metadata under "genes".'
    )


def _read_text(path: Path, separator: str) -> pd.DataFrame:
    content = open_text_table(path, separator)
    options: dict[str, Any] = {"sep": separator, "header": None, "encoding": "utf-8-sig", "low_memory": False}

    def read(**how: Any) -> pd.DataFrame:
        content.seek(0)
        return pd.read_csv(content, **how, **options)

    try:
        # Names as they are: 'NA' and 'nan' would otherwise be missing.
        as_text: dict[str, Any] = {"dtype": str, "keep_default_na": False}
        head = read(nrows=1, **as_text).iloc[0].tolist()
        options["skiprows"] = int(has_header := _is_header(head[1:]))
        names = read(usecols=[0], **as_text)[0]
        table = read().drop(columns=0)
    except pd.errors.EmptyDataError:
        raise CheckpointError(f"{str(path)!r} has no genes.") from None
    except Exception as error:  # of pandas, or of the encoding
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"{str(path)!r} cannot be read as a table ({type(error).__name__}: {reason}).") from None
    # Without a name for the column of genes, as R writes tables, the header is one shorter.
    titles = head[len(head) - table.shape[1] :] if has_header and len(head) >= table.shape[1] else None
    return table.set_axis(names, axis=0).set_axis(titles or range(2, table.shape[1] + 2), axis=1)


def _is_header(cells: list[str]) -> bool:
    """Tell titles, which may be 0, 1, 2, ..., from the numbers of a first gene."""
    try:
        numbers = [float("nan" if cell.strip().upper() in ("", "NA") else cell) for cell in cells]
    except ValueError:
        return True
    return all(n == numbers[0] + i for i, n in enumerate(numbers)) and numbers[:1] in ([0.0], [1.0])
