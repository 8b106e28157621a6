"""Draw the results: ``python benchmarks/plots.py`` makes the figures of RESULTS.md from the CSV files.

Scores less those of FIMP on the same seed, since seeds differ in difficulty: one dot for each seed, a line at the mean.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
NAMES = {"dlpfc": "DLPFC 151673", "dlpfc_151674": "DLPFC 151674", "starmap": "STARmap", "merfish": "MERFISH"}
NETWORKS = ("MLP", "GCN", "GraphSAGE", "GAT", "GIN", "GPS", "GraphMAE", "GraphST", "STAGATE")
COLORS = {"FIMP": "#d55e00", "variants of FIMP": "#e69f00", "networks": "#0072b2", "others": "#666666"}
MASKED, ORACLES = "masked_expression", "noise_ceiling"
ROW = 0.17  # inches
LEAST = -0.4  # of FIMP's mean: differences further below are drawn at the edge


class Panel(NamedTuple):
    """One score of the rows of a data set in a CSV file."""

    file: str
    data: str
    score: str
    title: str


FIGURES = {
    "annotation": (
        "macro-F1 less that of FIMP on the same seed",
        [
            Panel("annotate_section", "dlpfc", "macro_f1", "another section: DLPFC"),
            *(Panel("annotate_blocks", d, "macro_f1", f"blocks: {NAMES[d]}") for d in ("dlpfc", "starmap", "merfish")),
        ],
    ),
    "hidden_expression": (
        "R² around gene means less that of FIMP on the same seed",
        [Panel(MASKED, d, "r2_gene", NAMES[d]) for d in ("dlpfc", "starmap", "merfish")],
    ),
    "embedding": (
        "macro-F1 of a linear probe (left) and adjusted Rand index of clusters (right), less those of FIMP",
        [
            *(Panel("embedding", d, "macro_f1", f"types: {NAMES[d]}") for d in ("dlpfc", "dlpfc_151674", "starmap")),
            *(
                Panel("embedding", d, "ari_smoothed", f"regions: {NAMES[d]}")
                for d in ("dlpfc", "dlpfc_151674", "starmap")
            ),
        ],
    ),
}


def kind(method: str) -> str:
    """Key of `COLORS`."""
    if method.startswith("FIMP"):
        return "FIMP" if method == "FIMP" else "variants of FIMP"
    return "networks" if method.split(",")[0] in NETWORKS else "others"


def rows_of(folder: Path, panel: Panel) -> pd.DataFrame:
    """Columns ``method``, ``seed`` and ``score`` of a panel; empty where the file or the score is not there.

    The recipe's heuristics, switched off one by one, stand in the tables alone.
    """
    path = folder / f"{panel.file}.csv"
    table = pd.read_csv(path) if path.exists() else pd.DataFrame()
    if panel.score not in table:
        return pd.DataFrame({"method": [], "seed": [], "score": []})
    drawn = (table.data == panel.data) & ~table.method.str.startswith("FIMP without ")
    rows = table[drawn].rename(columns={panel.score: "score"})
    return rows.loc[rows.score.notna(), ["method", "seed", "score"]]


def differences(folder: Path, panel: Panel, file: str | None = None) -> pd.DataFrame:
    """Rows of a panel, or of its data set in another `file`, with scores less those of FIMP in it on the same seed.

    Seeds that FIMP did not run are left out.
    """
    ours, rows = rows_of(folder, panel), rows_of(folder, panel._replace(file=file or panel.file))
    rows["score"] -= rows.seed.map(ours[ours.method == "FIMP"].set_index("seed").score)
    return rows.dropna()


def digest(folder: Path, panels: list[Panel]) -> str:
    """What a figure says of the rows that it was made from, to tell whether they have changed since."""
    drawn = panels + [panel._replace(file=ORACLES) for panel in panels if panel.file == MASKED]
    return hashlib.sha256("".join(rows_of(folder, panel).to_csv() for panel in drawn).encode()).hexdigest()


def draw(folder: Path, label: str, panels: list[Panel]) -> Any:
    """Figure of some panels side by side, one row for each method that any of them has."""
    tables = [differences(folder, panel) for panel in panels]
    methods = list(dict.fromkeys(name for table in tables for name in table.method if name != "FIMP"))
    # Groups together, in the order of the tables otherwise.
    methods.sort(key=lambda name: list(COLORS).index(kind(name)))
    place = {name: i for i, name in enumerate(methods)}
    size = (2.2 + 2.1 * len(panels), 1.3 + ROW * max(len(methods), 3))
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for ax, panel, rows in zip(axes[0], panels, tables, strict=True):
        whole = rows_of(folder, panel)
        ours = whole.score[whole.method == "FIMP"]
        least = LEAST * abs(ours.mean())
        ax.axvline(0, color=COLORS["FIMP"], lw=1)
        for name, scores in rows[rows.method != "FIMP"].groupby("method", sort=False).score:
            y, color, mean = place[name], COLORS[kind(name)], scores.mean()
            ax.scatter(scores.clip(lower=least), np.full(len(scores), y), s=7, color=color, alpha=0.6, lw=0)
            ax.plot([max(mean, least)], [y], "<" if mean < least else "|", color=color, ms=7, mew=1.4)
        if panel.file == MASKED:
            for name, scores in differences(folder, panel, ORACLES).groupby("method").score:
                ax.axvline(scores.mean(), color="#333333", lw=0.8, ls=":", label=name)
        title = f"{panel.title}\nFIMP {ours.mean():.3f} ± {ours.std(ddof=0):.3f}" if len(ours) else panel.title
        ax.set_title(title, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(axis="y", color="#eeeeee", lw=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    first = axes[0, 0]
    first.set_yticks(range(len(methods)), methods)
    for tick, name in zip(first.get_yticklabels(), methods, strict=True):
        tick.set_color(COLORS[kind(name)])
    first.set_ylim(len(methods) - 0.4, -0.6)
    figure.supxlabel(label, fontsize=8)
    return figure


def main() -> None:
    """Write all figures."""
    folder = HERE / "figures"
    folder.mkdir(exist_ok=True)
    for name, (label, panels) in FIGURES.items():
        path = folder / f"{name}.svg"
        # Without a date and with fixed ids, a file only changes when the figure does.
        with mpl.rc_context({"svg.hashsalt": "fimp-sc", "svg.fonttype": "none", "font.family": "sans-serif"}):
            figure = draw(HERE / "results", label, panels)
            figure.savefig(path, metadata={"Date": None, "Description": digest(HERE / "results", panels)})
            plt.close(figure)
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
        print(f"written: {path.relative_to(HERE)}")


if __name__ == "__main__":
    main()
