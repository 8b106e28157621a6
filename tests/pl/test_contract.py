"""Every figure has the arguments ``ax``, ``show``, ``save`` and ``return_fig``, with one meaning."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pandas as pd
import pytest
from attention_toys import heard
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from fimp_sc import pl
from fimp_sc.pp import GeneMatch

MATCH = GeneMatch(
    pd.DataFrame(
        {"id": [0, -1], "method": ["exact", ""], "status": ["matched", "lost"], "share_of_counts": [0.7, 0.3]}
    ),
    0.7,
    100,
)
ARGUMENTS = {"ax": None, "show": None, "save": None, "return_fig": False}
TEXTS = {
    "ax": r"Axes to draw into(, one for each panel)?; by default a new figure\.",
    "show": r"Show the figure and return nothing; by default if none of `ax`, `save` and `return_fig` is given\.",
    "save": r"File to write the figure to\.",
    "return_fig": r"Return the figure instead of the axes\.",
}


@pytest.fixture
def calls(brain, photos) -> dict[str, tuple]:
    """What each figure needs, and the shape of its axes."""
    cells = heard()
    cells.obs["fimp_niche"] = pd.Categorical(list("ababab"))
    measured = heard()[:, []].copy()
    measured = type(cells)(np.eye(6, 2), measured.obs, pd.DataFrame(index=["g", "h"]), obsm=dict(cells.obsm))
    measured.layers["fimp"] = measured.X * 0.5
    measured.uns["fimp"] = {"params": {"scale": "counts"}}
    losses = {"train_loss_epoch": pd.DataFrame({"train_loss_epoch": [2.0, 1.0]})}
    return {
        "attention": ((cells,), ()),
        "attention_arrows": ((cells, "c0"), ()),
        "gene_match": ((MATCH,), ()),
        "gene_pairs": ((cells,), ()),
        "history": ((losses,), ()),
        "image_graph": ((photos,), ()),
        "imputation": ((measured, ["g", "h"]), (2, 3)),
        "niche_composition": ((cells, "fimp_niche", "kind"), ()),
        "signals": ((brain, [0, 1]), (2,)),
        "spatial": ((cells, ["kind", "slide"]), (2, 1)),
    }


@pytest.mark.parametrize("name", pl.__all__)
def test_arguments_have_the_same_names_defaults_and_texts(name) -> None:
    function = getattr(pl, name)
    given = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert {p.name: p.default for p in given[-4:]} == ARGUMENTS, "the last ones, in this order"
    assert all(p.kind is p.KEYWORD_ONLY for p in given[-4:])
    text = inspect.getdoc(function)
    for argument, meaning in TEXTS.items():
        assert re.search(rf"^{argument}\n    {meaning}$", text, re.MULTILINE), argument
    returned = " ".join(re.search(r"Returns\n-+\n(.*?)\n\n", text, re.DOTALL)[1].split())
    assert returned.startswith("None if the figure is shown; else the figure if `return_fig`, else the axes")


@pytest.mark.parametrize("name", pl.__all__)
def test_what_becomes_of_a_figure(name, calls, monkeypatch, tmp_path) -> None:
    given, shape = calls[name]
    draw, shown, file = getattr(pl, name), [], tmp_path / "figure.png"
    monkeypatch.setattr(plt, "show", lambda: shown.append(1))
    assert draw(*given) is None
    assert shown == [1]
    assert np.shape(draw(*given, save=file)) == shape
    assert plt.imread(file).ndim == 3
    assert isinstance(draw(*given, return_fig=True), Figure)
    n = int(np.prod(shape, dtype=int))
    own = plt.subplots(n, squeeze=False)[1].ravel()
    drawn = draw(*given, ax=own if shape else own[0])
    assert list(np.ravel(drawn)) == list(own)
    assert shown == [1], "neither a file, nor a figure or axes asked for, is shown"
    assert all(ax.has_data() for ax in own)
    assert draw(*given, ax=own if shape else own[0], show=True) is None
    assert shown == [1, 1]
    with pytest.raises(ValueError, match="A figure that is shown is not returned"):
        draw(*given, show=True, return_fig=True)
    if shape:
        with pytest.raises(ValueError, match=f"ax holds {n + 1} axes, but the figure has {n} panels"):
            draw(*given, ax=plt.subplots(n + 1)[1])
