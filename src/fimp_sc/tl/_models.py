"""The model of a call: trained now, given, or remembered from the call before."""

from __future__ import annotations

import logging
import warnings
import weakref
import zlib
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData, ImplicitModificationWarning
from scipy import sparse

from fimp_sc._options import checked
from fimp_sc.data._kinds import sequence_kind
from fimp_sc.data._modality import get_modality
from fimp_sc.data._parts import as_modalities, is_mudata, nodes_of, parts_of
from fimp_sc.data._stored import identity, storage
from fimp_sc.model import FIMP
from fimp_sc.model._fields import check_known
from fimp_sc.model._pretrained import is_pretrained
from fimp_sc.model._train import on_gpu
from fimp_sc.nn import FoundationNetwork
from fimp_sc.tl._inputs import CONNECTIVITIES, Inputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mudata import MuData

logger = logging.getLogger(__name__)

# The last model used for an object, by identity: forgotten with the object, never written to it.
_models: dict[int, tuple[weakref.ref[Any], tuple[Any, ...], FIMP]] = {}
# How models were trained here.
_trainings: weakref.WeakKeyDictionary[FIMP, _Training] = weakref.WeakKeyDictionary()


class _Training(NamedTuple):
    """Arguments of a training, and checksums of its data and of what was hidden from it, by modality."""

    mark: tuple[Any, ...]
    max_epochs: int | None
    model_kwargs: dict[str, Any]
    train_kwargs: dict[str, Any]
    unseen: dict[str, int]


def fitted_model(
    adata: AnnData | MuData,
    work: AnnData | MuData,
    inputs: Inputs,
    *,
    model: FIMP | str | Path | None,
    reuse: bool,
    max_epochs: int | None,
    accelerator: str,
    random_state: int | None,
    same_seed: bool = True,
    verbose: bool,
    model_kwargs: dict[str, Any] | None,
    train_kwargs: dict[str, Any] | None,
    hidden: dict[str, Any] | None = None,
    gene_embeddings: Any = None,
    foundation: str | None = None,
    checkpoint: str | Path | None = None,
    zero_shot: bool = False,
    n_tokens: int | None = None,
    n_layers: int | None = None,
    genes: Sequence[str] | None = None,
) -> FIMP:
    """Return a model for the working copy: the given one, the remembered one, or one trained (or just built) now.

    The remembered one serves if ``reuse`` is set and it is what training would make: of the same data, with the same
    ``max_epochs`` and (``same_seed``) ``random_state`` where these are given, and blind to what is ``hidden``, by
    modality. A model is trained only if it will know ``genes``.
    """
    what = {"gene_embeddings": gene_embeddings, "foundation": foundation, "checkpoint": checkpoint}
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
    if isinstance(model, str | Path):
        given: FIMP | None
        if is_pretrained(model):
            given = FIMP.from_pretrained(model, accelerator=accelerator)
        elif Path(model, "model.pt").is_file():
            given = FIMP.load(str(model), adata=False, accelerator=accelerator)
        else:
            raise FileNotFoundError(
                f"No saved model in {str(model)!r}: model.save_pretrained(folder) or model.save(folder) writes one."
            )
    else:
        given = model
    if given is not None:
        if not given.is_trained and given.foundation is None:
            raise ValueError("The model is not trained: call model.train() first, or leave model out.")
        unused = [name for name, value in what.items() if value is not None]
        unused += [n for n, v in (("model_kwargs", model_kwargs), ("train_kwargs", train_kwargs)) if v]
        if unused:
            raise ValueError(f"{' and '.join(unused)} would have no effect on a model that is trained already.")
        _check_modalities(given, work, inputs)
        bound = _forgettable(FIMP.load_query_data(work, given, **_given_keys(inputs)))
        if given in _trainings:
            _trainings[bound] = _trainings[given]
        return bound
    mark = _fingerprint(work, inputs)
    remembered = _models.get(id(adata))
    known = remembered is not None and remembered[0]() is adata and remembered[1] == mark
    usable = remembered is not None and known and remembered[2].is_trained
    unseen = {name: _checksum(mask) for name, mask in (hidden or {}).items()}
    if remembered is not None and usable and reuse and not arguments and not train_kwargs:
        # A model that was given is one of other data, for all that is known of it here.
        former, seed = _trainings.get(remembered[2], _Training((), None, {}, {}, {})), remembered[2].random_state
        blind = former.mark != mark or unseen in ({}, former.unseen)
        if blind and max_epochs in (None, former.max_epochs) and (not same_seed or random_state in (None, seed)):
            logger.info("Using the model trained before on this object.")
            return remembered[2]
        logger.info(
            "Training a model like the one before on this object, which %s.",
            "had another max_epochs or random_state" if blind else "saw what is hidden now",
        )
        arguments, train_kwargs = former.model_kwargs, former.train_kwargs
        max_epochs = former.max_epochs if max_epochs is None else max_epochs
        random_state = seed if random_state is None else random_state
    ids = arguments.get("vocabulary_key")
    setup = asdict(inputs) | {"layer": None}
    names = setup.pop("modality")
    if isinstance(work, AnnData):
        if ids is not None and ids in adata.var:
            work.var[ids] = np.asarray(adata.var[ids])
        FIMP.setup_anndata(work, **setup)
    else:
        FIMP.setup_mudata(work, modality=list(names), **setup)
    fresh = _forgettable(FIMP(work, **{"random_state": random_state or 0, **arguments}))
    if genes is not None:
        check_known(genes, fresh.genes)
    _report(fresh, work, inputs, accelerator, zero_shot)
    if zero_shot:
        fresh.to_device(_device(accelerator))
        return fresh
    usual = {"max_epochs": max_epochs, "accelerator": accelerator, "enable_progress_bar": verbose}
    fresh.train(**usual | ({"hidden": hidden} if hidden else {}) | train_kwargs)
    _trainings[fresh] = _Training(mark, max_epochs, arguments, train_kwargs, unseen)
    return fresh


