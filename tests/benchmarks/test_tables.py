"""Tables of the README and of the benchmarks' page are those of the CSV files."""

from __future__ import annotations

import pandas as pd
import pytest


@pytest.fixture
def tables(load_script):
    return load_script("tables")


def test_pages_are_filled_from_the_results(tables) -> None:
    if not list((tables.HERE / "results").glob("*.csv")):
        pytest.skip("the results are not part of the source distribution")
    for page in tables.FILLED:
        text = page.read_text(encoding="utf-8")
        assert "<!-- table:" in text
        assert tables.filled(text, tables.HERE / "results") == text, "run `python benchmarks/tables.py`"


def test_a_summary_names_the_best_of_each_kind(tables, tmp_path) -> None:
    scores = {"FIMP": 0.8, "FIMP, no messages": 0.6, "logistic, own": 0.5, "logistic, all genes": 0.7, "GCN, PCs": 0.9}
    rows = [
        {"data": "dlpfc", "method": name, "seed": seed, "macro_f1": mean + shift}
        for name, mean in scores.items()
        for seed, shift in enumerate((-0.01, 0.01))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "annotate_section.csv", index=False)
    lines = tables.summary(tmp_path, "annotation")
    assert len(lines) == 3, "tasks without rows are left out"
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells[2:] == [
        "**0.800 ± 0.010**", "0.600 ± 0.010", "0.700 ± 0.010 (logistic, all genes)", "0.900 ± 0.010 (GCN, PCs)",
    ]  # fmt: skip
