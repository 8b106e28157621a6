"""What embed, annotate and impute share: a working copy, a model for it, and a record of how a result was made."""

from __future__ import annotations

import logging
import warnings
import weakref
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData, ImplicitModificationWarning
from scipy import sparse

import fimp_sc
from fimp_sc import pp
from fimp_sc.data._checks import (
    check_anndata,
    check_coordinates,
    check_graph,
    check_labels,
    check_obs_key,
    get_matrix,
    get_obs,
    in_memory,
)
from fimp_sc.data._stored import identity, storage
from fimp_sc.model import FIMP
from fimp_sc.model._pretrained import is_pretrained
from fimp_sc.model._train import on_gpu
from fimp_sc.nn import FoundationNetwork

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_CONNECTIVITIES = "_connectivities"


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


# The last model used for an object, by identity: forgotten with the object, never written to it.
_models: dict[int, tuple[weakref.ref[AnnData], tuple[Any, ...], FIMP]] = {}


def working_copy(adata: AnnData, inputs: Inputs, *, labels_required: bool = False) -> AnnData:
    """Return a light object that shares the expression matrix and holds what a model needs, graph included.

    The user's object stays as it is: scvi-tools writes its identifiers to the working copy, and a graph built here
    is written back by :func:`write_back` only when the call has succeeded. An expression matrix that is not in memory
    stays where it is: ``X`` of the light object then is the very dataset or dask array.
    """
    check_anndata(adata)
    for key, role in ((inputs.library_key, "library"), (inputs.batch_key, "batch")):
        if key is not None:
            check_obs_key(adata, key, role)
    if labels_required:
        check_labels(adata, str(inputs.labels_key), inputs.unlabeled_category)
    keys = dict.fromkeys([inputs.library_key, inputs.batch_key, inputs.labels_key])
    columns = [key for key in keys if key is not None and key in adata.obs]
    coordinates = [inputs.spatial_key] if inputs.spatial_key in adata.obsm else []
    work = AnnData(
        get_matrix(adata, inputs.layer),
        obs=pd.DataFrame(get_obs(adata, columns), index=adata.obs_names),
        var=pd.DataFrame(index=adata.var_names),
        obsm={key: in_memory(adata.obsm[key], f"adata.obsm[{key!r}]") for key in coordinates},
    )
    if inputs.connectivities_key in adata.obsp:
        where = f"adata.obsp[{inputs.connectivities_key!r}]"
        work.obsp[inputs.connectivities_key] = in_memory(adata.obsp[inputs.connectivities_key], where)
    elif inputs.connectivities_key.endswith(_CONNECTIVITIES):
        if not coordinates:
            check_coordinates(adata, inputs.spatial_key)  # absent: names the keys of the user's object
        pp.spatial_graph(
            work,
            library_key=inputs.library_key,
            spatial_key=inputs.spatial_key,
            key_added=inputs.connectivities_key.removesuffix(_CONNECTIVITIES),
        )
    else:
        check_graph(adata, inputs.connectivities_key)  # absent: says so, and what to do
    return work


def fitted_model(
    adata: AnnData,
    work: AnnData,
    inputs: Inputs,
    *,
    model: FIMP | str | Path | None,
    reuse: bool,
    max_epochs: int | None,
    accelerator: str,
    random_state: int,
    verbose: bool,
    model_kwargs: dict[str, Any] | None,
    train_kwargs: dict[str, Any] | None,
    gene_embeddings: Any = None,
    foundation: str | None = None,
    checkpoint: str | Path | None = None,
    zero_shot: bool = False,
) -> FIMP:
    """Return a model for the working copy: the given one, the remembered one, or one trained (or just built) now."""
    what = {"gene_embeddings": gene_embeddings, "foundation": foundation, "checkpoint": checkpoint}
    arguments = {name: value for name, value in what.items() if value is not None} | (model_kwargs or {})
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
        return FIMP.load_query_data(with_model_keys(work, given, inputs), given)
    mark = _fingerprint(work, inputs)
    remembered = _models.get(id(adata))
    known = remembered is not None and remembered[0]() is adata and remembered[1] == mark
    usable = remembered is not None and known and remembered[2].is_trained
    if remembered is not None and usable and reuse and not arguments and not train_kwargs:
        logger.info("Using the model trained before on this object.")
        return remembered[2]
    ids = arguments.get("vocabulary_key")
    if ids is not None and ids in adata.var:
        work.var[ids] = np.asarray(adata.var[ids])
    FIMP.setup_anndata(work, **(asdict(inputs) | {"layer": None}))
    fresh = FIMP(work, **{"random_state": random_state, **arguments})
    _report(fresh, work, accelerator, zero_shot)
    if zero_shot:
        fresh.to_device(_device(accelerator))
        return fresh
    fresh.train(max_epochs, accelerator=accelerator, **{"enable_progress_bar": verbose, **(train_kwargs or {})})
    return fresh


