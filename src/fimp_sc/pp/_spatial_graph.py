"""Neighborhood graph from spatial coordinates."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._compat import quiet_squidpy, squidpy_graph_builder
from fimp_sc._options import checked
from fimp_sc.data._samples import warn_joined_samples
from fimp_sc.data.validate._checks import (
    check_connectivities,
    check_coordinates,
    check_graph,
    check_key_added,
    check_object,
    check_obs_key,
    dissociated_hint,
    get_graph,
    shorten,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

logger = logging.getLogger(__name__)

Method = Literal["knn", "radius", "delaunay", "grid"]
DEFAULT_NEIGHBORS = 6


@checked
def spatial_graph(
    adata: AnnData,
    *,
    method: Method = "knn",
    n_neighbors: int = DEFAULT_NEIGHBORS,
    radius: float | tuple[float, float] | None = None,
    n_rings: int = 1,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    key_added: str = "spatial",
    overwrite: bool = False,
) -> None:
    """Connect cells with their spatial neighbors.

    The graph is built by squidpy and stored under squidpy's keys, so every squidpy function can use it, and a graph
    that squidpy built is used as it is. Samples are built one by one and never joined.

    Parameters
    ----------
    adata
        Cells with coordinates in ``adata.obsm[spatial_key]``, shape ``(n_obs, 2)`` or ``(n_obs, 3)``. The expression
        values are not touched. A view becomes an independent object; the object it was taken from stays unchanged.
    method
        ``"knn"``
            the ``n_neighbors`` nearest cells. Every cell has the same number of neighbors; the relation need not be
            mutual.
        ``"radius"``
            all cells within ``radius``.
        ``"delaunay"``
            the edges of the Delaunay triangulation, without those longer than ``radius`` if that is given. Of cells
            at the same place only one gets edges.
        ``"grid"``
            the ``n_neighbors`` (6 for hexagons, 4 for squares) adjacent positions of a regular grid such as Visium's,
            out to ``n_rings`` rings.
    n_neighbors
        Number of neighbors for ``"knn"`` and ``"grid"``; left alone otherwise. With 0, of ``"knn"``, the graph is empty
        and coordinates are not needed: cells of dissociated tissue (scRNA-seq) are so described by their own genes.
    radius
        Distance in the unit of the coordinates. Needed by ``"radius"``, optional for ``"delaunay"``. A pair
        ``(minimum, maximum)`` keeps the edges whose length lies between the two.
    n_rings
        Number of rings for ``"grid"``.
    library_key
        Column of ``adata.obs`` that names the sample (section, slide, field of view) of each cell. Without it all cells
        are taken to share one coordinate system.
    spatial_key
        Key of the coordinates in ``adata.obsm``.
    key_added
        Prefix of the keys that are written.
    overwrite
        Build again although ``adata.obsp[f"{key_added}_connectivities"]`` exists. By default an existing graph is kept
        as it is, after a check that it is usable and joins no two samples; where another method or size is asked for,
        a warning is logged. Distances or parameters under these names that belong to no graph of this name are not
        replaced without it either.

    Returns
    -------
    ``None``. Written to ``adata``:

    ``adata.obsp[f"{key_added}_connectivities"]``
        float32 CSR, ``(n_obs, n_obs)``, 1 where the cell of the column is a neighbor of the cell of the row.
    ``adata.obsp[f"{key_added}_distances"]``
        CSR, ``(n_obs, n_obs)``, lengths of the edges in the unit of the coordinates (for ``"grid"``: the ring).
    ``adata.uns[f"{key_added}_neighbors"]``
        the two keys above and the parameters, without those that are ``None``.

    Raises
    ------
    MissingKeyError
        ``spatial_key`` or ``library_key`` is absent (a subclass of :class:`KeyError`).
    TypeError
        ``adata`` is no AnnData object, or a parameter has the wrong type.
    ValueError
        No cells, unusable coordinates (also one place for all cells of a sample), cells without a sample, a sample too
        small for the graph asked for, parameters that do not belong together, a slash in ``key_added``, a graph without
        any edge (but for ``n_neighbors=0``), an existing graph that is unusable, or something else under the
        names of the results. ``adata`` is unchanged whenever an exception is raised.

    Warns
    -----
    UserWarning
        Some cells have no neighbors; or, without ``library_key``, edges join samples that lie over each other, as told
        by a column of ``adata.obs`` named like fov, sample, section, slide, donor or batch, by ``adata.uns["spatial"]``
        or by the names of cells.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> adata = fimp.datasets.toy_tissue(n_obs=300)
    >>> fimp.pp.spatial_graph(adata, n_neighbors=8, library_key="section")
    >>> adata.obsp["spatial_connectivities"].nnz
    2400
    """
    add_graph(
        adata, method=method, n_neighbors=n_neighbors, radius=radius, n_rings=n_rings, library_key=library_key,
        spatial_key=spatial_key, key_added=key_added, overwrite=overwrite, columns=adata,
    )  # fmt: skip


def add_graph(
    adata: AnnData,
    *,
    method: Method = "knn",
    n_neighbors: int = DEFAULT_NEIGHBORS,
    radius: float | tuple[float, float] | None = None,
    n_rings: int = 1,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    key_added: str = "spatial",
    overwrite: bool = False,
    columns: AnnData | None = None,
) -> None:
    """Do what :func:`spatial_graph` does, to an object that may be a light copy of the user's.

    Parameters
    ----------
    columns
        Object with the columns by which samples are told that a graph without ``library_key`` joins; without it nothing
        is said of these.
    """
    check_object(adata)
    check_key_added(key_added)
    arguments = _builder_arguments(method, n_neighbors, radius, n_rings)
    keys = {"connectivities_key": f"{key_added}_connectivities", "distances_key": f"{key_added}_distances"}
    library = None if library_key is None else check_obs_key(adata, library_key, "library")

    if keys["connectivities_key"] in adata.obsp and not overwrite:
        check_graph(adata, keys["connectivities_key"], library_key)
        if columns is not None:
            warn_joined_samples(columns, get_graph(adata, keys["connectivities_key"]), spatial_key, library_key)
        asked = (method, n_neighbors, radius, n_rings) != ("knn", DEFAULT_NEIGHBORS, None, 1)
        logger.log(
            # Another graph than the default was asked for, and this one may not be it.
            logging.WARNING if asked else logging.INFO,
            "Using the graph found in adata.obsp[%r] as it is; pass overwrite=True to build it again.",
            keys["connectivities_key"],
        )
        return
    if not overwrite:
        check_free(adata, key_added)
    if method == "knn" and n_neighbors == 0:
        empty = sparse.csr_matrix((adata.n_obs, adata.n_obs), dtype=np.float32)
        _write(adata, key_added, empty, empty.astype(np.float64), {**keys, "params": {"n_neighbors": 0}})
        logger.info("Wrote a graph without edges to adata.obsp[%r]: no cell has neighbors.", keys["connectivities_key"])
        return

    coordinates = check_coordinates(adata, spatial_key, advice=dissociated_hint(adata))
    groups = {"": np.arange(adata.n_obs)} if library is None else _groups(library)
    _check_places(coordinates, groups, f"adata.obsm[{spatial_key!r}]", library_key)
    _check_library_sizes(method, n_neighbors, coordinates, groups, library_key)

    built = build_graph(method, arguments, coordinates, library)
    connectivities: csr_matrix = built.obsp["spatial_connectivities"].tocsr().astype(np.float32)
    distances: csr_matrix = built.obsp["spatial_distances"].tocsr()
    connectivities.sort_indices()
    distances.sort_indices()
    if connectivities.nnz == 0:
        raise ValueError(_no_edges_message(method, radius, coordinates))
    check_connectivities(connectivities, adata.n_obs, where=f"The {method} graph", library=library)
    if columns is not None:
        warn_joined_samples(columns, connectivities, spatial_key, library_key)
    params = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in built.uns["spatial_neighbors"]["params"].items()
        if value is not None  # h5ad files cannot hold tuples, and not every anndata reads None from them
    }

    _write(adata, key_added, connectivities, distances, {**keys, "params": params})
    logger.info(
        "Built a %s graph of %d cells in %d %s, %.1f neighbors per cell on average, for adata.obsp[%r].",
        method,
        adata.n_obs,
        len(groups),
        "sample" if len(groups) == 1 else "samples",
        connectivities.nnz / adata.n_obs,
        keys["connectivities_key"],
    )


def check_free(adata: AnnData, key_added: str) -> None:
    """Refuse to build a graph where something that belongs to no graph of this name would be replaced.

    Raises
    ------
    ValueError
        There are distances or parameters under its names, and the parameters are not those of a graph of this name.
    """
    keys = {"obsp": f"{key_added}_distances", "uns": f"{key_added}_neighbors"}
    found = adata.uns.get(keys["uns"])
    if isinstance(found, Mapping) and found.get("connectivities_key") == f"{key_added}_connectivities":
        return  # left behind when that graph was removed
    for slot, key in keys.items():
        if key in getattr(adata, slot):
            raise ValueError(
                f"adata.{slot}[{key!r}] exists, but no graph adata.obsp['{key_added}_connectivities'], and building "
                f"one would replace it: remove it if it is not needed (del adata.{slot}[{key!r}]), or build the graph "
                "under another name with fimp_sc.pp.spatial_graph(adata, key_added=...)."
            )


def _builder_arguments(method: str, n_neighbors: Any, radius: Any, n_rings: Any) -> dict[str, Any]:
    """Check the parameters against each other and return those that squidpy's builder takes."""
    if n_rings != 1 and method != "grid":
        raise ValueError(f'n_rings={n_rings} only applies to method="grid", but method={method!r}.')
    if n_neighbors != DEFAULT_NEIGHBORS and method not in {"knn", "grid"}:
        raise ValueError(f'n_neighbors={n_neighbors} only applies to method="knn" or "grid", but method={method!r}.')

    if method in {"knn", "grid"}:
        if method == "grid" and n_neighbors == 0:
            raise ValueError('n_neighbors=0 only applies to method="knn": a grid has adjacent positions.')
        if radius is not None:
            raise ValueError(
                f'radius={radius!r} only applies to method="radius" or "delaunay", but method={method!r}: '
                f'drop radius, or pass method="radius".'
            )
        return {"n_neighs": int(n_neighbors)} | ({"n_rings": int(n_rings)} if method == "grid" else {})
    if radius is None:
        if method == "radius":
            raise ValueError('method="radius" needs radius=, a distance in the unit of the coordinates.')
        return {"radius": None}
    return {"radius": _check_radius(radius, method)}


