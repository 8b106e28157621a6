from __future__ import annotations

import numpy as np
import pytest
from attention_toys import heard
from figure_contract import check_figure
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from fimp_sc import pl

TITLES = ["L (B) → R (A)", "L (B) → R (B)", "M (A) → L (B)", "N (B) → M (A)"]


@pytest.mark.parametrize("x", ["z", "correlation", "score"])
def test_dots_are_the_table(x) -> None:
    adata = heard()
    table = adata.uns["fimp_gene_pairs"]["pairs"]
    ax = pl.gene_pairs(adata, x=x, show=False)
    dots = ax.collections[0]
    np.testing.assert_array_equal(dots.get_offsets(), np.c_[table[x], np.arange(4)])
    np.testing.assert_allclose(dots.get_array(), -np.log10(table["fdr"]))
    assert [label.get_text() for label in ax.get_yticklabels()] == TITLES
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the most significant pair is at the top"
    ax.figure.canvas.draw()


def test_areas_tell_edges_and_rims_significance() -> None:
    ax = pl.gene_pairs(heard(), fdr=0.01, show=False)
    dots = ax.collections[0]
    area = dots.get_sizes()
    assert area[1] == area.max()
    assert area[0] == area[3]
    np.testing.assert_allclose((area[0] - area[2]) / (area[1] - area[2]), (40 - 7) / (1200 - 7))
    rims = [to_rgba("black")] * 2 + [to_rgba("#bfbfbf")] * 2
    np.testing.assert_allclose(dots.get_edgecolors(), rims)
    legend = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["300", "600", "1,200", "FDR ≤ 0.01"]
    assert legend.get_title().get_text() == "Edges"
    np.testing.assert_allclose(legend.legend_handles[2].get_sizes(), area.max())


def test_choice_of_pairs() -> None:
    adata = heard()

    def titles(**kwargs) -> list[str]:
        ax = pl.gene_pairs(adata, show=False, **kwargs)
        return [label.get_text() for label in ax.get_yticklabels()]

    assert titles(n_top=2) == TITLES[:2]
    assert titles(source_group="B", destination_group="A") == [TITLES[0], TITLES[3]]
    adata.uns["fimp_gene_pairs"]["pairs"].loc[0, ["fdr", "z"]] = np.nan
    assert titles() == TITLES[1:]


def test_pairs_without_direction_have_no_arrow() -> None:
    adata = heard()
    for directed, joint in ((True, "→"), (False, "–")):
        adata.uns["fimp_gene_pairs"]["directed"] = directed
        ax = pl.gene_pairs(adata, show=False)
        expected = [title.replace("→", joint) for title in TITLES]
        assert [label.get_text() for label in ax.get_yticklabels()] == expected


def test_axes_show_and_save(monkeypatch, tmp_path) -> None:
    _, own = plt.subplots()
    adata = heard()
    adata.uns["other"] = adata.uns.pop("fimp_gene_pairs")
    assert pl.gene_pairs(adata, "other", ax=own, save=tmp_path / "a.png") is own
    assert (tmp_path / "a.png").stat().st_size > 1000
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    assert pl.gene_pairs(adata, "other") is None
    assert shown == [True]


def test_unusable_input() -> None:
    adata = heard()
    with pytest.raises(ValueError, match="x must be one of 'z'"):
        pl.gene_pairs(adata, x="fdr", show=False)
    with pytest.raises(ValueError, match=r"n_top must be .* at least 1"):
        pl.gene_pairs(adata, n_top=0, show=False)
    with pytest.raises(KeyError, match="'C' is not in source_group of the tested pairs"):
        pl.gene_pairs(adata, source_group="C", show=False)
    with pytest.raises(ValueError, match="no tested pair of these groups"):
        pl.gene_pairs(adata, source_group="A", destination_group="A", show=False)
    with pytest.raises(KeyError, match=r"no results of gene_pairs\. Run fimp_sc\.tl\.gene_pairs"):
        pl.gene_pairs(adata, "fimp_attention", show=False)
    del adata.uns["fimp_gene_pairs"]
    with pytest.raises(KeyError, match=r"Run fimp_sc\.tl\.gene_pairs\(adata, groupby\) first"):
        pl.gene_pairs(adata, show=False)


def test_what_becomes_of_the_figure() -> None:
    check_figure(pl.gene_pairs, heard())
