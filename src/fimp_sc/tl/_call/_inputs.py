"""What a call of a tool reads: keys, and a working copy that holds what a model needs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from fimp_sc._keys import check_key, choose_target, last_record
from fimp_sc._logging import user_messages
from fimp_sc.data._modality import MODALITY_KEY, quiet_mudata
from fimp_sc.data._study import Modality, Study, as_modalities, is_mudata, resolve
from fimp_sc.data.sequences._kinds import sequence_kind
from fimp_sc.data.storage._elements import missing_key
from fimp_sc.data.validate._checks import (
    check_anndata,
    check_coordinates,
    check_graph,
    check_labels,
    check_obs_key,
    check_scaled,
    dissociated_hint,
    get_matrix,
    get_obs,
    in_memory,
    neighbors_key,
)
from fimp_sc.model.registry._fields import MEASURED_KEY, check_scales, scale_of
from fimp_sc.model.registry._setup import check_layer
from fimp_sc.pp._spatial_graph import add_graph, check_free

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mudata import MuData
    from numpy.typing import NDArray

    from fimp_sc.model import FIMP

logger = logging.getLogger(__name__)

CONNECTIVITIES = "_connectivities"
# Where keys are looked up.
_SLOTS = {
    "layer": "layers", "library_key": "obs", "batch_key": "obs", "spatial_key": "obsm", "connectivities_key": "obsp",
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Where a call finds its data in the object; the parameters that all tools share."""

    layer: str | None = None
    library_key: str | None = None
    batch_key: str | None = None
    spatial_key: str = "spatial"
    connectivities_key: str = "spatial_connectivities"
    input_scale: str | dict[str, str] = "auto"
    center: str = "training"
    labels_key: str | None = None
    unlabeled_category: str = "Unknown"
    modality: tuple[str, ...] | None = None


def copied(data: AnnData | MuData) -> AnnData | MuData:
    """Return a copy of an object with nothing added: mudata would copy columns of modalities to the whole."""
    with quiet_mudata():
        return data.copy()


def choose(
    data: AnnData | MuData,
    modality: str | Sequence[str] | None,
    *,
    verbose: bool,
    model: FIMP | None = None,
    **keys: Any,
) -> tuple[Study, Inputs]:
    """Return the study that a call reads and writes, and where it finds its data there.

    Its object is an AnnData object, one modality of a MuData object, or all of it where several modalities are read
    together.

    Parameters
    ----------
    data
        What the user passed.
    modality
        Names of modalities; ``None`` for those of earlier results, if these are of the same ones.
    verbose
        Say which keys are taken from a model or an earlier call.
    model
        A given model, whose modalities and keys go before those of earlier calls.
    **keys
        Of :class:`Inputs`; see :func:`inherit` for those that are ``None``.
    """
    if modality is None and model is not None and is_mudata(data):
        modality = _modalities_of(model, data, verbose=verbose)
    target, names = choose_target(data, modality)
    also = {}
    if modality is None and is_mudata(data) and len(data.mod) > 1:
        also["modality"] = names or next(name for name, part in data.mod.items() if part is target)
    study = resolve(target, names)
    keys = inherit(study, keys, verbose=verbose, also=also, model=model)
    check_layer(keys["layer"], study)
    if isinstance(keys["input_scale"], dict):
        if names is None:
            raise ValueError(
                f"input_scale={keys['input_scale']!r} gives scales by modality, and one modality is read: pass its own."
            )
        check_scales(keys["input_scale"], [table.name for table in study.tables])
    return study, Inputs(modality=None if names is None else tuple(names), **keys)


def inherit(
    study: Study,
    keys: dict[str, Any],
    *,
    verbose: bool,
    also: dict[str, Any] | None = None,
    model: FIMP | None = None,
) -> dict[str, Any]:
    """Return keys without those that are ``None``: these are as in the latest of the calls whose results are there.

    Those that a given model was trained with go before, see :func:`_own_keys`. Where there is neither, graph and
    samples are those that a modality names itself, all else the defaults of :class:`Inputs`. The scale of values is as
    before only for the same layer.

    Parameters
    ----------
    study
        What the call reads.
    keys
        Some attributes of :class:`Inputs`. The layer ``"X"`` is ``X``, unless there is a layer of that name.
    verbose
        Say which keys are taken from an earlier call, if they are others than the defaults.
    also
        What else is taken from it.
    model
        A given model.

    Raises
    ------
    MissingKeyError
        The object does not hold what the model reads, or the layer or column of the earlier call any more.
    """
    default = asdict(Inputs()) | study.registered_keys()
    last = last_record(study.data, several=study.names is not None)
    # What was None then is not in the record.
    earlier = default if last is None else asdict(Inputs()) | dict(last[1]["params"])
    given = {name: value for name, value in keys.items() if value is not None}
    if given.get("layer") == "X" and all("X" not in modality.adata.layers for modality in study.modalities):
        given["layer"] = None
    if model is not None:
        given |= _own_keys(model, study, given, earlier, default, verbose=verbose)
    if given.get("layer", earlier["layer"]) != earlier["layer"]:
        earlier = earlier | {"input_scale": default["input_scale"]}
    taken = {name: earlier[name] for name in keys if name not in given}
    if isinstance(taken.get("input_scale"), Mapping):
        taken["input_scale"] = {str(name): str(scale) for name, scale in taken["input_scale"].items()}
    if last is None:
        return given | taken
    said = {name: value for name, value in taken.items() if value != default[name]}
    for name in [name for name in ("layer", "library_key", "batch_key") if name in said]:
        slot, tables = _holders(name, study)
        if all(said[name] not in getattr(table, slot) for table in tables):
            advice = f"It is the {name} of the call that wrote adata.uns[{last[0]!r}]: pass {name}= for another one."
            raise missing_key(said[name], f"adata.{slot}", getattr(tables[0], slot), advice)
    _say(f"As in the call that wrote uns[{last[0]!r}]", (also or {}) | said, verbose)
    return given | taken


