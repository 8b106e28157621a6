"""Brain regions: BOLD signals and a graph of regions as one modality of a MuData."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._options import checked
from fimp_sc.data._modality import CONNECTIVITIES_KEY, SPATIAL_KEY, check_modality_name, make_mudata
from fimp_sc.data._nodes import by_name, label_columns, label_values, node_names
from fimp_sc.data.graph._adjacency import euclidean_lengths, report_isolated
from fimp_sc.data.sequences._signal import check_signals
from fimp_sc.pp._fmri_graph import DEFAULT_NEIGHBORS, Method, region_graphs
from fimp_sc.pp._fmri_signals import Orientation, read_recordings

if TYPE_CHECKING:
    from mudata import MuData
    from numpy.typing import ArrayLike, NDArray

logger = logging.getLogger(__name__)

LIBRARY_KEY = "recording"
REGION_KEY = "region"


@checked
def fmri(
    bold: Any,
    *,
    connectivity: Any = None,
    coordinates: ArrayLike | None = None,
    region_names: Sequence[Any] | None = None,
    labels: Any = None,
    recordings: Sequence[Any] | None = None,
    sampling_interval: float | None = None,
    orientation: Orientation | None = None,
    method: Method | None = None,
    n_neighbors: int = DEFAULT_NEIGHBORS,
    train_recordings: Sequence[Any] | None = None,
    top_fraction: float | None = None,
    threshold: float | None = None,
    modality: str = "fmri",
) -> MuData:
    """Make a MuData of brain regions from their signals.

    Every region of every recording is one observation; regions of different recordings are never joined. The signals
    stay as they are given.

    Parameters
    ----------
    bold
        ``(recording, region, time)`` array, ``(region, time)`` array of one recording, or a list or a dictionary (by
        recording) of arrays ``(time, region)``, which is what nilearn's maskers return.
    connectivity
        Structural connectivity: ``(region, region)`` matrix (dense or sparse) for all recordings, or one for each
        recording, as ``(recording, region, region)`` array, list or dictionary. Entry ``[i, j]`` is the weight of the
        edge from ``j`` to ``i``; data frames with the names of the regions are brought into their order. The diagonal
        is left out. A precomputed graph of any other kind fits here too.
    coordinates
        ``(region, 3)``, or ``(recording, region, 3)`` where every recording has its own.
    region_names
        Names of the regions, as in the atlas.
    labels
        Data frame or dictionary of columns, or one array (column ``"label"``), with one label for each region, for each
        recording, or ``(recording, region)`` for each observation. An index with the names of regions or recordings
        says which label is whose, whatever the order.
    recordings
        Names of the recordings (subjects, sessions, runs); not together with a dictionary.
    sampling_interval
        Seconds between two time points (repetition time, TR).
    orientation
        ``"region_time"`` or ``"time_region"``: the order of the last two axes of ``bold``. By default the former for
        one array, the latter for lists and dictionaries.
    method
        ``"structural"`` (default where ``connectivity`` is given)
            the edges of ``connectivity`` with their weights; dense ones are thinned out with ``top_fraction`` or
            ``threshold``.
        ``"coordinates"`` (default otherwise)
            the ``n_neighbors`` nearest regions, weight 1.
        ``"functional"``
            the ``n_neighbors`` most correlated regions, weighted by the mean of the correlations in
            ``train_recordings``; correlations below zero make no edges. All recordings get this graph, so recordings
            that a model is tested on must not be among ``train_recordings``.
    n_neighbors
        For ``"coordinates"`` and ``"functional"``.
    train_recordings
        Names (or positions, counted from 0; numbers are names where all of them are) of the recordings that
        ``"functional"`` may look at; required there.
    top_fraction
        For ``"structural"``: fraction of the pairs of regions to keep, the strongest of each recording's matrix;
        equally strong ones are kept together. Connectivities from tractography often join almost all regions: 0.1 is
        common.
    threshold
        For ``"structural"``: smallest weight to keep. Negative weights, which are refused otherwise, make no edges
        where ``top_fraction`` or ``threshold`` is given.
    modality
        Name of the modality.

    Returns
    -------
    MuData with the modality ``modality``, whose

    - ``obs_names`` are ``"{recording}:{region}"``; ``obs["recording"]`` and ``obs["region"]`` are categorical;
    - ``var_names`` are ``"t0"``, ``"t1"``, …; ``var["time"]`` in seconds where ``sampling_interval`` is given;
    - ``X`` is a float32 array ``(recording × region, time)``;
    - ``obsm["spatial"]`` is a float64 array ``(n_obs, 3)`` where ``coordinates`` are given;
    - ``obsp["spatial_connectivities"]`` (float32) and, with coordinates, ``obsp["spatial_distances"]`` (float64, in
      their unit) are block-diagonal CSR matrices without self-loops;
    - ``uns["fimp_modality"]`` has ``kind="signal"``, ``library_key="recording"``, ``graph`` (the method) and, where
      known, ``sampling_interval`` and ``train_recordings``.

    Raises
    ------
    TypeError
        Signals, weights or coordinates that are not real numbers.
    ValueError
        Signals that look transposed, differ in length, are NaN, infinite or constant; a graph or coordinates of another
        number of regions; names that repeat; parameters that do not belong together.

    Examples
    --------
    >>> import numpy as np
    >>> import fimp_sc as fimp
    >>> rng = np.random.default_rng(0)
    >>> mdata = fimp.pp.fmri(rng.normal(size=(2, 10, 50)), coordinates=rng.normal(size=(10, 3)), sampling_interval=0.72)
    >>> mdata["fmri"].shape
    (20, 50)
    """
    from anndata import AnnData

    check_modality_name(modality)
    positions = None if coordinates is None else _check_coordinates(coordinates)
    expected = _expected_regions(region_names, positions, connectivity)
    names, signals = read_recordings(bold, recordings, orientation, expected)
    named = recordings is not None or isinstance(bold, Mapping)
    n_recordings, n_regions, n_times = signals.shape
    regions = node_names(region_names, n_regions, "region", "region_names")
    values = signals.reshape(-1, n_times)
    check_signals(values, lambda i: f"region {regions[i % n_regions]!r} of recording {names[i // n_regions]!r}")
    if positions is not None and positions.ndim == 3 and len(positions) != n_recordings:
        raise ValueError(f"coordinates are of {len(positions)} recordings, but bold has {n_recordings}.")

    graphs, parameters = region_graphs(
        signals,
        names,
        region_names=None if region_names is None else regions,
        connectivity=connectivity,
        coordinates=positions,
        method=method,
        n_neighbors=n_neighbors,
        train_recordings=train_recordings,
        top_fraction=top_fraction,
        threshold=threshold,
    )
    graph = sparse.csr_matrix(sparse.block_diag(graphs, format="csr"))
    graph.sort_indices()
    obs_names = pd.Index([f"{recording}:{region}" for recording in names for region in regions])
    if not obs_names.is_unique:
        raise ValueError(f"Two observations would be named {obs_names[obs_names.duplicated()][0]!r}: rename regions.")
    obs = pd.DataFrame(
        {
            LIBRARY_KEY: pd.Categorical(np.repeat(names, n_regions), categories=names),
            REGION_KEY: pd.Categorical(np.tile(regions, n_recordings), categories=regions),
        }
        | _labels(labels, names, regions, named=(region_names is not None, named)),
        index=obs_names,
    )
    var = pd.DataFrame(index=[f"t{i}" for i in range(n_times)])
    if sampling_interval is not None:
        var["time"] = np.arange(n_times) * sampling_interval
    adata = AnnData(X=values, obs=obs, var=var)
    distances = None
    if positions is not None:
        points = np.tile(positions, (n_recordings, 1)) if positions.ndim == 2 else positions.reshape(-1, 3)
        adata.obsm[SPATIAL_KEY] = points
        distances = euclidean_lengths(graph, points)
    info = {
        "kind": "signal",
        "library_key": LIBRARY_KEY,
        "graph": parameters["method"],
        "sampling_interval": sampling_interval,
        "train_recordings": parameters.get("train_recordings"),
    }
    mdata = make_mudata(adata, modality, info, graph, distances=distances, parameters=parameters)
    report_isolated(graph, list(obs_names), "region")
    logger.info(
        "%d recordings × %d regions × %d time points; %s graph with %.1f neighbors per region, in mdata[%r].obsp[%r].",
        n_recordings,
        n_regions,
        n_times,
        parameters["method"],
        graph.nnz / len(obs_names),
        modality,
        CONNECTIVITIES_KEY,
    )
    return mdata


def _check_coordinates(coordinates: Any) -> NDArray[np.float64]:
    try:
        points = np.asarray(coordinates, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError("coordinates must be an array of numbers, (region, 3).") from None
    if points.ndim not in {2, 3} or points.shape[-1] != 3:
        raise ValueError(f"coordinates must be (region, 3) or (recording, region, 3), found {points.shape}.")
    if not np.isfinite(points).all():
        region = int(np.argwhere(~np.isfinite(points))[0][-2])
        raise ValueError(
            f"coordinates are NaN or infinite, first for region {region} (counted from 0): give every region "
            "coordinates, or leave it out of bold too."
        )
    return points


def _expected_regions(region_names: Any, coordinates: NDArray[np.float64] | None, connectivity: Any) -> dict[str, int]:
    """Return how many regions each argument speaks of; they must agree."""
    found: dict[str, int] = {}
    if region_names is not None:
        found["region_names"] = len(region_names)
    if coordinates is not None:
        found["coordinates"] = coordinates.shape[-2]
    if connectivity is not None:
        one = connectivity
        while isinstance(one, Mapping | list | tuple) and len(one):
            one = next(iter(one.values())) if isinstance(one, Mapping) else one[0]
            if isinstance(one, Real):  # a row of a nested list
                one = np.asarray(connectivity)
        shape = np.shape(one) if not sparse.issparse(one) else one.shape
        if len(shape) not in {2, 3} or shape[-1] != shape[-2]:
            raise ValueError(f"connectivity must be square, (region, region) or one for each recording, found {shape}.")
        found["connectivity"] = int(shape[-1])
    if len(set(found.values())) > 1:
        counts = ", ".join(f"{name} {n}" for name, n in found.items())
        raise ValueError(f"Different numbers of regions: {counts}. All must describe the same regions in one order.")
    return found


def _labels(
    labels: Any, recordings: Sequence[str], regions: Sequence[str], *, named: tuple[bool, bool]
) -> dict[str, Any]:
    """Return label columns; ``named`` tells whether the names of regions and of recordings are the user's own."""
    columns, n_recordings, n_regions = {}, len(recordings), len(regions)
    for name, values in label_columns(labels, (LIBRARY_KEY, REGION_KEY)).items():
        shape = np.shape(values)
        if shape == (n_recordings, n_regions):
            columns[name] = label_values(np.asarray(values).reshape(-1))
            continue
        if shape == (n_regions,) == (n_recordings,):
            raise ValueError(
                f"labels ({name!r}) may be of the {n_regions} regions or of the {n_recordings} recordings: pass the "
                "shape (recording, region)."
            )
        if shape == (n_regions,):
            rows = np.tile(np.arange(n_regions), n_recordings)
            values = by_name(values, regions, f"labels ({name!r})", given=named[0])
        elif shape == (n_recordings,):
            rows = np.repeat(np.arange(n_recordings), n_regions)
            values = by_name(values, recordings, f"labels ({name!r})", given=named[1])
        else:
            raise ValueError(
                f"labels ({name!r}) has the shape {shape}: there are {n_regions} regions and {n_recordings} "
                "recordings, so one label for each region, for each recording, or (recording, region)."
            )
        columns[name] = label_values(values, rows)
    return columns
