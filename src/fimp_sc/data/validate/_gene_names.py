"""Hints where names of genes do not match: case, versions, signs that R replaces, genomes, duplicates, columns."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_NUMBER = re.compile(r"[.-]\d+$")
_SIGN = re.compile(r"[^0-9A-Za-z]")
_R_PREFIX = re.compile(r"^X(?=\d)")
# As Cell Ranger writes it where reads were aligned to several.
_GENOME = re.compile(r"^(GRC[a-z]\d+|hg\d+|mm\d+|rn\d+|human|mouse)_+", re.IGNORECASE)
_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{6,}")
_LEAST = 2


def naming_hint(known: Iterable[str], names: Iterable[str], var: pd.DataFrame | None = None) -> str:
    """Return how more of ``names`` would match ``known`` ones, as sentences for a message; ``""`` if nothing helps.

    Parameters
    ----------
    known
        Names of genes that are looked for, as those of a model or a vocabulary.
    names
        Names of an object that match badly.
    var
        Table of the object's genes, whose columns may hold other names.
    """
    known, names = list(map(str, known)), list(map(str, names))
    least = max(_LEAST, 2 * len(set(known) & set(names)), min(len(known), len(names)) // 100)
    ways = (
        (_case, _case_hint),
        (_without_number, _number_hint),
        (_without_signs, _sign_hint),
        (_without_genome, _genome_hint),
    )
    found = []
    for key, hint in ways:
        here, there = _by_key(names, key), _by_key(known, key)
        shared = [k for k in here if k in there]
        pairs = [(here[k], there[k]) for k in shared if here[k] != there[k]]
        if len(shared) >= least and pairs:
            name, gene = pairs[0]
            found.append((len(shared), hint(len(shared), name, gene)))
    for column, values in () if var is None else var.items():
        if pd.api.types.is_numeric_dtype(values.dtype):
            continue
        number = len(set(known).intersection(values.dropna().astype(str)))
        if number >= least:
            line = f"adata.var_names = adata.var[{column!r}].astype(str)"
            found.append((number, f"adata.var[{column!r}] holds {number:,} of them: {line} uses these names."))
    return max(found, key=lambda way: way[0])[1] if found else ""


def _by_key(names: list[str], key: Callable[[str], str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(key(name), name)
    return found


def _case(name: str) -> str:
    return name.strip().casefold()


def _without_number(name: str) -> str:
    return _NUMBER.sub("", name)


def _without_signs(name: str) -> str:
    return _SIGN.sub(".", _R_PREFIX.sub("", name))


def _without_genome(name: str) -> str:
    return _GENOME.sub("", name)


def _case_hint(number: int, name: str, gene: str) -> str:
    call = "upper" if gene.isupper() else "capitalize"
    return (
        f"{number:,} names match if case is ignored ({name!r} here, {gene!r} there), as those of human and mouse genes "
        "do: translate genes of another species to orthologs; if only the writing differs, set "
        f"adata.var_names = adata.var_names.str.{call}()."
    )


def _number_hint(number: int, name: str, gene: str) -> str:
    matched = f"{number:,} names match without the number at the end ({name!r} here, {gene!r} there)"
    if _ENSEMBL.match(name):
        cut = r'adata.var_names = adata.var_names.str.replace(r"\.\d+$", "", regex=True)'
        line = cut if _NUMBER.search(name) else "here names have no versions, there they have"
        return f"{matched}, the version of Ensembl ids: {line}."
    return f"{matched}, as var_names_make_unique() and R give them to duplicates: add these up under one name."


def _sign_hint(number: int, name: str, gene: str) -> str:
    return (
        f"{number:,} names match if signs are ignored ({name!r} here, {gene!r} there), as R replaces them: write the "
        "names as they are there."
    )


def _genome_hint(number: int, name: str, gene: str) -> str:
    matched = f"{number:,} names match without the name of the genome ({name!r} here, {gene!r} there)"
    genome = _GENOME.match(name)
    cut = f"adata.var_names = adata.var_names.str.removeprefix({genome[0]!r})" if genome else "write them as there"
    return f"{matched}: {cut}."
