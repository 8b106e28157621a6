"""The model of a call: trained now, given, or remembered from the call before."""

from __future__ import annotations

import logging
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from anndata import AnnData, ImplicitModificationWarning
from scipy import sparse

from fimp_sc._errors import MissingKeyError
from fimp_sc._keys import choose_target, records
from fimp_sc._logging import user_messages
from fimp_sc._options import checked
from fimp_sc.data.sequences._kinds import sequence_kind
from fimp_sc.data.storage._checksums import checksum
from fimp_sc.data.storage._elements import get_matrix, shorten
from fimp_sc.data.storage._rows import storage
from fimp_sc.model import FIMP
from fimp_sc.model.predict._outputs import check_classes
from fimp_sc.model.registry._fields import X_KEY, check_known, table_states
from fimp_sc.model.registry._graph_data import field_state
from fimp_sc.model.train._train import on_gpu
from fimp_sc.tl._call._inputs import CONNECTIVITIES, Inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mudata import MuData

    from fimp_sc.data._study import Study
    from fimp_sc.pretrained import Foundation

logger = logging.getLogger(__name__)

# By identity: forgotten with the object, never written to it.
_models: dict[int, _Remembered] = {}
# How models were trained here.
_trainings: weakref.WeakKeyDictionary[FIMP, _Training] = weakref.WeakKeyDictionary()


class _Remembered(NamedTuple):
    """The last model used for an object, and what it read there."""

    adata: weakref.ref[Any]
    marks: dict[str, Any]
    model: FIMP


class _Training(NamedTuple):
    """What a model was trained on, with which arguments, and checksums of what was hidden from it, by modality.

    ``labels_alone`` says whether it learned nothing but labels.
    """

    marks: dict[str, Any]
    max_epochs: int | None
    model_kwargs: dict[str, Any]
    train_kwargs: dict[str, Any]
    unseen: dict[str, int]
    labels_alone: bool = False


def given_model(model: FIMP | str | Path | None, accelerator: str, *, verbose: bool) -> FIMP | None:
    """Return the model that a call was given, read if it is a folder or a name on the hub.

    Raises
    ------
    ValueError
        It is not trained, or cannot be read.
    """
    if isinstance(model, str | Path):
        with user_messages(verbose=verbose):
            model = FIMP.load(model, accelerator=accelerator)
    if model is not None and not model.is_trained and model.foundation is None:
        raise ValueError("The model is not trained: call model.train() first, or leave model out.")
    return model


