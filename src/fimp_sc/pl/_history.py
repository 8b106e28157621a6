"""Learning curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from fimp_sc._option_rules import shown
from fimp_sc._options import checked
from fimp_sc.pl._figure._canvas import Canvas

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SPLITS = {"train": "train", "validation": "validation", "val": "validation"}
_STYLES = {"train": "-", "validation": "--"}


@checked
def history(
    model: Any,
    *,
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Plot the training and validation losses of a model per epoch.

    Parameters
    ----------
    model
        A trained model with a `history` attribute, a mapping from names such as `train_loss_epoch` and
        `validation_loss` to one-column data frames indexed by epoch (scvi-tools' convention), or such a mapping.
    title
        Title of the axes; none by default.
    ax
        Axes to draw into; by default a new figure.
    show
        Show the figure and return nothing; by default if none of `ax`, `save` and `return_fig` is given.
    save
        File to write the figure to.
    return_fig
        Return the figure instead of the axes.

    Returns
    -------
    None if the figure is shown; else the figure if `return_fig`, else the axes.

    Raises
    ------
    TypeError
        If there is no history.
    ValueError
        If the model is not trained, or its history holds no losses.
    """
    from matplotlib.ticker import MaxNLocator

    canvas = Canvas(ax, show, save, return_fig, title)
    record = model if isinstance(model, Mapping) else getattr(model, "history", model)
    if record is not None and not isinstance(record, Mapping):
        hint = ": fimp_sc.tl.get_model(adata) returns the model of an object" if hasattr(model, "obs") else ""
        raise TypeError(f"model must be a trained model or its history, found {shown(model)}{hint}.")
    curves = _loss_curves(record)
    ax = canvas.axes((5, 3.5))
    terms = list(dict.fromkeys(term for _, term in curves))
    for (split, term), values in curves.items():
        ax.plot(
            values.index.to_numpy(),
            values.to_numpy(),
            linestyle=_STYLES[split],
            color=f"C{terms.index(term) % 10}",
            marker="." if len(values) == 1 else None,
            label=f"{split}, {term}",
        )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    canvas.entitle()
    ax.set_xlabel("Epoch")
    ax.set_ylabel("Loss")
    ax.legend(frameon=False, fontsize="small")
    return canvas.finish()


def _loss_curves(record: Mapping[str, pd.DataFrame] | None) -> dict[tuple[str, str], pd.Series]:
    """Select the losses of a history, by (split, term); the value per step is left out."""
    if not record:
        message = "The model has no history: call `model.train()` first."
        raise ValueError(message)
    curves: dict[tuple[str, str], pd.Series] = {}
    for name, frame in record.items():
        prefix, _, rest = str(name).partition("_")
        if prefix not in _SPLITS or "loss" not in rest or rest.endswith("_step"):
            continue
        values = pd.to_numeric(pd.DataFrame(frame).iloc[:, 0], errors="coerce").dropna()
        if len(values):
            curves[_SPLITS[prefix], rest.removesuffix("_epoch").replace("_", " ")] = values
    if not curves:
        message = f"The history holds no train or validation loss; it has {sorted(map(str, record))}."
        raise ValueError(message)
    return curves
