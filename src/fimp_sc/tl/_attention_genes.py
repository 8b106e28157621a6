"""Which genes, and which pairs of genes, attention is read of."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fimp_sc.data._access import missing_key, shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fimp_sc.data import GraphData
    from fimp_sc.model import FIMP

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
        It has no rows.
    """
    if not isinstance(pairs, pd.DataFrame):
        raise TypeError(f"pairs must be a data frame with columns 'source' and 'target', found {type(pairs).__name__}.")
    for columns in _COLUMNS:
        if set(columns) <= set(pairs.columns):
            table = pairs[list(columns)].dropna().astype(str).drop_duplicates().set_axis(["source", "target"], axis=1)
            if table.empty:
                raise ValueError("pairs has no rows that name two genes.")
            return table
    raise missing_key(
        "source",
        "pairs",
        map(str, pairs.columns),
        "Name the columns 'source' and 'target', or 'ligand' and 'receptor'.",
    )


def choose_genes(
    model: FIMP, data: GraphData, genes: Sequence[str] | None, n_genes: int, pairs: pd.DataFrame | None
) -> tuple[list[str], NDArray[np.bool_]]:
    """Return the genes to look at, and which pairs of them to test.

    Parameters
    ----------
    model, data
        What is known of genes.
    genes, n_genes, pairs
        See :func:`fimp_sc.tl.attention`; ``pairs`` as :func:`check_pairs` returns it.

    Returns
    -------
    Names, and ``(g, g)`` bool, destination gene x source gene.

    Raises
    ------
    KeyError
        A gene of ``genes`` is not known to the model.
    ValueError
        Fewer than two genes are left.
    """
    known = pd.Index(model.genes.astype(str))
    if isinstance(genes, str):
        genes = [genes]
    if genes is not None:
        chosen = list(dict.fromkeys(map(str, genes)))
        unknown = [gene for gene in chosen if gene not in known]
        if unknown:
            raise missing_key(
                unknown[0], "the genes of the model", known, f"Not known, of {len(chosen)} genes: {shorten(unknown)}."
            )
    elif pairs is not None:
        named = pd.unique(pairs.to_numpy().ravel())
        chosen = [gene for gene in named if gene in known]
    else:
        chosen = list(known[np.sort(_most_variable(data, n_genes))])
    if pairs is None:
        if not chosen:
            raise ValueError("There are no genes to look at: name some with genes=.")
        return chosen, np.ones((len(chosen), len(chosen)), dtype=bool)
    index = pd.Index(chosen)
    source, target = (index.get_indexer(pairs[column]) for column in ("source", "target"))
    kept = (source >= 0) & (target >= 0)
    if not kept.any():
        raise ValueError(
            f"None of the {len(pairs)} pairs has both genes among the {len(known)} genes of the model (and those of "
            f"genes=), which are named like {shorten(list(known), 3)}: are these names of another kind or species?"
        )
    if not kept.all():
        logger.warning("%d of %d pairs name a gene that is not known and are left out.", (~kept).sum(), len(kept))
    wanted = np.zeros((len(chosen), len(chosen)), dtype=bool)
    wanted[target[kept], source[kept]] = True
    return chosen, wanted


def _most_variable(data: Any, n_genes: int) -> NDArray[np.int64]:
    """Return the positions of the genes whose log-normalised values vary most."""
    if n_genes < 1:
        raise ValueError(f"n_genes must be at least 1, found {n_genes}.")
    source, n_obs = data.source, data.graph.csr.shape[0]
    total = np.zeros((2, source.n_genes))
    for start in range(0, n_obs, _CELLS):
        rows = source.sparse_rows(np.arange(start, min(start + _CELLS, n_obs)))
        total += np.stack([np.asarray(part.sum(0, dtype=np.float64)).ravel() for part in (rows, rows.power(2))])
    mean, square = total / n_obs
    variance = square - np.square(mean)
    return np.argsort(-variance, kind="stable")[: min(n_genes, int((variance > 0).sum()))]
