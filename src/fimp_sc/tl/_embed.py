from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fimp_sc._logging import user_messages
from fimp_sc._options import checked
from fimp_sc.tl._call._inputs import check_results, choose, copied, working_copy
from fimp_sc.tl._call._models import fitted_model, given_model, write_back
from fimp_sc.tl._call._results import finite_or_raise, placed, record

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData

    from fimp_sc.model import FIMP
    from fimp_sc.pretrained import Foundation


@checked
def embed(
    adata: AnnData | MuData,
    *,
    modality: str | Sequence[str] | None = None,
    layer: str | None = None,
    library_key: str | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = None,
    connectivities_key: str | None = None,
    input_scale: str | None = None,
    center: Literal["training", "batch"] | None = None,
    key_added: str = "X_fimp",
    gene_embeddings: Any = None,
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
) -> AnnData | MuData | None:
    """Embed each cell (region, image) from its own tokens and those of its neighbors.

    Builds a graph of 6 nearest neighbors when cells have none, trains a model on masked expression (or
    signals, or images; FIMP-base, unless ``foundation`` names another), and writes the embedding.

    Parameters
    ----------
    adata
        Cells with expression and coordinates; or a MuData object, of which a modality is read: expression, signals of
        regions (:func:`fimp_sc.pp.fmri`), images (:func:`fimp_sc.pp.images`) or features.
    modality
        Name of the modality of a MuData object, to which results are written. Of several, the tokens of a node are
        those of all, and results are written to the MuData object. By default the one, or the several, that earlier
        results are of.
    layer, library_key, batch_key, spatial_key, connectivities_key, input_scale, center
        Where to find data and what they are. Those that are not given (``None``) are those that a given ``model`` was
        trained with, and else as in the latest call of :mod:`fimp_sc.tl` whose results are in the object, also if it
        was written to a file since; a line of the log says so. The scale is as in that call for the same layer, and
        else that of the model.

        ``layer``
            layer with expression; ``"X"`` for ``X``, which is read without earlier results.
        ``library_key``
            column of ``obs`` with samples, which are never joined by an edge.
        ``batch_key``
            column of ``obs`` with technical batches, whose means ``center="batch"`` subtracts. Else ``library_key``.
        ``spatial_key``
            coordinates in ``obsm``, else ``"spatial"``.
        ``connectivities_key``
            graph in ``obsp``, else ``"spatial_connectivities"``. If absent it is built with
            :func:`fimp_sc.pp.spatial_graph`.
        ``input_scale``
            ``"counts"``, ``"normalized"``, ``"log"`` or ``"auto"``, else ``"auto"``; see
            :meth:`fimp_sc.model.FIMP.setup_anndata`.
        ``center``
            mean that is subtracted from the expression of a gene: ``"training"``, of all training cells, so that
            results of a cell do not depend on which others there are; ``"batch"``, of the cells of its batch, for
            batches with about the same mixture of cells. Else ``"training"``.
    key_added
        Where to write in ``obsm`` and ``uns``.
    gene_embeddings
        Pretrained vectors of genes that FIMP-base starts from, for instance the file of GenePT; see
        :class:`fimp_sc.model.FIMP`.
    foundation
        A foundation model that makes the messages, from :func:`fimp_sc.pretrained.load`, such as
        ``fimp_sc.pretrained.load("scgpt", "scGPT_human/")``.
    zero_shot
        Use the foundation model as it is, without training. A foundation model that stays frozen embeds alike with and
        without training, which then only concerns labels and expression.
    model
        A trained model to apply without training: the model, its folder, or its name on the Hugging Face hub. Genes
        are matched by name. The object must hold what the keys of the model name, or others be given; a column of
        samples only where the model subtracts means of batches by it (``center="batch"``).
    n_tokens, n_layers
        Token budget of a cell, and message-passing layers, of a model that is trained now; see
        :class:`fimp_sc.model.FIMP`.
    max_epochs
        Upper limit of epochs; by default about 600 steps, and up to four times as many from 4,000 cells on, with early
        stopping.
    accelerator
        ``"auto"`` takes a GPU when there is one.
    random_state
        Seed.
    verbose
        Show a progress bar and a line on what is being done.
    overwrite
        Replace what is under the names of the results already. Without, only earlier results of this function are
        replaced. What the call itself reads never is.
    copy
        Return a copy with the results instead of writing to ``adata``.
    model_kwargs, train_kwargs
        Passed to :class:`fimp_sc.model.FIMP` and its ``train``.
    inference_kwargs
        How results are computed (``batch_size``, ``strategy``, ``distribute``); see
        :meth:`fimp_sc.model.FIMP.get_latent_representation`.

    Returns
    -------
    ``None``, or the copy. Writes ``obsm[key_added]`` (``(n_obs, n_latent)`` float32), ``uns[key_added]`` (parameters,
    seed, versions), and the graph if it was built. Nothing is written when the call fails.

    Raises
    ------
    KeyError
        When a key is missing.
    TypeError
        When an argument is unknown or of another type.
    ValueError
        When an argument is out of range, values or graph cannot be used, or files of a foundation model or of gene
        vectors; or ``key_added`` has a slash, or is the name of something that would be lost (see ``overwrite``).
    """
    adata = copied(adata) if copy else adata
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
            gene_embeddings=gene_embeddings, foundation=foundation, zero_shot=zero_shot,
            n_tokens=n_tokens, n_layers=n_layers,
        )  # fmt: skip
        embedding = fitted.get_latent_representation(**(inference_kwargs or {}))
        finite_or_raise(embedding, "embedding")
        with write_back(study, work, inputs, fitted):
            target.obsm[key_added] = placed(embedding, work.nodes.obs_names, target.obs_names)
            target.uns[key_added] = record(fitted, inputs, target, "tl.embed")
    return adata if copy else None
