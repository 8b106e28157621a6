"""Names and labels of nodes, as people hand them in."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fimp_sc.data._nodes import by_name, one_label_each, square_by_name
from fimp_sc.data.storage._elements import label_text

NAMES = ["a", "b", "c", "d"]


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA])
def test_missing_labels_in_a_list_stay_missing(missing) -> None:
    found = one_label_each(["x", missing, "y", missing], NAMES, "node", given=False)["label"]
    assert list(found.categories) == ["x", "y"]
    np.testing.assert_array_equal(found.codes, [0, -1, 1, -1])


def test_numbers_in_a_list_stay_numbers() -> None:
    np.testing.assert_array_equal(one_label_each([3, 1, 2, 1], NAMES, "node", given=False)["label"], [3, 1, 2, 1])


@pytest.mark.parametrize("given", [True, False])
def test_labels_with_the_names_of_nodes_are_theirs_in_any_order(given: bool) -> None:
    table = pd.DataFrame({"type": list("ABCD"), "age": [1, 2, 3, 4]}, index=NAMES).iloc[[2, 0, 3, 1]]
    found = one_label_each(table, NAMES, "node", given=given)
    assert list(found["type"]) == list("ABCD")
    np.testing.assert_array_equal(found["age"], [1, 2, 3, 4])


def test_labels_with_a_plain_index_are_in_the_order_of_nodes() -> None:
    series = pd.Series(list("ABCD"))
    assert list(one_label_each(series, NAMES, "node", given=True)["label"]) == list("ABCD")


def test_an_index_of_other_names_is_refused_where_nodes_were_named() -> None:
    series = pd.Series(list("ABCD"), index=list("abcx"))
    with pytest.raises(ValueError, match="index of values has no 'd'; it has 'a', 'b', 'c', 'x'"):
        by_name(series, NAMES, "values", given=True)
    pd.testing.assert_series_equal(by_name(series, NAMES, "values", given=False), series)


def test_rows_and_columns_of_a_table_are_brought_into_order() -> None:
    matrix = np.arange(16).reshape(4, 4)
    order = [3, 1, 0, 2]
    table = pd.DataFrame(matrix, index=NAMES, columns=NAMES).iloc[order, order[::-1]]
    np.testing.assert_array_equal(square_by_name(table, NAMES, "adjacency", given=True), matrix)
    assert square_by_name(matrix, NAMES, "adjacency", given=True) is matrix


@pytest.mark.parametrize("dtype", [float, np.float32, "Int64", object])
def test_whole_numbers_read_alike_with_and_without_missing_ones(dtype) -> None:
    column = pd.Series([0, 1, 2, 10]).astype(dtype)
    assert label_text(column).tolist() == ["0", "1", "2", "10"]
    column[1] = np.nan
    text = label_text(column)
    assert text[[0, 2, 3]].tolist() == ["0", "2", "10"]
    assert pd.isna(text[1])
    assert label_text(pd.Series(["a", None, "1.0"]).astype("category")).tolist()[::2] == ["a", "1.0"]
