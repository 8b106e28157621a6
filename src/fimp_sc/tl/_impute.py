from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fimp_sc._logging import user_messages
from fimp_sc.tl._common import Inputs, finite_or_raise, fitted_model, record, working_copy, write_back

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData

    from fimp_sc.model import FIMP

logger = logging.getLogger(__name__)


def impute(
    adata: AnnData,
    *,
    genes: Sequence[str] | None = None,
    scale: Literal["log", "counts"] = "log",
    layer: str | None = None,
    library_key: str | None = None,
    batch_key: str | None = None,
    spatial_key: str = "spatial",
    connectivities_key: str = "spatial_connectivities",
    input_scale: str = "auto",
    key_added: str = "fimp",
    gene_embeddings: Any = None,
    foundation: Literal["scgpt"] | None = None,
    checkpoint: str | Path | None = None,
    model: FIMP | str | Path | None = None,
    max_epochs: int | None = None,
    accelerator: str = "auto",
    random_state: int = 0,
    verbose: bool = True,
    copy: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    train_kwargs: dict[str, Any] | None = None,
    inference_kwargs: dict[str, Any] | None = None,
) -> AnnData | None:
    """Predict the expression of every cell from its own genes and those of its neighbours.

    Uses the model that :func:`embed` or :func:`annotate` trained on this object before, if nothing has changed, and
    trains one otherwise.

    Parameters
    ----------
    adata
        Cells with expression and coordinates.
    genes
        Genes to predict, of those that the model knows, measured here or not. All genes of ``adata`` by default,
        which makes a dense cells x genes layer: name genes for a large object.
    scale
        ``"log"``: ``log1p`` of values scaled to the model's common total (the median total of its training cells).
        ``"counts"``: scaled back to the total of each cell.
    layer, library_key, batch_key, spatial_key, connectivities_key, input_scale
        As in :func:`embed`.
    key_added
        Where to write in ``layers`` (all genes) or ``obsm`` (with ``genes``), and in ``uns``.
    gene_embeddings, foundation, checkpoint, model
        As in :func:`embed`.
    max_epochs, accelerator, random_state, verbose, copy, model_kwargs, train_kwargs, inference_kwargs
        As in :func:`embed`.

    Returns
    -------
    ``None``, or the copy. Writes ``layers[key_added]`` (``(n_obs, n_vars)`` float32, NaN for genes that a given
    model does not know) or, with ``genes``, ``obsm[key_added]`` (``(n_obs, len(genes))`` float32); ``uns[key_added]``
    (``genes``, parameters, seed, versions); and the graph if it was built. Nothing is written when the call fails.

    Raises
    ------
    KeyError
        When a key is missing or a gene of ``genes`` is not known to the model.
    ValueError
        When values or graph cannot be used.
    """
    adata = adata.copy() if copy else adata
    inputs = Inputs(layer, library_key, batch_key, spatial_key, connectivities_key, input_scale)
    with user_messages(verbose=verbose):
        work = working_copy(adata, inputs)
        fitted = fitted_model(
            adata, work, inputs, model=model, reuse=True, max_epochs=max_epochs, accelerator=accelerator,
            random_state=random_state, verbose=verbose, model_kwargs=model_kwargs, train_kwargs=train_kwargs,
            gene_embeddings=gene_embeddings, foundation=foundation, checkpoint=checkpoint,
        )  # fmt: skip
        expression = fitted.get_expression(genes=genes, scale=scale, **(inference_kwargs or {}))
        names = np.array(adata.var_names if genes is None else list(genes), dtype=object)
        unknown = ~np.isin(names.astype(str), fitted.genes.astype(str))
        if unknown.any():
            logger.warning("%d genes are not known to the model: their columns are NaN.", unknown.sum())
        finite_or_raise(expression[:, ~unknown], "prediction")
        with write_back(adata, work, inputs, fitted):
            if genes is None:
                adata.layers[key_added] = expression
            else:
                adata.obsm[key_added] = expression
            adata.uns[key_added] = record(fitted, inputs, scale=scale) | {"genes": names}
    return adata if copy else None