def _forgettable(model: FIMP) -> FIMP:
    """Let scvi-tools forget the object of a model, and with it the user's values, as soon as the model is gone."""
    key = model.adata_manager.adata_uuid
    weakref.finalize(model, _forget, model.id, key).atexit = False
    return model


def _forget(model_id: str, key: str) -> None:
    FIMP._setup_adata_manager_store.pop(key, None)
    FIMP._per_instance_manager_store.pop(model_id, None)


def _check_modalities(model: FIMP, work: AnnData | MuData, inputs: Inputs) -> None:
    parts = parts_of(work, inputs.modality)
    known = list(model.module.sequences)
    table = "expression or features, " if len(model.genes) else ""
    if len(parts) != len(known) + bool(table):
        raise ValueError(
            f"The model reads {table}signals and images {known}, and modality= names {[part.name for part in parts]}: "
            "name the modalities that the model was trained on."
        )


def _given_keys(inputs: Inputs) -> dict[str, Any]:
    """Return where a given model finds its data in the working copy: the caller's keys name the caller's data."""
    names = ("library_key", "batch_key", "connectivities_key", "spatial_key")
    keys: dict[str, Any] = {"layer": None} | {name: getattr(inputs, name) for name in names}
    if inputs.input_scale != "auto":
        keys["input_scale"] = inputs.input_scale
    return keys


@contextmanager
def write_back(adata: AnnData | MuData, work: AnnData | MuData, inputs: Inputs, model: FIMP) -> Iterator[None]:
    """Write results, and the graph if it was built here; remember the model."""
    with warnings.catch_warnings():
        # Writing to a view turns it into an object of its own, as anndata documents.
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        if inputs.modality is None and inputs.connectivities_key not in adata.obsp:
            prefix = inputs.connectivities_key.removesuffix(CONNECTIVITIES)
            adata.obsp[f"{prefix}_distances"] = work.obsp[f"{prefix}_distances"]
            adata.obsp[inputs.connectivities_key] = work.obsp[inputs.connectivities_key]
            adata.uns[f"{prefix}_neighbors"] = work.uns[f"{prefix}_neighbors"]
        yield
    address = id(adata)
    reference = weakref.ref(adata, lambda _: _models.pop(address, None))
    _models[address] = (reference, _fingerprint(work, inputs), model)


@checked
def get_model(adata: AnnData | MuData, modality: str | Sequence[str] | None = None) -> FIMP:
    """Return the model that the last call of ``tl`` trained on, or used for, this object in this session.

    Parameters
    ----------
    adata
        The object that was passed to :func:`embed`, :func:`annotate` or :func:`impute`. A copy of it does not count.
    modality
        Of a MuData object, as it was passed.

    Raises
    ------
    KeyError
        When there is none.
    """
    names = as_modalities(modality)
    if is_mudata(adata) and (names is None or len(names) == 1):
        adata = get_modality(adata, names[0] if names else None)[1]
    remembered = _models.get(id(adata))
    if remembered is None or remembered[0]() is not adata:
        raise KeyError(
            "No model is known for this object in this session: call fimp_sc.tl.embed(adata) first, or "
            "FIMP.load(folder) for a saved one."
        )
    return remembered[2]


