"""Graphs of brain regions: structural, by coordinates, functional."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc.data._nodes import square_by_name
from fimp_sc.data.graph._adjacency import check_adjacency, strongest_edges
from fimp_sc.data.storage._elements import shorten
from fimp_sc.pp._spatial_graph import build_graph

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Method = Literal["structural", "coordinates", "functional"]
DEFAULT_NEIGHBORS = 6
_DENSE = 0.5


def region_graphs(
    signals: NDArray[np.float32],
    names: Sequence[str],
    *,
    region_names: Sequence[str] | None,
    connectivity: Any,
    coordinates: NDArray[np.float64] | None,
    method: Method | None,
    n_neighbors: int,
    train_recordings: Sequence[Any] | None,
    top_fraction: float | None,
    threshold: float | None,
) -> tuple[list[sparse.csr_matrix], dict[str, Any]]:
    """Return one float32 graph for each recording and the parameters that made it; see :func:`fimp_sc.pp.fmri`.

    Parameters
    ----------
    signals
        ``(recording, region, time)``.
    names, region_names
        Of the recordings, and of the regions where the user names them.

    Raises
    ------
    ValueError
        Parameters that do not belong together, or a graph without edges.
    """
    chosen = method or ("structural" if connectivity is not None else "coordinates")
    _check_arguments(chosen, connectivity, coordinates, n_neighbors, train_recordings, top_fraction, threshold)
    n_regions = signals.shape[1]
    parameters: dict[str, Any] = {"method": chosen}
    if chosen == "structural":
        graphs = _structural(connectivity, names, n_regions, region_names, top_fraction, threshold)
        parameters |= {"top_fraction": top_fraction, "threshold": threshold}
    else:
        if n_neighbors >= n_regions:
            raise ValueError(
                f"n_neighbors={n_neighbors} is too much for {n_regions} regions: pass {n_regions - 1} or less."
            )
        parameters["n_neighbors"] = int(n_neighbors)
        if chosen == "coordinates" and coordinates is not None:
            own = [coordinates] if coordinates.ndim == 2 else list(coordinates)
            built = [build_graph("knn", {"n_neighs": int(n_neighbors)}, points) for points in own]
            graphs = [light.obsp["spatial_connectivities"] for light in built]
        else:
            rows = _positions(train_recordings or (), names)
            parameters["train_recordings"] = [names[row] for row in rows]
            graphs = [_functional(signals[rows], n_neighbors)]
    if not any(graph.nnz for graph in graphs):
        raise ValueError(f"The {chosen} graph has no edges: check its weights, or keep more of them.")
    graphs = [sparse.csr_matrix(graph, dtype=np.float32) for graph in graphs]
    return graphs * (len(names) // len(graphs)), parameters


def _check_arguments(
    method: str,
    connectivity: Any,
    coordinates: Any,
    n_neighbors: Any,
    train_recordings: Any,
    top_fraction: Any,
    threshold: Any,
) -> None:
    needs = {"structural": ("connectivity", connectivity), "coordinates": ("coordinates", coordinates)}
    needs["functional"] = ("train_recordings", train_recordings)
    name, value = needs[method]
    if value is None or (name == "train_recordings" and not len(value)):
        why = {
            "structural": "pass the weights between regions",
            "coordinates": "pass the centers of the regions (region, 3), or a graph with connectivity=",
            "functional": "name the recordings a model is trained on, so that the graph knows nothing of the others",
        }
        raise ValueError(f"The {method} graph needs {name}=: {why[method]}.")
    for name, value, user in (
        ("connectivity", connectivity, "structural"),
        ("train_recordings", train_recordings, "functional"),
        ("top_fraction", top_fraction, "structural"),
        ("threshold", threshold, "structural"),
    ):
        if value is not None and method != user:
            raise ValueError(f'{name}= only applies to method="{user}", but method={method!r}: drop one of them.')
    if method == "structural" and n_neighbors != DEFAULT_NEIGHBORS:
        raise ValueError('n_neighbors= does not apply to method="structural": pass top_fraction= or threshold=.')
    if top_fraction is not None and threshold is not None:
        raise ValueError("Pass either top_fraction= or threshold=, not both.")


def _structural(
    connectivity: Any,
    names: Sequence[str],
    n_regions: int,
    region_names: Sequence[str] | None,
    top_fraction: float | None,
    threshold: float | None,
) -> list[sparse.csr_matrix]:
    thinned = top_fraction is not None or threshold is not None
    graphs = []
    for where, matrix in _matrices(connectivity, names):
        if region_names is not None:
            matrix = square_by_name(matrix, region_names, where, given=True)
        graph = check_adjacency(matrix, n_regions, where=where, what="region", self_loops=False, signed=thinned)
        graphs.append(strongest_edges(graph, top_fraction=top_fraction, threshold=threshold) if thinned else graph)
    density = max(graph.nnz for graph in graphs) / max(1, n_regions * (n_regions - 1))
    if density > _DENSE and not thinned:
        logger.warning(
            "The structural graph joins %.0f %% of all pairs of regions, and computation grows with that: thin it out "
            "with top_fraction= (for instance 0.1) or threshold=.",
            100 * density,
        )
    return graphs


def _matrices(connectivity: Any, names: Sequence[str]) -> list[tuple[str, Any]]:
    """Return one matrix for all recordings, or one for each, with a name for messages."""
    if isinstance(connectivity, Mapping):
        given = {str(name): matrix for name, matrix in connectivity.items()}
        if set(given) != set(names):
            odd = sorted(set(given) ^ set(names))
            raise ValueError(f"connectivity and bold have different recordings: {shorten([repr(n) for n in odd])}.")
        return [(f"connectivity[{name!r}]", given[name]) for name in names]
    several = isinstance(connectivity, list | tuple) and (
        sparse.issparse(connectivity[0]) or np.ndim(connectivity[0]) == 2
    )
    if not several and not sparse.issparse(connectivity) and not isinstance(connectivity, pd.DataFrame):
        connectivity = np.asarray(connectivity)
        several = connectivity.ndim == 3
    if not several:
        return [("connectivity", connectivity)]
    if len(connectivity) != len(names):
        raise ValueError(f"connectivity has {len(connectivity)} matrices, but bold has {len(names)} recordings.")
    return [(f"connectivity of recording {name!r}", matrix) for name, matrix in zip(names, connectivity, strict=True)]


def _positions(wanted: Sequence[Any], names: Sequence[str]) -> list[int]:
    """Return positions of recordings; whole numbers are names if all of them are, and positions otherwise."""
    numbers = [name for name in wanted if isinstance(name, int | np.integer) and not isinstance(name, bool)]
    named = [str(number) in names for number in numbers]
    if any(named) and not all(named):
        raise ValueError(
            f"train_recordings={list(wanted)} has numbers that are names of recordings and others that are not; the "
            f"recordings are {shorten([*map(repr, names)], 10)}: pass names alone."
        )
    rows = []
    for name in wanted:
        if str(name) in names:
            rows.append(names.index(str(name)))
        elif name in numbers and 0 <= name < len(names):
            rows.append(int(name))
        else:
            raise ValueError(
                f"train_recordings has {name!r}, but the recordings are {shorten([*map(repr, names)], 10)}."
            )
    return sorted(set(rows))


def _functional(signals: NDArray[np.float32], n_neighbors: int) -> sparse.csr_matrix:
    """Join every region with those it correlates with most, on average over recordings."""
    n = signals.shape[1]
    correlation = np.zeros((n, n))
    for recording in signals:
        correlation += np.corrcoef(recording.astype(np.float64)).reshape(n, n) / len(signals)
    np.fill_diagonal(correlation, -np.inf)
    strongest = np.argsort(-correlation, axis=1, kind="stable")[:, :n_neighbors]
    row = np.repeat(np.arange(n), n_neighbors)
    weight = np.maximum(correlation[row, strongest.ravel()], 0)
    graph = sparse.csr_matrix((weight, (row, strongest.ravel())), shape=(n, n))
    graph.eliminate_zeros()
    return graph
