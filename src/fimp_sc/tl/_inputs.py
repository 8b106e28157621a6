"""What a call of a tool reads: keys, and a working copy that holds what a model needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
from anndata import AnnData

from fimp_sc.data._checks import (
    check_anndata,
    check_coordinates,
    check_graph,
    check_labels,
    check_object,
    check_obs_key,
    check_scaled,
    get_matrix,
    get_obs,
    in_memory,
)
from fimp_sc.data._kinds import sequence_kind
from fimp_sc.data._modality import MODALITY_KEY, get_modality, quiet_mudata
from fimp_sc.data._parts import as_modalities, check_whole, is_mudata, nodes_of, parts_of, registered_keys
from fimp_sc.model._setup import check_layer
from fimp_sc.pp._spatial_graph import add_graph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mudata import MuData

CONNECTIVITIES = "_connectivities"


@dataclass(frozen=True)
class Inputs:
    """Where a call finds its data in the object; the parameters that all tools share."""

    layer: str | None = None
    library_key: str | None = None
    batch_key: str | None = None
    spatial_key: str = "spatial"
    connectivities_key: str = "spatial_connectivities"
    input_scale: str = "auto"
    labels_key: str | None = None
    unlabeled_category: str = "Unknown"
    modality: tuple[str, ...] | None = None


def copied(data: AnnData | MuData) -> AnnData | MuData:
    """Return a copy of an object with nothing added: mudata would copy columns of modalities to the whole."""
    with quiet_mudata():
        return data.copy()


def choose(
    data: AnnData | MuData, modality: str | Sequence[str] | None, **keys: Any
) -> tuple[AnnData | MuData, Inputs]:
    """Return the object that a call reads and writes, and where it finds its data there.

    That is an AnnData object, one modality of a MuData object, or all of it where several modalities are read together.

    Parameters
    ----------
    data
        What the user passed.
    modality
        Names of modalities.
    **keys
        Of :class:`Inputs`. Graph and samples default to what a modality names itself.
    """
    names = as_modalities(modality)
    if not is_mudata(data):
        check_object(data)
        if names is not None:
            raise ValueError(f"modality={modality!r} is for MuData objects, found an AnnData object: leave it out.")
    elif names is None or len(names) == 1:
        data, names = get_modality(data, names[0] if names else None)[1], None
    check_layer(keys["layer"], parts_of(data, names))
    own = registered_keys(data, names)
    keys["library_key"] = keys["library_key"] or own["library_key"]
    if keys["connectivities_key"] == Inputs.connectivities_key:
        keys["connectivities_key"] = own["connectivities_key"]
    return data, Inputs(modality=None if names is None else tuple(names), **keys)


def working_copy(adata: AnnData | MuData, inputs: Inputs, *, labels_required: bool = False) -> AnnData | MuData:
    """Return a light object that shares values and holds what a model needs, graph included.

    The user's object stays as it is: scvi-tools writes its identifiers to the working copy, and a graph built here
    is written back by :func:`write_back` only when the call has succeeded. An expression matrix that is not in memory
    stays where it is: ``X`` of the light object then is the very dataset or dask array.
    """
    nodes = nodes_of(adata, inputs.modality)
    for key, role in ((inputs.library_key, "library"), (inputs.batch_key, "batch")):
        if key is not None:
            check_obs_key(nodes, key, role)
    if labels_required:
        check_labels(nodes, str(inputs.labels_key), inputs.unlabeled_category)
    if inputs.modality is not None:
        return _working_mudata(adata, nodes, inputs)
    work = _light(nodes, inputs)
    if inputs.connectivities_key in nodes.obsp:
        where = f"adata.obsp[{inputs.connectivities_key!r}]"
        work.obsp[inputs.connectivities_key] = in_memory(nodes.obsp[inputs.connectivities_key], where)
    elif inputs.connectivities_key.endswith(CONNECTIVITIES) and MODALITY_KEY not in nodes.uns:
        if inputs.spatial_key not in nodes.obsm:
            check_coordinates(nodes, inputs.spatial_key)  # absent: names the keys of the user's object
        add_graph(
            work,
            library_key=inputs.library_key,
            spatial_key=inputs.spatial_key,
            key_added=inputs.connectivities_key.removesuffix(CONNECTIVITIES),
        )
    else:
        check_graph(nodes, inputs.connectivities_key)  # absent: says so, and what to do
    return work


def _light(adata: AnnData, inputs: Inputs) -> AnnData:
    """Return values, coordinates and columns of one modality, shared with the user's object."""
    part = parts_of(adata, None)[0]
    keys = dict.fromkeys([inputs.library_key, inputs.batch_key, inputs.labels_key])
    obsm = [inputs.spatial_key] if inputs.spatial_key in adata.obsm else []
    if part.is_sequence:
        held = sequence_kind(part.kind).parts(adata)
        matrix = held["X"][""] if "X" in held else None
        keys |= dict.fromkeys(held.get("obs", ()))
        obsm += list(held.get("obsm", ()))
    else:
        check_anndata(adata)
        if part.kind == "expression":
            check_scaled(adata, inputs.layer, inputs.input_scale)
        matrix = get_matrix(adata, inputs.layer)
    columns = [key for key in keys if key is not None and key in adata.obs]
    work = AnnData(
        matrix,
        var=None if matrix is None else pd.DataFrame(index=adata.var_names),
        obs=pd.DataFrame(get_obs(adata, columns), index=adata.obs_names),
        obsm={key: in_memory(adata.obsm[key], f"adata.obsm[{key!r}]") for key in obsm},
    )
    if MODALITY_KEY in adata.uns:
        work.uns[MODALITY_KEY] = adata.uns[MODALITY_KEY]
    return work


def _working_mudata(mdata: Any, nodes: AnnData, inputs: Inputs) -> MuData:
    from mudata import MuData

    check_whole(mdata, inputs.connectivities_key, inputs.modality, nodes)
    check_graph(nodes, inputs.connectivities_key, inputs.library_key)
    with quiet_mudata():
        parts = {part.name: _light(part.adata, inputs) for part in parts_of(mdata, inputs.modality)}
        work = MuData(parts)
        # Nodes that have none of these modalities stay out, as they would have no token at all.
        nodes = nodes[work.obs_names]
        keys = dict.fromkeys([inputs.library_key, inputs.batch_key, inputs.labels_key])
        for key in keys:
            if key is not None and key in nodes.obs:
                work.obs[key] = nodes.obs[key]
        work.obsp[inputs.connectivities_key] = nodes.obsp[inputs.connectivities_key]
        if inputs.spatial_key in nodes.obsm:
            work.obsm[inputs.spatial_key] = nodes.obsm[inputs.spatial_key]
    return work
