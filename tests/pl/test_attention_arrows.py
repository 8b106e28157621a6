from __future__ import annotations

import numpy as np
import pytest
from attention_toys import heard
from figure_contract import check_figure
from matplotlib import colormaps
from matplotlib.colors import to_rgba

from fimp_sc import pl


def points(ax) -> dict[tuple[float, float], np.ndarray]:
    """Return the color of each cell that is drawn."""
    return {
        tuple(place): color
        for dots in ax.collections
        for place, color in zip(np.asarray(dots.get_offsets()), dots.get_facecolors(), strict=True)
    }


def test_arrows_come_from_neighbors_in_the_color_and_width_of_their_influence() -> None:
    adata = heard()
    ax = pl.attention_arrows(adata, "c0", show=False)
    weak, strong = ax.patches
    ends = [np.asarray(arrow._posA_posB).tolist() for arrow in (weak, strong)]
    assert ends == [[[0, 2], [0, 0]], [[1, 0], [0, 0]]]
    shades = colormaps["viridis_r"]
    np.testing.assert_allclose(weak.get_facecolor(), shades(1.5 / 3.0))
    np.testing.assert_allclose(strong.get_facecolor(), shades(1.0))
    widths = [arrow.get_arrowstyle().tail_width for arrow in (weak, strong)]
    assert widths == pytest.approx([3, 5])
    bar = ax.figure.axes[-1]
    assert bar.get_ylabel() == "Influence"
    assert bar.get_ylim() == (0, 3)
    ax.figure.canvas.draw()


def test_cells_in_view_of_the_same_sample_have_the_colors_of_their_group() -> None:
    adata = heard()
    ax = pl.attention_arrows(adata, 0, show=False)
    colors = points(ax)
    assert set(colors) == {(0, 0), (1, 0), (0, 2)}, "c2 is far away, c4 and c5 are in another sample"
    for cell, color in (("c0", "#ff0000"), ("c1", "#00ff00"), ("c3", "#ff0000")):
        np.testing.assert_allclose(colors[tuple(adata[cell].obsm["spatial"][0])], to_rgba(color))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["B", "A"]
    assert ax.get_title() == "Influence on c0"
    assert ax.yaxis_inverted(), "as in maps of whole tissue"
    np.testing.assert_allclose(np.mean([ax.get_xlim(), ax.get_ylim()], axis=1), 0, atol=1e-12)


def test_other_columns_and_cells_without_group() -> None:
    adata = heard()
    adata.obs["all"] = "here"
    ax = pl.attention_arrows(adata, "c0", library_key="all", show=False)
    colors = points(ax)
    assert set(colors) == {(0, 0), (1, 0), (0, 2), (1, 1), (0.5, 0.5)}
    np.testing.assert_allclose(colors[1, 1], to_rgba("#d3d3d3", 0.35))
    np.testing.assert_allclose(colors[0.5, 0.5], to_rgba("#00ff00", 0.35))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["B", "A", "missing"]
    ax = pl.attention_arrows(adata, "c0", groupby="slide", show=False)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["x"]


def test_an_influence_of_nothing_is_drawn() -> None:
    ax = pl.attention_arrows(heard(), "c3", show=False)
    (arrow,) = ax.patches
    np.testing.assert_allclose(arrow.get_facecolor(), colormaps["viridis_r"](0.0))
    ax.figure.canvas.draw()


def test_unusable_input() -> None:
    adata = heard()
    with pytest.raises(ValueError, match="'c2' has no neighbors"):
        pl.attention_arrows(adata, "c2", show=False)
    with pytest.raises(KeyError, match="'c9' is not in obs_names"):
        pl.attention_arrows(adata, "c9", show=False)
    with pytest.raises(IndexError, match="cell has the position 6, and positions go from 0 to 5"):
        pl.attention_arrows(adata, 6, show=False)
    with pytest.raises(KeyError, match=r"'type' is not in adata\.obs"):
        pl.attention_arrows(adata, "c0", groupby="type", show=False)
    with pytest.raises(KeyError, match="has no 'xy'"):
        pl.attention_arrows(adata, "c0", spatial_key="xy", show=False)
    del adata.obsp["fimp_attention"]
    with pytest.raises(KeyError, match=r"is not in adata\.obsp.*Run fimp_sc\.tl\.attention"):
        pl.attention_arrows(adata, "c0", show=False)
    del adata.uns["fimp_attention"]
    with pytest.raises(KeyError, match=r"Run fimp_sc\.tl\.attention"):
        pl.attention_arrows(adata, "c0", show=False)


@pytest.mark.parametrize("names", [["A", "B"], ["excitatory neurons of cortical layer 5, extratelencephalic", "B"]])
def test_nothing_leaves_the_figure(names: list[str]) -> None:
    adata = heard()
    adata.obs["kind"] = np.asarray(names)[np.arange(adata.n_obs) % 2]
    ax = pl.attention_arrows(adata, "c0", groupby="kind", show=False)
    figure = ax.figure
    figure.draw_without_rendering()
    legend = ax.get_legend().get_window_extent()
    assert ax.get_window_extent().x1 < legend.x0
    assert legend.x1 <= figure.bbox.x1
    assert figure.axes[-1].get_tightbbox().x0 >= 0


def test_neighbors_in_the_place_of_the_cell_are_drawn() -> None:
    adata = heard()
    adata.obsm["spatial"][:] = 0
    ax = pl.attention_arrows(adata, "c0", show=False)
    assert ax.get_xlim() == (-1, 1)
    ax.figure.canvas.draw()


def test_what_becomes_of_the_figure() -> None:
    check_figure(pl.attention_arrows, heard(), "c0")
