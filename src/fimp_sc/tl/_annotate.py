from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype

from fimp_sc._logging import user_messages, warn
from fimp_sc._options import checked
from fimp_sc.data.storage._elements import nearest
from fimp_sc.data.validate._labels import labeled
from fimp_sc.tl._call._inputs import check_results, choose, working_copy
from fimp_sc.tl._call._models import fitted_model, given_model, write_back
from fimp_sc.tl._call._results import drop_stale_colors, finite_or_raise, placed, record
from fimp_sc.tl._call._several import opened, several

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData

    from fimp_sc.model import FIMP
    from fimp_sc.pretrained import Foundation


@several
@checked
def annotate(
    adata: AnnData | MuData | Sequence[AnnData] | Mapping[str, AnnData],
    labels_key: str,
    *,
    unlabeled_category: str = "Unknown",
    modality: str | Sequence[str] | None = None,
    layer: str | None = None,
    library_key: str | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = None,
    connectivities_key: str | None = None,
    input_scale: str | dict[str, str] | None = None,
    center: Literal["training", "batch", "matched"] | None = None,
    key_added: str | None = None,
    foundation: Foundation | None = None,
    model: FIMP | str | Path | None = None,
    n_tokens: int | None = None,
    n_layers: int | None = None,
    max_epochs: int | None = None,
    accelerator: str = "auto",
    random_state: int = 0,
    verbose: bool = True,
    overwrite: bool = False,
    copy: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    train_kwargs: dict[str, Any] | None = None,
    inference_kwargs: dict[str, Any] | None = None,
) -> AnnData | MuData | list[AnnData] | dict[str, AnnData] | None:
    """Label every cell: learn from the labeled ones, or apply a trained model to a new section.

    Predictions made with and without neighbors are combined, then smoothed over the graph, each with the weight that
    suits validation cells best.

    Parameters
    ----------
    adata
        Cells with expression and coordinates; or a MuData object, of which a modality is read: expression, signals of
        regions (:func:`fimp_sc.pp.fmri`), images (:func:`fimp_sc.pp.images`) or features (:func:`fimp_sc.pp.features`).
        Several AnnData objects, as a list or a dictionary by name, are read as samples of one (see Notes).
    labels_key
        Column of ``obs`` with labels. Cells without label (missing, or ``unlabeled_category``) are predicted like all
        others. With ``model`` the column need not exist: it then is the one that the model was trained with, and names
        the results.
    unlabeled_category
        Label of cells whose class is not known.
    modality
        Name of the modality of a MuData object to read and to write to. Several are read together: the tokens of a node
        are those of all of them, and results are written to the MuData object. By default the modality, or the several,
        of earlier results.
    layer
        Layer with expression; ``"X"`` for ``X``. By default that of the ``model`` or of the latest call (see Notes),
        else ``X``.
    library_key
        Column of ``obs`` with samples; no edge joins two of them. By default that of the ``model`` or of the latest
        call, else none.
    batch_key
        Column of ``obs`` with technical batches, whose means ``center="batch"`` subtracts. By default that of the
        ``model`` or of the latest call, else ``library_key``.
    spatial_key
        Coordinates in ``obsm``, ``(n_obs, 2)`` or ``(n_obs, 3)``. By default that of the ``model`` or of the latest
        call, else ``"spatial"``.
    connectivities_key
        Graph in ``obsp``, ``(n_obs, n_obs)``, row = destination. If it is absent, a graph of the 6 nearest neighbors is
        built with :func:`fimp_sc.pp.spatial_graph`; cells without places (scRNA-seq) get an empty one from it with
        ``n_neighbors=0`` first. By default that of the ``model`` or of the latest call, else
        ``"spatial_connectivities"``.
    input_scale
        Scale of the values: ``"counts"`` (whole numbers), ``"normalized"`` (without logarithm), ``"log"``
        (log-normalized), ``"real"`` (any numbers, used as they are), or ``"auto"``, which decides from the values; of
        several tables also a dictionary by modality. By default that of the latest call for the same layer, else that
        of the ``model``, else ``"auto"``.
    center
        Mean that is subtracted from the expression of a gene: ``"training"``, over all training cells, so that results
        of a cell do not depend on the other cells of the object; ``"batch"``, over the cells of its batch, for batches
        with about the same mixture of cells; ``"matched"``, that of training, after genes of batches were scaled so
        that neighborhoods which batches have in common agree, for batches that share some tissue. By default that of
        the ``model`` or of the latest call, else ``"training"``.
    key_added
        Name of the results; ``fimp_{labels_key}`` by default, with "_" for "/".
    foundation
        A foundation model that makes the messages, from :func:`fimp_sc.pretrained.load`, such as
        ``fimp_sc.pretrained.load("scgpt", "scGPT_human/")``.
    model
        A trained model to apply without training: the model, its folder, or its name on the Hugging Face hub. Genes are
        matched by name. The object must hold the keys of the model, or others must be given; a column of samples is
        only needed where the model subtracts means of batches by it (``center="batch"``). It must have been trained
        with labels.
    n_tokens
        Number of tokens of a cell: its genes with the highest values. By default 16, or 200 with a foundation model.
        For a model that is trained now.
    n_layers
        Number of message-passing layers; a cell sees as many hops. By default 2. For a model that is trained now.
    max_epochs
        Upper limit of epochs. By default about 600 steps, and up to four times as many from 4,000 cells on, with early
        stopping. For a model that is trained now.
    accelerator
        Device: ``"auto"`` takes a GPU if there is one; else ``"cpu"``, ``"gpu"``, ``"cuda"`` or ``"mps"``.
    random_state
        Seed of training.
    verbose
        Show a progress bar and lines of the log.
    overwrite
        Replace anything that is under the names of the results. If False, only earlier results of this function are
        replaced. Data that the call itself reads are never replaced.
    copy
        Return a copy with the results instead of writing to ``adata``; of several objects a list, or a dictionary.
    model_kwargs
        Further arguments of :class:`fimp_sc.model.FIMP` for a model that is trained now, such as ``{"n_latent": 128}``,
        or ``{"gene_embeddings": "vectors.npz"}`` for pretrained vectors of genes.
    train_kwargs
        Further arguments of :meth:`fimp_sc.model.FIMP.train` for a model that is trained now, such as ``{"checkpoint":
        "folder"}`` for a training that can be continued.
    inference_kwargs
        Computation of results, which it does not change: ``batch_size``, nodes of a block; ``strategy``, ``"blocks"``
        (blocks of nodes with their neighborhood), ``"layers"`` (one layer for all nodes before the next) or ``"auto"``;
        ``distribute``, True for blocks as Dask tasks.

    Returns
    -------
    ``None``, or the copy. Nothing is written when the call fails. Writes, where ``key`` is ``key_added``:

    - ``obs[key]``: categorical, the label of every cell; numbers, or True and False, where the labels in
      ``obs[labels_key]`` are, else text;
    - ``obs[f"{key}_confidence"]``: float32, probability of the label;
    - ``obsm[f"{key}_probabilities"]``: ``(n_obs, n_classes)`` float32;
    - ``uns[key]``: ``classes`` in the order of these columns; ``neighbor_weight``, the weight (0 to 1) of the
      prediction with neighbors beside that without, ``linear_weight``, the weight of a linear model of all genes
      beside these, and ``smoothing_weight``, the weight of the mean prediction over a cell and its neighbors beside its
      own; parameters, seed, versions;
    - the graph in ``obsp`` and ``uns``, if it was built.

    The colors of an earlier call, ``uns[f"{key}_colors"]``, are removed if the classes differ.

    Raises
    ------
    KeyError
        A key is missing.
    TypeError
        An argument is unknown or of another type.
    ValueError
        Labels, values or graph cannot be used; the given model knows no labels; or ``key_added`` has a slash or names
        data that would be lost (see ``overwrite``).
    FloatingPointError
        Training diverged.

    Warns
    -----
    UserWarning
        Genes or cells without values, cells without neighbors, control probes among the genes, or a graph that joins
        samples that lie over each other. Labels that read as if cells had none, or that a single cell has. With
        ``model``, a ``labels_key`` that neither the object has nor the model was trained with.

    Notes
    -----
    Keys that are not given (``None``) are those that a given ``model`` was trained with, else those of the latest call
    of :mod:`fimp_sc.tl` whose results are in the object, also if it was written to a file since; a line of the log
    names them.

    A frozen foundation model learns labels alone here: its embeddings are computed once, whatever the number of epochs.
    :func:`impute` then trains a model of its own; ``train_kwargs={"mask_cells": 0.5}`` learns both at once.

    Several objects are in memory; each is a sample, as is each value of ``library_key`` within it, and has its own
    graph. The model knows the genes of all of them; those that an object does not have were not measured there.
    Results, and the model, are those of one object that holds the cells of all, and are written to each.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> fimp.tl.annotate(adata, "cell_type", library_key="section", max_epochs=1, verbose=False)
    >>> bool((adata.obs["fimp_cell_type_confidence"] > 0).all())
    True
    """
    key = key_added or f"fimp_{labels_key}".replace("/", "_")
    adata = opened(adata, copy)
    model = given_model(model, accelerator, verbose=verbose)
    study, inputs = choose(
        adata, modality, verbose=verbose, model=model, layer=layer, library_key=library_key, batch_key=batch_key,
        spatial_key=spatial_key, connectivities_key=connectivities_key, input_scale=input_scale,
        center=center, labels_key=labels_key,
        unlabeled_category=unlabeled_category,
    )  # fmt: skip
    target = study.data
    check_results(key, "tl.annotate", study, inputs, overwrite=overwrite)
    if model is not None:
        _warn_unknown_column(labels_key, model, study.nodes, key)
    with user_messages(verbose=verbose):
        work = working_copy(study, inputs, labels_required=model is None)
        fitted = fitted_model(
            study, work, inputs, model=model, reuse=False, max_epochs=max_epochs, accelerator=accelerator,
            random_state=random_state, verbose=verbose, model_kwargs=model_kwargs, train_kwargs=train_kwargs,
            foundation=foundation, n_tokens=n_tokens, n_layers=n_layers, wanted="labels",
        )  # fmt: skip
        soft = cast("pd.DataFrame", fitted.predict(soft=True, **(inference_kwargs or {})))
        probabilities = soft.to_numpy(dtype=np.float32)
        finite_or_raise(probabilities, "prediction")
        classes = _in_type_of_labels(soft.columns, work.nodes, labels_key, unlabeled_category)
        with write_back(study, work, inputs, fitted):
            probabilities = placed(probabilities, work.nodes.obs_names, target.obs_names)
            known = ~np.isnan(probabilities).any(1)
            best = pd.Categorical.from_codes(
                np.where(known, probabilities.argmax(1), -1).tolist(), categories=list(classes)
            )
            drop_stale_colors(target, key, best.categories)
            target.obs[key] = pd.Series(best, index=target.obs_names)
            target.obs[f"{key}_confidence"] = probabilities.max(1)
            target.obsm[f"{key}_probabilities"] = probabilities
            target.uns[key] = record(fitted, inputs, target, "tl.annotate") | {
                "classes": np.asarray(classes),
                "neighbor_weight": fitted.neighbor_weight,
                "smoothing_weight": fitted.smoothing_weight,
                "linear_weight": fitted.linear_weight,
            }
    return adata if copy else None


