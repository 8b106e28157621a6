"""Fields that FIMP registers with scvi-tools. Data stay where the user keeps them; nothing is written to ``obs``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scvi.data.fields import BaseAnnDataField

from fimp_sc._errors import MissingKeyError
from fimp_sc._logging import warn
from fimp_sc.data._study import Modality, Study, feature_names, resolve
from fimp_sc.data.sequences._kinds import sequence_kind
from fimp_sc.data.storage._elements import nearest
from fimp_sc.data.validate._checks import (
    check_anndata,
    check_coordinates,
    check_graph,
    check_labels,
    check_object,
    check_obs_key,
    check_scaled,
    get_graph,
    get_matrix,
    get_obs,
    label_text,
    warn_labels,
)
from fimp_sc.data.validate._values import Samples, inspect_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

X_KEY = "X"
GRAPH_KEY = "connectivities"
SEQUENCE_KEY = "sequence:"
LABELS_KEY = "labels"
LIBRARY_KEY = "library"
BATCH_KEY = "technical_batch"
# Of `varm`: a data frame of genes and samples, which of them were measured where it is known.
MEASURED_KEY = "fimp_measured"


class _Field(BaseAnnDataField):
    """An attribute of the nodes that keeps no state: transfer to another object is registration there.

    Parameters
    ----------
    registry_key, attr_key
        As in scvi-tools.
    modality
        What the model reads of a MuData object, see :func:`~fimp_sc.data._study.resolve`.
    """

    _attr = ""

    def __init__(self, registry_key: str, attr_key: str | None, modality: Any = None) -> None:
        super().__init__()
        self._registry_key, self._attr_key = registry_key, attr_key
        self._modality = modality
        # While an object is registered: all fields read it as it was resolved once.
        self.registered: Study | None = None

    def study(self, data: AnnData | MuData) -> Study:
        """Return what is read of an object."""
        if self.registered is not None and self.registered.data is data:
            return self.registered
        return resolve(data, self._modality)

    def nodes(self, data: AnnData | MuData) -> AnnData:
        """Return the object that describes the nodes."""
        return self.study(data).nodes

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

    def validate_field(self, adata: AnnData | MuData) -> None:
        super().validate_field(adata)

    def register_field(self, adata: AnnData | MuData) -> dict:
        return super().register_field(adata)

    def transfer_field(self, state_registry: dict, adata_target: AnnData | MuData, **kwargs: Any) -> dict:
        return self.register_field(adata_target)

    def get_summary_stats(self, state_registry: dict) -> dict:
        return {}

    def view_state_registry(self, state_registry: dict) -> None:
        return None


class ExpressionField(_Field):
    """Tables of expression or features, in ``X`` or a layer of modalities. Another object may have other genes.

    The names that are registered are those of the object of training, and its scale beside that of the object. Genes
    that were not measured in every sample are registered by sample. Several tables that are read together have a state
    each, under their names, with the names of their own columns; of all tables there are ``NAMES``.

    Without any such modality (of signals or images only) the field is empty.
    """

    NAMES = "column_names"
    SCALE, TRAINED_SCALE = "input_scale", "trained_scale"
    SAMPLES, LACKING, SILENT = "samples", "lacking", "silent"
    TABLES = "tables"

    _learned = True

    def __init__(
        self,
        layer: str | None,
        input_scale: str | Mapping[str, str],
        modality: Any = None,
        sample: tuple[str, str] | None = None,
    ) -> None:
        super().__init__(X_KEY, layer, modality)
        self._attr = "X" if layer is None else "layers"
        self._input_scale = input_scale
        # Key and what it is for.
        self._sample = sample
        # By table, ``(n_samples, n_vars)`` bool: what a trained model knows not to have been measured. scvi-tools may
        # register an object again.
        self.unmeasured: dict[str, NDArray[np.bool_]] = {}

    def validate_field(self, adata: AnnData | MuData) -> None:
        # The values are looked at when they are registered: that reads all of them, and once is enough.
        tables = self.study(adata).tables
        if not tables:
            check_object(self.nodes(adata))
        for part in tables:
            check_anndata(part.adata)
            get_matrix(part.adata, self.attr_key)

    def register_field(self, adata: AnnData | MuData) -> dict:
        self.validate_field(adata)
        tables = self.study(adata).tables
        n_obs = self.nodes(adata).n_obs
        if not tables:
            return {"n_obs": n_obs, "n_vars": 0, self.NAMES: np.array([], dtype=object)}
        if isinstance(self._input_scale, Mapping):
            check_scales(self._input_scale, [part.name for part in tables])
        names = feature_names(tables)
        states = {part.name: self._state(adata, part) for part in tables}
        if len(states) == 1:
            return states[tables[0].name]
        joined = np.concatenate([np.asarray(name, dtype=object) for name in names])
        return {"n_obs": n_obs, "n_vars": len(joined), self.NAMES: joined, self.TABLES: states}

    def _state(self, adata: AnnData | MuData, part: Modality) -> dict:
        """Return what is registered of one table."""
        where = "adata.X" if self.attr_key is None else f"adata.layers[{self.attr_key!r}]"
        if part.adata is not adata:
            where = where.replace("adata", f"mdata[{part.name!r}]")
        asked = scale_of(self._input_scale, part.name)
        scale = "real" if part.kind == "feature" and asked == "auto" else asked
        check_scaled(part.adata, self.attr_key, scale)
        samples = self._samples(adata, part)
        matrix = get_matrix(part.adata, self.attr_key)
        found = inspect_values(
            matrix, where=where, input_scale=scale, samples=samples, learned=self._learned,
            joint=len(self.study(adata).modalities) > 1,
        )  # fmt: skip
        if asked == "auto" and part.kind != "feature":
            logger.info("The values of %s are taken for %s (input_scale=%r).", where, MEANING[found.scale], found.scale)
        state = {
            "n_obs": self.nodes(adata).n_obs,
            "n_vars": part.adata.n_vars,
            self.NAMES: np.asarray(part.adata.var_names.astype(str)),
            self.SCALE: found.scale,
            self.TRAINED_SCALE: found.scale,
        }
        if found.lacking is not None:
            state |= {self.SAMPLES: [] if samples is None else list(samples.names), self.LACKING: found.lacking}
        if not self._learned and found.scale != "real" and found.silent.any():
            state |= {self.SAMPLES: [] if samples is None else list(samples.names), self.SILENT: found.silent}
        known = self.unmeasured.get(part.name)
        if known is not None and known.shape == found.silent.shape:
            state |= {self.SAMPLES: [] if samples is None else list(samples.names), self.LACKING: known}
        return state

    def _samples(self, adata: AnnData | MuData, part: Modality) -> Samples | None:
        """Return the sample of each row of a modality, where samples are named."""
        if self._sample is None:
            return None
        column = check_obs_key(self.nodes(adata), *self._sample)
        code = column.codes.astype(np.int64)
        if part.rows is not None:
            of_nodes, code = code, np.full(part.adata.n_obs, -1, dtype=np.int64)
            code[part.rows[part.rows >= 0]] = of_nodes[part.rows >= 0]
        names = [str(name) for name in column.categories]
        measured = part.adata.varm.get(MEASURED_KEY)
        lacking = None if measured is None else ~measured[names].to_numpy(dtype=bool).T
        return Samples(code, names, self._sample[0], None if lacking is None or not lacking.any() else lacking)

    def transfer_field(self, state_registry: dict, adata_target: AnnData | MuData, **kwargs: Any) -> dict:
        self._learned = False
        self.validate_field(adata_target)
        tables, trained = self.study(adata_target).tables, table_states(state_registry)
        if bool(tables) != bool(trained):
            raise ValueError(
                "The model reads expression or features, and this object has none."
                if not tables
                else f"The model reads signals or images only, and {tables[0].name!r} holds a table of values."
            )
        if not tables:
            return self.register_field(adata_target)
        tables = as_trained(tables, trained)
        for part, known in zip(tables, trained.values(), strict=True):
            _report_shared(known[self.NAMES], part.adata)
        state = self.register_field(adata_target)
        found = table_states(state)
        states = {}
        for part, (name, known) in zip(tables, trained.items(), strict=True):
            states[name] = self._transferred(found[part.name if len(found) > 1 else ""], known, part)
        if len(states) == 1:
            return next(iter(states.values()))
        known = {"n_vars": len(state_registry[self.NAMES]), self.NAMES: state_registry[self.NAMES]}
        return state | known | {self.TABLES: states}

    def _transferred(self, state: dict, known: dict, part: Modality) -> dict:
        """Return what is registered of a table, whose columns become those of training."""
        # Weights belong to the genes of training, whatever this object has.
        trained = known.get(self.TRAINED_SCALE, known.get(self.SCALE))
        found = state[self.SCALE]
        asked = scale_of(self._input_scale, part.name)
        if asked == "auto" and trained is not None and _ALIKE.get(found) != _ALIKE.get(trained):
            where = f"adata.layers[{self.attr_key!r}]" if self.attr_key else "adata.X"
            warn(
                f"The values of {where} are taken for {MEANING[found]}, and the model was trained on "
                f"{MEANING[trained]}. Pass values as in training, or confirm with input_scale={found!r}."
            )
        names = known[self.NAMES]
        return state | {"n_vars": len(names), self.NAMES: names, self.TRAINED_SCALE: trained}

    def get_summary_stats(self, state_registry: dict) -> dict:
        return {"n_cells": state_registry["n_obs"], "n_vars": state_registry["n_vars"]}


def table_states(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what is registered of each table, by its name where there are several; empty where there is none."""
    if ExpressionField.TABLES in state:
        return dict(state[ExpressionField.TABLES])
    return {"": dict(state)} if len(state[ExpressionField.NAMES]) else {}


