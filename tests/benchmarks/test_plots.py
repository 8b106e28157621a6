"""The figures of the results show the rows of the CSV files."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

SCORES = {"GCN, PCs": [0.5, 0.7], "FIMP": [0.9, 0.7], "logistic, own": [0.1, 0.1], "FIMP, no messages": [0.6]}


@pytest.fixture
def plots(load_script):
    yield load_script("plots")
    plt.close("all")


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"data": data, "method": name, "seed": seed, "r2_gene": score + shift}
        for data, shift in (("dlpfc", 0.0), ("starmap", 0.05))
        for name, scores in SCORES.items()
        for seed, score in enumerate(scores)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "masked_expression.csv", index=False)
    oracles = {"data": ["dlpfc"] * 2, "method": "oracle", "seed": [0, 1], "r2_gene": [0.9, 1.0]}
    pd.DataFrame(oracles).to_csv(tmp_path / "noise_ceiling.csv", index=False)
    return tmp_path


def test_figures_are_of_the_rows_that_are_there(plots):
    if not list((plots.HERE / "results").glob("*.csv")):
        pytest.skip("the results are not part of the source distribution")
    for name, (_, panels) in plots.FIGURES.items():
        made = (plots.HERE / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert plots.digest(plots.HERE / "results", panels) in made, "run `python benchmarks/tables.py`"
        for panel in panels:
            assert len(plots.rows_of(plots.HERE / "results", panel)) > 10


def test_differences_are_those_of_the_same_seed(plots, folder):
    for data in ("dlpfc", "starmap"):
        found = plots.differences(folder, plots.Panel("masked_expression", data, "r2_gene", ""))
        for name, scores in SCORES.items():
            expected = [x - ours for x, ours in zip(scores, SCORES["FIMP"], strict=False)]
            assert found.score[found.method == name].tolist() == pytest.approx(expected)
    oracles = plots.differences(folder, plots.Panel("masked_expression", "dlpfc", "r2_gene", ""), "noise_ceiling")
    assert oracles.score.tolist() == pytest.approx([0.0, 0.3])
    absent = plots.Panel("masked_expression", "starmap", "r2_gene", "")
    assert not len(plots.differences(folder, absent, "noise_ceiling"))


def test_every_seed_is_a_dot_and_every_mean_a_line(plots, folder):
    panels = [plots.Panel("masked_expression", data, "r2_gene", data) for data in ("dlpfc", "starmap", "merfish")]
    axes = plots.draw(folder, "score", panels).axes
    names = [tick.get_text() for tick in axes[0].get_yticklabels()]
    assert names == ["FIMP, no messages", "GCN, PCs", "logistic, own"]
    for ax, shift in zip(axes[:2], (0.0, 0.05), strict=True):
        edge = -0.4 * (0.8 + shift)
        dots = {(round(float(x), 6), names[round(y)]) for c in ax.collections for x, y in np.asarray(c.get_offsets())}
        assert dots == {
            (round(max(x - ours, edge), 6), name)
            for name in names
            for x, ours in zip(SCORES[name], SCORES["FIMP"], strict=False)
        }
        means = {
            names[round(line.get_ydata()[0])]: (line.get_xdata()[0], line.get_marker())
            for line in ax.lines
            if line.get_marker() in ("|", "<")
        }
        assert means["GCN, PCs"] == (pytest.approx(-0.2), "|")
        assert means["logistic, own"] == (pytest.approx(edge), "<")
        assert ax.get_title() == f"{'starmap' if shift else 'dlpfc'}\nFIMP {0.8 + shift:.3f} ± 0.100"
    assert [line.get_xdata()[0] for line in axes[0].lines if line.get_linestyle() == ":"] == [pytest.approx(0.15)]
    assert not axes[2].collections


def test_a_digest_follows_its_rows_alone(plots, folder):
    panels = [plots.Panel("masked_expression", "dlpfc", "r2_gene", "")]
    before = plots.digest(folder, panels)
    path = folder / "masked_expression.csv"
    rows = pd.read_csv(path)
    rows.loc[rows.data == "starmap", "r2_gene"] = 0.0
    rows.to_csv(path, index=False)
    assert plots.digest(folder, panels) == before
    rows.loc[0, "r2_gene"] = 0.0
    rows.to_csv(path, index=False)
    changed = plots.digest(folder, panels)
    assert changed != before
    (folder / "noise_ceiling.csv").unlink()
    assert plots.digest(folder, panels) != changed, "the oracles are drawn too"


def test_kinds_of_methods(plots):
    kinds = {"FIMP": "FIMP", "FIMP, sum": "variants of FIMP", "GAT, PCs": "networks"}
    kinds |= {"PCA": "others", "GraphMAE, expression": "networks", "scVI": "others"}
    assert {name: plots.kind(name) for name in kinds} == kinds
