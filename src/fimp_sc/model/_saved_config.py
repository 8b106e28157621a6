"""What a shared model says of itself: a model to plain values, and back to what scvi-tools keeps of its data."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import fimp_sc
from fimp_sc.data._kinds import sequence_kind, sequence_kinds
from fimp_sc.model._fields import (
    LABELS_KEY,
    SEQUENCE_KEY,
    X_KEY,
    ExpressionField,
    LabelField,
    SequenceField,
    registered_fields,
)
from fimp_sc.pretrained._weights import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from fimp_sc.model._base import GraphModel

FORMAT = "fimp-sc"
FORMAT_VERSION = 1
_SCALES = ("counts", "normalized", "log", "real")
_KEYS = {
    "format": str,
    "format_version": int,
    "class": str,
    "versions": dict,
    "is_trained": bool,
    "n_cells": int,
    "n_genes": int,
    "input_scale": str | None,
    "sequences": dict,
    "classes": list | None,
    "setup_args": dict,
    "init_params": dict,
    "history": dict,
    "sha256": dict,
}
# Of arguments whose default is None; all others are of the type of their default.
_OPTIONAL = {
    "n_tokens": int,
    "architecture": dict,
    "token_size": int | dict,
    "modality": list,
    "n_latent": int,
    "dropout": float,
}
# Files that a model was made from, which it does not need again: whose folders they were in is nobody's business.
_FILES = ("checkpoint", "gene_embeddings", "orthologs")


def describe(model: GraphModel) -> dict[str, Any]:
    """Return what a model has to be built again from, besides genes and weights, in types that JSON can hold.

    Raises
    ------
    ValueError
        An argument of the model cannot be written as JSON.
    """
    registry = model.registry
    expression = registry["field_registries"][X_KEY]["state_registry"]
    params = {name: _plain(value, name) for name, value in model.init_params_["non_kwargs"].items()}
    for name in _FILES:
        if params.get(name) is not None:
            params[name] = re.split(r"[\\/]", params[name].rstrip("\\/"))[-1]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "class": type(model).__name__,
        "versions": {"fimp-sc": fimp_sc.__version__, **{name: version(name) for name in ("scvi-tools", "torch")}},
        "is_trained": bool(model.is_trained),
        "n_cells": int(expression["n_obs"]),
        "n_genes": len(model.genes),
        "input_scale": str(expression[ExpressionField.TRAINED_SCALE]) if len(model.genes) else None,
        "sequences": {
            key.removeprefix(SEQUENCE_KEY): _plain(field["state_registry"], key)
            for key, field in registry["field_registries"].items()
            if key.startswith(SEQUENCE_KEY)
        },
        "classes": model.classes if registry["setup_args"]["labels_key"] is not None else None,
        "setup_args": {
            name: key if key is None or isinstance(key, list) else str(key)
            for name, key in registry["setup_args"].items()
        },
        "init_params": params,
        "history": {name: _curve(frame) for name, frame in (model.history or {}).items()},
    }


def check_config(config: Mapping[str, Any], path: Path, cls: type[GraphModel]) -> dict[str, Any]:
    """Check a configuration, and complete it with the defaults of arguments that its writer did not know yet.

    Parameters
    ----------
    config
        What the file holds.
    path
        The file, for messages.
    cls
        Class of the model.

    Raises
    ------
    CheckpointError
        It is not the configuration of such a model, or a newer one; an entry is missing, unknown or of another type.
    """
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{str(path)!r} does not describe a model of fimp-sc ('format' is {config.get('format')!r}): pass the "
            f"folder that model.save_pretrained(folder) wrote."
        )
    newer = config.get("format_version")
    if isinstance(newer, int) and newer > FORMAT_VERSION:
        raise CheckpointError(
            f"{str(path)!r} has 'format_version' {newer}, and fimp-sc {fimp_sc.__version__} reads up to "
            f"{FORMAT_VERSION}: it was written by a newer version, upgrade with pip install -U fimp-sc."
        )
    # Files of the first version say nothing of sequences.
    config = {"sequences": {}, **config}
    _check_names(config, _KEYS, path, "", complete=True)
    for key, kind in _KEYS.items():
        least = 0 if key == "n_genes" and config["sequences"] else 1
        wrong_number = kind is int and (isinstance(config[key], bool) or not isinstance(config[key], int))
        if wrong_number or not isinstance(config[key], kind) or (kind is int and config[key] < least):
            raise _wrong(path, key, config[key])
    if config["class"] != cls.__name__:
        raise CheckpointError(f"{str(path)!r} describes a {config['class']!r}, not a {cls.__name__!r}: 'class'.")
    if config["input_scale"] not in (_SCALES if config["n_genes"] else (None,)):
        raise _wrong(path, "input_scale", config["input_scale"])
    for name, state in config["sequences"].items():
        if not _is_sequence(state):
            raise _wrong(path, f"sequences.{name}", state)
        kind = state[SequenceField.KIND]
        if kind not in sequence_kinds():
            raise CheckpointError(
                f"{str(path)!r} describes a model of nodes of the kind {kind!r}, which is not known here: make it "
                "known with fimp_sc.data.register_kind before."
            )
    register = cls.setup_mudata if "modality" in config["setup_args"] else cls.setup_anndata
    setup = _arguments(config["setup_args"], register, path, "setup_args")
    classes = config["classes"]
    if (classes is None) != (setup["labels_key"] is None) or (
        classes and (not all(isinstance(label, str) for label in classes) or len(set(classes)) < len(classes))
    ):
        raise _wrong(path, "classes", classes)
    params = _arguments(config["init_params"], cls.__init__, path, "init_params")
    return {**config, "setup_args": setup, "init_params": params}


def make_registry(config: Mapping[str, Any], genes: Sequence[str]) -> dict[str, Any]:
    """Return what scvi-tools keeps of the data that a model was trained on, from a checked configuration."""
    setup, scale = config["setup_args"], config["input_scale"]
    states: dict[str, dict[str, Any]] = {
        X_KEY: {
            "n_obs": config["n_cells"],
            "n_vars": len(genes),
            ExpressionField.NAMES: np.array(genes, dtype=object),
            **(dict.fromkeys((ExpressionField.SCALE, ExpressionField.TRAINED_SCALE), scale) if genes else {}),
        },
    }
    if config["classes"] is not None:
        states[LABELS_KEY] = {LabelField.CLASSES: np.array(config["classes"], dtype=object)}
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
        "setup_method_name": "setup_mudata" if "modality" in setup else "setup_anndata",
        "setup_args": dict(setup),
        "field_registries": registries,
    }


def make_history(config: Mapping[str, Any], path: Path) -> dict[str, pd.DataFrame] | None:
    """Return the training curves as scvi-tools keeps them, ``None`` where there are none.

    Raises
    ------
    CheckpointError
        A curve is not made of numbers.
    """
    history = {}
    for name, curve in config["history"].items():
        try:
            values = np.array([math.nan if v is None else v for v in curve["values"]], dtype=np.float64)
            at = pd.Index([int(i) for i in curve["at"]], name=curve["by"])
            history[name] = pd.DataFrame({name: values}, index=at)
        except (KeyError, TypeError, ValueError):
            raise _wrong(path, f"history.{name}", curve) from None
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


def _arguments(values: Mapping[str, Any], function: Any, path: Path, part: str) -> dict[str, Any]:
    """Check what is passed to a function by name against its defaults."""
    parameters = inspect.signature(function).parameters.values()
    defaults = {
        p.name: p.default
        for p in parameters
        if p.default is not p.empty and p.name not in ("adata", "registry")  # these are not of the model
    }
    _check_names(values, defaults, path, f"{part}.")
    for name, value in values.items():
        default = defaults[name]
        kind: Any = _OPTIONAL.get(name, str) if default is None else type(default)
        kind = int | float if kind is float else kind
        fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not fits and not (value is None and default is None):
            raise _wrong(path, f"{part}.{name}", value)
    return defaults | dict(values)


def _is_sequence(state: Any) -> bool:
    """Tell whether a saved modality of signals or images is one."""
    keys = {SequenceField.KIND, SequenceField.SIZE, SequenceField.N_COORDINATES}
    if not isinstance(state, dict) or set(state) != keys:
        return False
    kind, size, n_coordinates = (state[key] for key in (SequenceField.KIND, SequenceField.SIZE, "n_coordinates"))
    if not isinstance(kind, str) or not isinstance(size, list) or n_coordinates not in (0, 2, 3):
        return False
    if kind in sequence_kinds() and len(size) != len(sequence_kind(kind).size_names):
        return False
    return bool(size) and all(isinstance(number, int) and number >= 1 for number in size)


def _check_names(
    found: Mapping[str, Any], known: Mapping[str, Any], path: Path, prefix: str, *, complete: bool = False
) -> None:
    unknown = [f"{prefix}{name}" for name in found if name not in known]
    missing = [f"{prefix}{name}" for name in known if name not in found] if complete else []
    if unknown:
        raise CheckpointError(
            f"{str(path)!r} has {unknown[0]!r}, which fimp-sc {fimp_sc.__version__} does not know: it was changed, or "
            "written by a newer version (pip install -U fimp-sc)."
        )
    if missing:
        raise CheckpointError(f"{str(path)!r} has no {missing[0]!r}: it was changed or is damaged, get it anew.")


def _wrong(path: Path, key: str, value: Any) -> CheckpointError:
    text = repr(value)
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return CheckpointError(f"{str(path)!r} has {key!r}: {shown}, which cannot be: it was changed or is damaged.")