def as_trained(tables: Sequence[Modality], states: Mapping[str, Any]) -> list[Modality]:
    """Return the tables of an object in the order in which a model knows them; a single one has any name.

    Raises
    ------
    ValueError
        The model was trained on others.
    """
    found = {part.name: part for part in tables}
    if len(tables) == len(states) == 1:
        return list(tables)
    if set(found) != set(states):
        trained = f"the tables {list(states)}" if len(states) > 1 else "one table of values"
        raise ValueError(
            f"The model reads {trained}, and this object has {list(found)}: name those with modality=, or give the "
            "modalities these names."
        )
    return [found[name] for name in states]


def scale_of(input_scale: str | Mapping[str, str], name: str) -> str:
    """Return the scale of the values of one modality, where scales may be given by modality."""
    return str(input_scale.get(name, "auto")) if isinstance(input_scale, Mapping) else input_scale


def check_scales(input_scale: Mapping[str, str], tables: Sequence[str]) -> None:
    """Raise a ValueError where scales are given of what is no table that is read."""
    unknown = [name for name in input_scale if name not in tables]
    if unknown:
        raise ValueError(
            f"input_scale names {unknown[0]!r}, and the tables that are read are {list(tables)}: name one of these."
        )


# Of counts and of values in proportion to them the same becomes.
_ALIKE = {"counts": "linear", "normalized": "linear", "log": "log", "real": "real"}
MEANING = {
    "counts": "counts",
    "normalized": "normalized values without a logarithm",
    "log": "log-normalized values",
    "real": "real numbers",
}


