"""Results as they are written: rows in place, checked, with a record of how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fimp_sc._keys import new_record
from fimp_sc.data.storage._checksums import checksum
from fimp_sc.data.storage._elements import get_obs
from fimp_sc.model.registry._fields import X_KEY, ExpressionField, table_states
from fimp_sc.model.registry._graph_data import table_ends

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from fimp_sc.data._study import Modality
    from fimp_sc.model import FIMP
    from fimp_sc.tl._call._inputs import Inputs


def placed(values: np.ndarray, nodes: pd.Index, wanted: pd.Index) -> np.ndarray:
    """Return rows of ``nodes`` in the order of ``wanted``, NaN for those that have none."""
    wanted = wanted.astype(str)  # numbers may be names in an object of the user, and are text in others
    if nodes.equals(wanted):
        return values
    rows = nodes.get_indexer(wanted)
    out = values[rows]
    out[rows < 0] = np.nan
    return out


def record(model: FIMP, inputs: Inputs, data: AnnData | MuData, tool: str, **extra: Any) -> dict[str, Any]:
    """Return what goes to ``uns`` of ``data``: parameters, seed and versions, in types that h5ad can hold."""
    history = model.history or {}
    state = model.adata_manager.registry["field_registries"][X_KEY]["state_registry"]
    return {
        **inputs_record(inputs, data, tool, table_states(state), "scvi-tools", "torch", "anndata", **extra),
        "model": storable(model.init_params_["non_kwargs"]),
        "random_state": int(model.random_state),
        # Embeddings of one model are in one space.
        "weights_checksum": str(checksum(*model.module.network.parameters())),
        "epochs": len(history["train_loss"]) if "train_loss" in history else 0,
    }


def inputs_record(
    inputs: Inputs, data: AnnData | MuData, tool: str, tables: Mapping[str, Mapping[str, Any]], *packages: str,
    **extra: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return the part of a record that needs no model.

    Parameters
    ----------
    inputs
        Where the call found its data.
    data
        Object that the results are written to.
    tool
        Name of the function, ``"tl.embed"``.
    tables
        What is registered of each table, see :func:`~fimp_sc.model.registry._fields.table_states`.
    *packages
        Those whose versions matter beside this one's.
    **extra
        Further parameters of the call.
    """
    # Beside the parameters: later calls take these, and what was guessed once may not hold for other values.
    scales = {name: str(state[ExpressionField.SCALE]) for name, state in tables.items()}
    return {
        "params": storable(asdict(inputs) | extra),
        **({"input_scale": scales.get("", scales)} if scales else {}),
        **new_record(data, tool, *packages),
    }


def measured_scale(model: FIMP, part: Modality) -> dict[str, Any]:
    """Return how the model reads the values of a table, which are to be compared with its predictions.

    Parameters
    ----------
    model
        Bound to the object of which the table is.
    part
        The table.

    Returns
    -------
    ``input_scale`` of the values and ``trained_scale`` of those of training; and, of expression, the ``target_sum`` of
    the model, the ``total`` to which it scales the genes ``measured`` here that it knows, and the ``fraction`` that
    each of these has in it. Nothing of a model that was never trained, which takes the median total of what it reads.
    """
    states = table_states(model.adata_manager.registry["field_registries"][X_KEY]["state_registry"])
    number = list(states).index(part.name) if len(states) > 1 else 0
    state = list(states.values())[number]
    scale, trained = (str(state[name]) for name in (ExpressionField.SCALE, ExpressionField.TRAINED_SCALE))
    scales = {"input_scale": scale, "trained_scale": trained}
    target_sum = float(model.module.target_sum.reshape(-1)[number])
    if scale == "real":
        return scales
    if not target_sum:
        return {}
    names = part.adata.var_names.astype(str)
    place = pd.Index(state[ExpressionField.NAMES]).get_indexer(names)
    fraction = np.split(model.module.gene_fraction.cpu().numpy(), table_ends(model)[:-1])[number][place[place >= 0]]
    known = float(fraction.sum())
    return scales | {
        "target_sum": target_sum,
        "total": target_sum * known,
        "measured": np.array(names[place >= 0], dtype=object),
        "fraction": fraction / max(known, 1e-12),
    }


def storable(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters without None and tuples, which not every supported anndata reads or writes."""
    kept: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            kept[name] = storable(value)
        elif value is not None:
            kept[name] = list(value) if isinstance(value, tuple) else value
    return kept


def drop_stale_colors(data: AnnData | MuData, key: str, categories: pd.Index) -> None:
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


def finite_or_raise(values: np.ndarray, what: str) -> None:
    """Refuse to write results that training has driven to NaN."""
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"The {what} has values that are not finite: training diverged. Lower the learning rate with "
            "train_kwargs={'plan_kwargs': {'lr': 1e-4}}. The object is unchanged."
        )
