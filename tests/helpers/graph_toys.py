"""What a model reads of an object, for tests that look at it."""

from __future__ import annotations

from typing import Any

from fimp_sc.data import GraphData
from fimp_sc.model import FIMP
from fimp_sc.model.registry._graph_data import graph_data, study_of


def data_of(model: FIMP, adata: Any = None, hidden: Any = None) -> GraphData:
    return graph_data(model, study_of(model, adata), hidden)
