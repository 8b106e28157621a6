"""Genes that another object holds but did not measure: zeros that an outer join of panels put there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fimp_sc._logging import warn
from fimp_sc.data._study import resolve
from fimp_sc.data.storage._elements import shorten
from fimp_sc.model.registry._fields import X_KEY, ExpressionField, as_trained, table_states
from fimp_sc.model.registry._graph_data import field_state, table_ends

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from fimp_sc.model._fimp import FIMP

# Of the counts of training, in genes that are zero throughout a sample: at most .026 in crops of 100 cells.
MOST_SILENT = 0.05


def mark_unmeasured(model: FIMP, data: AnnData | MuData) -> None:
    """Take genes that are zero throughout another object for not measured, where they are too many to be silent.

    So they are in one section of an outer join of panels. Any 100 cells, also of one class, show genes with all but 3 %
    of the counts of training (crops of four tissues).

    Parameters
    ----------
    data
        Registered with the model just now; what is registered of it changes.

    Warns
    -----
    UserWarning
        Genes with 5 % or more of the counts of training are zero in a sample of 100 cells or more.
    """
    manager = model.get_anndata_manager(data, required=True)
    registered = manager.registry["field_registries"][X_KEY]["state_registry"]
    field = next(field for field in manager.fields if isinstance(field, ExpressionField))
    tables = resolve(data, model.registry["setup_args"].get("modality")).tables
    if not tables:
        return
    trained = table_states(field_state(model, X_KEY))
    states = list(registered[ExpressionField.TABLES].values()) if len(trained) > 1 else [registered]
    weights = np.split(model.module.gene_fraction.cpu().numpy(), table_ends(model)[:-1])
    for part, state, weight in zip(as_trained(tables, trained), states, weights, strict=True):
        silent = state.pop(ExpressionField.SILENT, None)
        if silent is None:
            continue
        place = pd.Index(state[ExpressionField.NAMES]).get_indexer(part.adata.var_names.astype(str))
        of_column = np.where(place >= 0, weight[place], 0.0)
        lacking = state.get(ExpressionField.LACKING, np.zeros_like(silent))
        measured = (~lacking * of_column).sum(1)
        fraction = (silent * of_column).sum(1) / np.where(measured > 0, measured, 1)
        samples = np.flatnonzero(fraction >= MOST_SILENT)
        if not len(samples):
            continue
        names = state[ExpressionField.SAMPLES] or [""]
        each = [
            f"{int((silent[i] & (of_column > 0)).sum()):,} genes with {fraction[i]:.0%} of the counts of training"
            + (f" in {names[i]!r}" if len(names) > 1 else "")
            for i in samples.tolist()
        ]
        warn(
            f"{shorten(each)} are zero for every cell here, as genes are that a panel lacks after an outer join. They "
            "count as not measured: no tokens, no part in totals, and values that can be imputed."
        )
        state[ExpressionField.LACKING] = lacking | (silent & (fraction >= MOST_SILENT)[:, None])
        field.unmeasured[part.name] = state[ExpressionField.LACKING]