def _check_radius(radius: Any, method: str) -> float | tuple[float, float]:
    values = tuple(radius) if isinstance(radius, tuple | list) else (radius,)
    if len(values) > 2 or not values or any(isinstance(v, bool) or not isinstance(v, Real) for v in values):
        raise TypeError(f"radius must be a number or a pair (minimum, maximum), found {radius!r}.")
    numbers = tuple(float(v) for v in values)
    if not all(math.isfinite(v) for v in numbers) or numbers[-1] <= 0 or min(numbers) < 0 or numbers[0] > numbers[-1]:
        raise ValueError(f"radius must be positive and finite, a pair in increasing order; found {radius!r}.")
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    # Before squidpy 1.8 a single number was ignored for triangulations; the pair means the same in every version.
    return numbers[0] if method == "radius" else (0.0, numbers[0])


def _groups(library: pd.Categorical) -> dict[str, np.ndarray]:
    return {str(name): np.flatnonzero(library.codes == code) for code, name in enumerate(library.categories)}


def _check_places(coordinates: np.ndarray, groups: dict[str, np.ndarray], where: str, library_key: str | None) -> None:
    same = [name for name, cells in groups.items() if len(cells) > 1 and not np.ptp(coordinates[cells], axis=0).any()]
    if same:
        cells = "all cells" if library_key is None else f"all cells of {shorten([repr(name) for name in same])}"
        raise ValueError(
            f"{where} holds the same place for {cells}, so there are no neighbors to tell: put the coordinates of each "
            "cell there, or name others with spatial_key=."
        )


