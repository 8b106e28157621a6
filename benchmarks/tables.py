"""Render the results: ``python benchmarks/tables.py`` writes RESULTS.md and its figures from the CSV files.

The tables of README.md and of docs/benchmarks.md between the comments ``table:`` are filled from the same files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pandas as pd

import plots

HERE = Path(__file__).resolve().parent
TITLES = {
    "annotate_section": "Cell types of another section",
    "annotate_blocks": "Cell types of held-out blocks",
    "annotate_blocks_inductive": "Cell types of held-out blocks that are not there in training",
    "annotate_blocks_random": "Cell types of cells held out at random, which is too easy",
    "crops": "Parts of a section that hold only some of the classes",
    "masked_expression": "Hidden expression in held-out blocks",
    "missing_genes": "Genes that a section did not measure",
    "noise_ceiling": "What could be predicted of hidden expression",
    "embedding": "Features without labels: cell types and domains",
    "niches": "Niches against annotated regions",
    "mapped_niches": "Niches of one section in the next",
    "planted_pairs": "Pairs of genes planted in simulated tissues",
    "gene_pairs": "Pairs of genes in real tissue",
    "fmri": "Hidden segments of fMRI signals",
    "he": "Expression of spots from their H&E patches, a section left out",
    "images": "Noisy digits at places of a simulated town",
    "features": "Documents of a simulated citation graph",
    "ontology": "Terms of the Gene Ontology",
    "attention": "Cost of attention across edges",
    "embed_cost": "Cost of tl.embed",
    "foundation": "Cost of a foundation model",
    "scale": "Large data",
    "torch_compile": "torch.compile",
}
COMMANDS = {f"annotate_blocks_{how}": f"annotate_blocks.py --{how}" for how in ("inductive", "random")}


class Task(NamedTuple):
    """One line of the summary: a score of the rows of a data set in a CSV file, and the method that is ours there."""

    question: str
    file: str
    data: str
    score: str
    unit: str
    ours: str = "FIMP"


SUMMARY = {
    "annotation": [
        Task(
            "layers of another section with another gene list (DLPFC)",
            "annotate_section",
            "dlpfc",
            "macro_f1",
            "macro-F1",
        ),
        Task("layers of held-out blocks (DLPFC)", "annotate_blocks", "dlpfc", "macro_f1", "macro-F1"),
        Task("the same with 3 % of the counts", "annotate_blocks", "dlpfc_few_counts", "macro_f1", "macro-F1"),
        Task("cell types of held-out blocks (STARmap)", "annotate_blocks", "starmap", "macro_f1", "macro-F1"),
        Task("cell types of held-out blocks (MERFISH)", "annotate_blocks", "merfish", "macro_f1", "macro-F1"),
    ],
    "expression": [
        Task(
            "hidden expression of held-out blocks (DLPFC)",
            "masked_expression",
            "dlpfc",
            "r2_gene",
            "R² around gene means",
        ),
        Task("the same (STARmap)", "masked_expression", "starmap", "r2_gene", "R² around gene means"),
        Task("the same (MERFISH)", "masked_expression", "merfish", "r2_gene", "R² around gene means"),
    ],
    "embedding": [
        Task(
            "linear probe of layers, without labels in training (DLPFC 151673)",
            "embedding",
            "dlpfc",
            "macro_f1",
            "macro-F1",
        ),
        Task("the same (DLPFC 151674)", "embedding", "dlpfc_151674", "macro_f1", "macro-F1"),
        Task("linear probe of cell types (STARmap)", "embedding", "starmap", "macro_f1", "macro-F1"),
        Task("linear probe of cell types (MERFISH)", "embedding", "merfish", "macro_f1", "macro-F1"),
    ],
    "niches": [
        Task("7 niches against layers (DLPFC 151673)", "niches", "dlpfc", "ari", "adjusted Rand index", "tl.niches"),
        Task("the same (DLPFC 151674)", "niches", "dlpfc_151674", "ari", "adjusted Rand index", "tl.niches"),
        Task("7 niches against regions (STARmap)", "niches", "starmap", "ari", "adjusted Rand index", "tl.niches"),
    ],
}
# The tables of the README are short.
SUMMARY["readme"] = [*SUMMARY["annotation"][:2], *SUMMARY["annotation"][3:]]
FILLED = (HERE.parent / "README.md", HERE.parent / "docs" / "benchmarks.md")

SCORES = ["accuracy", "within_whole", "macro_f1", "accuracy_smoothed", "macro_f1_smoothed", "r2", "r2_gene", "mse"]
SCORES += ["pearson", "pearson_50", "pearson_expressed", "r2_expressed"]
SCORES += ["power", "found", "wrong", "false_rate"]
SCORES += ["ari_reference", "ari", "ari_both", "ari_smoothed", "nmi", "nmi_smoothed", "mrr", "hits10"]
COSTS = ["forward_s", "both_s", "step_ms", "first_s", "graph_s", "read_s", "embed_s", "us_per_cell", "ms_per_cell"]
COSTS += ["epoch_s", "epochs", "total_s", "cpu_s", "peak_mb", "before_gb", "peak_gb", "result_gb"]
COSTS += ["parameters", "trained", "heads", "tests", "pairs", "found_pairs", "itself"]


def score(values: pd.Series) -> str:
    """Mean ± standard deviation over seeds, or nothing where the method has no such figure."""
    if values.isna().all():
        return ""
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=0):.3f}" if len(values) > 1 else "")


def cost(values: pd.Series) -> str:
    """Mean over seeds to three digits."""
    mean = values.mean()
    if pd.isna(mean):
        return ""
    return f"{mean:,.0f}" if mean >= 100 else f"{mean:.3g}"


def table(rows: pd.DataFrame, keys: list[str]) -> list[str]:
    """Lines of a Markdown table with one line for each value of `keys`."""
    scores = [name for name in SCORES if name in rows and rows[name].notna().any()]
    costs = [name for name in COSTS if name in rows and rows[name].notna().any()]
    lines = ["| " + " | ".join([*keys, *scores, *costs, "seeds"]) + " |"]
    lines.append("|---" * (len(keys) + len(scores) + len(costs) + 1) + "|")
    for names, group in rows.groupby(keys, sort=False):
        cells = [*map(str, names), *(score(group[name]) for name in scores), *(cost(group[name]) for name in costs)]
        lines.append("| " + " | ".join([*cells, str(len(group))]) + " |")
    return lines


def planted(folder: Path) -> list[str]:
    """Lines of a Markdown table: power and wrong discoveries of each method in each of the simulated tissues."""
    path = folder / "planted_pairs.csv"
    if not path.exists():
        return []
    rows = pd.read_csv(path)
    tissues = list(rows.data.unique())
    lines = ["| power / wrong | " + " | ".join(name.replace("_", ", effect ") for name in tissues) + " |"]
    lines.append("|---" * (len(tissues) + 1) + "|")
    for method in sorted(rows.method.unique(), key=lambda name: (not name.startswith("gene_pairs"), name)):
        means = rows[rows.method == method].groupby("data")[["power", "wrong"]].mean()
        cells = [f"{means.power[t]:.2f} / {means.wrong[t]:.1f}" if t in means.index else "" for t in tissues]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return lines


def _best(rows: pd.DataFrame, task: Task) -> str:
    """Score and name of the method of the highest mean, ``(n seeds)`` where it is not FIMP's number of seeds."""
    rows = rows[rows[task.score].notna()]
    if rows.empty:
        return ""
    means = rows.groupby("method", sort=False)[task.score]
    name = means.mean().idxmax()
    return f"{score(means.get_group(name))} ({name})"


