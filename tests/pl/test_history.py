from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest
from figure_contract import check_figure

from fimp_sc import pl


def _frame(name: str, values: list[float]) -> pd.DataFrame:
    return pd.DataFrame({name: values}, index=pd.RangeIndex(len(values), name="epoch"))


@pytest.fixture
def record() -> dict[str, pd.DataFrame]:
    names = ["train_loss_step", "train_loss_epoch", "validation_loss", "train_label_loss", "kl_weight"]
    return {name: _frame(name, [3.0, 2.0, 1.0]) for name in names}


def test_losses_are_drawn(record) -> None:
    ax = pl.history(SimpleNamespace(history=record), show=False)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "train, loss",
        "validation, loss",
        "train, label loss",
    ]
    train, validation, label = ax.lines
    assert list(train.get_ydata()) == [3, 2, 1]
    assert train.get_color() == validation.get_color() != label.get_color()
    assert train.get_linestyle() != validation.get_linestyle()


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_epochs_are_whole(n) -> None:
    ax = pl.history({"train_loss_epoch": _frame("train_loss_epoch", [1.0] * n)}, title="Loss of the toy", show=False)
    ax.figure.canvas.draw()
    assert all(tick == round(tick) for tick in ax.get_xticks())
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("Epoch", "Loss", "Loss of the toy")


@pytest.mark.parametrize("history", [None, {}])
def test_untrained(history) -> None:
    with pytest.raises(ValueError, match="no history"):
        pl.history(SimpleNamespace(history=history), show=False)


def test_no_losses() -> None:
    with pytest.raises(ValueError, match=r"no train or validation loss; it has \['kl_weight'\]"):
        pl.history({"kl_weight": _frame("kl_weight", [1.0])}, show=False)


def test_what_becomes_of_the_figure(record) -> None:
    check_figure(pl.history, record)
