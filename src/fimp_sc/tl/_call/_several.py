"""Several objects in one call: joined for the tool, results written to each of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import pandas as pd
from anndata import AnnData, ImplicitModificationWarning
from scipy import sparse

from fimp_sc._draws import name_key, uniform
from fimp_sc._keys import WRITTEN, check_key, new_record
from fimp_sc._logging import user_messages, warn
from fimp_sc._options import checked_value
from fimp_sc.data._samples import warn_joined_samples
from fimp_sc.data._study import Modality, resolve
from fimp_sc.data._warnings import warn_control_features
from fimp_sc.data.storage._elements import get_graph, get_matrix, get_obs, missing_key, shorten
from fimp_sc.data.storage._rows import storage
from fimp_sc.data.validate._checks import check_graph, check_object, check_obs_key, check_values, is_dissociated
from fimp_sc.model.registry._fields import MEASURED_KEY
from fimp_sc.model.registry._graph_data import check_genes
from fimp_sc.tl._call._inputs import check_results, choose, copied, inherit, working_copy
from fimp_sc.tl._call._models import given_model, hand_on, write_back
from fimp_sc.tl._call._results import drop_stale_colors, measured_scale, storable
from fimp_sc.tl._statistics._mapping import typical_among
from fimp_sc.tl._statistics._reference import Reference
from fimp_sc.tl._statistics._representation import made_by, read_representation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mudata import MuData

    from fimp_sc.model import FIMP

F = TypeVar("F", bound=Callable[..., Any])

_LIBRARY, _BATCH, _SPATIAL, _GRAPH = "fimp_library", "fimp_batch", "spatial", "spatial_connectivities"
_KEYS = ("layer", "library_key", "batch_key", "spatial_key", "connectivities_key", "input_scale", "center",
         "labels_key", "unlabeled_category")  # fmt: skip
# Scales whose values are in proportion to counts.
_LINEAR = {"counts", "normalized"}


def opened(adata: Any, copy: bool) -> AnnData | MuData:
    """Return the one object that a tool works on, which is a copy if that is asked for."""
    return copied(adata) if copy else adata


def several(function: F) -> F:
    """Let a tool take several objects, as a list or as a dictionary by name.

    They are joined into one object, of which each is a sample: genes are those of all of them, and those that an object
    does not have were not measured in it. Results are written to each object, as if it had been passed alone.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # which says what is wrong
        given = bound.arguments.get("adata")
        if not isinstance(given, Mapping | list | tuple):
            return function(*args, **kwargs)
        bound.apply_defaults()
        return _call(function, signature, given, {k: v for k, v in bound.arguments.items() if k != "adata"})

    return cast("F", call)


@dataclass
class _Member:
    """One of the objects.

    Attributes
    ----------
    adata
        What results are written to.
    work
        Light copy with what the tool reads.
    params
        Keys of this object, for the record of the call.
    library
        ``(n_obs,)`` text, sample of each cell.
    write
        Writes the graph, where it was built.
    """

    adata: AnnData
    work: AnnData
    params: dict[str, Any]
    library: pd.Series
    write: AbstractContextManager[None]


