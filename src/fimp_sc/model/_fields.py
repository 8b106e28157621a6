"""What FIMP registers with scvi-tools. Data stay where the user keeps them; nothing is written to ``obs``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scvi.data.fields import BaseAnnDataField

from fimp_sc.data._checks import (
    check_anndata,
    check_graph,
    check_labels,
    check_obs_key,
    check_values,
    get_matrix,
    get_obs,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

X_KEY = "X"
GRAPH_KEY = "connectivities"
LABELS_KEY = "labels"
LIBRARY_KEY = "library"
BATCH_KEY = "technical_batch"


class _Field(BaseAnnDataField):
    """An attribute of the object that keeps no state: transfer to another object is registration there."""

    _attr = ""

    def __init__(self, registry_key: str, attr_key: str | None) -> None:
        super().__init__()
        self._registry_key, self._attr_key = registry_key, attr_key

    @property
    def registry_key(self) -> str:
        return self._registry_key

    @property
    def attr_name(self) -> str:
        return self._attr

    @property
    def attr_key(self) -> str | None:
        return self._attr_key

    @property
    def is_empty(self) -> bool:
        return False

    def validate_field(self, adata: AnnData) -> None:
        super().validate_field(adata)

    def register_field(self, adata: AnnData) -> dict:
        return super().register_field(adata)

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        return self.register_field(adata_target)

    def get_summary_stats(self, state_registry: dict) -> dict:
        return {}

    def view_state_registry(self, state_registry: dict) -> None:
        return None


class ExpressionField(_Field):
    """Expression in ``X`` or a layer. Another object may have other genes, as long as some are shared."""

    NAMES = "column_names"
    SCALE = "input_scale"

    def __init__(self, layer: str | None, input_scale: str) -> None:
        super().__init__(X_KEY, layer)
        self._attr = "X" if layer is None else "layers"
        self._input_scale = input_scale

    def validate_field(self, adata: AnnData) -> None:
        # The values are looked at when they are registered: that reads all of them, and once is enough.
        check_anndata(adata)
        get_matrix(adata, self.attr_key)

    def register_field(self, adata: AnnData) -> dict:
        self.validate_field(adata)
        where = "adata.X" if self.attr_key is None else f"adata.layers[{self.attr_key!r}]"
        return {
            "n_obs": adata.n_obs,
            "n_vars": adata.n_vars,
            self.NAMES: np.asarray(adata.var_names.astype(str)),
            self.SCALE: check_values(get_matrix(adata, self.attr_key), where=where, input_scale=self._input_scale),
        }

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        self.validate_field(adata_target)
        n_model = len(state_registry[self.NAMES])
        shared = int((match_columns(state_registry[self.NAMES], adata_target) >= 0).sum())
        if shared < max(adata_target.n_vars, n_model):
            logger.info(
                "%d of %d genes are known to the model (%d are dropped); %d genes of the model are not measured here.",
                shared, adata_target.n_vars, adata_target.n_vars - shared, n_model - shared,
            )  # fmt: skip
        return self.register_field(adata_target)

    def get_summary_stats(self, state_registry: dict) -> dict:
        return {"n_cells": state_registry["n_obs"], "n_vars": state_registry["n_vars"]}


def match_columns(genes: NDArray[Any], adata: AnnData) -> NDArray[np.int64]:
    """Return the column of each of ``genes`` in ``adata``, -1 where it is not measured.

    Raises
    ------
    ValueError
        When no gene is shared.
    """
    columns = pd.Index(adata.var_names.astype(str)).get_indexer(pd.Index(genes)).astype(np.int64)
    shared = int((columns >= 0).sum())
    if not shared:
        raise ValueError(
            f"No gene of adata.var_names is known to the model: found names like {list(adata.var_names[:3])}, the "
            f"model was trained on names like {list(genes[:3])}. Use the same kind of gene names (symbols or Ensembl "
            "ids, same species and case) as in training."
        )
    return columns


class GraphField(_Field):
    """Neighbour graph in ``obsp``; validated, never built here."""

    _attr = "obsp"

    def __init__(self, connectivities_key: str, library_key: str | None) -> None:
        super().__init__(GRAPH_KEY, connectivities_key)
        self._library_key = library_key

    def validate_field(self, adata: AnnData) -> None:
        check_graph(adata, str(self.attr_key), self._library_key)


class GroupField(_Field):
    """Grouping of cells in ``obs`` (sample or technical batch) that every object defines for itself."""

    _attr = "obs"

    def __init__(self, registry_key: str, obs_key: str | None, role: str) -> None:
        super().__init__(registry_key, obs_key)
        self._role = role

    @property
    def is_empty(self) -> bool:
        return self.attr_key is None

    def validate_field(self, adata: AnnData) -> None:
        check_obs_key(adata, str(self.attr_key), self._role)


class LabelField(_Field):
    """Labels in ``obs``. Another object may lack the column or have other classes: these are unlabeled there."""

    _attr = "obs"
    CLASSES = "categorical_mapping"

    def __init__(self, labels_key: str | None, unlabeled_category: str) -> None:
        super().__init__(LABELS_KEY, labels_key)
        self._unlabeled = unlabeled_category

    @property
    def is_empty(self) -> bool:
        return self.attr_key is None

    def validate_field(self, adata: AnnData) -> None:
        # An object to predict needs no labels: they are checked where they are learnt from.
        super().validate_field(adata)

    def register_field(self, adata: AnnData) -> dict:
        check_labels(adata, str(self.attr_key), self._unlabeled)
        labels = get_obs(adata, [str(self.attr_key)])[self.attr_key].dropna().astype(str)
        return {self.CLASSES: np.array(sorted(set(labels) - {str(self._unlabeled)}), dtype=object)}

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        return {self.CLASSES: state_registry[self.CLASSES]}

    def get_summary_stats(self, state_registry: dict) -> dict:
        return {"n_labels": len(state_registry.get(self.CLASSES, ()))}


def registered_fields(setup: Mapping[str, Any]) -> list[_Field]:
    """Return what FIMP registers, from the arguments of its ``setup_anndata``."""
    return [
        ExpressionField(setup["layer"], setup["input_scale"]),
        GraphField(setup["connectivities_key"], setup["library_key"]),
        LabelField(setup["labels_key"], setup["unlabeled_category"]),
        GroupField(LIBRARY_KEY, setup["library_key"], "library"),
        GroupField(BATCH_KEY, setup["batch_key"] or setup["library_key"], "batch"),
    ]
