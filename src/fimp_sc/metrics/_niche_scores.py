from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pandas as pd

from fimp_sc.data.graph._adjacency import check_adjacency
from fimp_sc.data.storage._elements import get_graph, missing_key
from fimp_sc.metrics._common import labels

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import ArrayLike, NDArray
    from scipy import sparse


@overload
def niche_scores(
    truth: ArrayLike,
    niches: ArrayLike,
    /,
    *,
    connectivities: sparse.spmatrix | None = ...,
    unlabeled_category: str | None = ...,
) -> dict[str, Any]: ...
@overload
def niche_scores(
    adata: AnnData,
    truth: str,
    niches: str,
    /,
    *,
    connectivities: str | sparse.spmatrix | None = ...,
    unlabeled_category: str | None = ...,
) -> dict[str, Any]: ...
def niche_scores(*given: Any, connectivities: Any = None, unlabeled_category: str | None = "Unknown") -> dict[str, Any]:
    """Compare niches with a reference, whatever they are called; and say how contiguous they are.

    ``niche_scores(truth, niches)`` takes arrays, ``niche_scores(adata, "layer", "fimp_niche")`` columns.

    Parameters
    ----------
    *given
        Reference and niches, ``(n_obs,)`` each; or an object and the names of two columns of its ``obs``.
    connectivities
        Spatial graph ``(n_obs, n_obs)``, or its key in ``obsp``, for ``continuity``.
    unlabeled_category
        Reference of cells where it is not known.

    Returns
    -------
    ``ari``, the adjusted Rand index, and ``nmi``, the mutual information normalized by the mean of the entropies, over
    the cells that have a reference and a niche; ``n_obs``, the number of these cells. With ``connectivities`` also
    ``continuity``: the fraction of a cell's neighbors that are in its niche, mean over all cells that have a niche and
    neighbors with one; it needs no reference, and is 1 for a single niche.

    Raises
    ------
    KeyError
        When a column or the graph is missing.
    ValueError
        When arrays differ in length, or no cell has both.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    adata, truth, found = labels(given, None)
    known, placed = ~pd.isna(truth) & (truth != unlabeled_category), ~pd.isna(found)
    both = known & placed
    if not both.any():
        raise ValueError("No cell has a reference and a niche, so that there is nothing to compare.")
    pair = truth[both].astype(str), found[both].astype(str)
    scores: dict[str, Any] = {
        "ari": float(adjusted_rand_score(*pair)),
        "nmi": float(normalized_mutual_info_score(*pair)),
        "n_obs": int(both.sum()),
    }
    if connectivities is not None:
        where = "connectivities"
        if isinstance(connectivities, str):
            if adata is None or connectivities not in adata.obsp:
                advice = "Build the graph with fimp_sc.pp.spatial_graph(adata), or pass a matrix."
                raise missing_key(connectivities, "adata.obsp", () if adata is None else adata.obsp, advice)
            where, connectivities = f"adata.obsp[{connectivities!r}]", get_graph(adata, connectivities)
        graph = check_adjacency(connectivities, len(found), where=where, what="cell", self_loops=False)
        scores["continuity"] = _continuity(graph, found, placed)
    return scores


def _continuity(graph: sparse.csr_matrix, niches: NDArray[Any], placed: NDArray[np.bool_]) -> float:
    row = np.repeat(np.arange(len(niches)), np.diff(graph.indptr))
    kept = placed[row] & placed[graph.indices]
    row, column = row[kept], graph.indices[kept]
    codes = pd.factorize(niches)[0]
    n_neighbors = np.bincount(row, minlength=len(niches))
    alike = np.bincount(row, weights=codes[row] == codes[column], minlength=len(niches))
    return float(np.mean(alike[n_neighbors > 0] / n_neighbors[n_neighbors > 0])) if row.size else float("nan")
