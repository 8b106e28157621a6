"""Groups of cells, and tables of pairs of them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fimp_sc.data.storage._elements import get_obs, missing_key
from fimp_sc.data.validate._labels import warn_words
from fimp_sc.model.predict._attention import cell_groups, edge_pairs

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from fimp_sc.data import NodeGraph
    from fimp_sc.tl._statistics._significance import Significance

logger = logging.getLogger(__name__)


def read_groups(nodes: AnnData, groupby: str, unlabeled_category: str) -> pd.Categorical:
    """Return the group of each node, missing where it has none.

    Raises
    ------
    KeyError
        There is no such column.
    TypeError
        The column holds numbers that measure something.
    ValueError
        There is one group only, or far too many.
    """
    if groupby not in nodes.obs:
        raise missing_key(groupby, "adata.obs", nodes.obs, "Name the groups of cells, for instance their types.")
    column = get_obs(nodes, [groupby])[groupby]
    groups = _at_least_two(cell_groups(column, f"adata.obs[{groupby!r}]", unlabeled_category), groupby)
    warn_words(nodes, groupby, unlabeled_category, "each is a group")
    return groups


def read_domains(nodes: AnnData, domain_key: str, unlabeled_category: str) -> NDArray[np.int64]:
    """Return the domain of each node, -1 where it has none.

    Raises
    ------
    KeyError
        There is no such column.
    TypeError
        The column holds numbers that measure something.
    ValueError
        No node has a domain, or there are far too many.
    """
    if domain_key not in nodes.obs:
        raise missing_key(domain_key, "adata.obs", nodes.obs, "Name a column of domains, for instance niches.")
    where = f"adata.obs[{domain_key!r}]"
    domains = cell_groups(get_obs(nodes, [domain_key])[domain_key], where, unlabeled_category)
    if not len(domains.categories):
        raise ValueError(f"{where} has no domain: all {len(domains):,} cells are missing or {unlabeled_category!r}.")
    return np.asarray(domains.codes, dtype=np.int64)


def places_of(nodes: pd.Index, read: pd.Index) -> NDArray[np.int64] | slice:
    """Return where the nodes that are read, which may be fewer and in another order, stand among ``nodes``."""
    nodes = nodes.astype(str)
    # Names that are not unique can be the same all the same.
    return slice(None) if nodes.equals(read) else np.asarray(nodes.get_indexer(read), dtype=np.int64)


def groups_of(groups: pd.Categorical, nodes: pd.Index, read: pd.Index, groupby: str) -> pd.Categorical:
    """Return the groups of the nodes that are read, which may be fewer than ``nodes`` and in another order."""
    places = places_of(nodes, read)
    return groups if isinstance(places, slice) else _at_least_two(groups[places], groupby)


def _at_least_two(category: pd.Categorical, groupby: str) -> pd.Categorical:
    category = category.remove_unused_categories()
    if len(category.categories) < 2:
        found = f"one group only, {category.categories[0]!r}" if len(category.categories) else "no group"
        n_missing = int((category.codes < 0).sum())
        raise ValueError(
            f"adata.obs[{groupby!r}] has {found}, and {n_missing:,} of {len(category):,} cells without one: pairs of "
            "groups are compared, which takes two."
        )
    return category


def check_edges(graph: NodeGraph, codes: NDArray[np.int64], n_groups: int, min_edges: int) -> None:
    """Check that some pair of groups has enough edges to be tested.

    Parameters
    ----------
    graph
        Of all nodes.
    codes
        ``(n,)`` int64 group of each node, -1 for none.

    Raises
    ------
    ValueError
        None has.
    """
    pair = edge_pairs(graph, codes, n_groups)[2]
    if not len(pair) or np.unique(pair, return_counts=True)[1].max() < min_edges:
        raise ValueError(
            f"Nothing to test: no pair of {n_groups} groups has min_edges={min_edges} edges, of {len(pair):,} that "
            "join cells with a group. Merge groups, lower min_edges, or look at the graph."
        )


def say_left_out(codes: NDArray[np.int64], why: str) -> None:
    """Say how many cells are left out."""
    n_missing = int((codes < 0).sum())
    if n_missing:
        logger.info("%s of %s cells have %s, and are left out.", f"{n_missing:,}", f"{len(codes):,}", why)


def group_columns(names: pd.Index, pair: NDArray[np.int64]) -> dict[str, Any]:
    """Return the columns of a table that name both groups of each pair, source x number of groups + destination."""
    source, destination = np.divmod(pair, len(names))
    return {
        "source_group": pd.Categorical.from_codes(source.tolist(), categories=list(names)),
        "destination_group": pd.Categorical.from_codes(destination.tolist(), categories=list(names)),
    }


def warn_still(result: Significance) -> None:
    """Warn where no permutation differs from what was found."""
    if not np.nan_to_num(result.z).any():
        logger.warning(
            "No permutation differs from what was found, so that nothing can be told (all p-values are 1): cells of "
            "one group and sample are all alike, or there is one of each."
        )