def _check_library_sizes(
    method: str, n_neighbors: int, coordinates: np.ndarray, groups: dict[str, np.ndarray], library_key: str | None
) -> None:
    def describe(name: str, size: int) -> str:
        cells = "1 cell" if size == 1 else f"{size} cells"
        return cells if library_key is None else f"{name!r} ({cells})"

    where = "adata has" if library_key is None else f"In adata.obs[{library_key!r}]:"
    if method in {"knn", "grid"}:
        small = [describe(name, len(cells)) for name, cells in groups.items() if len(cells) <= n_neighbors]
        if small:
            largest = min(map(len, groups.values())) - 1
            advice = "leave these cells out"
            if largest:
                sample = "" if library_key is None else f", library_key={library_key!r}"
                call = f"fimp_sc.pp.spatial_graph(adata, n_neighbors={largest}{sample})"
                advice += f", or build a graph of fewer neighbors first: {call}"
            raise ValueError(
                f"{where} {shorten(small)}, too few for n_neighbors={n_neighbors}, which needs at least "
                f"{n_neighbors + 1} cells in every sample: {advice}."
            )
    if method == "delaunay":
        dimensions = coordinates.shape[1]
        flat = [
            describe(name, len(cells))
            for name, cells in groups.items()
            if np.linalg.matrix_rank(coordinates[cells] - coordinates[cells].mean(axis=0)) < dimensions
        ]
        if flat:
            shape = "a line" if dimensions == 2 else "a plane"
            raise ValueError(
                f"{where} {shorten(flat)} that lie on {shape} or are fewer than {dimensions + 1}, so they cannot be "
                f'triangulated: use method="knn" or "radius", or only the columns of the coordinates that vary.'
            )