def with_model_keys(work: AnnData, model: FIMP, inputs: Inputs) -> AnnData:
    """Give the working copy the keys under which the model was set up: the caller's keys name the caller's data."""
    setup = model.registry["setup_args"]
    query = work.copy() if work.is_view else work
    if setup["layer"] is not None:
        query.layers[setup["layer"]] = query.X
    if setup["connectivities_key"] not in query.obsp:
        query.obsp[setup["connectivities_key"]] = query.obsp[inputs.connectivities_key]
    if setup["spatial_key"] not in query.obsm and inputs.spatial_key in query.obsm:
        query.obsm[setup["spatial_key"]] = query.obsm[inputs.spatial_key]
    for name in ("library_key", "batch_key"):
        if setup[name] is not None and setup[name] not in query.obs:
            given = getattr(inputs, name)
            query.obs[setup[name]] = query.obs[given] if given is not None else "query"
    return query


@contextmanager
def write_back(adata: AnnData, work: AnnData, inputs: Inputs, model: FIMP) -> Iterator[None]:
    """Write results, and the graph if it was built here; remember the model."""
    with warnings.catch_warnings():
        # Writing to a view turns it into an object of its own, as anndata documents.
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        if inputs.connectivities_key not in adata.obsp:
            prefix = inputs.connectivities_key.removesuffix(_CONNECTIVITIES)
            adata.obsp[f"{prefix}_distances"] = work.obsp[f"{prefix}_distances"]
            adata.obsp[inputs.connectivities_key] = work.obsp[inputs.connectivities_key]
            adata.uns[f"{prefix}_neighbors"] = work.uns[f"{prefix}_neighbors"]
        yield
    address = id(adata)
    reference = weakref.ref(adata, lambda _: _models.pop(address, None))
    _models[address] = (reference, _fingerprint(work, inputs), model)


def record(model: FIMP, inputs: Inputs, **extra: Any) -> dict[str, Any]:
    """Return what goes to ``uns``: parameters, seed and versions, in types that h5ad can hold."""
    history = model.history or {}
    return {
        "params": {key: value for key, value in (asdict(inputs) | extra).items() if value is not None},
        "model": dict(model.init_params_["non_kwargs"]),
        "random_state": int(model.random_state),
        "epochs": len(history["train_loss"]) if "train_loss" in history else 0,
        "versions": {"fimp-sc": fimp_sc.__version__, **{p: version(p) for p in ("scvi-tools", "torch", "anndata")}},
    }


def get_model(adata: AnnData) -> FIMP:
    """Return the model that the last call of ``tl`` trained on, or used for, this object in this session.

    Parameters
    ----------
    adata
        The object that was passed to :func:`embed`, :func:`annotate` or :func:`impute`. A copy of it does not count.

    Raises
    ------
    KeyError
        When there is none.
    """
    remembered = _models.get(id(adata))
    if remembered is None or remembered[0]() is not adata:
        raise KeyError(
            "No model is known for this object in this session: call fimp_sc.tl.embed(adata) first, or "
            "FIMP.load(folder) for a saved one."
        )
    return remembered[2]


def _fingerprint(work: AnnData, inputs: Inputs) -> tuple[Any, ...]:
    groups = [work.obs[key] for key in (inputs.library_key, inputs.batch_key) if key is not None]
    tables = [pd.util.hash_pandas_object(x).to_numpy() for x in (work.obs_names, work.var_names, *groups)]
    contents = [_checksum(x) for x in (*tables, work.obsp[inputs.connectivities_key])]
    # Expression that is not in memory is known by where it is: reading all of it would take longer than most calls.
    expression = _checksum(work.X) if storage(work.X) == "memory" else identity(work.X)
    return (*contents, expression, inputs.layer, inputs.library_key, inputs.batch_key, inputs.input_scale)


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


def _report(model: FIMP, work: AnnData, accelerator: str, zero_shot: bool) -> None:
    graph = work.obsp[model.registry["setup_args"]["connectivities_key"]]
    # With what the optimiser keeps of those that are trained.
    weights = sum(p.numel() * (16 if p.requires_grad and not zero_shot else 4) for p in model.module.parameters())
    # A block: about twice its destinations with the halo, a dozen dense copies of its expression, and copies of its
    # tokens, a few dozen in training; a stack that computes its layers again in backward keeps two for each.
    network, n_nodes, copies = model.module.network, 2 * 256, 40
    if isinstance(network, FoundationNetwork):
        n_nodes, copies = (
            (2 * 128, 12) if zero_shot or network.frozen else (n_nodes, 24 + 2 * len(network.stack.layers))
        )
    block = n_nodes * (12 * work.n_vars + copies * (model.n_tokens + 1) * network.width) * 4
    matrix = 0
    if storage(work.X) == "memory":
        matrix = 3 * (work.X.nnz * 8 if sparse.issparse(work.X) else work.X.nbytes)
    logger.info(
        "%s cells, %s genes, %.1f neighbours per cell, %d classes; %s on %s, about %.1f GB of memory.",
        f"{work.n_obs:,}", f"{work.n_vars:,}", graph.nnz / work.n_obs, len(model.classes),
        "computing" if zero_shot else "training", "GPU" if on_gpu(accelerator) else "CPU",
        (weights + block + matrix) / 1e9 + 0.6,
    )  # fmt: skip


def finite_or_raise(values: np.ndarray, what: str) -> None:
    """Refuse to write results that training has driven to NaN."""
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"The {what} has values that are not finite: training diverged. Lower the learning rate with "
            "train_kwargs={'plan_kwargs': {'lr': 1e-4}}. The object is unchanged."
        )