def _warn_unknown_column(labels_key: str, model: FIMP, nodes: AnnData, key: str) -> None:
    """Warn where a column of labels is neither that of the model nor in the object: it may be misspelled."""
    trained = model.registry["setup_args"].get("labels_key")
    if labels_key in nodes.obs or trained in (labels_key, None):
        return
    warn(
        f"labels_key={labels_key!r} is no column of adata.obs, and the model was trained with {trained!r}."
        f"{nearest(labels_key, [str(trained), *map(str, nodes.obs.columns)])} Results go to adata.obs[{key!r}]: "
        f"pass labels_key={trained!r}, and key_added= for another name of the results."
    )


def _in_type_of_labels(classes: pd.Index, nodes: AnnData, labels_key: str, unlabeled_category: str) -> pd.Index:
    """Return classes, which a model knows as text, as numbers or bools where the labels of an object are."""
    kind = (
        ""
        if labels_key not in nodes.obs
        else infer_dtype(labeled(nodes, labels_key, unlabeled_category).astype(object))
    )
    try:
        if kind == "boolean":
            return pd.Index([{"False": False, "True": True}[name] for name in classes])
        return classes.astype({"integer": np.int64, "floating": np.float64}.get(kind, object))
    except (KeyError, ValueError):  # a given model knows other classes
        return classes.astype(object)
