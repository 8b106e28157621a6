"""Files with gene vectors, each format opened in one place; what they hold is checked by the caller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from fimp_sc.data._access import shorten
from fimp_sc.pretrained._files import (
    CheckpointError,
    check_file,
    find_weights,
    read_json,
    read_safetensors,
    read_weights,
)
from fimp_sc.pretrained._pickles import read_pickle

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SCGPT_TABLES = ("encoder.embedding.weight", "gene_encoder.embedding.weight", "embedding.weight")
_PADDING = 64  # tables may be filled up to a multiple of this


def read_table(path: Path) -> Any:
    """Return what a file, or the folder of an scGPT checkpoint, says about genes.

    Returns
    -------
    Names and vectors, a data frame with the names as index, or what a pickle holds.

    Raises
    ------
    CheckpointError
        There is no such file, or it cannot be read as any of the formats.
    """
    if path.is_dir():
        return _read_scgpt(path)
    check_file(path)
    kind = _kind(path)
    if kind == "pickle":
        return read_pickle(path)
    if kind == "npz":
        return _read_npz(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    return _read_text(path, "," if kind == "csv" else "\t")


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
        "folder of an scGPT checkpoint."
    )


def _read_npz(path: Path) -> tuple[list[str], NDArray[Any]]:
    try:
        # Opened here: numpy leaves a file open that it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except Exception as error:
        advice = "download it again"
        if "allow_pickle" in str(error):
            advice = "names stored as Python objects can run code, so save them as text with names.astype(str)"
        raise CheckpointError(f"{str(path)!r} cannot be read as .npz ({type(error).__name__}): {advice}.") from None
    names = [key for key, array in arrays.items() if array.ndim == 1 and array.dtype.kind in "US"]
    tables = [key for key, array in arrays.items() if array.ndim == 2 and array.dtype.kind == "f"]
    pairs = [(n, t) for n in names for t in tables if len(arrays[n]) == len(arrays[t])]
    if len(pairs) != 1:
        found = shorten([f"{key!r} {array.dtype} {array.shape}" for key, array in arrays.items()], 10) or "nothing"
        raise CheckpointError(
            f"{str(path)!r} must hold one array of names (n,) and one of real numbers (n, width); found {found}."
        )
    name, table = pairs[0]
    try:
        return _text(arrays[name]), arrays[table]
    except UnicodeDecodeError:
        raise CheckpointError(f"{name!r} in {str(path)!r} is not UTF-8 text.") from None


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
    options: dict[str, Any] = {"sep": separator, "header": None, "encoding": "utf-8-sig", "low_memory": False}
    try:
        # Names as they are: 'NA' and 'nan' would otherwise be missing.
        as_text: dict[str, Any] = {"dtype": str, "keep_default_na": False}
        head = pd.read_csv(path, nrows=1, **as_text, **options).iloc[0].tolist()
        options["skiprows"] = int(has_header := _is_header(head[1:]))
        names = pd.read_csv(path, usecols=[0], **as_text, **options)[0]
        table = pd.read_csv(path, **options).drop(columns=0)
    except pd.errors.EmptyDataError:
        raise CheckpointError(f"{str(path)!r} has no genes.") from None
    except Exception as error:  # of pandas, of the decompression, or of the encoding
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


def _read_scgpt(folder: Path) -> tuple[list[str], NDArray[np.float32]]:
    path = folder / "vocab.json"
    vocabulary = read_json(path)
    weights = read_weights(find_weights(folder, ["best_model.pt"]))
    key = next((key for key in _SCGPT_TABLES if key in weights), _SCGPT_TABLES[0])
    table = weights.take(key, (None, None)).numpy()
    ids = list(vocabulary.values())
    if not ids or any(not isinstance(i, int) or isinstance(i, bool) for i in ids) or len(set(ids)) < len(ids):
        raise CheckpointError(f"{str(path)!r} must give every token a whole number of its own.")
    if min(ids) < 0 or max(ids) >= len(table) or len(table) - len(ids) >= _PADDING:
        raise CheckpointError(
            f"{str(path)!r} has {len(ids):,} tokens with ids from {min(ids):,} to {max(ids):,}, but {key!r} in "
            f"{str(weights.path)!r} has {len(table):,} rows: they belong to different checkpoints."
        )
    genes = [token for token in vocabulary if not (token.startswith("<") and token.endswith(">"))]
    return genes, table[[vocabulary[gene] for gene in genes]]
