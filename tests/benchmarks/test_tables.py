"""The page of results is made of the CSV files."""

from __future__ import annotations

import pandas as pd
import pytest


@pytest.fixture
def tables(load_script):
    return load_script("tables")


def test_the_page_is_that_of_the_csv_files(tables):
    folder = tables.HERE / "results"
    if not list(folder.glob("*.csv")):
        pytest.skip("the results are not part of the source distribution")
    assert (tables.HERE / "RESULTS.md").read_text() == tables.render(folder)


def test_means_and_spreads_over_seeds(tables, tmp_path):
    rows = {"data": ["d", "d", "d"], "method": ["a", "a", "b"], "seed": [0, 1, 0], "r2": [0.1, 0.3, 0.5]}
    pd.DataFrame({**rows, "cpu_s": [1.0, 2.0, None]}).to_csv(tmp_path / "masked_expression.csv", index=False)
    page = tables.render(tmp_path).splitlines()
    assert "| d | a | 0.200 ± 0.100 | 1.5 | 2 |" in page
    assert "| d | b | 0.500 |  | 1 |" in page
    assert not any("Cost of" in line for line in page)