def _fingerprint(work: AnnData | MuData, inputs: Inputs) -> tuple[Any, ...]:
    nodes = nodes_of(work, inputs.modality)
    groups = [nodes.obs[key] for key in (inputs.library_key, inputs.batch_key) if key is not None]
    marks: list[Any] = [_checksum(pd.util.hash_pandas_object(table).to_numpy()) for table in (nodes.obs_names, *groups)]
    marks.append(_checksum(nodes.obsp[inputs.connectivities_key]))
    for part in parts_of(work, inputs.modality):
        if part.is_sequence:
            held = [value for place in sequence_kind(part.kind).parts(part.adata).values() for value in place.values()]
            # Names of files tell images apart; they are not opened.
            marks += [_checksum(pd.util.hash_pandas_object(v).to_numpy() if hasattr(v, "iloc") else v) for v in held]
            continue
        values = part.adata.X
        marks.append(_checksum(pd.util.hash_pandas_object(part.adata.var_names).to_numpy()))
        # Expression that is not in memory is known by where it is: reading all of it would take longer than most calls.
        marks.append(_checksum(values) if storage(values) == "memory" else identity(values))
    return (*marks, inputs.layer, inputs.library_key, inputs.batch_key, inputs.input_scale, inputs.modality)


def _checksum(matrix: Any) -> int:
    """Of all values and their places: totals alone stay the same when cells or edges change places."""
    if sparse.issparse(matrix):
        matrix = sparse.csr_matrix(matrix)
        parts = [matrix.data, matrix.indices, matrix.indptr]
    else:
        parts = [np.asarray(matrix)]
    check = 0
    for part in parts:
        check = zlib.crc32(np.ascontiguousarray(part).data, check)
    return check


def _device(accelerator: str) -> str:
    if accelerator == "auto":
        return "cuda:0" if on_gpu(accelerator) else "cpu"
    return {"gpu": "cuda:0", "cuda": "cuda:0"}.get(accelerator, accelerator)


def _report(model: FIMP, work: AnnData | MuData, inputs: Inputs, accelerator: str, zero_shot: bool) -> None:
    nodes, parts = nodes_of(work, inputs.modality), parts_of(work, inputs.modality)
    tables = [part.adata for part in parts if not part.is_sequence]
    n_vars = sum(table.n_vars for table in tables)
    shapes = model.module.sequences.values()
    # With what the optimiser keeps of those that are trained.
    weights = sum(p.numel() * (16 if p.requires_grad and not zero_shot else 4) for p in model.module.parameters())
    # A block: about twice its destinations with the halo, a dozen dense copies of its expression, and copies of its
    # tokens, a few dozen in training; a stack that computes its layers again in backward keeps two for each.
    network, n_nodes, copies = model.module.network, 2 * 256, 40
    if isinstance(network, FoundationNetwork):
        n_nodes, copies = (
            (2 * 128, 12) if zero_shot or network.frozen else (n_nodes, 24 + 2 * len(network.stack.layers))
        )
    n_tokens = (model.n_tokens if tables else 0) + sum(shape.n_tokens for shape in shapes)
    n_values = n_vars + sum(shape.n_tokens * shape.token_size for shape in shapes)
    block = min(n_nodes, 2 * nodes.n_obs) * (12 * n_values + copies * (n_tokens + 1) * network.width) * 4
    matrix = 0
    for table in tables:
        if storage(table.X) == "memory":
            matrix += 3 * (table.X.nnz * 8 if sparse.issparse(table.X) else table.X.nbytes)
    what = "cell" if parts[0].kind == "expression" else "node"
    things = [f"{table.n_vars:,} genes" for table in tables]
    things += [f"{shape.n_tokens} tokens of {name}" for name, shape in model.module.sequences.items()]
    logger.info(
        "%s %s, %s, %.1f neighbours per %s, %d classes; %s on %s, about %.1f GB of memory.",
        f"{nodes.n_obs:,}", f"{what}s", ", ".join(things),
        nodes.obsp[inputs.connectivities_key].nnz / nodes.n_obs, what,
        len(model.classes),
        "computing" if zero_shot else "training", "GPU" if on_gpu(accelerator) else "CPU",
        (weights + block + matrix) / 1e9 + 0.6,
    )  # fmt: skip
