"""The genes, and the pairs of genes, that are tested."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from fimp_sc._logging import warn
from fimp_sc.data.storage._elements import missing_key, shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fimp_sc.data import ExpressionReader
    from fimp_sc.data.expression._reader import JoinedExpression
    from fimp_sc.tl._statistics._gene_tests import Plan

logger = logging.getLogger(__name__)

_CELLS = 4096
# Tables of OmniPath, LIANA and CellPhoneDB also have columns "source" and "target", of proteins or groups of cells.
_COLUMNS = (
    ("genesymbol_intercell_source", "genesymbol_intercell_target"),
    ("source_genesymbol", "target_genesymbol"),
    ("ligand_complex", "receptor_complex"),
    ("ligand", "receptor"),
    ("gene_a", "gene_b"),
    ("source", "target"),
)
_NAMES = "Name the columns 'ligand' and 'receptor', or 'source' and 'target'; those of OmniPath, LIANA and CellPhoneDB "
_NAMES += "are known."


class Features(NamedTuple):
    """Genes, and complexes of several genes, that are tested."""

    names: list[str]
    members: list[NDArray[np.int64]]
    """Positions of the genes of each."""
    wanted: NDArray[np.bool_] | None
    """``(g, g)`` bool, destination x source: the pairs to test; ``None`` for all, without direction."""


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

    Warns
    -----
    UserWarning
        Some rows lack a name.
    """
    if not isinstance(pairs, pd.DataFrame):
        raise TypeError(
            f"pairs must be a data frame with columns 'ligand' and 'receptor', or 'source' and 'target', found "
            f"{type(pairs).__name__}."
        )
    for columns in _COLUMNS:
        if set(columns) <= set(pairs.columns):
            twice = [name for name in columns if (pairs.columns == name).sum() > 1]
            if twice:
                raise ValueError(f"pairs has more than one column {twice[0]!r}: leave one.")
            table = pairs[list(columns)].set_axis(["source", "target"], axis=1)
            named = (table.notna() & (table.astype(str) != "")).all(axis=1)
            if not named.any():
                raise ValueError(
                    f"pairs has no rows that name two genes, in columns {columns[0]!r} and {columns[1]!r}."
                )
            if not named.all():
                warn(
                    f"{(~named).sum():,} of {len(table):,} rows of pairs name no gene in {columns[0]!r} or "
                    f"{columns[1]!r}, and are left out."
                )
            return table[named].astype(str).drop_duplicates()
    half = next((pair for pair in _COLUMNS if pair[0] in pairs.columns), None)
    raise missing_key("source" if half is None else half[1], "pairs", map(str, pairs.columns), _NAMES)


def named_features(known: pd.Index, genes: Sequence[str] | None, pairs: pd.DataFrame | None) -> Features | None:
    """Return what is asked for, ``None`` if nothing is named.

    Parameters
    ----------
    known
        Names of the genes of the object.
    genes, pairs
        As :func:`fimp_sc.tl.gene_pairs` takes them; ``pairs`` as :func:`check_pairs` returns it. A name of ``pairs``
        that is no gene, but several joined by ``_``, is a complex.

    Raises
    ------
    KeyError
        A gene of ``genes`` is not known.
    ValueError
        No pair has two genes that are known.

    Warns
    -----
    UserWarning
        Some pairs name genes that are not known.
    """
    chosen = None if genes is None else list(dict.fromkeys(map(str, genes)))
    if chosen is not None:
        unknown = [gene for gene in chosen if gene not in known]
        if unknown:
            advice = f"Not known, of {len(chosen)} genes: {shorten(unknown)}."
            raise missing_key(unknown[0], "adata.var_names", known, advice)
    if pairs is None:
        return None if chosen is None else all_pairs(chosen, known.get_indexer(chosen))
    usable = known if chosen is None else pd.Index(chosen)
    names = pd.unique(pairs.to_numpy().ravel()).tolist()
    split = {name: [name] if name in usable else name.split("_") for name in names}
    found = [name for name in names if all(member in usable for member in split[name])]
    place = pd.Index(found)
    to, of = (place.get_indexer(pairs[column]) for column in ("target", "source"))
    kept = (to >= 0) & (of >= 0)
    if not kept.any():
        raise ValueError(
            f"None of the {len(pairs)} pairs has both genes in adata.var_names (and among those of genes=), where "
            f"names are like {shorten(list(known), 3)}: are these names of another kind or species?"
        )
    if not kept.all():
        left = [name for name in names if name not in place]
        warn(
            f"{(~kept).sum():,} of {len(kept):,} pairs name a gene that is not in adata.var_names (or not among those "
            f"of genes=), and are left out: {shorten(left)}."
        )
    used = np.unique(np.r_[to[kept], of[kept]])
    wanted = np.zeros((len(used), len(used)), dtype=bool)
    wanted[np.searchsorted(used, to[kept]), np.searchsorted(used, of[kept])] = True
    names = [found[i] for i in used]
    return Features(names, [known.get_indexer(split[name]) for name in names], wanted)


