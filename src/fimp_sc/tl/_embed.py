from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fimp_sc._logging import user_messages
from fimp_sc._options import checked
from fimp_sc.tl._call._inputs import check_results, choose, working_copy
from fimp_sc.tl._call._models import fitted_model, given_model, write_back
from fimp_sc.tl._call._results import finite_or_raise, placed, record
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
def embed(
    adata: AnnData | MuData | Sequence[AnnData] | Mapping[str, AnnData],
    *,
    modality: str | Sequence[str] | None = None,
    layer: str | None = None,
    library_key: str | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = None,
    connectivities_key: str | None = None,
    input_scale: str | dict[str, str] | None = None,
    center: Literal["training", "batch", "matched"] | None = None,
    key_added: str = "X_fimp",
    foundation: Foundation | None = None,
    zero_shot: bool = False,
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
    """Embed each cell (region, image) from its own tokens and those of its neighbors.

    A model is trained on masked expression (or signals, or images): FIMP-base, or a foundation model between cells. It
    is remembered for later calls on this object, see :func:`get_model`.

    Parameters
    ----------
    adata
        Cells with expression and coordinates; or a MuData object, of which a modality is read: expression, signals of
        regions (:func:`fimp_sc.pp.fmri`), images (:func:`fimp_sc.pp.images`) or features (:func:`fimp_sc.pp.features`).
        Several AnnData objects, as a list or a dictionary by name, are read as samples of one (see Notes).
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
        Name of the results in ``obsm`` and ``uns``.
    foundation
        A foundation model that makes the messages, from :func:`fimp_sc.pretrained.load`, such as
        ``fimp_sc.pretrained.load("scgpt", "scGPT_human/")``.
    zero_shot
        Use the foundation model as it is, without training. The embedding of a frozen foundation model is the same with
        and without training, which only concerns labels and expression.
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
    ``None``, or the copy. Nothing is written when the call fails. Writes:

    - ``obsm[key_added]``: ``(n_obs, n_latent)`` float32;
    - ``uns[key_added]``: parameters, seed, versions;
    - the graph in ``obsp`` and ``uns``, if it was built.

    Raises
    ------
    KeyError
        A key is missing.
    TypeError
        An argument is unknown or of another type.
    ValueError
        An argument is out of range; values, graph, or the files of a foundation model or of gene vectors cannot be
        used; or ``key_added`` has a slash or names data that would be lost (see ``overwrite``).
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
    >>> fimp.tl.embed(adata, library_key="section", max_epochs=1, verbose=False)
    >>> adata.obsm["X_fimp"].shape
    (200, 64)
    """
    adata = opened(adata, copy)
    model = given_model(model, accelerator, verbose=verbose)
    study, inputs = choose(
        adata, modality, verbose=verbose, model=model, layer=layer, library_key=library_key, batch_key=batch_key,
        spatial_key=spatial_key, connectivities_key=connectivities_key, input_scale=input_scale,
        center=center,
    )  # fmt: skip
    target = study.data
    check_results(key_added, "tl.embed", study, inputs, overwrite=overwrite)
    if zero_shot and not (foundation or model or (model_kwargs or {}).get("foundation")):
        raise ValueError(
            "zero_shot=True needs a foundation model: pass foundation=fimp_sc.pretrained.load(name, checkpoint)."
        )
    with user_messages(verbose=verbose):
        work = working_copy(study, inputs)
        fitted = fitted_model(
            study, work, inputs, model=model, reuse=False, max_epochs=max_epochs, accelerator=accelerator,
            random_state=random_state, verbose=verbose, model_kwargs=model_kwargs, train_kwargs=train_kwargs,
            foundation=foundation, zero_shot=zero_shot,
            n_tokens=n_tokens, n_layers=n_layers,
        )  # fmt: skip
        embedding = fitted.get_latent_representation(**(inference_kwargs or {}))
        finite_or_raise(embedding, "embedding")
        with write_back(study, work, inputs, fitted):
            target.obsm[key_added] = placed(embedding, work.nodes.obs_names, target.obs_names)
            target.uns[key_added] = record(fitted, inputs, target, "tl.embed")
    return adata if copy else None
