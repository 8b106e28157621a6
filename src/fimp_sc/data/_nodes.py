"""Names and labels of nodes, as people hand them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fimp_sc.data.storage._elements import shorten

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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


def by_name(values: Any, names: Sequence[str], what: str, *, given: bool) -> Any:
    """Return rows of a data frame or series in the order of ``names``; of anything else the rows as they are.

    Parameters
    ----------
    values
        What a user passes beside nodes that have names.
    names
        Of the nodes.
    what
        What ``values`` are, for messages.
    given
        Whether the names are the user's own. Others need not agree with the index.

    Raises
    ------
    ValueError
        The index names other nodes.
    """
    index = getattr(values, "index", None)
    if not isinstance(index, pd.Index) or len(index) != len(names) or index.equals(pd.RangeIndex(len(names))):
        return values
    rows = index.map(str).get_indexer(pd.Index(names)) if index.is_unique else np.full(len(names), -1)
    if (rows >= 0).all():
        return values.iloc[rows]
    if given:
        lacking = [repr(name) for name, row in zip(names, rows, strict=True) if row < 0]
        raise ValueError(
            f"The index of {what} has no {shorten(lacking)}; it has {shorten([repr(name) for name in index])}. Give "
            "it the names of the nodes, or pass values in their order as an array."
        )
    return values


def square_by_name(matrix: Any, names: Sequence[str], what: str, *, given: bool) -> Any:
    """Return a data frame with rows and columns in the order of ``names``; see :func:`by_name`."""
    if not isinstance(matrix, pd.DataFrame):
        return matrix
    return by_name(by_name(matrix, names, what, given=given).T, names, f"{what}.T", given=given).T


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
        # A list with NaN among its texts would become an array of texts, one of which is "nan".
        array = np.asarray(values if hasattr(values, "dtype") else pd.Series(values, dtype=object).infer_objects())
        labels = array if array.dtype.kind in "biuf" else pd.Categorical(array.astype(object))
    return labels if rows is None else labels[rows]


def one_label_each(
    labels: Any, names: Sequence[str], what: str, taken: Iterable[str] = (), *, given: bool
) -> dict[str, Any]:
    """Return label columns for the nodes ``names``, by their index where they have one; see :func:`by_name`.

    Raises
    ------
    ValueError
        A column is not one label for each node, or has a name in ``taken``.
    """
    columns, n = {}, len(names)
    for name, values in label_columns(labels, taken).items():
        shape = np.shape(values)
        if shape != (n,):
            raise ValueError(f"labels ({name!r}) has the shape {shape}, but {n:,} {what}s need {(n,)}: one label each.")
        columns[name] = label_values(by_name(values, names, f"labels ({name!r})", given=given))
    return columns
