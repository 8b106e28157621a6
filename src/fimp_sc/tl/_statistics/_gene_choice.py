"""The genes, and the pairs of genes, that are tested."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fimp_sc.data.storage._elements import missing_key, shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fimp_sc.data import ExpressionReader
    from fimp_sc.data.expression._reader import JoinedExpression
    from fimp_sc.tl._statistics._significance import Tests

logger = logging.getLogger(__name__)

_CELLS = 4096
_COLUMNS = (("source", "target"), ("ligand", "receptor"))


def check_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return pairs of genes as text in columns ``source`` and ``target``, each pair once.

    Raises
    ------
    KeyError
        A column is missing.
    TypeError
        It is no data frame.
    ValueError
        It has no rows, or a column twice.
    """
    if not isinstance(pairs, pd.DataFrame):
        raise TypeError(f"pairs must be a data frame with columns 'source' and 'target', found {type(pairs).__name__}.")
    for columns in _COLUMNS:
        if set(columns) <= set(pairs.columns):
            twice = [name for name in columns if (pairs.columns == name).sum() > 1]
            if twice:
                raise ValueError(f"pairs has more than one column {twice[0]!r}: leave one.")
            table = pairs[list(columns)].dropna().astype(str).drop_duplicates().set_axis(["source", "target"], axis=1)
            if table.empty:
                raise ValueError("pairs has no rows that name two genes.")
            return table
    half = next((pair for pair in _COLUMNS if pair[0] in pairs.columns), None)
    raise missing_key(
        "source" if half is None else half[1],
        "pairs",
        map(str, pairs.columns),
        "Name the columns 'source' and 'target', or 'ligand' and 'receptor'.",
    )


def named_genes(known: pd.Index, genes: Sequence[str] | None, pairs: pd.DataFrame | None) -> list[str] | None:
    """Return the genes that are asked for, ``None`` if none are named.

    Parameters
    ----------
    known
        Names of the genes of the object.
    genes, pairs
        As :func:`fimp_sc.tl.gene_pairs` takes them; ``pairs`` as :func:`check_pairs` returns it.

    Raises
    ------
    KeyError
        A gene of ``genes`` is not known.
    ValueError
        No pair has two genes that are known.
    """
    chosen = None if genes is None else list(dict.fromkeys(map(str, genes)))
    if chosen is not None:
        unknown = [gene for gene in chosen if gene not in known]
        if unknown:
            advice = f"Not known, of {len(chosen)} genes: {shorten(unknown)}."
            raise missing_key(unknown[0], "adata.var_names", known, advice)
    elif pairs is not None:
        chosen = [gene for gene in pd.unique(pairs.to_numpy().ravel()) if gene in known]
    if pairs is not None and not pairs.isin(chosen).all(axis=1).any():
        raise ValueError(
            f"None of the {len(pairs)} pairs has both genes in adata.var_names (and among those of genes=), where "
            f"names are like {shorten(list(known), 3)}: are these names of another kind or species?"
        )
    return chosen


def wanted_pairs(chosen: list[str], pairs: pd.DataFrame | None) -> NDArray[np.bool_]:
    """Return the pairs of the chosen genes to test, ``(g, g)`` bool, destination gene x source gene."""
    if pairs is None:
        return np.ones((len(chosen), len(chosen)), dtype=bool)
    index = pd.Index(chosen)
    place, origin = (index.get_indexer(pairs[column]) for column in ("target", "source"))
    kept = (place >= 0) & (origin >= 0)
    if not kept.all():
        unknown = [name for name in pd.unique(pairs.to_numpy().ravel()) if name not in index]
        logger.warning(
            "%d of %d pairs name a gene that is not known and are left out: %s.", (~kept).sum(), len(kept),
            shorten(unknown),
        )  # fmt: skip
    wanted = np.zeros((len(chosen), len(chosen)), dtype=bool)
    wanted[place[kept], origin[kept]] = True
    return wanted


def say_untested(chosen: list[str], wanted: NDArray[np.bool_], tests: Tests, *, asked: bool) -> None:
    """Say which pairs of genes are tested between no groups at all.

    Parameters
    ----------
    chosen, wanted
        Genes, and the pairs of them that were to be tested.
    tests
        What is tested.
    asked
        Whether the user named these genes, so that this is a warning.
    """
    left = wanted.copy()
    left[tests.destination_gene, tests.source_gene] = False
    if not left.any():
        return
    names = [f"{chosen[source]} → {chosen[destination]}" for destination, source in np.argwhere(left)[:3]]
    logger.log(
        logging.WARNING if asked else logging.INFO,
        "%s of %s pairs of genes are tested between no groups, as too few neighbors express both: %s. A lower "
        "min_support tests more.", f"{left.sum():,}", f"{wanted.sum():,}",
        ", ".join(names) + (", …" if left.sum() > len(names) else ""),
    )  # fmt: skip


def most_variable(source: ExpressionReader | JoinedExpression, n_obs: int, n_genes: int) -> NDArray[np.int64]:
    """Return the positions of the genes whose log-normalized values vary most, in ascending order."""
    total: NDArray[Any] = np.zeros((2, source.n_genes))
    for start in range(0, n_obs, _CELLS):
        rows = source.sparse_rows(np.arange(start, min(start + _CELLS, n_obs)))
        total += np.stack([np.asarray(part.sum(0, dtype=np.float64)).ravel() for part in (rows, rows.power(2))])
    mean, square = total / n_obs
    variance = square - np.square(mean)
    order = np.argsort(-variance, kind="stable")[: min(n_genes, int((variance > 0).sum()))]
    return np.sort(order)
