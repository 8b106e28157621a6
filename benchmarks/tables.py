"""Render the results: ``python benchmarks/tables.py`` writes RESULTS.md and its figures from the CSV files."""

from __future__ import annotations

from pathlib import Path

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
    "fmri": "Hidden segments of fMRI signals",
    "images": "Noisy digits at places of a simulated town",
    "features": "Documents of a simulated citation graph",
    "attention": "Cost of attention across edges",
    "embed_cost": "Cost of tl.embed",
    "foundation": "Cost of a foundation model",
    "scale": "Large data",
    "torch_compile": "torch.compile",
}
COMMANDS = {f"annotate_blocks_{how}": f"annotate_blocks.py --{how}" for how in ("inductive", "random")}
SCORES = ["accuracy", "within_whole", "macro_f1", "accuracy_smoothed", "macro_f1_smoothed", "r2", "r2_gene", "mse"]
SCORES += ["pearson", "pearson_expressed", "r2_expressed"]
SCORES += ["ari_reference", "ari", "ari_both", "ari_smoothed", "nmi", "nmi_smoothed"]
COSTS = ["forward_s", "both_s", "step_ms", "first_s", "graph_s", "read_s", "embed_s", "us_per_cell", "ms_per_cell"]
COSTS += ["epoch_s", "epochs", "total_s", "cpu_s", "peak_mb", "before_gb", "peak_gb", "result_gb"]
COSTS += ["parameters", "trained", "heads"]


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
    print("written: RESULTS.md")
