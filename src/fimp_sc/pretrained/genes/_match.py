"""Genes of a data set matched with the vocabulary of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd

from fimp_sc.data.storage._elements import shorten
from fimp_sc.data.validate._gene_names import naming_hint
from fimp_sc.pretrained.genes._orthologs import Orthologs, OrthologSource, index_orthologs, read_orthologs
from fimp_sc.pretrained.genes._vocabulary import (
    AliasSource,
    Names,
    VocabularySource,
    bare,
    mostly_ensembl,
    mostly_mouse,
    read_aliases,
    read_vocabulary,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import ArrayLike

Species = Literal["human", "mouse"]
UPPERCASE = "uppercase"
NO_ORTHOLOG = "no ortholog known"
METHODS = ("exact", "case", "alias", "ortholog", UPPERCASE)
# Kinds of evidence, best first: of several genes with one id, the one with the best evidence keeps it.
_EXACT, _CASE, _ALIAS, _ALIASES, _ONE_TO_ONE, _NAMESAKE, _ORTHOLOG, _ORTHOLOGS, _UPPERCASE = range(9)


@dataclass(frozen=True)
class _Hit:
    """Match of a name: a name of the vocabulary, by which step, how sure, and what else it could have been."""

    symbol: str
    method: str
    evidence: int
    equals: tuple[str, ...] = ()


def match_names(
    names: Sequence[str] | pd.Series,
    vocabulary: VocabularySource,
    *,
    species: Species = "human",
    ensembl_symbols: Mapping[str, str] | None = None,
    orthologs: OrthologSource = None,
    aliases: AliasSource = None,
    counts: ArrayLike | None = None,
) -> pd.DataFrame:
    """Match names of genes with a vocabulary.

    Parameters
    ----------
    names
        ``(n_genes,)`` symbols or Ensembl ids, whose versions are ignored. The index of a series labels the genes in
        the result.
    vocabulary
        See :func:`~fimp_sc.pretrained.genes._vocabulary.read_vocabulary`.
    species
        Of the names.
    ensembl_symbols
        Symbols of Ensembl ids without version, where these are known.
    orthologs
        See :func:`~fimp_sc.pretrained.genes._orthologs.read_orthologs`; ``"uppercase"`` takes mouse symbols in
        upper case for human ones instead. Used for mouse names and a human vocabulary, and for symbols of Ensembl ids.
    aliases
        See :func:`~fimp_sc.pretrained.genes._vocabulary.read_aliases`.
    counts
        ``(n_genes,)`` non-negative total of each gene; by default all genes weigh the same in a contest for one id, and
        fractions are missing.

    Returns
    -------
    Data frame with a row per name and the columns

    ``name``
        as given; missing where it was.
    ``symbol``, ``id``
        of the vocabulary; missing and -1 for a gene that has none.
    ``method``
        step that found it, ``"exact"``, ``"case"``, ``"alias"``, ``"ortholog"`` or ``"uppercase"``; else ``""``.
    ``status``
        ``"matched"``; ``"ambiguous"``: one of several equal candidates was chosen (that of the same name, else the
        first in the alphabet), or without an id because a gene with better evidence has it; ``"lost"``.
    ``fraction_of_counts``
        float64.
    ``note``
        why a gene is ambiguous or lost, as far as known.

    Raises
    ------
    ValueError, TypeError, FileNotFoundError
        Unusable arguments, vocabulary or tables; or mouse genes, a human vocabulary and no table of orthologs.

    Notes
    -----
    Steps, of which the first that finds something counts: the name as it is; regardless of case, if only one name of
    the vocabulary fits; as an alias; as a mouse gene whose best human ortholog is in the vocabulary (one-to-one, else
    highest confidence; never a second-best one, which is another gene). Case is not ignored between names written
    as mouse genes are and a human vocabulary: that would be a guess at orthologs.
    """
    if species not in get_args(Species):
        raise ValueError(f"species={species!r} is unknown: choose one of {', '.join(map(repr, get_args(Species)))}.")
    series = pd.Series(names, dtype=object) if not isinstance(names, pd.Series) else names.astype(object)
    given = series.where(series.notna(), "").astype(str).str.strip()
    total = np.ones(len(given)) if counts is None else np.asarray(counts, dtype=np.float64)
    if total.shape != (len(given),) or not (np.isfinite(total).all() and (total >= 0).all()):
        raise ValueError(f"counts must hold a finite, non-negative number for each of the {len(given):,} names.")
    matcher = _Matcher(read_vocabulary(vocabulary), list(given), species, ensembl_symbols, orthologs, aliases)
    hits = [matcher.find(name) for name in given]
    table = pd.DataFrame(
        {
            "name": given.astype(object).where(given != "", None),
            "symbol": np.full(len(given), None, dtype=object),
            "id": np.int64(-1),
            "method": [hit.method if isinstance(hit, _Hit) else "" for hit in hits],
            "status": "lost",
            "fraction_of_counts": total / total.sum() if counts is not None and total.sum() > 0 else np.nan,
            "note": [hit if isinstance(hit, str) else "" for hit in hits],
        },
        index=given.index,
    )
    _award(table, hits, matcher.ids, total)
    return table


def advice(
    table: pd.DataFrame, vocabulary: Iterable[str], species: str, orthologs: OrthologSource | None = None
) -> str:
    """Return what a user whose genes are mostly unknown to the vocabulary may do about it.

    Parameters
    ----------
    table
        From :func:`match_names`.
    vocabulary, species, orthologs
        What it was made of.
    """
    names = table["name"].dropna().astype(str).tolist()
    genes = list(vocabulary)
    lost = table.loc[table["id"] < 0].sort_values("fraction_of_counts", ascending=False, kind="stable")["name"].dropna()
    folded = {name.casefold() for name in names}
    examples = [gene for gene in genes if gene.casefold() in folded][:3] or genes[:3]
    hints = [f"Names not found: {shorten([repr(n) for n in lost])}; vocabulary: {', '.join(map(repr, examples))}."]
    if mostly_mouse(names) and species == "human" and not mostly_mouse(genes):
        also = "" if orthologs is None else ", without which orthologs= translates nothing"
        hints.append(
            f'The names look like mouse genes (Aqp4 rather than AQP4): pass species="mouse"{also}. If they are human, '
            "put them into upper case first."
        )
    elif mostly_mouse(genes) and not mostly_mouse(names):
        hints.append("The vocabulary looks like that of a mouse model, the names do not look like mouse genes.")
    elif species == "mouse" and orthologs is not None and not mostly_mouse(genes):
        unknown = int((table["note"] == NO_ORTHOLOG).sum())
        hints.append(
            f"orthologs= has no ortholog of {unknown:,} genes: check that these are names of mouse genes, or pass a "
            "larger table; aliases= translates outdated symbols."
            if unknown
            else "The vocabulary lacks the human genes that orthologs= leads to."
        )
    elif mostly_ensembl(names) and not mostly_ensembl(genes):
        table_too = "" if orthologs is not None else ", or orthologs= with a table of both"
        hints.append(f"The names are Ensembl ids: pass gene_key= with a column of symbols{table_too}.")
    elif mostly_ensembl(genes) and not mostly_ensembl(names):
        hints.append("The vocabulary holds Ensembl ids: pass gene_key= with a column of Ensembl ids.")
    else:
        hints.append(
            naming_hint(genes, names)
            or f"Check that these are {species} genes, and gene_key=; aliases= translates outdated symbols."
        )
    return " ".join(hints)


class _Matcher:
    """Steps from a name to a name of the vocabulary."""

    def __init__(
        self,
        ids: Mapping[str, int],
        names: list[str],
        species: Species,
        ensembl_symbols: Mapping[str, str] | None,
        orthologs: OrthologSource,
        aliases: AliasSource,
    ) -> None:
        self.ids = ids
        # Ids of Ensembl in the vocabulary may have versions, too.
        tokens: dict[str, str] = {bare(token): token for token in reversed(list(ids))} | {token: token for token in ids}
        self._tokens = Names(tokens)
        self._aliases = Names(read_aliases(aliases))
        given = {bare(key): str(symbol).strip() for key, symbol in (ensembl_symbols or {}).items() if pd.notna(symbol)}
        self._ensembl_symbols = given
        self._fold = (species == "mouse" or mostly_mouse(names)) == mostly_mouse(ids)
        self._translate = species == "mouse" and not mostly_mouse(ids)
        self._uppercase = isinstance(orthologs, str) and orthologs == UPPERCASE
        if self._translate and orthologs is None:
            raise ValueError(
                "Mouse genes are matched through a table of orthologs, and none was given: pass orthologs=, a table "
                "with columns mouse_symbol and human_symbol, or one of mouse genes and their human homologs from "
                "Ensembl's BioMart. Upper-case mouse symbols are a guess that is only made on request, with "
                'orthologs="uppercase".'
            )
        self._orthologs = Orthologs({}, frozenset(), {})
        if not (self._uppercase or orthologs is None):
            self._orthologs = index_orthologs(read_orthologs(orthologs))
        self._partners = Names(self._orthologs.partners)

    def find(self, name: str) -> _Hit | str:
        """Return where a name leads, or why it leads nowhere as far as that is known."""
        if not name:
            return "no name"
        key = bare(name)
        known = self._ensembl_symbols.get(key)
        keys = [key, *([known] if known else self._orthologs.symbols.get(key, ()))]
        direct = self._direct(keys, fold=self._fold)
        if direct is not None or not self._translate:
            return direct or ""
        # An alias may be an outdated name of the mouse gene.
        keys += [symbol for key in keys for symbol in self._alias(key, fold=True)]
        return self._upper(keys) if self._uppercase else self._partner(keys)

    def _direct(self, names: Sequence[str], *, fold: bool) -> _Hit | None:
        for name in names:
            if name in self._tokens.entries:
                return _Hit(self._tokens.entries[name], "exact", _EXACT)
        for name in names if fold else ():
            found = self._tokens.find(name, fold=True)
            if found is not None:
                return _Hit(self._tokens.entries[found], "case", _CASE)
        for name in names:
            symbols = self._distinct(self._known(self._alias(name, fold=fold), fold=fold))
            if symbols:
                return _Hit(symbols[0], "alias", *((_ALIASES, tuple(symbols)) if len(symbols) > 1 else (_ALIAS,)))
        return None

    def _alias(self, name: str, *, fold: bool) -> tuple[str, ...]:
        found = self._aliases.find(name, fold=fold)
        return () if found is None else self._aliases.entries[found]

    def _known(self, names: Iterable[str], *, fold: bool) -> Iterator[str]:
        for name in names:
            found = self._tokens.find(bare(name), fold=fold)
            if found is not None:
                yield self._tokens.entries[found]

    def _distinct(self, symbols: Iterable[str]) -> list[str]:
        """Return the symbols in alphabetical order, one for each id."""
        return sorted({self.ids[symbol]: symbol for symbol in sorted(symbols, reverse=True)}.values())

    def _partner(self, names: Sequence[str]) -> _Hit | str:
        for name in names:
            key = self._partners.find(name, fold=True)
            if key is None:
                continue
            genes = self._partners.entries[key]
            # Both sides are human here, whatever the names of the data set are.
            hits = [self._direct(gene, fold=True) for gene in genes]
            symbols = self._distinct(hit.symbol for hit in hits if hit is not None)
            if not symbols:
                partners = [gene[0] for gene in genes]
                return f"the vocabulary lacks its ortholog{'s' * (len(partners) > 1)} {shorten(partners)}"
            equals = tuple(symbols) if len(symbols) > 1 else ()
            namesake = Names(dict.fromkeys(symbols)).find(name, fold=True)
            if namesake is not None and (equals or key not in self._orthologs.one_to_one):
                return _Hit(namesake, "ortholog", _NAMESAKE, equals)
            if equals:
                return _Hit(symbols[0], "ortholog", _ORTHOLOGS, equals)
            return _Hit(symbols[0], "ortholog", _ONE_TO_ONE if key in self._orthologs.one_to_one else _ORTHOLOG)
        return NO_ORTHOLOG

    def _upper(self, names: Sequence[str]) -> _Hit | str:
        symbol = next(self._known([name.upper() for name in names], fold=True), None)
        return "" if symbol is None else _Hit(symbol, UPPERCASE, _UPPERCASE)


def _award(table: pd.DataFrame, hits: list[_Hit | str], ids: Mapping[str, int], total: np.ndarray) -> None:
    """Give every id to one gene: to that with the best evidence, then the most counts, then first in the alphabet."""
    symbol, number, status, note = (table[column].tolist() for column in ("symbol", "id", "status", "note"))
    labels = [str(x) for x in (table["name"] if isinstance(table.index, pd.RangeIndex) else table.index)]
    claims: dict[int, list[tuple[tuple[int, float, str], int, _Hit]]] = {}
    for i, hit in enumerate(hits):
        if isinstance(hit, _Hit):
            claims.setdefault(ids[hit.symbol], []).append(((hit.evidence, -float(total[i]), labels[i]), i, hit))
    for token, claimants in claims.items():
        (_, winner, hit), *others = sorted(claimants, key=lambda claim: claim[0])
        symbol[winner], number[winner] = hit.symbol, token
        status[winner] = "ambiguous" if hit.equals else "matched"
        if hit.equals:
            note[winner] = f"equal candidates: {shorten(list(hit.equals))}"
        for _, i, other in others:
            status[i] = "ambiguous"
            note[i] = f"{other.symbol} went to {labels[winner]}"
    table["symbol"] = pd.Series(symbol, index=table.index, dtype=object)
    table["id"] = np.asarray(number, dtype=np.int64)
    table["status"], table["note"] = status, note
