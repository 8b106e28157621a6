"""Print the tables of all results as Markdown: ``python benchmarks/tables.py``."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

SCORES = ["accuracy", "macro_f1", "r2", "r2_gene", "mse"]
COSTS = ["forward_s", "both_s", "step_ms", "first_s", "graph_s", "read_s", "embed_s", "us_per_cell", "ms_per_cell"]
COSTS += ["epoch_s", "total_s", "trained", "heads"]
MEMORY = ["peak_mb", "before_gb", "peak_gb", "result_gb"]


def cell(values: pd.Series) -> str:
    """Mean ± standard deviation, or nothing where the method has no such figure."""
    if values.isna().all():
        return ""
    if values.mean() >= 10_000:
        return f"{values.mean():,.0f}"
    return f"{values.mean():.3f} ± {values.std(ddof=0):.3f}"


def table(path: Path) -> str:
    """Mean ± standard deviation over seeds of the scores in one CSV."""
    rows = pd.read_csv(path)
    keys = [rows.columns[0], "method"] if "method" in rows else [rows.columns[0]]
    scores = [name for name in (*SCORES, *COSTS, *MEMORY) if name in rows]
    lines = [f"### {path.stem}", "", "| " + " | ".join([*keys, *scores, "seeds"]) + " |"]
    lines.append("|---" * (len(keys) + len(scores) + 1) + "|")
    for names, group in rows.groupby(keys, sort=False):
        cells = [cell(group[name]) for name in scores]
        lines.append("| " + " | ".join([*map(str, names), *cells, str(len(group))]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    for found in sorted((Path(__file__).resolve().parent / "results").glob("*.csv")):
        if not found.stem.endswith("_quick"):
            print(table(found), end="\n\n")
