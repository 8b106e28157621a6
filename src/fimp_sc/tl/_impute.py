from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import sparse

from fimp_sc._logging import user_messages
from fimp_sc._options import checked
from fimp_sc.data._study import expand_rows
from fimp_sc.data.sequences._kinds import sequence_kind
from fimp_sc.data.storage._elements import missing_key, shorten
from fimp_sc.model.predict._attention import gene_columns
from fimp_sc.model.registry._graph_data import known_columns, table_ends, tables_of
from fimp_sc.tl._call._inputs import check_results, choose, working_copy
from fimp_sc.tl._call._models import fitted_model, given_model, write_back
from fimp_sc.tl._call._results import finite_or_raise, measured_scale, placed, record
from fimp_sc.tl._call._several import opened, several

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray

    from fimp_sc.data._study import Modality
    from fimp_sc.model import FIMP
    from fimp_sc.pretrained import Foundation

logger = logging.getLogger(__name__)


@several
@checked
def impute(
    adata: AnnData | MuData | Sequence[AnnData] | Mapping[str, AnnData],
    *,
    genes: str | Sequence[str] | None = None,
    scale: Literal["log", "counts"] = "log",
    hidden: NDArray[np.bool_] | str | None = None,
    modality: str | Sequence[str] | None = None,
    layer: str | None = None,
    library_key: str | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = None,
    connectivities_key: str | None = None,
    input_scale: str | dict[str, str] | None = None,
    center: Literal["training", "batch"] | None = None,
    key_added: str = "fimp",
    foundation: Foundation | None = None,
    model: FIMP | str | Path | None = None,
    n_tokens: int | None = None,
    n_layers: int | None = None,
    max_epochs: int | None = None,
    accelerator: str = "auto",
    random_state: int | None = None,
    verbose: bool = True,
    overwrite: bool = False,
    copy: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    train_kwargs: dict[str, Any] | None = None,
    inference_kwargs: dict[str, Any] | None = None,
) -> AnnData | MuData | list[AnnData] | dict[str, AnnData] | None:
    """Predict expression (signals, images) of every node from its own tokens and those of its neighbors.

    The model that :func:`embed` or :func:`annotate` trained on this object before is used, if nothing has changed.
    Otherwise one is trained, and a line of the log says why; so it is if that model has seen values that are ``hidden``
    now.

    Parameters
    ----------
    adata
        Cells with expression and coordinates; or a MuData object, of which a modality is read: expression, signals of
        regions (:func:`fimp_sc.pp.fmri`), images (:func:`fimp_sc.pp.images`) or features (:func:`fimp_sc.pp.features`).
        Several AnnData objects, as a list or a dictionary by name, are read as samples of one (see Notes).
    genes
        Gene or genes to predict, of those that the model knows, measured here or not, spelled as in the object that the
        model was trained on. All genes of ``adata`` by default, which makes a dense layer of cells x genes: name genes
        for a large object. Of several tables that are read together genes of any; each is written to its own table.
    scale
        ``"log"``: ``log1p`` of values scaled to the common total of the model, the median total of the cells that it
        was trained on. ``"counts"``: scaled back to the total of each cell. Measured values are on the scale of
        ``"log"`` once the genes ``uns[key_added]["measured"]`` of each cell are scaled to ``uns[key_added]["total"]``
        together, and ``log1p`` is taken. Predictions are on that of cells whose median total of these genes is ``own``
        after ``np.log1p(np.expm1(predictions) * own / total)``.
    hidden
        Values that the model must not see, in training or later: a boolean array, or the name of a layer that holds it
        (of images, of an entry of ``obsm``); of several modalities the name, under which each of them may hold its own.
        Of expression ``(n_obs, n_vars)``, of signals ``(n_obs, n_times)``, of images ``(n_obs, height, width)``.
        Segments and patches that are not hidden are predicted in turn, each while it is hidden; genes are predicted as
        they are seen. Totals of cells are those of visible values; of log-normalized values, which are used as they
        are, those that they were normalized with. Predictions are on the scale of whole cells. A given ``model`` is
        used as it is, whatever it was trained on.
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
        with about the same mixture of cells. By default that of the ``model`` or of the latest call, else
        ``"training"``.
    key_added
        Name of the results in ``layers`` (all genes) or ``obsm`` (with ``genes``), and in ``uns``.
    foundation
        A foundation model that makes the messages, from :func:`fimp_sc.pretrained.load`, such as
        ``fimp_sc.pretrained.load("scgpt", "scGPT_human/")``.
    model
        A trained model to apply without training: the model, its folder, or its name on the Hugging Face hub. Genes are
        matched by name. The object must hold the keys of the model, or others must be given; a column of samples is
        only needed where the model subtracts means of batches by it (``center="batch"``).
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
        Seed of training; 0 by default. A model that was trained before with another seed is not used if one is given.
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
    ``None``, or the copy. Nothing is written when the call fails. Writes:

    - ``layers[key_added]``: ``(n_obs, n_vars)`` float32, NaN for genes that a given model does not know; or with
      ``genes``, ``obsm[key_added]``: ``(n_obs, len(genes))`` float32. What an earlier call wrote to the other one is
      removed;
    - of signals ``layers[key_added]``: ``(n_obs, n_times)`` float32, NaN for time points that do not fill a segment; of
      images ``obsm[key_added]``: ``(n_obs, height * width * channels)`` float32, NaN for pixels that do not fill a
      patch; each in its modality;
    - ``uns[key_added]``: ``genes``, parameters, seed, versions, and the scaling of measured values: ``input_scale``,
      ``trained_scale``, ``target_sum``, the ``total`` of the genes ``measured`` here that the model knows, and the
      ``fraction`` of it that each has; also in ``uns`` of each modality where several are read together;
    - the graph in ``obsp`` and ``uns``, if it was built.

    Raises
    ------
    KeyError
        A key is missing, or the model does not know a gene of ``genes``.
    TypeError
        An argument is unknown or of another type.
    ValueError
        Values or graph cannot be used, an argument is for other modalities, a gene is named twice, everything is
        hidden, or ``key_added`` has a slash or names data that would be lost (see ``overwrite``).
    FloatingPointError
        Training diverged.

    Warns
    -----
    UserWarning
        Genes or cells without values, cells without neighbors, control probes among the genes, or a graph that joins
        samples that lie over each other.

    Notes
    -----
    Keys that are not given (``None``) are those that a given ``model`` was trained with, else those of the latest call
    of :mod:`fimp_sc.tl` whose results are in the object, also if it was written to a file since; a line of the log
    names them.

    Several objects are in memory; each is a sample, as is each value of ``library_key`` within it, and has its own
    graph. The model knows the genes of all of them; those that an object does not have were not measured there.
    Results, and the model, are those of one object that holds the cells of all, and are written to each.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> adata = fimp.datasets.toy_communication(n_obs=200, n_genes=40)
    >>> genes = list(adata.var_names[:3])
    >>> fimp.tl.impute(adata, genes=genes, library_key="section", max_epochs=1, verbose=False)
    >>> adata.obsm["fimp"].shape
    (200, 3)
    """
    genes = [genes] if isinstance(genes, str) else genes if genes is None else list(genes)
    twice = [gene for gene, number in Counter(genes or ()).items() if number > 1]
    if twice:
        raise ValueError(f"genes names {shorten([repr(gene) for gene in twice])} more than once: name each gene once.")
    adata = opened(adata, copy)
    model = given_model(model, accelerator, verbose=verbose)
    study, inputs = choose(
        adata, modality, verbose=verbose, model=model, layer=layer, library_key=library_key, batch_key=batch_key,
        spatial_key=spatial_key, connectivities_key=connectivities_key, input_scale=input_scale,
        center=center,
    )  # fmt: skip
    modalities = study.modalities
    target = study.data
    check_results(
        key_added, "tl.impute", study, inputs, overwrite=overwrite, tables=[one.adata for one in modalities],
        also={(slot, hidden): "hidden" for slot in ("layers", "obsm") if isinstance(hidden, str)},
    )  # fmt: skip
    if all(one.is_sequence for one in modalities) and (genes is not None or scale != "log"):
        raise ValueError(
            "genes= and scale= are for expression and features: signals and images are predicted as a whole, as they "
            "are. Leave them out."
        )
    with user_messages(verbose=verbose):
        work = working_copy(study, inputs)
        masks = _masks(hidden, modalities, work.nodes.obs_names)
        if len(masks) == len(modalities) and all(_is_whole(mask) for mask in masks.values()):
            raise ValueError("hidden is True everywhere, so that there is nothing to see: leave some values visible.")
        fitted = fitted_model(
            study, work, inputs, model=model, reuse=True, max_epochs=max_epochs, accelerator=accelerator,
            random_state=random_state, verbose=verbose, model_kwargs=model_kwargs, train_kwargs=train_kwargs,
            hidden=masks, foundation=foundation,
            genes=genes, n_tokens=n_tokens, n_layers=n_layers, wanted="values",
        )  # fmt: skip
        how = inference_kwargs or {}
        predicted: list[tuple[Modality, np.ndarray, Any]] = [
            (one, _reconstructed(fitted, one, masks.get(one.name), how), None) for one in modalities if one.is_sequence
        ]
        tables = tables_of(fitted, work)
        if tables:
            users = {one.name: one for one in modalities}
            hidden_here = {one.name: masks[one.name] for one in tables if one.name in masks} or None
            expression = _expression(fitted, tables, genes, scale, hidden_here, how)
            predicted += [(users[name], values, names) for name, values, names in expression]
        extra: dict[str, Any] = {}
        with write_back(study, work, inputs, fitted):
            for one, values, names in predicted:
                table = one.adata
                values = placed(values, work.nodes.obs_names, table.obs_names)
                in_layer = sequence_kind(one.kind).results == "layers" if one.is_sequence else genes is None
                if in_layer:
                    table.layers[key_added] = values
                else:
                    table.obsm[key_added] = values.reshape(len(values), -1)
                if names is None:
                    continue
                other = table.obsm if in_layer else table.layers
                if key_added in other:
                    del other[key_added]  # of an earlier call, whose record is about to be replaced
                extra = {"genes": np.array(names, dtype=object)} | measured_scale(fitted, one)
                if table is not target:
                    table.uns[key_added] = record(fitted, inputs, table, "tl.impute", scale=scale) | extra
            kept = scale if extra else None
            if len(tables) > 1:
                # How each table is scaled is said in its own record.
                extra = {"genes": np.concatenate([names for _, _, names in predicted if names is not None])}
            target.uns[key_added] = record(fitted, inputs, target, "tl.impute", scale=kept) | extra
    return adata if copy else None