def _own_keys(
    model: FIMP,
    study: Study,
    given: Mapping[str, Any],
    earlier: Mapping[str, Any],
    described: Mapping[str, Any],
    *,
    verbose: bool,
) -> dict[str, Any]:
    """Return the keys that a model was trained with, without those that are ``given``; the log says which.

    What a model does not name is as without it, and what the values are is a matter of the object. A column of samples
    may be missing, as from a single sample, unless the model subtracts the mean of each batch, by this column.

    Parameters
    ----------
    earlier, described
        Keys of the latest call whose results are there, and those that the object names for itself.

    Raises
    ------
    MissingKeyError
        The object lacks what a key names.
    """
    setup, default = model.registry["setup_args"], asdict(Inputs())
    own = {name: setup.get(name) for name in _SLOTS if described[name] == default[name]}
    own = {name: key for name, key in own.items() if key not in (None, default[name])}
    own["center"] = setup.get("center", "training")
    if own["center"] == "batch" and "library_key" in own:
        own.setdefault("batch_key", None)  # samples are the batches
    own = {name: key for name, key in own.items() if name not in given}
    used = {**earlier, **given, **own}
    batches = (used["batch_key"] or used["library_key"]) if used["center"] == "batch" else None
    for name in [name for name in _SLOTS if own.get(name) is not None]:
        key, (slot, tables) = own[name], _holders(name, study)
        if any(key in getattr(table, slot) for table in tables):
            continue
        if slot == "obs" and key != batches:
            _say("adata.obs has no such column, and is read without", {f"{name} of the model": key}, verbose)
            del own[name]
            continue
        advice = f"It is the {name} of the model: pass {name}= for another one."
        if name == "layer":
            advice += " layer='X' reads X."
        elif slot == "obs":
            advice += (
                f" The model subtracts the mean of each batch: of a single one, adata.obs[{key!r}] = 'one' will do."
            )
        raise missing_key(key, f"adata.{slot}", getattr(tables[0], slot), advice)
    _say("From the model", {k: v for k, v in own.items() if not v == default[k] == earlier[k]}, verbose)
    return own


def _holders(name: str, study: Study) -> tuple[str, list[Any]]:
    """Return the element in which a key of :class:`Inputs` is looked up, and the objects whose it is."""
    slot = _SLOTS[name]
    return slot, [modality.adata for modality in study.modalities] if slot == "layers" else [study.nodes]


def _modalities_of(model: FIMP, data: MuData, *, verbose: bool) -> list[str] | None:
    """Return the modalities that a model reads together, if it reads several.

    Raises
    ------
    MissingKeyError
        The object lacks one.
    """
    known = as_modalities(model.registry["setup_args"].get("modality"))
    if known is None or len(known) == 1:
        return None
    for name in known:
        if name not in data.mod:
            raise missing_key(
                name, "mdata.mod", data.mod,
                f"The model reads {known} together: rename modalities to these, or name yours with modality=. Of a "
                f"modality that was not measured, train a model on {[n for n in known if n in data.mod]} alone.",
            )  # fmt: skip
    _say("From the model", {"modality": known}, verbose)
    return known


def _say(origin: str, keys: Mapping[str, Any], verbose: bool) -> None:
    if keys:
        with user_messages(verbose=verbose):
            logger.info("%s: %s.", origin, ", ".join(f"{name}={value!r}" for name, value in keys.items()))


def check_results(
    key: str,
    tool: str,
    study: Study,
    inputs: Inputs,
    *,
    overwrite: bool,
    tables: Sequence[AnnData] = (),
    also: Mapping[tuple[str, Any], str] | None = None,
) -> None:
    """Refuse a name of results that would replace what the call reads, or what is no earlier result of ``tool``.

    Parameters
    ----------
    study, inputs
        As :func:`choose` returns them.
    tables
        Objects that results are written to, if it is not that of ``study``.
    also
        Names of further arguments by the entries that they name: ``{("obs", "cell_type"): "groupby"}``.

    Raises
    ------
    ValueError
        The name cannot be used; the message says why.
    """
    prefix = inputs.connectivities_key.removesuffix(CONNECTIVITIES)
    reads = {
        ("layers", inputs.layer): "layer",
        ("obs", inputs.library_key): "library_key",
        ("obs", inputs.batch_key): "batch_key",
        ("obs", inputs.labels_key): "labels_key",
        ("obsm", inputs.spatial_key): "spatial_key",
        ("obsp", inputs.connectivities_key): "connectivities_key",
        ("obsp", f"{prefix}_distances"): "the graph",
        ("uns", f"{prefix}_neighbors"): "the graph",
        ("uns", MODALITY_KEY): "the kind of nodes",
        **(also or {}),
    }
    for modality in study.sequences:
        held = sequence_kind(modality.kind).parts(modality.adata)
        reads |= {(slot, name): modality.kind for slot, names in held.items() for name in names}
    check_key(key, tool, study.data, reads, overwrite=overwrite, tables=tables)