def all_pairs(names: Sequence[str], positions: NDArray[np.int64]) -> Features:
    """Return genes of which all pairs are tested."""
    return Features(list(names), [np.array([i]) for i in positions], None)


def say_tests(features: Features, plan: Plan, *, min_edges: int, min_support: float) -> None:
    """Say how much is tested, and what is not.

    Warns
    -----
    UserWarning
        Pairs of genes that the user named are tested between no groups.
    """
    n = len(plan.tests.pair)
    logger.info(
        "%s tests of pairs of genes between %s pairs of groups. Not tested: %s pairs of groups with fewer than "
        "min_edges=%d edges, and %s tests with fewer than min_support=%g expected edges between cells that express "
        "both genes.", f"{n:,}", f"{len(plan.pairs):,}", f"{plan.n_few_edges:,}", min_edges, f"{plan.n_few_cells:,}",
        min_support,
    )  # fmt: skip
    if features.wanted is None:
        return
    left = features.wanted.copy()
    left[plan.tests.destination_gene, plan.tests.source_gene] = False
    if left.any():
        names = [f"{features.names[of]} → {features.names[to]}" for to, of in np.argwhere(left)[:3]]
        warn(
            f"{left.sum():,} of {features.wanted.sum():,} pairs of genes are tested between no groups, as too few "
            f"neighbors express both: {', '.join(names)}{', …' if left.sum() > len(names) else ''}. A lower "
            "min_support tests more."
        )


def feature_values(
    source: ExpressionReader | JoinedExpression, members: Sequence[NDArray[np.int64]], n_obs: int
) -> NDArray[np.float32]:
    """Return ``(n_obs, len(members))`` log-normalized values; those of a complex are the minimum of its genes."""
    used = np.unique(np.concatenate(members))
    first = np.searchsorted(used, [genes[0] for genes in members])
    several = [(i, np.searchsorted(used, genes)) for i, genes in enumerate(members) if len(genes) > 1]
    out = np.empty((n_obs, len(members)), dtype=np.float32)
    for start in range(0, n_obs, _CELLS):
        rows = np.arange(start, min(start + _CELLS, n_obs))
        values = source.rows(rows)[:, used]
        out[rows] = values[:, first]
        for i, genes in several:
            out[rows, i] = values[:, genes].min(1)
    return out


def most_variable(source: ExpressionReader | JoinedExpression, n_obs: int, n_genes: int) -> NDArray[np.int64]:
    """Return the positions of the genes whose log-normalized values vary most, the first most; none that do not."""
    total: NDArray[Any] = np.zeros((2, source.n_genes))
    for start in range(0, n_obs, _CELLS):
        rows = source.sparse_rows(np.arange(start, min(start + _CELLS, n_obs)))
        total += np.stack([np.asarray(part.sum(0, dtype=np.float64)).ravel() for part in (rows, rows.power(2))])
    mean, square = total / n_obs
    variance = square - np.square(mean)
    return np.argsort(-variance, kind="stable")[: min(n_genes, int((variance > 0).sum()))]