def _report_shared(genes: NDArray[Any], adata: AnnData) -> None:
    n_model = len(genes)
    shared = int((match_columns(genes, adata) >= 0).sum())
    if shared < max(adata.n_vars, n_model):
        logger.info(
            "%d of %d genes are known to the model (%d are dropped); %d genes of the model are not measured here.",
            shared, adata.n_vars, adata.n_vars - shared, n_model - shared,
        )  # fmt: skip


class SequenceField(_Field):
    """A modality of signals, images or other sequences."""

    _attr = "X"
    KIND, SIZE, N_COORDINATES = "kind", "size", "n_coordinates"

    def __init__(self, part: str, spatial_key: str, modality: Any = None) -> None:
        super().__init__(SEQUENCE_KEY + part, None, modality)
        self._part, self._spatial_key = part, spatial_key

    def register_field(self, adata: AnnData | MuData) -> dict:
        part = sequence_modality(self.study(adata), self._part)
        kind, n_coordinates = sequence_kind(part.kind), 0
        if kind.located and self._spatial_key in self.nodes(adata).obsm:
            n_coordinates = check_coordinates(self.nodes(adata), self._spatial_key).shape[1]
        size = [int(number) for number in kind.size(part.adata)]
        return {self.KIND: part.kind, self.SIZE: size, self.N_COORDINATES: n_coordinates}

    def transfer_field(self, state_registry: dict, adata_target: AnnData | MuData, **kwargs: Any) -> dict:
        new, old = self.register_field(adata_target), state_registry
        if new[self.KIND] != old[self.KIND]:
            raise ValueError(f"The model reads a {old[self.KIND]!r} modality, and this one is {new[self.KIND]!r}.")
        if new[self.N_COORDINATES] < old[self.N_COORDINATES]:
            raise ValueError(
                f"The model knows where regions are, by {old[self.N_COORDINATES]} coordinates in "
                f"obsm[{self._spatial_key!r}]: this object has {new[self.N_COORDINATES]}."
            )
        reason = sequence_kind(new[self.KIND]).fits(new[self.SIZE], old[self.SIZE])
        if reason is not None:
            raise ValueError(f"The model cannot read {self._part!r}: {reason}.")
        return new


