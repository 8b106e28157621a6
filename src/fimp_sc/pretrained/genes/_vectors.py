"""Vectors of genes, one row per gene, from the formats in which they are shared."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from fimp_sc._files import write_files
from fimp_sc.data.storage._elements import shorten
from fimp_sc.pretrained.files._files import CheckpointError
from fimp_sc.pretrained.genes._tables import read_table

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneVectors:
    """One vector per gene.

    Attributes
    ----------
    names
        Name of each gene, unique, ``(n,)``.
    values
        Their vectors, float32, ``(n, width)``; all finite, and none all zero.
    species, orthologs
        See :func:`read_gene_vectors`.
    """

    names: NDArray[np.str_]
    values: NDArray[np.float32]
    species: Literal["human", "mouse"] = "human"
    orthologs: Any = field(default=None, repr=False, compare=False)

    def rows(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return vectors by their place here.

        Parameters
        ----------
        rows
            ``(n_genes,)`` int64, -1 for a gene that has no vector.

        Returns
        -------
        ``(n_genes, width)`` float32, zero where there is none, and ``(n_genes,)`` bool, where there is one.
        """
        found = rows >= 0
        values = np.zeros((len(rows), self.values.shape[1]), dtype=np.float32)
        values[found] = self.values[rows[found]]
        return values, found


def read_gene_vectors(
    source: str | Path | Mapping[str, ArrayLike] | pd.DataFrame,
    *,
    species: Literal["human", "mouse"] = "human",
    orthologs: Any = None,
) -> GeneVectors:
    """Read a table of gene vectors, without running code that a file may carry.

    Rows that are all zero stand for missing genes and are left out. Of names that occur more than once the first row is
    used. Both are counted in the log.

    Parameters
    ----------
    source
        One of

        - a pickle (``.pickle``, ``.pkl``, or a name without such an ending) of a dictionary from gene name to numbers,
          as GenePT is shared. Reading its lists takes much memory: convert them once with :func:`write_gene_vectors`;
        - ``.npz`` with one array of names and one of real numbers ``(n, width)``;
        - ``.csv`` or ``.tsv`` (also ``.gz``): names in the first column, numbers in the others;
        - ``.safetensors`` with one tensor ``(n, width)``, and names in its metadata as a JSON list under ``"genes"``,
          or one per line in a file beside it that ends in ``.genes.txt`` or ``.txt`` instead;
        - the folder of a checkpoint of scGPT (``vocab.json`` and ``best_model.pt``): its table of genes;
        - a data frame with the names as index, or a dictionary from name to numbers.
    species, orthologs
        Of the genes of the data that the vectors are for, ``"human"`` or ``"mouse"``; mouse genes are matched with
        human names by a table of orthologs, see :func:`fimp_sc.pp.match_genes`.

    Raises
    ------
    CheckpointError
        There is no such file; it is of another kind, damaged or carries code; names are not text; vectors differ in
        length, are not numbers, or are NaN or infinite; no gene is left. The message names the file and the gene.
    TypeError
        ``source`` is none of these.
    """
    return replace(_read(source), species=species, orthologs=orthologs)


def write_gene_vectors(vectors: GeneVectors, path: str | Path) -> None:
    """Write gene vectors as a safetensors file with the names in its metadata; fast to read, and free of code.

    Parameters
    ----------
    vectors
        What to write.
    path
        The file, which ends in ``.safetensors``; one that exists is replaced when the new one is complete.

    Raises
    ------
    ValueError
        The name ends otherwise.
    """
    from safetensors.numpy import save

    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"Gene vectors are written as .safetensors, found the name {str(path)!r}.")
    values = np.ascontiguousarray(vectors.values)
    content = save({"gene_vectors": values}, metadata={"genes": json.dumps(vectors.names.tolist())})
    write_files(path.parent, {path.name: content})


def _read(source: Any) -> GeneVectors:
    if isinstance(source, pd.DataFrame):
        return _checked(source.index, _numbers_of_frame(source), "the data frame")
    if isinstance(source, Mapping):
        return _checked(source.keys(), _stack(source, "the dictionary"), "the dictionary")
    if not isinstance(source, str | Path):
        raise TypeError(f"Expected a path, a dictionary or a data frame, found {type(source).__name__}.")
    path = Path(source).expanduser()
    where = repr(str(path))
    content = read_table(path)
    if isinstance(content, pd.DataFrame):
        return _checked(content.index, _numbers_of_frame(content, where), where)
    if isinstance(content, tuple) and len(content) == 2 and isinstance(content[1], np.ndarray):
        names, values = content
        return _checked(names, values, where)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where} holds {type(content).__name__}, expected a dictionary from gene to numbers.")
    return _checked(content.keys(), _stack(content, where, path.stat().st_size), where)


