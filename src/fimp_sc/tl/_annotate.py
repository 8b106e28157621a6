from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype

from fimp_sc._logging import user_messages
from fimp_sc._options import checked
from fimp_sc.data.storage._elements import get_obs
from fimp_sc.data.validate._labels import labeled
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
def annotate(
    adata: AnnData | MuData,
    labels_key: str,
    *,
    unlabeled_category: str = "Unknown",
    modality: str | Sequence[str] | None = None,
    layer: str | None = None,
    library_key: str | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = None,
    connectivities_key: str | None = None,
    input_scale: str | None = None,
    center: Literal["training", "batch"] | None = None,
    key_added: str | None = None,
    gene_embeddings: Any = None,
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
) -> AnnData | MuData | None:
    """Label every cell: learn from the labeled ones, or apply a trained model to a new section.

    Parameters
    ----------
    adata
        Cells with expression and coordinates.
    labels_key
        Column of ``obs`` with labels. Cells without label (missing, or ``unlabeled_category``) are predicted like
        all others. With ``model`` the column need not exist.
    unlabeled_category
        Label of cells whose class is not known.
    modality, layer, library_key, batch_key, spatial_key, connectivities_key, input_scale, center
        As in :func:`embed`.
    key_added
        Name of the results; ``fimp_{labels_key}`` by default, with "_" for "/".
    gene_embeddings, foundation, model
        As in :func:`embed`.
    n_tokens, n_layers, max_epochs, accelerator, random_state, verbose, overwrite, copy
        As in :func:`embed`.
    model_kwargs, train_kwargs, inference_kwargs
        As in :func:`embed`. A given model must have been trained with labels.

    Returns
    -------
    ``None``, or the copy. Writes ``obs[key]`` (categorical, all cells), ``obs[f"{key}_confidence"]`` (float32,
    probability of the label), ``obsm[f"{key}_probabilities"]`` (``(n_obs, n_classes)`` float32), ``uns[key]``
    (``classes`` in the order of the columns, ``neighbor_share``, ``smoothed_share``, parameters, seed, versions), and
    the graph if it was built. Classes are numbers, or True and False, where the labels in ``obs[labels_key]`` are, else
    text. ``uns[f"{key}_colors"]`` of an earlier call is removed if the classes differ. Nothing is written when the call
    fails. ``neighbor_share``, 0 to 1, is how much the prediction with neighbors counts, beside that of the cell by
    itself (:attr:`fimp_sc.model.FIMP.neighbor_share`); ``smoothed_share`` how much the mean prediction over the cell
    and its neighbors does, beside its own (:attr:`fimp_sc.model.FIMP.smoothed_share`).

    Raises
    ------
    KeyError
        When a key is missing.
    ValueError
        When labels, values or graph cannot be used, the given model knows no labels, or the key is the name of
        something that would be lost.
    """
    key = key_added or f"fimp_{labels_key}".replace("/", "_")
    adata = copied(adata) if copy else adata
    model = given_model(model, accelerator, verbose=verbose)
    study, inputs = choose(
        adata, modality, verbose=verbose, model=model, layer=layer, library_key=library_key, batch_key=batch_key,
        spatial_key=spatial_key, connectivities_key=connectivities_key, input_scale=input_scale,
        center=center, labels_key=labels_key,
        unlabeled_category=unlabeled_category,
    )  # fmt: skip
    target = study.data
    check_results(key, "tl.annotate", study, inputs, overwrite=overwrite)
    with user_messages(verbose=verbose):
        work = working_copy(study, inputs, labels_required=model is None)
        fitted = fitted_model(
            study, work, inputs, model=model, reuse=False, max_epochs=max_epochs, accelerator=accelerator,
            random_state=random_state, verbose=verbose, model_kwargs=model_kwargs, train_kwargs=train_kwargs,
            gene_embeddings=gene_embeddings, foundation=foundation,
            n_tokens=n_tokens, n_layers=n_layers,
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
            _drop_stale_colors(target, key, best.categories)
            target.obs[key] = pd.Series(best, index=target.obs_names)
            target.obs[f"{key}_confidence"] = probabilities.max(1)
            target.obsm[f"{key}_probabilities"] = probabilities
            target.uns[key] = record(fitted, inputs, target, "tl.annotate") | {
                "classes": np.asarray(classes),
                "neighbor_share": fitted.neighbor_share,
                "smoothed_share": fitted.smoothed_share,
            }
    return adata if copy else None


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


def _drop_stale_colors(data: AnnData | MuData, key: str, categories: pd.Index) -> None:
    """Remove the colors of a column whose categories change: scanpy would give them to others, or fail."""
    name = f"{key}_colors"
    if name not in data.uns:
        return
    if key in data.obs:
        same = list(pd.Categorical(get_obs(data, [key])[key]).categories) == list(categories)
    else:
        same = np.size(data.uns[name]) == len(categories)
    if not same:
        del data.uns[name]