def fitted_model(
    study: Study,
    work: Study,
    inputs: Inputs,
    *,
    model: FIMP | None,
    reuse: bool,
    max_epochs: int | None,
    accelerator: str,
    random_state: int | None,
    same_seed: bool = True,
    verbose: bool,
    model_kwargs: dict[str, Any] | None,
    train_kwargs: dict[str, Any] | None,
    hidden: dict[str, Any] | None = None,
    foundation: Foundation | None = None,
    zero_shot: bool = False,
    n_tokens: int | None = None,
    n_layers: int | None = None,
    genes: Sequence[str] | None = None,
    check: Callable[[FIMP], Any] | None = None,
    wanted: Literal["labels", "values"] | None = None,
) -> FIMP:
    """Return a model for the working copy: the given one, the remembered one, or one trained (or just built) now.

    The remembered one serves if ``reuse`` is set and it is what training would make: of the same data, with the same
    ``max_epochs`` and (``same_seed``) ``random_state`` where these are given, and blind to what is ``hidden``, by
    modality. A model is trained only if it will know ``genes``, and if ``check`` of it raises nothing. ``wanted`` is
    what is to be predicted: where labels are, a frozen foundation model learns these alone.
    """
    what: dict[str, Any] = {"foundation": foundation}
    what |= {"n_tokens": n_tokens, "n_layers": n_layers}
    both = sorted(name for name, value in what.items() if value is not None and name in (model_kwargs or {}))
    if both:
        raise ValueError(f"{both[0]} is given twice, by itself and in model_kwargs: leave one out.")
    arguments = {name: value for name, value in what.items() if value is not None} | (model_kwargs or {})
    train_kwargs = dict(train_kwargs or {})
    twice = train_kwargs.pop("max_epochs", None)
    if max_epochs is not None and twice is not None:
        raise ValueError(
            f"max_epochs={max_epochs} and train_kwargs={{'max_epochs': {twice}}} are the same argument: leave one out."
        )
    max_epochs = twice if max_epochs is None else max_epochs
    if model is not None:
        if inputs.labels_key is not None:
            check_classes(model)
        unused = [name for name, value in what.items() if value is not None]
        unused += [n for n, v in (("model_kwargs", model_kwargs), ("train_kwargs", train_kwargs)) if v]
        if unused:
            raise ValueError(f"{' and '.join(unused)} would have no effect on a model that is trained already.")
        _check_modalities(model, work)
        bound = _forgettable(FIMP.load_query_data(work.data, model, user_study=study, **_given_keys(inputs)))
        if model in _trainings:
            _trainings[bound] = _trainings[model]
        return bound
    marks = _marks(work, inputs)
    remembered = _remembered(study.data)
    unseen = {name: checksum(mask) for name, mask in (hidden or {}).items()}
    if reuse and remembered is not None:
        # A model that was given is one of other data, for all that is known of it here.
        former, seed = _trainings.get(remembered.model, _Training({}, None, {}, {}, {})), remembered.model.random_state
        asked = {"max_epochs": (max_epochs, former.max_epochs), "random_state": (random_state, seed)}
        if not same_seed:
            del asked["random_state"]
        others = [name for name, (now, then) in asked.items() if now not in (None, then)]
        changed = [name for name in marks | remembered.marks if marks.get(name) != remembered.marks.get(name)]
        before = former.model_kwargs | former.train_kwargs
        named = [name for name, value in (arguments | train_kwargs).items() if not _same(value, before.get(name))]
        if changed:
            why = f"{shorten(changed)} changed since"
        elif not remembered.model.is_trained:
            why = "that one was not trained"
        elif wanted == "values" and former.labels_alone:
            why = "that one learned labels alone"
        elif named:
            why = f"{shorten(named)} given now"
        elif former.marks == marks and unseen not in ({}, former.unseen):
            why = "that one saw what is hidden now"
        elif others:
            why = f"that one had another {' and '.join(others)}"
        else:
            logger.info("Using the model of the call before on this object.")
            return remembered.model
        like = not (changed or named) and remembered.model.is_trained
        if like:
            arguments, train_kwargs = former.model_kwargs, former.train_kwargs
            max_epochs = former.max_epochs if max_epochs is None else max_epochs
            random_state = seed if random_state is None else random_state
        logger.info("Not using the model of the call before: %s. Training %s.", why, "one like it" if like else "one")
    elif reuse and any("model" in found for _, found in records(study.data)):
        logger.info(
            "The model of the earlier results is not in this session, or was of another object: training one. Pass "
            "model= for a saved one."
        )
    ids = getattr(arguments.get("foundation"), "vocabulary_key", None)
    setup = asdict(inputs)
    names = setup.pop("modality")
    if isinstance(work.data, AnnData):
        if ids is not None and ids in study.data.var:
            work.data.var[ids] = np.asarray(study.data.var[ids])
        FIMP.setup_anndata(work.data, user_study=study, **setup)
    else:
        FIMP.setup_mudata(work.data, modality=list(names), user_study=study, **setup)
    fresh = _forgettable(FIMP(work.data, **{"random_state": random_state or 0, **arguments}))
    if genes is not None:
        check_known(genes, fresh.genes)
    if check is not None:
        check(fresh)
    _report(fresh, work, inputs, accelerator, zero_shot)
    if zero_shot:
        fresh.to_device(_device(accelerator))
        return fresh
    usual: dict[str, Any] = {"max_epochs": max_epochs, "accelerator": accelerator, "enable_progress_bar": verbose}
    if wanted == "labels" and fresh.module.network.frozen:
        usual["mask_cells"] = 0.0
    fresh.train(**usual | ({"hidden": hidden} if hidden else {}) | train_kwargs)
    # A folder that keeps a training is that of this one alone.
    again = {name: value for name, value in train_kwargs.items() if name != "checkpoint"}
    labels_alone = (usual | train_kwargs).get("mask_cells") == 0
    _trainings[fresh] = _Training(marks, max_epochs, arguments, again, unseen, labels_alone)
    return fresh