def sequence_modality(study: Study, name: str) -> Modality:
    """Return the modality that holds signals or images under ``name``.

    Raises
    ------
    ValueError
        There is none.
    """
    named = [modality for modality in study.sequences if modality.name == name]
    if not named and len(study.sequences) != 1:
        raise ValueError(f"The model reads the modality {name!r} of signals or images, which is not there.")
    # An object that holds the modality alone does not say its name.
    return (named or study.sequences)[0]


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


def check_known(wanted: Sequence[str], genes: NDArray[Any]) -> None:
    """Raise where one of the ``wanted`` is not among the ``genes`` of a model.

    Raises
    ------
    MissingKeyError
        The message names up to five of them.
    """
    there = set(genes.tolist())
    unknown = [gene for gene in wanted if gene not in there]
    if unknown:
        raise MissingKeyError(
            f"Not among the {len(genes)} genes of the model: {unknown[:5]}.{nearest(unknown[0], there)} Leave them "
            "out, or pass a model that was trained on them."
        )


class GraphField(_Field):
    """Neighbor graph in ``obsp``; validated, never built here. What is registered is whether there were edges."""

    _attr = "obsp"
    EDGES = "has_edges"

    def __init__(self, connectivities_key: str, library_key: str | None, modality: Any = None) -> None:
        super().__init__(GRAPH_KEY, connectivities_key, modality)
        self._library_key = library_key

    def validate_field(self, adata: AnnData | MuData) -> None:
        study = self.study(adata)
        study.check_graph(str(self.attr_key))
        nodes = study.nodes
        check_graph(nodes, str(self.attr_key), self._library_key)

    def register_field(self, adata: AnnData | MuData) -> dict:
        self.validate_field(adata)
        return {self.EDGES: bool(get_graph(self.nodes(adata), str(self.attr_key)).nnz)}

    def transfer_field(self, state_registry: dict, adata_target: AnnData | MuData, **kwargs: Any) -> dict:
        self.validate_field(adata_target)
        return state_registry


class GroupField(_Field):
    """Grouping of cells in ``obs`` (sample or technical batch) that every object defines for itself."""

    _attr = "obs"

    def __init__(self, registry_key: str, obs_key: str | None, role: str, modality: Any = None) -> None:
        super().__init__(registry_key, obs_key, modality)
        self._role = role

    @property
    def is_empty(self) -> bool:
        return self.attr_key is None

    def validate_field(self, adata: AnnData | MuData) -> None:
        check_obs_key(self.nodes(adata), str(self.attr_key), self._role)


class LabelField(_Field):
    """Labels in ``obs``, checked where they are learned from.

    Another object needs none; it may lack the column or have other classes, which are unlabeled there.
    """

    _attr = "obs"
    CLASSES = "categorical_mapping"

    def __init__(self, labels_key: str | None, unlabeled_category: str, modality: Any = None) -> None:
        super().__init__(LABELS_KEY, labels_key, modality)
        self._unlabeled = unlabeled_category

    @property
    def is_empty(self) -> bool:
        return self.attr_key is None

    def register_field(self, adata: AnnData | MuData) -> dict:
        nodes = self.nodes(adata)
        check_labels(nodes, str(self.attr_key), self._unlabeled)
        warn_labels(nodes, str(self.attr_key), self._unlabeled)
        labels = label_text(get_obs(nodes, [str(self.attr_key)])[self.attr_key]).dropna()
        return {self.CLASSES: np.array(sorted(set(labels) - {str(self._unlabeled)}), dtype=object)}

    def transfer_field(self, state_registry: dict, adata_target: AnnData | MuData, **kwargs: Any) -> dict:
        return {self.CLASSES: state_registry[self.CLASSES]}

    def get_summary_stats(self, state_registry: dict) -> dict:
        return {"n_labels": len(state_registry.get(self.CLASSES, ()))}


def registered_fields(setup: Mapping[str, Any], sequences: Sequence[str] = ()) -> list[_Field]:
    """Return what FIMP registers.

    Parameters
    ----------
    setup
        Arguments of ``setup_anndata`` or ``setup_mudata``.
    sequences
        Names of the modalities that hold signals or images.
    """
    modality = setup.get("modality")
    keys = [(setup[f"{role}_key"], role) for role in ("library", "batch") if setup[f"{role}_key"]]
    return [
        ExpressionField(setup["layer"], setup["input_scale"], modality, keys[0] if keys else None),
        *(SequenceField(name, setup["spatial_key"], modality) for name in sequences),
        GraphField(setup["connectivities_key"], setup["library_key"], modality),
        LabelField(setup["labels_key"], setup["unlabeled_category"], modality),
        GroupField(LIBRARY_KEY, setup["library_key"], "library", modality),
        GroupField(BATCH_KEY, setup["batch_key"] or setup["library_key"], "batch", modality),
    ]
