"""Images at places: pixels or files and a graph of the images as one modality of a MuData."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from fimp_sc._options import checked
from fimp_sc.data._modality import CONNECTIVITIES_KEY, SPATIAL_KEY, check_modality_name, make_mudata
from fimp_sc.data._nodes import node_names, one_label_each
from fimp_sc.data.graph._adjacency import (
    check_adjacency,
    haversine_km,
    haversine_lengths,
    nearest_places,
    report_isolated,
)
from fimp_sc.data.sequences._image_files import Channels, decode_files, flatten_images, inspect_files
from fimp_sc.data.sequences._pixels import PATH_KEY, PIXELS_KEY

if TYPE_CHECKING:
    from mudata import MuData
    from numpy.typing import ArrayLike, NDArray
    from scipy.sparse import csr_matrix

logger = logging.getLogger(__name__)

DEFAULT_NEIGHBORS = 6


@checked
def images(
    images: Any,
    *,
    coordinates: ArrayLike | None = None,
    adjacency: Any = None,
    labels: Any = None,
    names: Sequence[Any] | None = None,
    channels: Channels = "last",
    image_size: int | tuple[int, int] | None = None,
    lazy: bool = True,
    method: Literal["knn", "radius"] = "knn",
    n_neighbors: int = DEFAULT_NEIGHBORS,
    radius_km: float | None = None,
    modality: str = "image",
) -> MuData:
    """Make a MuData of images that are joined where they are near.

    Parameters
    ----------
    images
        ``(n, H, W)`` or ``(n, H, W, C)`` array, uint8, or real numbers between 0 and 1 (stored with 8 bits); or a list
        of PNG, JPEG, TIFF or WebP files, which are read with Pillow. Files become gray (one channel) if all are gray,
        RGB otherwise, without transparency; turned as the camera noted.
    coordinates
        ``(n, 2)`` latitude and longitude in degrees, in this order.
    adjacency
        ``(n, n)`` array or sparse matrix to use as the graph instead; entry ``[i, j]`` is the weight of the edge from
        ``j`` to ``i``. Its diagonal is left out.
    labels
        Data frame or dictionary of columns, or one array (column ``"label"``), with one label for each image; an
        index with the names of the images says which is whose.
    names
        Names of the images; by default the names of the files. To join them with another modality of the same nodes in
        one MuData, pass the names that the nodes have there.
    channels
        ``"first"`` if the array is ``(n, C, H, W)``.
    image_size
        Resize all images to this height and width, or to a square. Without it all must have one size.
    lazy
        Keep the names of files and decode them when they are needed, instead of now. Does not matter for arrays.
    method
        ``"knn"`` joins an image with its ``n_neighbors`` nearest (within ``radius_km`` if that is given), ``"radius"``
        with all within ``radius_km``. Distances are great-circle distances (haversine).
    n_neighbors
        For ``"knn"``.
    radius_km
        Largest distance in km; required for ``"radius"``.
    modality
        Name of the modality.

    Returns
    -------
    MuData with the modality ``modality`` without variables, whose

    - ``obsm["pixels"]`` is a uint8 array ``(n, H × W × C)``, channels last; of lazy files there is ``obs["path"]``
      (absolute) instead. :func:`fimp_sc.data.read_pixels` serves both;
    - ``obsm["spatial"]`` has the coordinates where they are given;
    - ``obsp["spatial_connectivities"]`` (float32; 1, or the weights of ``adjacency``) and, with coordinates,
      ``obsp["spatial_distances"]`` (km) are CSR matrices without self-loops;
    - ``uns["fimp_modality"]`` has ``kind="patch"``, ``image_shape=[H, W, C]``, ``resize``, ``graph`` and, with
      coordinates, ``coordinate_unit`` and ``distance_unit``.

    Raises
    ------
    TypeError
        Images, coordinates or weights that are not numbers.
    ValueError
        Files that are missing, no images, or of different sizes; values out of range; a graph, coordinates or labels of
        another number of images; coordinates that are out of range; a graph without edges; parameters that do not
        belong together.

    Examples
    --------
    >>> import numpy as np
    >>> import fimp_sc as fimp
    >>> rng = np.random.default_rng(0)
    >>> photos = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    >>> places = [55.70, 13.20] + 0.01 * rng.normal(size=(30, 2))
    >>> mdata = fimp.pp.images(photos, coordinates=places, n_neighbors=4)
    >>> fimp.data.read_pixels(mdata["image"], [3, 5]).shape
    (2, 32, 32, 3)
    """
    from anndata import AnnData

    check_modality_name(modality)
    size = _check_size(image_size)
    paths = [images] if isinstance(images, str | Path) else images
    listed = isinstance(paths, list | tuple | pd.Series | pd.Index | np.ndarray) and getattr(paths, "ndim", 1) > 0
    from_files = listed and _are_paths(paths)
    pixels, default_names = None, names is None
    if from_files:
        files, shape = inspect_files(list(paths), size)
        default = [Path(file).name for file in files]
        names = (default if len(set(default)) == len(files) else files) if names is None else names
        if not lazy:
            pixels = decode_files(files, shape, resize=size is not None).reshape(len(files), -1)
    else:
        pixels, shape = flatten_images(images, channels, size)
    n = len(files) if pixels is None else len(pixels)
    known = node_names(names, n, "image", "names")
    obs = pd.DataFrame(
        ({PATH_KEY: files} if from_files else {})
        | one_label_each(labels, known, "image", (PATH_KEY,), given=not default_names),
        index=pd.Index(known),
    )
    places = None if coordinates is None else _check_places(coordinates, n)
    graph, distances, parameters = _graph(places, adjacency, n, method, n_neighbors, radius_km)

    adata = AnnData(obs=obs)
    if pixels is not None:
        adata.obsm[PIXELS_KEY] = pixels
    if places is not None:
        adata.obsm[SPATIAL_KEY] = places
    info = {
        "kind": "patch",
        "image_shape": list(shape),
        "resize": size is not None,
        "graph": parameters["method"],
        "coordinate_unit": None if places is None else "degrees: latitude, longitude",
        "distance_unit": None if places is None else "km",
    }
    mdata = make_mudata(adata, modality, info, graph, distances=distances, parameters=parameters)
    report_isolated(graph, list(adata.obs_names), "image")
    logger.info(
        "%d images of %d × %d pixels × %d channels; %s graph with %.1f neighbors per image, in mdata[%r].obsp[%r].",
        n,
        *shape,
        parameters["method"],
        graph.nnz / n,
        modality,
        CONNECTIVITIES_KEY,
    )
    return mdata


def _are_paths(values: Any) -> bool:
    if len(values) == 0:
        raise ValueError("images is empty: pass at least one image.")
    return all(isinstance(value, str | Path) for value in values)


def _check_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, Sequence | np.ndarray) and np.ndim(size) == 1 else (size, size)
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, Integral) for v in pair):
        raise TypeError(f"image_size must be a whole number or (height, width), found {size!r}.")
    if min(pair) < 1:
        raise ValueError(f"image_size must be at least 1, found {size!r}.")
    return int(pair[0]), int(pair[1])


def _check_places(coordinates: Any, n: int) -> NDArray[np.float64]:
    try:
        places = np.array(coordinates, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError("coordinates must be an array of numbers: latitude and longitude in degrees.") from None
    if places.shape != (n, 2):
        raise ValueError(f"coordinates has the shape {places.shape}, but {n:,} images need {(n, 2)}.")
    bad = np.flatnonzero(~np.isfinite(places).all(axis=1))
    if bad.size:
        raise ValueError(
            f"coordinates are NaN or infinite for {bad.size:,} of {n:,} images, first image {bad[0]} (counted from 0): "
            "give them places, or leave these images out."
        )
    limits = np.array([90.0, 180.0])
    outside = np.flatnonzero((np.abs(places) > limits).any(axis=1))
    if outside.size:
        swapped = (np.abs(places[:, ::-1]) <= limits).all()
        advice = (
            "Latitude and longitude seem to be swapped: latitude comes first."
            if swapped
            else "Pass degrees. Where images have places in a plane, such as pixels of a slide, pass a graph instead: "
            "adjacency=sklearn.neighbors.kneighbors_graph(places, 6)."
        )
        raise ValueError(
            f"coordinates of {outside.size:,} of {n:,} images are no latitude (-90 to 90) and longitude (-180 to 180), "
            f"first {tuple(places[outside[0]].tolist())}. {advice}"
        )
    return places


def _graph(
    places: NDArray[np.float64] | None, adjacency: Any, n: int, method: str, n_neighbors: int, radius_km: float | None
) -> tuple[csr_matrix, csr_matrix | None, dict[str, Any]]:
    """Return graph, distances and the parameters that made them."""
    if adjacency is not None:
        if method != "knn" or n_neighbors != DEFAULT_NEIGHBORS or radius_km is not None:
            raise ValueError("method=, n_neighbors= and radius_km= do not apply where adjacency= is given: drop them.")
        graph = check_adjacency(adjacency, n, where="adjacency", what="image", self_loops=False).astype(np.float32)
        if graph.nnz == 0:
            raise ValueError("adjacency has no edges between images.")
        return graph, None if places is None else haversine_lengths(graph, places), {"method": "adjacency"}
    if places is None:
        raise ValueError("A graph needs coordinates= (latitude, longitude) of the images, or adjacency=.")
    if radius_km is None and method == "radius":
        raise ValueError('method="radius" needs radius_km=, a distance in km.')
    if method == "radius" and n_neighbors != DEFAULT_NEIGHBORS:
        raise ValueError('n_neighbors= only applies to method="knn", but method="radius".')
    if method == "knn" and not 1 <= n_neighbors < n:
        raise ValueError(f"n_neighbors={n_neighbors} must be at least 1 and less than the {n:,} images.")
    graph, distances = nearest_places(places, None if method == "radius" else n_neighbors, radius_km)
    if graph.nnz == 0:
        nearest = "" if n < 2 else f": an image is {_median_nearest(places):.4g} km from its nearest one (median)"
        raise ValueError(f"The graph with radius_km={radius_km!r} has no edges{nearest}. Pass a larger radius.")
    parameters = {"method": method, "n_neighbors": int(n_neighbors) if method == "knn" else None}
    return graph, distances, {**parameters, "radius_km": radius_km}


def _median_nearest(places: NDArray[np.float64]) -> float:
    graph, _ = nearest_places(places, 1, None)
    return float(np.median(haversine_km(places, places[graph.indices])))