def build_graph(
    method: str, arguments: dict[str, Any], coordinates: np.ndarray, library: pd.Categorical | None = None
) -> AnnData:
    """Let squidpy write the graph to an object of its own, so that the user's is untouched if it fails.

    Parameters
    ----------
    method, arguments
        Which builder of squidpy, and what it takes.
    coordinates
        ``(n, 2)`` or ``(n, 3)``, checked.
    library
        ``(n,)`` samples, which are built one by one.

    Returns
    -------
    Object with ``obsp["spatial_connectivities"]``, ``obsp["spatial_distances"]`` and ``uns["spatial_neighbors"]``.
    """
    from anndata import AnnData

    obs = pd.DataFrame(index=pd.RangeIndex(len(coordinates)).astype(str))
    if library is not None:
        obs["library"] = pd.Categorical(library.codes)
    light = AnnData(obs=obs, obsm={"spatial": coordinates})
    builder = squidpy_graph_builder(method)  # imports squidpy, whose logger is set up then
    with quiet_squidpy(), warnings.catch_warnings():
        # Only older versions reach the deprecated function, see `_compat`.
        warnings.filterwarnings("ignore", message=".*spatial_neighbors.*deprecated", category=FutureWarning)
        builder(light, library_key=None if library is None else "library", **arguments)
    return light


def _no_edges_message(method: str, radius: Any, coordinates: np.ndarray) -> str:
    from scipy.spatial import cKDTree

    message = f"The {method} graph with radius={radius!r} has no edges"
    if len(coordinates) < 2:
        return f"{message}: adata has a single cell."
    nearest = float(np.median(cKDTree(coordinates).query(coordinates, k=2)[0][:, 1]))
    return f"{message}: the median distance from a cell to its nearest one is {nearest:.4g}. Pass another radius."


def _write(
    adata: AnnData, key_added: str, connectivities: csr_matrix, distances: csr_matrix, neighbors: dict[str, Any]
) -> None:
    from anndata import ImplicitModificationWarning

    with warnings.catch_warnings():
        # Writing to a view makes it an object of its own, as documented above.
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        adata.obsp[neighbors["connectivities_key"]] = connectivities
        adata.obsp[neighbors["distances_key"]] = distances
        adata.uns[f"{key_added}_neighbors"] = neighbors
