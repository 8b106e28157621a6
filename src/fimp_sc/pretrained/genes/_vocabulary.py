"""Vocabularies of genes, and names looked up in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import pandas as pd

from fimp_sc.pretrained.files._files import CheckpointError, find_weights, read_json
from fimp_sc.pretrained.files._text_tables import open_text_table

# Ids by symbol, symbols in the order of their ids, a `vocab.json`, or a folder with one.
VocabularySource: TypeAlias = Mapping[str, int] | Sequence[str] | str | Path
AliasSource: TypeAlias = Mapping[str, str | Sequence[str]] | str | Path | None

_ENSEMBL = re.compile(r"(ENS[A-Z]*G\d{6,})(?:\.\d+)?")
_SPECIAL = re.compile(r"<.*>")
_CAPITALIZED = re.compile(r"[A-Z][a-z]")
Entry = TypeVar("Entry")


class Names(Generic[Entry]):
    """Entries by name, which can also be asked for regardless of case.

    Parameters
    ----------
    entries
        Entry of each name.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries
        self._folded: dict[str, str | None] = {}
        for name in entries:
            key = name.casefold()
            self._folded[key] = None if key in self._folded else name  # none of several

    def find(self, name: str, *, fold: bool) -> str | None:
        """Return ``name`` if it is here; with ``fold`` else the only name that differs from it in case alone."""
        if name in self.entries:
            return name
        return self._folded.get(name.casefold()) if fold else None


def read_vocabulary(vocabulary: VocabularySource) -> dict[str, int]:
    """Return the id of each gene of a vocabulary.

    Parameters
    ----------
    vocabulary
        Mapping from symbol to id; sequence of symbols, whose ids are their positions; path of a ``vocab.json``, or of a
        checkpoint folder that holds one. Tokens in angle brackets, such as ``<pad>``, are left out.

    Raises
    ------
    TypeError
        Another kind of object, or symbols that are not text, or ids that are not whole numbers.
    ValueError
        No genes, negative ids, a symbol that occurs twice, or a file that cannot be read
        (:class:`~fimp_sc.pretrained.CheckpointError`).
    """
    where = "vocabulary"
    entries: Mapping[Any, Any]
    if isinstance(vocabulary, str | Path):
        path = Path(vocabulary)
        if not path.exists():
            raise CheckpointError(
                f"There is no file or folder {str(path)!r} (looked from {str(Path.cwd())!r}): name a vocab.json, or "
                "the folder of a checkpoint that holds one."
            )
        path = find_weights(path, ["vocab.json"]) if path.is_dir() else path
        where = repr(str(path))
        entries = read_json(path)
    elif isinstance(vocabulary, Mapping):
        entries = vocabulary
    elif isinstance(vocabulary, Iterable):
        symbols = list(vocabulary)
        entries = {symbol: position for position, symbol in enumerate(symbols)}
        if len(entries) < len(symbols):
            twice = next(symbol for position, symbol in enumerate(symbols) if entries[symbol] != position)
            raise ValueError(f"vocabulary holds {twice!r} more than once: every symbol needs one id.")
    else:
        raise TypeError(
            "vocabulary must be a dict from symbol to id, a sequence of symbols, or the path of a vocab.json or of a "
            f"folder with one, found {type(vocabulary).__name__}."
        )
    for symbol, number in entries.items():
        if not isinstance(symbol, str) or isinstance(number, bool) or not isinstance(number, Integral):
            wrong = CheckpointError if isinstance(vocabulary, str | Path) else TypeError
            raise wrong(f"{where} must map symbols to whole numbers, found {symbol!r}: {number!r}.")
        if number < 0:
            raise ValueError(f"{where} gives {symbol!r} the id {number}: ids must not be negative.")
    genes = {str(symbol): int(number) for symbol, number in entries.items() if not _SPECIAL.fullmatch(symbol)}
    if not genes:
        raise ValueError(f"{where} holds no genes.")
    return genes


def read_aliases(aliases: AliasSource) -> dict[str, tuple[str, ...]]:
    """Return the symbols that each alias may stand for.

    Parameters
    ----------
    aliases
        Mapping from alias to symbol or symbols; path of a table without a header and with two tab-separated columns,
        alias and symbol (comma-separated if its name ends in ``.csv``); ``None`` for no aliases.

    Raises
    ------
    TypeError
        Another kind of object, or an alias that stands for something else than symbols.
    FileNotFoundError
        There is no such file.
    ValueError
        The file cannot be read, or does not have two columns.
    """
    if aliases is None:
        return {}
    if isinstance(aliases, Mapping):
        return {str(name): _symbols(name, to) for name, to in aliases.items()}
    if not isinstance(aliases, str | Path):
        raise TypeError(f"aliases must be a dict from alias to symbol or a path, found {type(aliases).__name__}.")
    path = Path(aliases)
    if not path.is_file():
        raise FileNotFoundError(f"There is no table of aliases at {str(path)!r}.")
    separator = "," if ".csv" in path.suffixes else "\t"
    # Names such as NA or NAN are genes.
    how: dict[str, Any] = {"sep": separator, "header": None, "dtype": str, "keep_default_na": False}
    try:
        table = pd.read_csv(open_text_table(path, separator), **how)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a table of aliases: {error}") from None
    if table.shape[1] != 2:
        raise ValueError(f"{str(path)!r} must have two columns, alias and symbol, found {table.shape[1]}.")
    found: dict[str, list[str]] = {}
    for alias, symbol in zip(table[0].str.strip(), table[1].str.strip(), strict=True):
        if alias and symbol:
            found.setdefault(alias, []).append(symbol)
    return {alias: tuple(dict.fromkeys(symbols)) for alias, symbols in found.items()}


def _symbols(alias: Any, symbols: Any) -> tuple[str, ...]:
    found = (
        (symbols,) if isinstance(symbols, str) else tuple(symbols) if isinstance(symbols, list | tuple | set) else ()
    )
    if not found or not all(isinstance(symbol, str) for symbol in found):
        raise TypeError(f"aliases must map an alias to a symbol or a list of symbols, found {alias!r}: {symbols!r}.")
    return found


def bare(name: str) -> str:
    """Return ``name`` without surrounding spaces and, if it is an Ensembl id, without its version."""
    name = name.strip()
    ensembl = _ENSEMBL.fullmatch(name)
    return ensembl[1] if ensembl else name


def is_ensembl(name: str) -> bool:
    """Tell whether a name is the Ensembl id of a gene, with or without a version."""
    return _ENSEMBL.fullmatch(name) is not None


def mostly_ensembl(names: Iterable[str]) -> bool:
    """Tell whether more than half of the names are Ensembl ids."""
    found = [is_ensembl(name) for name in names]
    return 2 * sum(found) > len(found)


def mostly_mouse(names: Iterable[str]) -> bool:
    """Tell whether more than half of the names are written as those of mouse genes are: Aqp4, ENSMUSG00000024411."""
    found = [_CAPITALIZED.match(name) is not None or name.startswith("ENSMUSG") for name in names]
    return 2 * sum(found) > len(found)
