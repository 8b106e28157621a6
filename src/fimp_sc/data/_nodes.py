"""Names and labels of nodes, as people hand them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fimp_sc.data._access import shorten

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


def node_names(names: Iterable[Any] | None, n: int, what: str, argument: str) -> list[str]:
    """Return ``n`` unique names as text; without ``names``, ``what`` and a number counted from 0.

    Parameters
    ----------
    what
        What is named, for instance ``"region"``.
    argument
        Name of the argument, for messages.

    Raises
    ------
    ValueError
        Another number of names, or duplicates.
    """
    if names is None:
        return [f"{what}_{i}" for i in range(n)]
    if isinstance(names, str):
        raise TypeError(f"{argument} must be a list of names, found the text {names!r}.")
    found = [str(name) for name in names]
    if len(found) != n:
        raise ValueError(f"{argument} has {len(found):,} names, but there are {n:,} {what}s: give one name for each.")
    index = pd.Index(found)
    if not index.is_unique:
        duplicates = [repr(name) for name in index[index.duplicated()].unique()]
        raise ValueError(f"{argument} must be unique, but repeats {shorten(duplicates)}.")
    return found


def label_columns(labels: Any, taken: Iterable[str] = ()) -> dict[str, Any]:
    """Return labels as columns by name: of a data frame or dictionary its own, of a plain array one named ``"label"``.

    Raises
    ------
    ValueError
        A column has a name in ``taken``, which is used for something else.
    """
    if labels is None:
        return {}
    if isinstance(labels, pd.DataFrame):
        columns = {str(name): labels[name] for name in labels.columns}
    else:
        columns = {str(k): v for k, v in labels.items()} if isinstance(labels, Mapping) else {"label": labels}
    clash = sorted(set(columns) & set(taken))
    if clash:
        raise ValueError(f"labels has the column {clash[0]!r}, a name that is used for something else: rename it.")
    return columns


def label_values(values: Any, rows: NDArray[np.intp] | None = None) -> Any:
    """Return labels ready for ``obs``: numbers stay numbers, all else becomes categories.

    Parameters
    ----------
    rows
        Which label each node takes; by default each its own.
    """
    if isinstance(getattr(values, "dtype", None), pd.CategoricalDtype):
        labels = pd.Categorical(values)
    else:
        array = np.asarray(values)
        labels = array if array.dtype.kind in "biuf" else pd.Categorical(array.astype(object))
    return labels if rows is None else labels[rows]


def one_label_each(labels: Any, n: int, what: str, taken: Iterable[str] = ()) -> dict[str, Any]:
    """Return label columns for ``n`` nodes.

    Raises
    ------
    ValueError
        A column is not one label for each node, or has a name in ``taken``.
    """
    columns = {}
    for name, values in label_columns(labels, taken).items():
        shape = np.shape(values)
        if shape != (n,):
            raise ValueError(f"labels ({name!r}) has the shape {shape}, but {n:,} {what}s need {(n,)}: one label each.")
        columns[name] = label_values(values)
    return columns
