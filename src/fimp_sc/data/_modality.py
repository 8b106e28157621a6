"""One modality of a MuData: what its nodes hold, how it is written down, and how it is read back."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc.data.graph._adjacency import check_adjacency
from fimp_sc.data.sequences._kinds import sequence_kinds
from fimp_sc.data.sequences._pixels import check_images
from fimp_sc.data.storage._elements import in_memory, missing_key
from fimp_sc.data.validate._checks import check_coordinates, check_obs_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from mudata import MuData
    from scipy.sparse import csr_matrix

MODALITY_KEY = "fimp_modality"
CONNECTIVITIES_KEY = "spatial_connectivities"
DISTANCES_KEY = "spatial_distances"
SPATIAL_KEY = "spatial"


@contextmanager
def quiet_mudata() -> Iterator[None]:
    """Make, read or write a MuData without what mudata and pandas announce about their own future versions.

    Columns of the modalities are not copied to the whole object, which is the default from mudata 0.4 on.
    """
    import mudata

    set_options = getattr(mudata, "set_options", None)
    root, handler = logging.getLogger(), logging.NullHandler()
    # Setting options logs by `logging.info`, which gives a root logger without handlers one that prints everything.
    root.addHandler(handler)
    try:
        with warnings.catch_warnings(), nullcontext() if set_options is None else set_options(pull_on_update=False):
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        root.removeHandler(handler)


def check_modality_name(modality: Any) -> str:
    """Return the name of a modality.

    Raises
    ------
    TypeError, ValueError
        No text, or a name that cannot be written to a file.
    """
    if not isinstance(modality, str):
        raise TypeError(f"modality must be a name, found {modality!r}.")
    if not modality or "/" in modality:
        raise ValueError(f"modality={modality!r} must not be empty and must not contain '/'.")
    return modality


def make_mudata(
    adata: AnnData,
    modality: str,
    info: dict[str, Any],
    graph: csr_matrix,
    *,
    distances: csr_matrix | None = None,
    parameters: dict[str, Any] | None = None,
) -> MuData:
    """Write graph and description to ``adata`` and return it as the only modality of a MuData.

    Parameters
    ----------
    info
        Goes to ``uns["fimp_modality"]``; entries that are ``None`` are left out, which h5ad files cannot hold.
    parameters
        How the graph was made, for ``uns["spatial_neighbors"]``, where squidpy looks it up.
    """
    from mudata import MuData

    key = info.get("connectivities_key", CONNECTIVITIES_KEY)
    weighted = bool((graph.data != 1).any())
    info = {"connectivities_key": key, "weighted": weighted} | info
    adata.obsp[key] = graph
    if distances is not None:
        adata.obsp[DISTANCES_KEY] = distances
    if parameters is not None:
        keys = {"connectivities_key": key} | ({} if distances is None else {"distances_key": DISTANCES_KEY})
        adata.uns["spatial_neighbors"] = {**keys, "params": {k: v for k, v in parameters.items() if v is not None}}
    adata.uns[MODALITY_KEY] = {k: v for k, v in info.items() if v is not None}
    with quiet_mudata():
        return MuData({modality: adata})


def get_modality(mdata: Any, modality: str | None = None) -> tuple[str, AnnData]:
    """Return the name of a modality and its object; of an AnnData object, itself.

    Raises
    ------
    MissingKeyError
        There is no such modality.
    TypeError
        Neither a MuData nor an AnnData object.
    ValueError
        No modality is named although there are several, or the modality has no nodes.
    """
    from anndata import AnnData
    from mudata import MuData

    if isinstance(mdata, AnnData):
        name, adata = modality or "adata", mdata
    elif isinstance(mdata, MuData):
        found = list(mdata.mod)
        if modality is None and len(found) != 1:
            raise ValueError(f"mdata has {len(found)} modalities: choose one with modality=, of {found}.")
        name = found[0] if modality is None else modality
        if name not in mdata.mod:
            raise missing_key(name, "mdata.mod", found, "Name the modality with modality=.")
        adata = mdata.mod[name]
    else:
        raise TypeError(f"Expected a MuData object, found {type(mdata).__name__}.")
    if adata.n_obs == 0:
        raise ValueError(f"The modality {name!r} has no nodes (n_obs = 0): check the filters applied before.")
    return name, adata


def place_of(data: AnnData | MuData, modality: str) -> str:
    """Return what a user writes for an object that :func:`get_modality` found: ``mdata['rna']``, or ``adata``."""
    return f"mdata[{modality!r}]" if hasattr(data, "mod") else "adata"


def describe_modality(
    mdata: MuData | AnnData,
    modality: str | None = None,
    *,
    need_graph: bool = True,
    need_coordinates: bool = False,
) -> dict[str, Any]:
    """Check a modality of any origin and say what its nodes hold.

    Parameters
    ----------
    mdata
        Object whose modality says in ``uns["fimp_modality"]["kind"]`` what it holds: ``"signal"`` (time points in
        ``X``), ``"patch"`` (pixels in ``obsm["pixels"]``, or files in ``obs["path"]``; ``"image_shape"`` beside the
        kind) or ``"feature"`` (``X`` or a layer). Beside the kind may stand ``"connectivities_key"`` (default
        ``"spatial_connectivities"``), ``"library_key"`` and ``"sampling_interval"`` (seconds). :func:`fimp_sc.pp.text`
        makes the kind ``"text"``.
    modality
        Its name; not needed if there is only one.
    need_graph
        Whether the modality must have a graph.
    need_coordinates
        Whether its nodes must have coordinates in ``obsm["spatial"]``.

    Returns
    -------
    A dictionary with ``modality``, ``kind``, ``n_obs``, ``n_edges`` (without self-loops; 0 without a graph),
    ``connectivities_key`` and ``library_key`` (``None`` if there is none), ``n_dimensions`` (of the coordinates; 0
    without), and

    - signal: ``n_times``, ``sampling_interval`` (seconds, or ``None``), ``n_recordings``;
    - patch: ``image_shape`` (height, width, channels), ``stored`` (``"pixels"`` or ``"files"``);
    - feature: ``n_features``;
    - a registered kind (:func:`fimp_sc.data.register_kind`): ``size``.

    Raises
    ------
    MissingKeyError
        There is no such modality, it does not say what it holds, or its graph, pixels, coordinates or recordings are
        absent.
    TypeError
        Neither a MuData nor an AnnData object, or values that are not real numbers.
    ValueError
        An unknown kind, a graph of another size, a graph that joins recordings, NaN, infinite or constant signals, or
        pixels that do not match the shape of an image.
    """
    name, adata = get_modality(mdata, modality)
    where = f"mdata[{name!r}]" if mdata is not adata else "adata"
    info = modality_info(adata, where)
    description: dict[str, Any] = {"modality": name, "kind": info["kind"], "n_obs": adata.n_obs}
    description |= {"n_edges": 0, "connectivities_key": None, "library_key": info.get("library_key")}
    library = None
    if info.get("library_key") is not None:
        library = check_obs_key(adata, str(info["library_key"]), "library")
    key = str(info.get("connectivities_key", CONNECTIVITIES_KEY))
    if need_graph or key in adata.obsp:
        graph = _graph(mdata, adata, key, where)
        row = np.repeat(np.arange(adata.n_obs), np.diff(graph.indptr))
        joined = np.zeros(0) if library is None else library.codes[row] != library.codes[graph.indices]
        if joined.any():
            raise ValueError(
                f"{where}.obsp[{key!r}] has {int(joined.sum()):,} edges that join different "
                f"{info['library_key']!r}: remove them, or build the graph for each one by itself."
            )
        description |= {"n_edges": int((graph.indices != row).sum()), "connectivities_key": key}
    spatial = need_coordinates or SPATIAL_KEY in adata.obsm
    description["n_dimensions"] = check_coordinates(adata, SPATIAL_KEY).shape[1] if spatial else 0
    return description | _content(adata, info, where, 1 if library is None else len(library.categories))


def described(adata: AnnData, where: str = "adata") -> Mapping[str, Any] | None:
    """Return what an object says of its nodes in ``uns``, if anything.

    Raises
    ------
    TypeError
        It is no dictionary.
    """
    info = adata.uns.get(MODALITY_KEY)
    if info is not None and not isinstance(info, Mapping):
        raise TypeError(
            f"{where}.uns[{MODALITY_KEY!r}] must be a dictionary such as {{'kind': 'signal'}}, found "
            f"{type(info).__name__}: correct it, or delete it if the nodes hold expression."
        )
    return info


def modality_info(adata: AnnData, where: str) -> dict[str, Any]:
    """Return what a modality says of itself in ``uns``.

    Raises
    ------
    MissingKeyError
        It says nothing.
    ValueError
        Its kind is unknown.
    """
    info = described(adata, where)
    if info is None or "kind" not in info:
        raise missing_key(
            "kind" if info is not None else MODALITY_KEY,
            f"{where}.uns" if info is None else f"{where}.uns[{MODALITY_KEY!r}]",
            adata.uns if info is None else info,
            "Make the object with fimp_sc.pp.fmri, images, text, features or from_pyg, or say what its nodes hold with "
            f"{where}.uns[{MODALITY_KEY!r}] = {{'kind': 'signal'}} (or 'patch', 'feature').",
        )
    kinds = [*sequence_kinds(), "feature"]
    if str(info["kind"]) not in kinds:
        raise ValueError(
            f"{where}.uns[{MODALITY_KEY!r}]['kind'] is {info['kind']!r}: it must be one of "
            f"{', '.join(map(repr, kinds))}."
        )
    return dict(info)


def _graph(mdata: Any, adata: AnnData, key: str, where: str) -> csr_matrix:
    if key not in adata.obsp:
        advice = "Build the graph with fimp_sc.pp.fmri, images or features, or store one of your own there."
        outer = getattr(mdata, "obsp", {}) if mdata is not adata else {}
        if key in outer:
            advice = (
                f"There is one in mdata.obsp, of {outer[key].shape[0]:,} nodes, while the modality has "
                f"{adata.n_obs:,}: store the part of these nodes in {where}.obsp[{key!r}]."
            )
        raise missing_key(key, f"{where}.obsp", adata.obsp, advice)
    found = f"{where}.obsp[{key!r}]"
    return check_adjacency(in_memory(adata.obsp[key], found), adata.n_obs, where=found)


def _content(adata: AnnData, info: dict[str, Any], where: str, n_recordings: int) -> dict[str, Any]:
    """Return what only this kind of modality has."""
    if info["kind"] == "feature":
        if adata.X is None and len(adata.layers) == 0:
            raise ValueError(f"{where}.X is None: store the values of the nodes there, one row each.")
        if adata.n_vars == 0:
            raise ValueError(f"{where} has no features (n_vars = 0).")
        return {"n_features": adata.n_vars}
    kind = sequence_kinds()[str(info["kind"])]
    size = kind.size(adata, where)
    if info["kind"] == "patch":
        return {"image_shape": tuple(size), "stored": check_images(adata, where)}
    if info["kind"] != "signal":
        return {"size": list(size)}
    interval = info.get("sampling_interval")
    if interval is not None and not (np.isfinite(interval) and interval > 0):
        raise ValueError(f"{where}.uns[{MODALITY_KEY!r}]['sampling_interval'] must be positive seconds: {interval!r}.")
    return {
        "n_times": size[0],
        "sampling_interval": None if interval is None else float(interval),
        "n_recordings": n_recordings,
    }
