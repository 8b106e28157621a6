"""Draw the figures of the documentation: `python docs/figures.py`."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Circle, FancyArrowPatch
from PIL import Image

HERE = Path(__file__).parent
STATIC = HERE / "_static"
INK, OWN, OTHER, SOFT = "#333333", "#4477aa", "#cc6677", "#bbbbbb"


def method() -> None:
    """Draw two neighboring cells, their tokens, and the attention of the edge between them."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=[1, 1.35], layout="constrained")
    places = np.array([[0.0, 0.0], [1.0, 0.35], [0.6, -0.9], [-0.5, -0.95], [-1.0, 0.1], [-0.6, 0.9], [0.35, 1.0]])
    for place in places[1:]:
        arrow = FancyArrowPatch(
            place, places[0], arrowstyle="-|>", mutation_scale=10, shrinkA=9, shrinkB=10, color=SOFT
        )
        left.add_patch(arrow)
    for i, place in enumerate(places):
        left.add_patch(Circle(place, 0.17, color=OWN if i == 0 else OTHER if i == 1 else SOFT))
    left.annotate("i", places[0], ha="center", va="center", color="white", style="italic")
    left.annotate("j", places[1], ha="center", va="center", color="white", style="italic")
    left.set(xlim=(-1.4, 1.4), ylim=(-1.35, 1.35), title="a cell and its neighbors")

    genes, others = ["GFAP", "AQP4", "SNAP25"], ["SNAP25", "MBP", "PLP1", "GFAP"]
    weight = np.random.default_rng(3).dirichlet(np.full(len(others), 0.6), len(genes))
    rows, columns = np.linspace(0.75, -0.75, len(genes)), np.linspace(1.0, -1.0, len(others))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            line = {"color": INK, "alpha": 0.12 + 0.88 * weight[i, j], "lw": 0.5 + 4 * weight[i, j]}
            right.plot([-0.62, 0.62], [row, column], solid_capstyle="round", **line)
    for x, names, places_y, color in ((-1, genes, rows, OWN), (1, others, columns, OTHER)):
        for name, y in zip(names, places_y, strict=True):
            box = {"boxstyle": "round,pad=0.35", "facecolor": color, "edgecolor": "none"}
            right.text(x, y, name, ha="center", va="center", color="white", fontsize=9, bbox=box)
    right.text(-1, -1.5, "tokens of cell $i$ ask", ha="center", va="center")
    right.text(1, -1.5, "tokens of cell $j$ answer", ha="center", va="center")
    right.set(xlim=(-1.6, 1.6), ylim=(-1.75, 1.35), title="one edge: softmax$(Q_i K_j^\\top / \\sqrt{d})\\, V_j$")
    for ax in (left, right):
        ax.set_aspect("equal" if ax is left else "auto")
        ax.axis("off")
    # Without a date and with fixed ids, the file only changes when the figure does.
    with mpl.rc_context({"svg.hashsalt": "fimp-sc"}):
        fig.savefig(STATIC / "method.svg", metadata={"Date": None})
    plt.close(fig)
    lines = (STATIC / "method.svg").read_text(encoding="utf-8").splitlines()
    (STATIC / "method.svg").write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def quick_start() -> None:
    """Run the quick start, and keep the figure that it makes."""
    page = (HERE / "quick_start.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "quick_start.md", "exec"), names)
        if plt.get_fignums():
            path = STATIC / "quick_start.png"
            plt.savefig(path, dpi=80)
            Image.open(path).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)
            break


if __name__ == "__main__":
    mpl.use("Agg")
    method()
    quick_start()