def _checked(names: Iterable[Any], values: NDArray[Any], where: str) -> GeneVectors:
    """Return the vectors as float32, without missing and repeated genes, if all is well."""
    listed = list(names) if isinstance(names, Iterable) else [names]
    wrong = next((i for i, name in enumerate(listed) if not (isinstance(name, str) and name.strip())), None)
    if wrong is not None:
        raise CheckpointError(
            f"{where}: the name of gene {wrong + 1:,} is {listed[wrong]!r}, expected text: gene names belong in the "
            "first column of a file, in the index of a data frame, or are the keys of a dictionary."
        )
    if values.ndim != 2 or 0 in values.shape or len(listed) != len(values):
        raise CheckpointError(
            f"{where} has {len(listed):,} gene names and vectors of shape {values.shape}, expected (genes, width)."
        )
    if values.dtype.kind not in "fiu":
        raise CheckpointError(f"{where} holds {values.dtype}, expected numbers.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        values = values.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        raise CheckpointError(
            f"{where} is NaN or infinite for {bad.size:,} of {len(values):,} genes, first {listed[bad[0]]!r}: remove "
            "them or give them zeros, which mean missing."
        )
    keep = values.any(axis=1)
    if not keep.any():
        raise CheckpointError(f"{where} has no gene with a vector: all {len(values):,} rows are zero.")
    index = pd.Index([name.strip() for name in listed], dtype=object)
    rows = np.flatnonzero(keep)
    repeated = index[rows].duplicated()
    if len(rows) < len(values):
        logger.info("%s: %d of %d genes have no vector (all zero)", where, len(values) - len(rows), len(values))
    if repeated.any():
        examples = shorten([repr(name) for name in index[rows[repeated]].unique()])
        logger.warning("%s: %d rows repeat an earlier name and were left out: %s", where, repeated.sum(), examples)
        rows = rows[~repeated]
    # A copy: what was read may be mapped to the file, or belong to the caller.
    return GeneVectors(index[rows].to_numpy().astype(np.str_), values[rows])


def _stack(vectors: Mapping[Any, Any], where: str, most: int | None = None) -> NDArray[np.float32]:
    """Return the vectors of a dictionary, row by row so that they are not held twice, and at most so many numbers."""
    values = np.empty((0, 0), dtype=np.float32)
    for row, (name, vector) in enumerate(vectors.items()):
        numbers = np.empty(0, dtype=object)
        # Lists in lists are not looked into: a small file can hold one whose array would fill any memory.
        if not isinstance(vector, list | tuple) or all(
            issubclass(t, int | float | np.number) for t in set(map(type, vector))
        ):
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                numbers = np.asarray(vector)
        if numbers.ndim != 1 or numbers.dtype.kind not in "fiu":
            raise CheckpointError(f"{where}: the vector of gene {name!r} is not a list of numbers.")
        if row == 0:
            if most is not None and len(vectors) * len(numbers) > most:
                raise CheckpointError(
                    f"{where} states {len(vectors):,} vectors of {len(numbers):,} numbers in {most:,} bytes: it is "
                    "damaged or made to do harm."
                )
            values = np.empty((len(vectors), len(numbers)), dtype=np.float32)
            first = name
        if len(numbers) != values.shape[1]:
            raise CheckpointError(
                f"{where}: the vector of gene {name!r} has {len(numbers):,} numbers, that of {first!r} "
                f"{values.shape[1]:,}: all must have the same length."
            )
        with np.errstate(over="ignore"):
            values[row] = numbers
    return values


def _numbers_of_frame(frame: pd.DataFrame, where: str = "the data frame") -> NDArray[np.float32]:
    for i, dtype in enumerate(frame.dtypes):
        if dtype.kind in "fiu":
            continue
        column = frame.iloc[:, i]
        text = pd.to_numeric(column, errors="coerce").isna().to_numpy()
        gene = f" for gene {frame.index[text.argmax()]!r}: {column.iloc[text.argmax()]!r}" if text.any() else ""
        raise CheckpointError(f"{where}: column {frame.columns[i]!r} does not hold numbers{gene}.")
    with np.errstate(over="ignore"):
        return frame.to_numpy(dtype=np.float32, na_value=np.nan)
