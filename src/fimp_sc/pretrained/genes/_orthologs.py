"""Mouse genes and the human genes they correspond to, from a table on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd

from fimp_sc.pretrained.files._text_tables import open_text_table

# A table, or the path of one.
OrthologSource: TypeAlias = "str | Path | pd.DataFrame | None"

_COLUMNS = ("mouse_symbol", "human_symbol", "mouse_ensembl", "human_ensembl", "type", "confidence")
_ONE_TO_ONE = "ortholog_one2one"
# Headings of Ensembl's BioMart, of mouse genes with their human homologs.
_BIOMART = {
    "Gene name": "mouse_symbol",
    "Human gene name": "human_symbol",
    "Gene stable ID": "mouse_ensembl",
    "Human gene stable ID": "human_ensembl",
    "Human homology type": "type",
    "Human orthology confidence [0 low, 1 high]": "confidence",
}


@dataclass(frozen=True)
class Orthologs:
    """Look-ups of a table of orthologs.

    Attributes
    ----------
    partners
        From a mouse symbol or Ensembl id to the human genes with the best evidence, in alphabetical order; several
        when their evidence is equal. Each gene is its names: the symbol first, then Ensembl ids.
    one_to_one
        Keys of ``partners`` whose best evidence is a one-to-one relation.
    symbols
        From an Ensembl id, of mouse or human, to the symbols of the gene.
    """

    partners: dict[str, tuple[tuple[str, ...], ...]]
    one_to_one: frozenset[str]
    symbols: dict[str, tuple[str, ...]]


def read_orthologs(orthologs: str | Path | pd.DataFrame) -> pd.DataFrame:
    """Read a table of mouse and human genes.

    Parameters
    ----------
    orthologs
        Data frame, or path of a tab- or comma-separated file (also compressed), with columns ``mouse_symbol`` and
        ``human_symbol`` and optionally ``mouse_ensembl``, ``human_ensembl``, ``type`` (``"ortholog_one2one"`` for
        one-to-one relations) and ``confidence`` (number, higher is better). The headings of Ensembl's BioMart are
        understood too.

    Returns
    -------
    Data frame with these six columns: text, and float64 ``confidence``; missing where the table tells nothing.

    Raises
    ------
    TypeError
        Another kind of object.
    FileNotFoundError
        There is no such file.
    ValueError
        The table cannot be read, or lacks a column, or holds no pair of genes.
    """
    if isinstance(orthologs, pd.DataFrame):
        return _standard(orthologs, "The data frame of orthologs")
    if not isinstance(orthologs, str | Path):
        raise TypeError(f"orthologs must be a data frame or a path, found {type(orthologs).__name__}.")
    path = Path(orthologs)
    if not path.is_file():
        raise FileNotFoundError(f"There is no table of orthologs at {str(path)!r}.")
    try:
        separator = "," if ".csv" in path.suffixes else "\t"
        table = pd.read_csv(open_text_table(path, separator), sep=separator, dtype=str)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a table of orthologs: {error}") from None
    return _standard(table, repr(str(path)))


def index_orthologs(table: pd.DataFrame) -> Orthologs:
    """Make look-ups of a table from :func:`read_orthologs`.

    One-to-one relations win over all others, then the highest confidence of a pair in any of its rows.
    """
    # Some rows name a gene by its id alone, others tell the symbol of that id.
    human = _grouped(table, "human_ensembl", "human_symbol")
    symbol = table["human_ensembl"].map({name: found[0] for name, found in human.items()})
    rows = table.assign(
        gene=table["human_symbol"].fillna(symbol).fillna(table["human_ensembl"]),
        one=table["type"].eq(_ONE_TO_ONE).fillna(value=False).astype(bool),
        confidence=table["confidence"].fillna(0.0),
    )
    ids = _grouped(rows, "gene", "human_ensembl")
    partners: dict[str, tuple[tuple[str, ...], ...]] = {}
    one_to_one: set[str] = set()
    for key in ("mouse_ensembl", "mouse_symbol"):
        known = rows.loc[rows[key].notna() & rows["gene"].notna(), [key, "gene", "one", "confidence"]]
        pairs = known.groupby([key, "gene"], sort=False, as_index=False).max()
        for column in ("one", "confidence"):
            pairs = pairs[pairs[column] == pairs.groupby(key, sort=False)[column].transform("max")]
        for name, genes in _grouped(pairs, key, "gene").items():
            partners[name] = tuple(tuple(dict.fromkeys((gene, *ids.get(gene, ())))) for gene in genes)
        one_to_one.update(pairs.loc[pairs["one"], key])
    symbols = _grouped(rows, "mouse_ensembl", "mouse_symbol") | human
    return Orthologs(partners, frozenset(one_to_one), symbols)


def _grouped(table: pd.DataFrame, key: str, value: str) -> dict[str, tuple[str, ...]]:
    """Return the distinct values of each key, sorted."""
    pairs = table[[key, value]].dropna().drop_duplicates()
    found: dict[str, list[str]] = {}
    for name, entry in zip(pairs[key].tolist(), pairs[value].tolist(), strict=True):
        found.setdefault(name, []).append(entry)
    return {name: tuple(sorted(entries)) for name, entries in found.items()}


def _standard(table: pd.DataFrame, where: str) -> pd.DataFrame:
    if "mouse_symbol" not in table.columns:
        table = table.rename(columns=_BIOMART)
    missing = [column for column in _COLUMNS[:2] if column not in table.columns]
    if missing:
        raise ValueError(
            f"{where} has no column {' and no column '.join(map(repr, missing))}; found "
            f"{list(map(str, table.columns))}: rename the columns with the symbols to mouse_symbol and human_symbol."
        )
    out = pd.DataFrame(index=pd.RangeIndex(len(table)))
    for column in _COLUMNS[:-1]:
        text = table[column].to_numpy(dtype=object) if column in table.columns else None
        values = pd.Series(text, index=out.index, dtype=object)
        stripped = values.where(values.isna(), values.astype(str).str.strip())
        text = np.where(stripped.isna() | stripped.isin(["", "-"]), None, stripped.to_numpy(dtype=object))
        out[column] = pd.Series(text, index=out.index, dtype=object)
    confidence = table["confidence"].to_numpy() if "confidence" in table.columns else 0.0
    try:
        out["confidence"] = pd.to_numeric(pd.Series(confidence, index=out.index)).astype("float64")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: the column 'confidence' must hold numbers ({error}).") from None
    if out[list(_COLUMNS[:2])].dropna().empty:
        raise ValueError(f"{where} holds no pair of a mouse and a human symbol.")
    return out
