from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from figure_contract import check_figure
from matplotlib.colors import to_rgba

from fimp_sc import pl


@pytest.fixture
def cells(toy):
    """Toy tissue with stored colors and a few cells without niche or type."""
    toy.obs["fimp_niche"] = toy.obs["region"].cat.rename_categories(["0", "1", "2", "3"])
    toy.uns["fimp_niche_colors"] = ["#ff0000", "#00ff00", "#0000ff", "#ffff00"]
    toy.obs.loc[toy.obs_names[:10], "fimp_niche"] = np.nan
    toy.obs.loc[toy.obs_names[10:15], "cell_type"] = np.nan
    return toy


def test_bars_are_fractions(cells) -> None:
    ax = pl.niche_composition(cells, show=False)
    table = pd.crosstab(cells.obs["fimp_niche"], cells.obs["cell_type"], normalize="index")
    bars = {container.get_label(): container for container in ax.containers}
    assert list(bars) == list(table.columns)
    for name, container in bars.items():
        np.testing.assert_allclose([bar.get_width() for bar in container], table[name], atol=1e-12)
    last = ax.containers[-1]
    np.testing.assert_allclose([bar.get_x() + bar.get_width() for bar in last], 1)
    sizes = cells.obs[cells.obs["cell_type"].notna()]["fimp_niche"].value_counts()
    assert [text.get_text() for text in ax.get_yticklabels()] == [f"{i}  ({sizes[i]})" for i in "0123"]
    ax.figure.canvas.draw()


def test_niches_are_marked_in_their_colors(cells) -> None:
    for kind in ("bars", "heatmap"):
        ax = pl.niche_composition(cells, kind=kind, show=False)
        marks = ax.collections[0]
        np.testing.assert_allclose(marks.get_facecolors(), [to_rgba(c) for c in cells.uns["fimp_niche_colors"]])


def test_heatmap_holds_shares_and_is_chosen_for_many_kinds(cells) -> None:
    ax = pl.niche_composition(cells, kind="heatmap", show=False)
    table = pd.crosstab(cells.obs["fimp_niche"], cells.obs["cell_type"], normalize="index")
    np.testing.assert_allclose(ax.images[0].get_array(), table)
    assert [text.get_text() for text in ax.get_xticklabels()] == list(table.columns)
    assert not pl.niche_composition(cells, show=False).images
    cells.obs["many"] = np.arange(cells.n_obs) % 25
    assert pl.niche_composition(cells, groupby="many", show=False).images


def test_empty_niches_and_kinds_are_left_out(cells) -> None:
    part = cells[(cells.obs["fimp_niche"] != "1") & (cells.obs["cell_type"] != "Dendritic")].copy()
    part.obs["fimp_niche"] = part.obs["fimp_niche"].cat.set_categories(list("0123"))
    part.obs["cell_type"] = part.obs["cell_type"].cat.set_categories(cells.obs["cell_type"].cat.categories)
    part.uns["fimp_niche_colors"] = cells.uns["fimp_niche_colors"]  # anndata drops that of a niche without cells
    ax = pl.niche_composition(part, show=False)
    assert [text.get_text()[0] for text in ax.get_yticklabels()] == ["0", "2", "3"]
    assert "Dendritic" not in [text.get_text() for text in ax.get_legend().get_texts()]
    np.testing.assert_allclose(ax.collections[0].get_facecolors()[1], to_rgba("#0000ff"))


def test_unusable_input(cells) -> None:
    del cells.obs["fimp_niche"]
    with pytest.raises(KeyError, match=r"fimp_sc\.tl\.niches"):
        pl.niche_composition(cells, show=False)
    with pytest.raises(KeyError, match="'type' is not in"):
        pl.niche_composition(cells, "region", "type", show=False)
    with pytest.raises(ValueError, match="kind must be"):
        pl.niche_composition(cells, "region", kind="pie", show=False)
    cells.obs["none"] = pd.Categorical([None] * cells.n_obs)
    with pytest.raises(ValueError, match="No cell has both"):
        pl.niche_composition(cells, "none", show=False)


def test_legend_of_many_kinds_lies_inside_the_figure(toy) -> None:
    toy.obs["cluster"] = pd.Categorical([f"Excitatory neurons {i % 46}" for i in range(toy.n_obs)])
    ax = pl.niche_composition(toy, "region", "cluster", kind="bars", show=False)
    legend, figure = ax.get_legend().get_window_extent(), ax.figure
    assert legend.y0 >= 0
    assert legend.y1 <= figure.bbox.y1
    assert legend.x1 <= figure.bbox.x1
    assert ax.get_window_extent().width > 2 * figure.dpi


def test_what_becomes_of_the_figure(cells) -> None:
    check_figure(pl.niche_composition, cells)
