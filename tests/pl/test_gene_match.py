from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from figure_contract import check_figure

from fimp_sc import pl
from fimp_sc.pp import GeneMatch


def make_match(counts=(0.5, 0.1, 0.1, 0.1, 0.2)) -> GeneMatch:
    table = pd.DataFrame(
        {
            "name": list("abcde"),
            "id": [0, 1, 2, -1, -1],
            "method": ["exact", "ortholog", "ortholog", "ortholog", ""],
            "status": ["matched", "matched", "ambiguous", "ambiguous", "lost"],
            "fraction_of_counts": counts,
        },
        index=list("abcde"),
    )
    return GeneMatch(table, 0.7, 100)


def test_bars_are_the_shares_of_genes_and_counts() -> None:
    ax = pl.gene_match(make_match(), show=False)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["exact (1)", "ortholog (1)", "ambiguous, chosen (1)", "ambiguous, not used (1)", "lost (1)"]
    genes, counts = zip(*[[bar.get_width() for bar in group] for group in ax.containers], strict=True)
    assert genes == pytest.approx([0.2] * 5)
    assert counts == pytest.approx([0.5, 0.1, 0.1, 0.1, 0.2])
    starts = [group[1].get_x() for group in ax.containers]
    assert starts == pytest.approx([0, 0.5, 0.6, 0.7, 0.8])
    colors = {group[0].get_facecolor() for group in ax.containers}
    assert len(colors) == 5
    assert [label.get_text() for label in ax.get_yticklabels()] == ["genes", "counts"]
    assert "50%" in [text.get_text() for text in ax.texts]


def test_without_counts_only_genes_are_drawn() -> None:
    ax = pl.gene_match(make_match((np.nan,) * 5), show=False)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["genes"]


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="found DataFrame"):
        pl.gene_match(make_match().table)


def test_what_becomes_of_the_figure() -> None:
    check_figure(pl.gene_match, make_match())