def _same(value: Any, other: Any) -> bool:
    """Tell whether two arguments are surely equal."""
    try:
        return bool(value is other or value == other)
    except (TypeError, ValueError):  # arrays, frames
        return False


def _forgettable(model: FIMP) -> FIMP:
    """Let scvi-tools forget the object of a model, and with it the user's values, as soon as the model is gone."""
    key = model.adata_manager.adata_uuid
    weakref.finalize(model, _forget, model.id, key).atexit = False
    return model


def _forget(model_id: str, key: str) -> None:
    FIMP._setup_adata_manager_store.pop(key, None)
    FIMP._per_instance_manager_store.pop(model_id, None)


def _check_modalities(model: FIMP, work: Study) -> None:
    found = [modality.name for modality in work.modalities]
    tables = [name or "a table" for name in table_states(field_state(model, X_KEY))]
    known = [*tables, *model.module.sequences]
    if len(found) == len(known):
        return
    here = "one modality" if work.names is None else found
    lacking = [name for name in known if name not in found] if work.names is not None else []
    raise ValueError(
        f"The model reads {known}, and this call {here}: name the modalities that the model was trained on, "
        f"modality={known} of a MuData object. Where {shorten(lacking) or 'one'} was not measured, train a model on "
        "the others alone."
    )


def _given_keys(inputs: Inputs) -> dict[str, Any]:
    """Return where a given model finds its data in the working copy: the caller's keys name the caller's data."""
    names = ("layer", "library_key", "batch_key", "connectivities_key", "spatial_key", "center")
    keys = {name: getattr(inputs, name) for name in names}
    if inputs.input_scale != "auto":
        keys["input_scale"] = inputs.input_scale
    return keys


@contextmanager
def write_back(study: Study, work: Study, inputs: Inputs, model: FIMP | None) -> Iterator[None]:
    """Write results, and the graph if it was built here; remember the model, if there is one."""
    adata, light = study.data, work.data
    with warnings.catch_warnings():
        # Writing to a view turns it into an object of its own, as anndata documents.
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        if inputs.modality is None and inputs.connectivities_key not in adata.obsp:
            prefix = inputs.connectivities_key.removesuffix(CONNECTIVITIES)
            adata.obsp[f"{prefix}_distances"] = light.obsp[f"{prefix}_distances"]
            adata.obsp[inputs.connectivities_key] = light.obsp[inputs.connectivities_key]
            adata.uns[f"{prefix}_neighbors"] = light.uns[f"{prefix}_neighbors"]
        yield
    if model is not None:
        _remember(adata, _marks(work, inputs), model)


def _remember(adata: AnnData | MuData, marks: dict[str, Any], model: FIMP) -> None:
    address = id(adata)
    reference = weakref.ref(adata, lambda _: _models.pop(address, None))
    _models[address] = _Remembered(reference, marks, model)


def hand_on(givers: Sequence[AnnData], takers: Sequence[AnnData]) -> FIMP | None:
    """Remember the model of some objects for others, if they have one in common, and return it."""
    found = [_remembered(giver) for giver in givers]
    first = found[0]
    if first is None or any(other is None or other.model is not first.model for other in found):
        return None
    for taker in takers:
        _remember(taker, first.marks, first.model)
    return first.model