def _reconstructed(model: FIMP, modality: Modality, hidden: Any, how: Any) -> np.ndarray:
    """Return signals or images of one modality for all nodes of the model."""
    names = list(model.module.sequences)
    name = modality.name if modality.name in names else names[0]
    values = model.get_reconstruction(modality=name, hidden=hidden, **how)
    # What does not fill a token is NaN by design.
    kind, shape = sequence_kind(modality.kind), model.module.sequences[name]
    size, token_size = kind.size(modality.adata), model.token_sizes[name]
    whole = np.zeros((1, kind.tokens(size, token_size)[0], shape.token_size))
    finite_or_raise(values[:, np.isfinite(kind.restore(whole, size, token_size)[0])], "reconstruction")
    return values


def _expression(
    model: FIMP, tables: Sequence[Modality], genes: list[str] | None, scale: Any, hidden: Any, how: Any
) -> list[tuple[str, np.ndarray, NDArray[Any]]]:
    """Return of each table its name, values of its genes for all nodes of the model, and their names.

    Of several tables, those that have none of ``genes`` are left out.
    """
    values = model.get_expression(genes=genes, scale=scale, hidden=hidden, **how)
    if genes is None:
        known = np.concatenate(known_columns(model, tables)) >= 0
        if not known.all():
            logger.warning("%d genes are not known to the model: their columns are NaN.", (~known).sum())
        finite_or_raise(values[:, known], "prediction")
        cuts = np.cumsum([modality.adata.n_vars for modality in tables])[:-1]
        split = zip(tables, np.split(values, cuts, axis=1), strict=True)
        return [(modality.name, own, np.array(modality.adata.var_names, dtype=object)) for modality, own in split]
    finite_or_raise(values, "prediction")
    names = np.array(genes, dtype=object)
    owner = np.searchsorted(table_ends(model), gene_columns(model, genes), side="right")
    chosen = [(modality.name, owner == i) for i, modality in enumerate(tables)]
    return [(name, values[:, mine], names[mine]) for name, mine in chosen if mine.any() or len(tables) == 1]