def sample_codes(nodes: AnnData, key: str | None) -> NDArray[np.int64]:
    """Return the ``(n_obs,)`` code of the sample of each node, 0 for all where no column is named."""
    if key is None:
        return np.zeros(nodes.n_obs, dtype=np.int64)
    return check_obs_key(nodes, key, "library").codes.astype(np.int64)


def working_copy(study: Study, inputs: Inputs, *, labels_required: bool = False) -> Study:
    """Return a study of a light object that shares values and holds what a model needs, graph included.

    The user's object stays as it is: scvi-tools writes its identifiers to the working copy, and a graph built here
    is written back by :func:`write_back` only when the call has succeeded. An expression matrix that is not in memory
    stays where it is: ``X`` of the light object then is the very dataset or dask array.
    """
    nodes = study.nodes
    for key, role in ((inputs.library_key, "library"), (inputs.batch_key, "batch")):
        if key is not None:
            check_obs_key(nodes, key, role)
    if labels_required:
        check_labels(nodes, str(inputs.labels_key), inputs.unlabeled_category)
    if inputs.modality is not None:
        return resolve(_working_mudata(study, inputs), study.names)
    work = _light(study.modalities[0], inputs, "adata")
    if inputs.connectivities_key in nodes.obsp:
        where = f"adata.obsp[{inputs.connectivities_key!r}]"
        work.obsp[inputs.connectivities_key] = in_memory(nodes.obsp[inputs.connectivities_key], where)
        described = neighbors_key(inputs.connectivities_key)
        if described in nodes.uns:
            work.uns[described] = nodes.uns[described]
    elif inputs.connectivities_key.endswith(CONNECTIVITIES) and MODALITY_KEY not in nodes.uns:
        if inputs.spatial_key not in nodes.obsm:
            # Absent: names the keys of the user's object.
            check_coordinates(nodes, inputs.spatial_key, advice=dissociated_hint(nodes))
        check_free(nodes, inputs.connectivities_key.removesuffix(CONNECTIVITIES))
        add_graph(
            work,
            library_key=inputs.library_key,
            spatial_key=inputs.spatial_key,
            key_added=inputs.connectivities_key.removesuffix(CONNECTIVITIES),
        )
    else:
        check_graph(nodes, inputs.connectivities_key)  # absent: says so, and what to do
    return resolve(work)


def _light(modality: Modality, inputs: Inputs, name: str) -> AnnData:
    """Return values, coordinates and columns of one modality, shared with the user's object."""
    adata, layer = modality.adata, None
    keys = dict.fromkeys([inputs.library_key, inputs.batch_key, inputs.labels_key])
    obsm = [inputs.spatial_key] if inputs.spatial_key in adata.obsm else []
    if modality.is_sequence:
        held = sequence_kind(modality.kind).parts(adata)
        matrix = held["X"][""] if "X" in held else None
        keys |= dict.fromkeys(held.get("obs", ()))
        obsm += list(held.get("obsm", ()))
    else:
        check_anndata(adata)
        if modality.kind == "expression":
            check_scaled(adata, inputs.layer, scale_of(inputs.input_scale, name))
        matrix = get_matrix(adata, inputs.layer)
        layer = inputs.layer
    columns = [key for key in keys if key is not None and key in adata.obs]
    work = AnnData(
        matrix if layer is None else None,
        layers=None if layer is None else {layer: matrix},
        var=None if matrix is None else pd.DataFrame(index=adata.var_names.astype(str)),
        obs=get_obs(adata, columns).set_axis(adata.obs_names.astype(str), axis=0),
        obsm={key: in_memory(adata.obsm[key], f"adata.obsm[{key!r}]") for key in obsm},
    )
    if MEASURED_KEY in adata.varm:
        work.varm[MEASURED_KEY] = adata.varm[MEASURED_KEY]
    if MODALITY_KEY in adata.uns:
        work.uns[MODALITY_KEY] = adata.uns[MODALITY_KEY]
    return work


def _working_mudata(study: Study, inputs: Inputs) -> MuData:
    from mudata import MuData

    study.check_graph(inputs.connectivities_key)
    nodes = study.nodes
    check_graph(nodes, inputs.connectivities_key, inputs.library_key)
    with quiet_mudata():
        work = MuData({one.name: _light(one, inputs, one.name) for one in study.modalities})
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