def _call(function: Any, signature: inspect.Signature, given: Any, arguments: dict[str, Any]) -> Any:
    tool = f"tl.{function.__name__}"
    for name, value in arguments.items():
        arguments[name] = checked_value(function.__qualname__, signature.parameters[name], value, name)
    objects, copy = _objects(given), arguments.pop("copy")
    if copy:
        objects = {name: copied(adata) for name, adata in objects.items()}
    if arguments["modality"] is not None:
        raise ValueError("modality= is for a MuData object, found several AnnData objects: leave it out.")
    if "model" in arguments:
        arguments["model"] = given_model(arguments["model"], arguments["accelerator"], verbose=arguments["verbose"])
    if tool == "tl.niches":
        default = _reference_key(arguments, objects)
        arguments["use_rep"] = arguments["use_rep"] or default
    key = arguments["key_added"] or f"fimp_{arguments['labels_key']}".replace("/", "_")
    with user_messages(verbose=arguments["verbose"]):
        members = {}
        for name, adata in objects.items():
            with _naming(name):
                members[name] = (_embedded if tool == "tl.niches" else _expression)(tool, key, name, adata, arguments)
        _check_columns(members, arguments)
        joint, own = _joined(members, arguments)
        hand_on(list(objects.values()), [joint])
        with warnings.catch_warnings():
            # Said of each object; those without any neighbors by design are no surprise.
            for said in ("have no neighbors", "are read as expression", "genes of the model are in"):
                warnings.filterwarnings("ignore", message=f".*{said}", category=UserWarning)
            function(joint, **arguments | own)
        model = hand_on([joint], [])
    # All results are there before any is written.
    found, first = [], 0
    for member in members.values():
        rows = slice(first, first + member.adata.n_obs)
        found.append(_results(tool, key, joint, rows, member, list(objects), model))
        first = rows.stop
    for member, results in zip(members.values(), found, strict=True):
        with member.write:
            _write(tool, key, member.adata, results)
    hand_on([joint], list(objects.values()))
    if not copy:
        return None
    return dict(zip(given, objects.values(), strict=True)) if isinstance(given, Mapping) else list(objects.values())


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name the object in errors and warnings of what is inside."""
    try:
        with warnings.catch_warnings(record=True) as told:
            yield
    except (KeyError, TypeError, ValueError) as error:
        raise type(error)(f"Of the object {name!r}: {error.args[0] if error.args else error}") from error
    for warning in told:
        if warning.category is UserWarning:
            warn(f"Of the object {name!r}: {warning.message}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _objects(given: Mapping[Any, Any] | Sequence[Any]) -> dict[str, AnnData]:
    """Return objects by name; those of a list are numbered.

    Raises
    ------
    TypeError
        One of them is no AnnData object.
    ValueError
        There is none, one is there twice, or one is not in memory.
    """
    pairs = given.items() if isinstance(given, Mapping) else enumerate(given)
    objects: dict[str, AnnData] = {str(name): adata for name, adata in pairs}
    if not objects or len(objects) < len(given):
        raise ValueError(f"Pass one AnnData object or more, each with a name of its own, found {len(given)}.")
    for name, adata in objects.items():
        with _naming(name):
            check_object(adata)
            if adata.isbacked or (adata.X is not None and storage(adata.X) not in ("memory", "other")):
                raise ValueError(
                    "its expression is not in memory, where several objects must be: adata = adata.to_memory(). One "
                    "object in a file may hold many samples, see library_key=."
                )
        if sum(adata is other for other in objects.values()) > 1:
            raise ValueError(f"The object {name!r} is there more than once: pass each object once.")
    return objects


def _reference_key(arguments: Mapping[str, Any], objects: Mapping[str, AnnData]) -> str:
    """Return the representation in which niches are found by default: that of the reference, none of the objects."""
    if arguments["reference"] is None:
        return "X_fimp"
    known = Reference(*(arguments[name] for name in ("reference", "key_added", "n_niches", "smooth")))
    for adata in objects.values():
        known.check_other(adata)
    return known.use_rep


def _samples(adata: AnnData, name: str, library_key: str | None) -> pd.Series:
    """Return the sample of each cell: the object, and what it tells apart itself."""
    if library_key is None:
        return pd.Series(name, index=adata.obs_names)
    own = check_obs_key(adata, library_key, "library")
    return pd.Series([f"{name} {sample}" for sample in own], index=adata.obs_names)


def _expression(tool: str, key: str, name: str, adata: AnnData, arguments: Mapping[str, Any]) -> _Member:
    """Return what tools that read expression need of one object."""
    keys = {one: arguments[one] for one in _KEYS if one in arguments}
    # What a tool does not take, it does not read.
    keys = {"batch_key": None, "center": None} | keys
    study, inputs = choose(adata, None, verbose=arguments["verbose"], model=arguments.get("model"), **keys)
    if arguments.get("model") is not None:
        check_genes(arguments["model"], adata)
    hidden = arguments.get("hidden")
    if hidden is not None and not isinstance(hidden, str):
        raise ValueError("hidden is an array for one object: store one in a layer of each, and pass its name.")
    also = {("layers", hidden): "hidden"} if hidden is not None else None
    check_results(key, tool, study, inputs, overwrite=arguments["overwrite"], also=also)
    work = working_copy(study, inputs).data
    check_graph(work, inputs.connectivities_key, inputs.library_key)
    warn_joined_samples(adata, get_graph(work, inputs.connectivities_key), inputs.spatial_key, inputs.library_key)
    warn_control_features(adata)
    library = _samples(adata, name, inputs.library_key)
    with warnings.catch_warnings(action="ignore"):  # said of all of them together
        scale = check_values(get_matrix(work, inputs.layer), where="adata.X", input_scale=str(inputs.input_scale))
    light = AnnData(
        get_matrix(work, inputs.layer),
        obs=pd.DataFrame(index=adata.obs_names.astype(str)),
        var=pd.DataFrame(index=adata.var_names.astype(str)),
        obsp={_GRAPH: get_graph(work, inputs.connectivities_key)},
        uns={"scale": scale, "asked": inputs.input_scale, "center": inputs.center},
    )
    light.uns["dissociated"] = is_dissociated(work, inputs.connectivities_key)
    if inputs.spatial_key in work.obsm:
        light.obsm[_SPATIAL] = np.asarray(work.obsm[inputs.spatial_key], dtype=np.float64)
    batch = library if inputs.batch_key is None else get_obs(adata, [inputs.batch_key])[inputs.batch_key]
    light.obs[_BATCH] = batch.array  # names of cells may be numbers, which the light object holds as text
    for column in (arguments.get("labels_key"), arguments.get("groupby")):
        if column is not None and column in adata.obs:
            light.obs[column] = get_obs(adata, [column])[column].array
    ids = getattr(arguments.get("foundation"), "vocabulary_key", None)
    if ids is not None and ids in adata.var:
        light.var[ids] = np.asarray(adata.var[ids])
    if hidden is not None:
        if hidden not in adata.layers:
            raise missing_key(hidden, "adata.layers", adata.layers, "Store there, True, what is not to be seen.")
        light.layers[hidden] = sparse.csr_matrix(adata.layers[hidden], dtype=bool)
    return _Member(adata, light, storable(asdict(inputs)), library, write_back(study, resolve(work), inputs, None))


def _embedded(tool: str, key: str, name: str, adata: AnnData, arguments: Mapping[str, Any]) -> _Member:
    """Return what niches are made of in one object."""
    keys = {one: arguments[one] for one in ("library_key", "connectivities_key")}
    keys = inherit(resolve(adata), keys, verbose=arguments["verbose"])
    library_key, graph = keys["library_key"], str(keys["connectivities_key"])
    reads = {("obs", library_key): "library_key", ("obs", arguments["labels_key"]): "labels_key"}
    check_key(key, tool, adata, reads, overwrite=arguments["overwrite"])
    light, use_rep = AnnData(obs=pd.DataFrame(index=adata.obs_names.astype(str))), arguments["use_rep"]
    if use_rep not in adata.obsm:
        advice = "Embed all objects together, fimp_sc.tl.embed([a, b]), or by one model."
        raise missing_key(use_rep, "adata.obsm", adata.obsm, advice)
    values, held = read_representation(adata, use_rep), adata.obsm[use_rep]
    columns = held.columns if isinstance(held, pd.DataFrame) else None
    light.obsm[use_rep] = values if columns is None else pd.DataFrame(values, light.obs_names, columns)
    light.uns = made_by(adata, use_rep)
    if graph in adata.obsp:
        light.obsp[_GRAPH] = get_graph(adata, graph)
    labels_key = arguments["labels_key"]
    if labels_key is not None and labels_key in adata.obs:
        light.obs[labels_key] = get_obs(adata, [labels_key])[labels_key].array
    params = {name: held for name, held in keys.items() if held is not None}
    return _Member(adata, light, params, _samples(adata, name, library_key), nullcontext())


def _check_columns(members: Mapping[str, _Member], arguments: Mapping[str, Any]) -> None:
    """Raise a KeyError where no object has a column that the tool reads; some may lack it."""
    for argument in ("groupby", "labels_key"):
        column = arguments.get(argument)
        needed = column is not None and arguments.get("model") is None
        if needed and not any(column in member.work.obs for member in members.values()):
            held = dict.fromkeys(name for member in members.values() for name in member.adata.obs)
            raise missing_key(str(column), "adata.obs of any object", held, f"Name a column with {argument}=.")


def _joined(members: Mapping[str, _Member], arguments: Mapping[str, Any]) -> tuple[AnnData, dict[str, Any]]:
    """Return one object of all of them, and the arguments that name what it holds."""
    works = [member.work for member in members.values()]
    names = pd.Index(np.concatenate([np.asarray(work.obs_names, dtype=object) for work in works]))
    if not names.is_unique:
        names = pd.Index([f"{cell}-{name}" for name, member in members.items() for cell in member.work.obs_names])
    samples = [set(member.library) for member in members.values()]
    if len(set().union(*samples)) < sum(map(len, samples)):
        raise ValueError(
            "Two objects have samples of one name, made of the name of the object and that of the sample: name the "
            f"objects otherwise, found {list(members)}."
        )
    library = np.concatenate([member.library.to_numpy(dtype=object) for member in members.values()])
    obs = pd.DataFrame({_LIBRARY: pd.Categorical(library)}, index=names)
    for column in dict.fromkeys(column for work in works for column in work.obs):
        obs[column] = np.concatenate(
            [
                np.asarray(work.obs[column] if column in work.obs else np.full(work.n_obs, np.nan), dtype=object)
                for work in works
            ]
        )
        obs[column] = obs[column].infer_objects()
    if arguments.get("model") is None and works[0].X is not None:
        _warn_apart({name: member.work for name, member in members.items()})
    joint = AnnData(obs=obs) if works[0].X is None else _with_genes(works, obs)
    if all(_GRAPH in work.obsp for work in works):
        joint.obsp[_GRAPH] = sparse.block_diag([work.obsp[_GRAPH] for work in works], format="csr")
    own: dict[str, Any] = {"library_key": _LIBRARY, "connectivities_key": _GRAPH, "modality": None, "copy": False}
    if works[0].X is None:
        _add_embedding(joint, members, arguments["use_rep"])
        return joint, own
    if all(work.uns["dissociated"] for work in works):
        joint.uns["spatial_neighbors"] = {"params": {"n_neighbors": 0}}
    _add_places(joint, works)
    own |= {"layer": "X", "spatial_key": _SPATIAL, "input_scale": _scale(members), "batch_key": _BATCH}
    centers = {name: member.work.uns["center"] for name, member in members.items()}
    if len(set(centers.values())) > 1:
        raise ValueError(f"Earlier calls had {centers} for center=: pass it, as one model has one.")
    own["center"] = next(iter(centers.values()))
    return joint, {name: value for name, value in own.items() if name in arguments or name == "copy"}


def _warn_apart(works: Mapping[str, AnnData]) -> None:
    """Warn of objects that have no gene in common with any other.

    Warns
    -----
    UserWarning
        There are some.
    """
    # Of a foundation model, ids tell which genes are the same.
    genes = {
        name: set(work.var_names if work.var.empty else work.var.iloc[:, 0][work.var.iloc[:, 0] >= 0])
        for name, work in works.items()
    }
    apart = [
        name for name, own in genes.items() if all(own.isdisjoint(its) for other, its in genes.items() if other != name)
    ]
    if apart and len(works) > 1:
        names = {name: list(works[name].var_names[:2]) for name in list(works)[:3]}
        warn(
            f"{shorten([repr(name) for name in apart])} of {len(works)} objects have no gene in common with any other, "
            f"so that nothing relates their cells to those of others. Names are like {names}: use one kind of gene "
            "names (symbols or Ensembl ids, of one species) everywhere."
        )


def _with_genes(works: Sequence[AnnData], obs: pd.DataFrame) -> AnnData:
    """Return expression with the genes of all objects, and which of them each sample measured."""
    genes = pd.Index(dict.fromkeys(gene for work in works for gene in work.var_names))
    columns = [genes.get_indexer(work.var_names) for work in works]
    alike = all(len(own) == len(genes) and (own == np.arange(len(genes))).all() for own in columns)

    def stacked(matrices: Sequence[Any]) -> Any:
        if alike and all(isinstance(matrix, np.ndarray) for matrix in matrices):
            return np.concatenate(matrices)
        moved = []
        for matrix, own in zip(matrices, columns, strict=True):
            # Half precision is none of scipy's.
            rows = sparse.csr_matrix(matrix.astype(np.float32) if matrix.dtype == np.float16 else matrix)
            # Of a copy: sorting moves values, which are the user's.
            moved_values = (rows.data.copy(), own[rows.indices], rows.indptr)
            rows = sparse.csr_matrix(moved_values, shape=(rows.shape[0], len(genes)))
            rows.sort_indices()
            moved.append(rows)
        return sparse.vstack(moved, format="csr")

    joint = AnnData(stacked([work.X for work in works]), obs=obs, var=pd.DataFrame(index=genes))
    for layer in works[0].layers:
        joint.layers[layer] = stacked([work.layers[layer] for work in works])
    for column in dict.fromkeys(column for work in works for column in work.var):
        held = [work.var[column] for work in works if column in work.var]
        values = pd.concat(held)
        joint.var[column] = values[~values.index.duplicated()].reindex(genes).fillna(-1).to_numpy(dtype=np.int64)
    if not alike:
        of = dict(zip(obs[_LIBRARY], np.repeat(np.arange(len(works)), [work.n_obs for work in works]), strict=True))
        measured = {sample: np.isin(np.arange(len(genes)), columns[number]) for sample, number in of.items()}
        joint.varm[MEASURED_KEY] = pd.DataFrame(measured, index=genes)
    return joint


def _add_places(joint: AnnData, works: Sequence[AnnData]) -> None:
    """Write coordinates; cells without get some at random, by which nothing but the cut into blocks is decided."""
    n_dims = max((work.obsm[_SPATIAL].shape[1] for work in works if _SPATIAL in work.obsm), default=0)
    if not n_dims:
        return
    places, first = [], 0
    for work in works:
        names = joint.obs_names[first : first + work.n_obs]
        if _SPATIAL in work.obsm:
            held = work.obsm[_SPATIAL]
            places.append(np.pad(held, ((0, 0), (0, n_dims - held.shape[1]))))
        else:
            places.append(uniform(0, name_key(names), np.arange(n_dims)).astype(np.float64))
        first += work.n_obs
    joint.obsm[_SPATIAL] = np.concatenate(places)


def _scale(members: Mapping[str, _Member]) -> str:
    """Return the scale of all values.

    Raises
    ------
    ValueError
        Objects hold values of different kinds.
    """
    found = {name: str(member.work.uns["scale"]) for name, member in members.items()}
    asked = {str(member.work.uns["asked"]) for member in members.values()}
    if len(set(found.values())) == 1:
        return asked.pop() if len(asked) == 1 else next(iter(found.values()))
    if set(found.values()) <= _LINEAR:
        return "normalized"
    raise ValueError(
        f"The values of the objects are of different kinds, {found} (input_scale): pass counts of all of them, for "
        "instance with layer=, or log-normalized values of all."
    )


def _add_embedding(joint: AnnData, members: Mapping[str, _Member], key: str) -> None:
    """Write the representation of all objects.

    Raises
    ------
    ValueError
        It has other columns in some of them, or was not made by one model.
    """
    held = {name: member.work.obsm[key] for name, member in members.items()}
    if all(isinstance(values, pd.DataFrame) for values in held.values()):
        columns = {name: sorted(map(str, values.columns)) for name, values in held.items()}
        order = next(iter(held.values())).columns
        if len(set(map(tuple, columns.values()))) > 1:
            raise ValueError(f"obsm[{key!r}] has other columns in some objects: {columns}. Give all the same ones.")
        held = {name: values[order] for name, values in held.items()}
    widths = {name: values.shape[1] for name, values in held.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"obsm[{key!r}] has other numbers of columns in some objects, {widths}: embed all of them together, "
            "fimp_sc.tl.embed([a, b]), or by one model."
        )
    joint.obsm[key] = np.concatenate([np.asarray(values) for values in held.values()])
    made = {member.work.uns["weights_checksum"] for member in members.values() if member.work.uns}
    if len(made) > 1:
        raise ValueError(
            f"obsm[{key!r}] of these objects was made by {len(made)} models, whose embeddings are not in one "
            "space: embed all objects together, fimp_sc.tl.embed([a, b]), or by one model."
        )
    if made:
        joint.uns[key] = {"weights_checksum": made.pop()}


def _results(
    tool: str, key: str, joint: AnnData, rows: slice, member: _Member, names: list[str], model: FIMP | None
) -> dict[tuple[str, str], Any]:
    """Return the results of some rows, by element and name in their object; ``None`` where there are none."""
    adata = member.adata
    record = dict(joint.uns[key])
    own = {name: value for name, value in record["params"].items() if name not in (*_KEYS, "modality")}
    shared = {name: record["params"][name] for name in ("labels_key",) if name in record["params"]}
    record["params"] = own | shared | member.params
    record |= {"order": new_record(adata, tool)["order"], "objects": np.array(names, dtype=object)}
    if "measured" in record and model is not None:
        record |= measured_scale(model, Modality("adata", "expression", adata))
    if "mixture" in record:
        cells = joint.obs[key].cat.codes.to_numpy(), joint.obs_names.to_numpy()
        record["mixture"] = typical_among(record["mixture"], *cells, rows, adata.obs_names.to_numpy())
    found: dict[tuple[str, str], Any] = {}
    for slot, name in ((slot, name.format(key)) for slot, name in WRITTEN[tool]):
        source = getattr(joint, slot)
        if name not in source:
            found[slot, name] = None
        elif slot == "uns":
            found[slot, name] = source[name]
        elif slot == "obs":
            found[slot, name] = pd.Series(source[name].iloc[rows].array, index=adata.obs_names)
        elif slot == "layers":
            found[slot, name] = source[name][rows][:, joint.var_names.get_indexer(adata.var_names.astype(str))]
            record["genes"] = np.array(adata.var_names, dtype=object)
        else:
            found[slot, name] = np.ascontiguousarray(source[name][rows])
    return found | {("uns", key): record}


def _write(tool: str, key: str, adata: AnnData, results: Mapping[tuple[str, str], Any]) -> None:
    """Write the results of an object to it."""
    with warnings.catch_warnings():
        # Writing to a view turns it into an object of its own, as anndata documents.
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        for (slot, name), values in results.items():
            there = getattr(adata, slot)
            if values is None:
                if name in there:
                    del there[name]  # of an earlier call, whose record is about to be replaced
                continue
            if slot == "obs" and isinstance(values.dtype, pd.CategoricalDtype) and tool != "tl.niches":
                drop_stale_colors(adata, key, values.cat.categories)
            getattr(adata, slot)[name] = values