def summary(folder: Path, part: str) -> list[str]:
    """Lines of a Markdown table: FIMP, without messages, and the best of the simple methods and of the networks."""
    lines = [
        "| task | score | fimp-sc | without messages | best simple method | best other network |",
        "|---|---|---|---|---|---|",
    ]
    for task in SUMMARY[part]:
        path = folder / f"{task.file}.csv"
        if not path.exists():
            continue
        rows = pd.read_csv(path)
        rows = rows[rows.data == task.data]
        if rows.empty:
            continue
        kinds = rows.method.map(plots.kind)
        ours = rows[rows.method == task.ours]
        silent = rows[rows.method == f"{task.ours}, no messages"]
        others = rows[
            (kinds == "others") & ~rows.method.str.startswith("tl.niches") | (rows.method == "tl.niches on PCs")
        ]
        cells = [task.question, task.unit, f"**{score(ours[task.score])}**"]
        cells += [
            score(silent[task.score]) if len(silent) else "",
            _best(others, task),
            _best(rows[kinds == "networks"], task),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def filled(text: str, folder: Path) -> str:
    """Return a page with the tables between ``<!-- table: name -->`` and ``<!-- end -->`` made anew."""

    def made(found: re.Match[str]) -> str:
        lines = planted(folder) if found[2] == "pairs" else summary(folder, found[2])
        return f"{found[1]}\n" + "\n".join(lines) + "\n<!-- end -->"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def render(folder: Path) -> str:
    """All tables of the CSV files in `folder` as one page."""
    page = [
        "# Results",
        "",
        "Mean ± standard deviation over seeds; costs are means. Seeds set the split, and splits differ in difficulty:",
        "compare rows of unlike numbers of seeds by their CSV rows, seed by seed. What a figure is and which command",
        "makes it is in [README.md](README.md); `python benchmarks/tables.py` makes this page from the CSV files in",
        "`results/`.",
        "",
        "The figures show differences from FIMP on the same seed: a dot is a seed, a line the mean over seeds, an",
        "arrow a method that is further to the left, dotted lines for oracles that know the rates behind the",
        "counts. Points to the right of zero beat FIMP.",
        "",
    ]
    page += [line for name in plots.FIGURES for line in (f"![{name.replace('_', ' ')}](figures/{name}.svg)", "")]
    for name, title in TITLES.items():
        path = folder / f"{name}.csv"
        if not path.exists():
            continue
        rows = pd.read_csv(path)
        group = rows.columns[0]
        page += [f"## {title}", "", f"`{COMMANDS.get(name, f'{name}.py')}`", ""]
        if "method" not in rows:
            page += [*table(rows, [group]), ""]
        elif rows[group].nunique() == 1 or rows.groupby(group).method.nunique().max() == 1:
            page += [*table(rows, [group, "method"]), ""]
        else:
            for data, part in rows.groupby(group, sort=False):
                page += [f"### {title}: {data}", "", *table(part, ["method"]), ""]
    return "\n".join(page).rstrip() + "\n"


if __name__ == "__main__":
    plots.main()
    (HERE / "RESULTS.md").write_text(render(HERE / "results"))
    for page in FILLED:
        page.write_text(filled(page.read_text(encoding="utf-8"), HERE / "results"), encoding="utf-8")
    print("written: RESULTS.md, and the tables of", *(page.name for page in FILLED))