@checked
def get_model(adata: AnnData | MuData, modality: str | Sequence[str] | None = None) -> FIMP:
    """Return the model that the last call of ``tl`` trained on, or used for, this object in this session.

    Parameters
    ----------
    adata
        The object that was passed to :func:`embed`, :func:`annotate`, :func:`impute` or :func:`attention`. A copy of
        it does not count.
    modality
        Name of the modality of a MuData object, or the several, that the call read. By default the modality, or the
        several, of earlier results.

    Returns
    -------
    The model itself, not a copy.

    Raises
    ------
    KeyError
        There is none.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.tl.embed(adata, library_key="section", max_epochs=1, verbose=False)
    >>> fimp.tl.get_model(adata).get_latent_representation().shape
    (200, 64)
    """
    remembered = _remembered(choose_target(adata, modality)[0])
    if remembered is None:
        raise MissingKeyError(
            "No model is known for this object in this session: call fimp_sc.tl.embed(adata) first, or "
            "FIMP.load(folder) for a saved one."
        )
    return remembered.model


def _remembered(adata: AnnData | MuData) -> _Remembered | None:
    found = _models.get(id(adata))
    return found if found is not None and found.adata() is adata else None


def _marks(work: Study, inputs: Inputs) -> dict[str, Any]:
    """Return what a model reads of an object, as checksums and keys, by names for messages."""
    nodes = work.nodes
    marks: dict[str, Any] = {
        name: getattr(inputs, name)
        for name in ("layer", "library_key", "batch_key", "input_scale", "center", "modality")
    }
    marks["obs_names"] = checksum(nodes.obs_names)
    marks["the graph"] = checksum(nodes.obsp[inputs.connectivities_key])
    for key in (inputs.library_key, inputs.batch_key):
        if key is not None:
            marks[f"obs[{key!r}]"] = checksum(nodes.obs[key])
    for part in work.modalities:
        which = "" if inputs.modality is None else f" of {part.name!r}"
        if part.is_sequence:
            held = [value for place in sequence_kind(part.kind).parts(part.adata).values() for value in place.values()]
            # Names of files tell images apart; they are not opened.
            marks[f"values{which}"] = checksum(*held)
            continue
        values = get_matrix(part.adata, inputs.layer)
        marks[f"var_names{which}"] = checksum(part.adata.var_names)
        marks[f"values{which}"] = checksum(values)
    return marks


def _device(accelerator: str) -> str:
    if accelerator == "auto":
        return "cuda:0" if on_gpu(accelerator) else "cpu"
    return {"gpu": "cuda:0", "cuda": "cuda:0"}.get(accelerator, accelerator)


def _report(model: FIMP, work: Study, inputs: Inputs, accelerator: str, zero_shot: bool) -> None:
    nodes = work.nodes
    tables = work.tables
    n_vars = sum(table.adata.n_vars for table in tables)
    shapes = model.module.sequences.values()
    # With what the optimizer keeps of those that are trained.
    weights = sum(p.numel() * (16 if p.requires_grad and not zero_shot else 4) for p in model.module.parameters())
    # A block: its nodes with the halo, a dozen dense copies of its expression, and copies of its tokens.
    network = model.module.network
    n_nodes, copies = network.block_memory(training=not zero_shot)
    n_tokens = (model.n_tokens if tables else 0) + sum(shape.n_tokens for shape in shapes)
    n_values = n_vars + sum(shape.n_tokens * shape.token_size for shape in shapes)
    block = min(n_nodes, 2 * nodes.n_obs) * (12 * n_values + copies * (n_tokens + 1) * network.width) * 4
    matrix = 0
    for table in tables:
        values = get_matrix(table.adata, inputs.layer)
        if storage(values) == "memory":
            matrix += 3 * (values.nnz * 8 if sparse.issparse(values) else values.nbytes)
    what = "cell" if work.modalities[0].kind == "expression" else "node"
    things = [f"{table.adata.n_vars:,} genes" for table in tables]
    things += [f"{shape.n_tokens} tokens of {name}" for name, shape in model.module.sequences.items()]
    logger.info(
        "%s %s, %s, %.1f neighbors per %s, %d classes; %s on %s, about %.1f GB of memory.",
        f"{nodes.n_obs:,}", f"{what}s", ", ".join(things),
        nodes.obsp[inputs.connectivities_key].nnz / nodes.n_obs, what,
        len(model.classes),
        "computing" if zero_shot else "training", "GPU" if on_gpu(accelerator) else "CPU",
        (weights + block + matrix) / 1e9 + 0.6,
    )  # fmt: skip
