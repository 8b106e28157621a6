"""Configuration of saved models: plain values from a model, and back to the registry of scvi-tools."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import fimp_sc
from fimp_sc.data.sequences._kinds import sequence_kinds
from fimp_sc.model.registry._fields import (
    GRAPH_KEY,
    LABELS_KEY,
    SEQUENCE_KEY,
    X_KEY,
    ExpressionField,
    GraphField,
    LabelField,
    SequenceField,
    registered_fields,
    table_states,
)
from fimp_sc.pretrained.files._weights import CheckpointError

if TYPE_CHECKING:
    from fimp_sc.model._fimp import FIMP

FORMAT = "fimp-sc"
FORMAT_VERSION = 2
# Files that a model was made from, which it does not need again: whose folders they were in is nobody's business.
_FILES = ("checkpoint", "gene_embeddings", "orthologs")
# Arguments of models that were saved before foundation models were one argument.
_FORMER = {
    "checkpoint": "checkpoint",
    "train_foundation": "train",
    "source": "neighbor_states",
    "aggregate": "aggregate",
    "species": "species",
    "orthologs": "orthologs",
    "vocabulary_key": "vocabulary_key",
}


def describe(model: FIMP) -> dict[str, Any]:
    """Return what a model has to be built again from, besides weights, in types that JSON can hold.

    Raises
    ------
    ValueError
        An argument of the model cannot be written as JSON.
    """
    registry = model.registry
    expression = registry["field_registries"][X_KEY]["state_registry"]
    tables = {
        name: {
            "genes": [str(gene) for gene in state[ExpressionField.NAMES]],
            "input_scale": str(state[ExpressionField.TRAINED_SCALE]),
        }
        for name, state in table_states(expression).items()
    }
    params = {name: _plain(value, name) for name, value in model.init_params_["non_kwargs"].items()}
    for holder in (params, params["foundation"] or {}):
        for name in _FILES:
            if holder.get(name) is not None:
                holder[name] = re.split(r"[\\/]", holder[name].rstrip("\\/"))[-1]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "class": type(model).__name__,
        "versions": {"fimp-sc": fimp_sc.__version__, **{name: version(name) for name in ("scvi-tools", "torch")}},
        "is_trained": bool(model.is_trained),
        "n_cells": int(expression["n_obs"]),
        "n_genes": len(model.genes),
        "input_scale": str(expression[ExpressionField.TRAINED_SCALE]) if len(tables) == 1 else None,
        "sequences": {
            key.removeprefix(SEQUENCE_KEY): _plain(field["state_registry"], key)
            for key, field in registry["field_registries"].items()
            if key.startswith(SEQUENCE_KEY)
        },
        "classes": model.classes if registry["setup_args"]["labels_key"] is not None else None,
        "setup_args": {
            name: key if key is None or isinstance(key, list | dict) else str(key)
            for name, key in registry["setup_args"].items()
        },
        "init_params": params,
        "history": {name: _curve(frame) for name, frame in (model.history or {}).items()},
        "genes": [str(gene) for gene in model.genes],
        **({"tables": tables} if len(tables) > 1 else {}),
    }


def init_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a saved model; those of a foundation model once stood beside its name."""
    arguments = dict(config["init_params"])
    former = {new: arguments.pop(old) for old, new in _FORMER.items() if old in arguments}
    if isinstance(arguments.get("foundation"), str) and "checkpoint" in former:
        arguments["foundation"] = {"name": arguments["foundation"], **former}
    return arguments


def make_registry(config: Mapping[str, Any], cls: type[FIMP]) -> dict[str, Any]:
    """Return what scvi-tools keeps of the data that a model of class ``cls`` was trained on.

    Raises
    ------
    CheckpointError
        A kind of nodes is not known here.
    """
    for state in config["sequences"].values():
        kind = state[SequenceField.KIND]
        if kind not in sequence_kinds():
            raise CheckpointError(
                f"The model reads nodes of the kind {kind!r}, which is not known here: make it known with "
                "fimp_sc.data.register_kind before."
            )
    method = "setup_mudata" if "modality" in config["setup_args"] else "setup_anndata"
    # With the defaults of arguments that the writer did not know yet.
    parameters = inspect.signature(getattr(cls, method)).parameters.values()
    setup = {p.name: p.default for p in parameters if p.default is not p.empty} | config["setup_args"]
    states: dict[str, dict[str, Any]] = {X_KEY: _table_state(config, config["n_cells"])}
    if config.get("tables"):
        tables = {name: _table_state(table, config["n_cells"]) for name, table in config["tables"].items()}
        states[X_KEY][ExpressionField.TABLES] = tables
    if config["classes"] is not None:
        states[LABELS_KEY] = {LabelField.CLASSES: np.array(config["classes"], dtype=object)}
    # A graph without edges is read by models that pass no messages alone.
    states[GRAPH_KEY] = {GraphField.EDGES: bool(init_arguments(config).get("messages", True))}
    states |= {SEQUENCE_KEY + name: dict(state) for name, state in config["sequences"].items()}
    registries = {}
    for field in registered_fields(setup, list(config["sequences"])):
        state = states.get(field.registry_key, {})
        registries[field.registry_key] = {
            "data_registry": field.get_data_registry(),
            "state_registry": state,
            "summary_stats": field.get_summary_stats(state),
        }
    return {
        "scvi_version": config["versions"].get("scvi-tools"),
        "model_name": config["class"],
        "setup_method_name": method,
        "setup_args": dict(setup),
        "field_registries": registries,
    }


def _table_state(table: Mapping[str, Any], n_obs: int) -> dict[str, Any]:
    genes, scale = table["genes"], table["input_scale"]
    return {
        "n_obs": n_obs,
        "n_vars": len(genes),
        ExpressionField.NAMES: np.array(genes, dtype=object),
        **(dict.fromkeys((ExpressionField.SCALE, ExpressionField.TRAINED_SCALE), scale) if scale else {}),
    }


def make_history(curves: Mapping[str, Any]) -> dict[str, pd.DataFrame] | None:
    """Return the training curves as scvi-tools keeps them, ``None`` where there are none."""
    history = {}
    for name, curve in curves.items():
        values = np.array([math.nan if v is None else v for v in curve["values"]], dtype=np.float64)
        history[name] = pd.DataFrame({name: values}, index=pd.Index([int(i) for i in curve["at"]], name=curve["by"]))
    return history or None


def _plain(value: Any, name: str) -> Any:
    """Return a value as JSON holds it."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, name) for inner in value]
    raise ValueError(f"{name}={value!r} of the model cannot be written to a configuration: use plain numbers and text.")


def _curve(frame: pd.DataFrame) -> dict[str, Any]:
    values = [float(value) for value in frame.iloc[:, 0]]
    return {
        "by": frame.index.name,
        "at": [int(i) for i in frame.index],
        "values": [value if math.isfinite(value) else None for value in values],
    }