def _masks(hidden: Any, modalities: Sequence[Modality], nodes: pd.Index) -> dict[str, Any]:
    """Return what is hidden of each modality, from an array or from the name under which modalities hold theirs."""
    if hidden is None:
        return {}
    if not isinstance(hidden, str):
        if len(modalities) > 1:
            raise ValueError(
                "hidden is one array for several modalities: store one in each that has something to hide, under one "
                "name in layers (of images in obsm), and pass that name."
            )
        return {modalities[0].name: hidden}
    masks = {modality.name: _mask(hidden, modality, nodes) for modality in modalities if hidden in _place(modality)[0]}
    if not masks:
        place, where = _place(modalities[0])
        raise missing_key(hidden, f"adata.{where}", place, "Store there, True, what is not to be seen.")
    return masks


def _is_whole(mask: Any) -> bool:
    """Tell whether all values are hidden."""
    if sparse.issparse(mask):
        return bool(mask.astype(bool).sum() == np.prod(mask.shape))
    return bool(np.asarray(mask, dtype=bool).all())


def _place(modality: Modality) -> tuple[Any, str]:
    """Return where a modality holds what is hidden of it, and what that is called."""
    in_layer = not modality.is_sequence or sequence_kind(modality.kind).results == "layers"
    return (modality.adata.layers, "layers") if in_layer else (modality.adata.obsm, "obsm")


def _mask(name: str, modality: Modality, nodes: pd.Index) -> Any:
    mask = _place(modality)[0][name]
    names = modality.adata.obs_names.astype(str)
    if names.equals(nodes):
        return mask if sparse.issparse(mask) else np.asarray(mask)
    rows = names.get_indexer(nodes)
    if sparse.issparse(mask):
        return expand_rows(mask, rows.astype(np.int64), name).astype(bool)
    out = np.asarray(mask)[rows]
    out[rows < 0] = False
    return out
