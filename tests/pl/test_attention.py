from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from attention_toys import heard
from figure_contract import check_figure
from matplotlib import colormaps
from matplotlib.colors import to_rgba

from fimp_sc import pl

# Source group x destination group, in the order of the categories: B, A.
TRUTH = {
    "influence": [[1.5, 2.0], [30.0, np.nan]],
    "z": [[-1.0, 3.5], [np.nan, np.nan]],
    "n_edges": [[1200, 40], [7, np.nan]],
}


def numbers(ax) -> dict[tuple[float, float], str]:
    return {text.get_position()[::-1]: text.get_text() for text in ax.texts}


@pytest.mark.parametrize("value", TRUTH)
def test_squares_are_the_table(value) -> None:
    ax = pl.attention(heard(), value=value, show=False)
    drawn = ax.images[0].get_array()
    np.testing.assert_array_equal(np.ma.filled(drawn.astype(float), np.nan), TRUTH[value])
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["B", "A"]
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("Source", "Destination")
    ax.figure.canvas.draw()


def test_what_is_missing_is_gray() -> None:
    ax = pl.attention(heard(), show=False)
    image = ax.images[0]
    np.testing.assert_allclose(image.cmap(image.norm(image.get_array()))[1, 1], to_rgba("#d3d3d3"))
    assert colormaps["viridis"].get_bad().tolist() != image.cmap.get_bad().tolist(), "maps of matplotlib stay"


def test_numbers_and_stars() -> None:
    assert numbers(pl.attention(heard(), show=False)) == {(0, 0): "1.5", (0, 1): "2*", (1, 0): "30"}
    assert numbers(pl.attention(heard(), fdr=1e-3, show=False))[0, 1] == "2"
    assert numbers(pl.attention(heard(), value="n_edges", show=False)) == {(0, 0): "1,200", (0, 1): "40", (1, 0): "7"}
    assert numbers(pl.attention(heard(), numbers=False, show=False)) == {(0, 1): "*"}
    assert not numbers(pl.attention(heard(), value="n_edges", numbers=False, show=False))


def test_stars_of_more_groups_than_have_numbers() -> None:
    adata = heard()
    names = [f"g{i:02d}" for i in range(15)]
    pairs = [(a, b) for a in names for b in names]
    fdr = np.where([a == b for a, b in pairs], 0.01, 0.5)
    adata.uns["fimp_attention"]["groups"] = pd.DataFrame(pairs, columns=["source_group", "destination_group"]).assign(
        n_edges=3, influence=1.0, z=0.0, p_value=fdr, fdr=fdr
    )
    ax = pl.attention(adata, show=False)
    assert numbers(ax) == {(i, i): "*" for i in range(15)}
    assert "FDR" in ax.get_title("right")


def test_the_unlabeled_category_is_not_shown() -> None:
    adata = heard()
    adata.uns["fimp_attention"]["params"]["unlabeled_category"] = "A"
    ax = pl.attention(adata, show=False)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["B"]
    assert numbers(ax) == {(0, 0): "1.5"}
    assert len(adata.uns["fimp_attention"]["groups"]) == 3, "the object stays as it is"
    arrows = pl.attention_arrows(adata, "c0", show=False)
    legend = arrows.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["B", "A"]
    assert legend.legend_handles[1].get_color() == "#d3d3d3"


def test_results_of_another_name() -> None:
    adata = heard()
    adata.uns["other"] = adata.uns.pop("fimp_attention")
    assert pl.attention(adata, "other", show=False).images


def test_unusable_input() -> None:
    adata = heard()
    with pytest.raises(ValueError, match="value must be one of 'influence'"):
        pl.attention(adata, value="attention", show=False)
    with pytest.raises(KeyError, match=r"no results of attention\. Run fimp_sc\.tl\.attention"):
        pl.attention(adata, "kind_colors", show=False)
    del adata.uns["fimp_attention"]
    with pytest.raises(KeyError, match=r"Run fimp_sc\.tl\.attention\(adata, groupby\) first"):
        pl.attention(adata, show=False)


def test_what_becomes_of_the_figure() -> None:
    check_figure(pl.attention, heard())
