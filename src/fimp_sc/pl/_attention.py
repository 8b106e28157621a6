"""Heat map of influence between groups of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from fimp_sc._options import checked
from fimp_sc.data.storage._elements import missing_key
from fimp_sc.pl._figure._canvas import Canvas
from fimp_sc.pl._figure._coloring import colormap
from fimp_sc.pl._figure._common import results_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from mudata import MuData
    from numpy.typing import NDArray

_LABELS = {
    "influence": "Mean influence",
    "z": "z of influence",
    "n_edges": "Edges",
}
_MOST_NUMBERS = 12  # groups whose squares have room for numbers


@checked
def attention(
    adata: AnnData | MuData,
    key: str = "fimp_attention",
    *,
    modality: str | Sequence[str] | None = None,
    value: Literal["influence", "z", "n_edges"] = "influence",
    fdr: float = 0.05,
    numbers: bool | None = None,
    cmap: str = "viridis",
    title: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Axes | Figure | None:
    """Draw influence from each group of cells to each other one as a heat map.

    Parameters
    ----------
    adata
        Object with the results of :func:`fimp_sc.tl.attention`; or a MuData object.
    key
        Their name in `.uns`.
    modality
        Of a MuData object, the one that the results are of, or the several; by default where they are found.
    value
        `"influence"`, mean over edges; `"z"`, its distance in standard deviations from the mean under permuted group
        labels; `"n_edges"`, the number of edges. Pairs of groups without edge or test are gray.
    fdr
        Influence (or z) with at most this false discovery rate has a star.
    numbers
        Write numbers into the squares; by default for up to 12 groups.
    cmap
        Color map.
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
    KeyError
        If there are no such results.
    ValueError
        If `value` is none of these.
    """
    from matplotlib.ticker import MaxNLocator

    canvas = Canvas(ax, show, save, return_fig, title)
    adata, _ = results_of(adata, modality, lambda held, _: key in held.uns)
    table = attention_result(adata, key)["groups"]
    names = _names(table)
    drawn = _square(table, value, names)
    marked = _square(table, "fdr", names) <= fdr if value in {"influence", "z"} else np.zeros(drawn.shape, dtype=bool)

    side = max(0.5 * min(len(names), _MOST_NUMBERS), 0.3 * len(names), 1.5)
    ax = canvas.axes((side + 2.6, side + 1.4))
    counts = value == "n_edges"
    lowest = 0 if counts and np.isfinite(drawn).any() else None
    image = ax.imshow(np.ma.masked_invalid(drawn), cmap=colormap(cmap), vmin=lowest, interpolation="nearest")
    written = numbers or (numbers is None and len(names) <= _MOST_NUMBERS)
    _write(ax, image, drawn if written else np.full_like(drawn, np.nan), marked, whole=counts)
    ax.set_xticks(np.arange(len(names)), names, rotation=90, fontsize="small")
    ax.set_yticks(np.arange(len(names)), names, fontsize="small")
    ax.set_xlabel("Destination")
    ax.set_ylabel("Source")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ticks = MaxNLocator("auto", integer=True) if counts else None
    ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.03, ticks=ticks).set_label(_LABELS[value])
    canvas.entitle()
    if marked.any():
        ax.set_title(f"*  FDR ≤ {fdr:g}", fontsize="small", loc="right")
    return canvas.finish()


def attention_result(adata: AnnData, key: str) -> dict[str, Any]:
    """Return the results of :func:`fimp_sc.tl.attention` in ``uns[key]``, without cells that have no group.

    Raises
    ------
    MissingKeyError
        There is nothing, or something else.
    """
    advice = "Run fimp_sc.tl.attention(adata, groupby) first, or set key=."
    if key not in adata.uns:
        raise missing_key(key, "adata.uns", adata.uns, advice)
    result = adata.uns[key]
    found = dict(result) if hasattr(result, "keys") else {}
    if "groups" not in found:
        raise missing_key("groups", f"adata.uns[{key!r}]", found, f"These are no results of attention. {advice}")
    unlabeled = dict(found.get("params", {})).get("unlabeled_category")
    rows = pd.DataFrame(found["groups"])
    # Results of an earlier version may have them as a group.
    found["groups"] = rows[(rows[["source_group", "destination_group"]].astype(str) != str(unlabeled)).all(axis=1)]
    return found


def _names(table: pd.DataFrame) -> list[str]:
    """Return the groups that have edges, in the order of their categories."""
    source, destination = (pd.Categorical(table[f"{side}_group"]) for side in ("source", "destination"))
    order = dict.fromkeys([*source.categories, *destination.categories])
    there = {*source, *destination}
    return [str(name) for name in order if name in there]


def _square(table: pd.DataFrame, value: str, names: list[str]) -> NDArray[np.float64]:
    out = np.full((len(names), len(names)), np.nan)
    place = pd.Index(names)
    rows, columns = (place.get_indexer(table[f"{side}_group"].astype(str)) for side in ("source", "destination"))
    out[rows, columns] = table[value]
    return out


def _write(ax: Axes, image: Any, numbers: NDArray[np.float64], marked: NDArray[np.bool_], *, whole: bool) -> None:
    """Write numbers, where they are finite, and stars into the squares."""
    for (row, column), number in np.ndenumerate(numbers):
        if not (np.isfinite(number) or marked[row, column]):
            continue
        red, green, blue, _ = image.cmap(image.norm(image.get_array()[row, column]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        text = f"{number:,.0f}" if whole else f"{number:.2g}" if abs(number) < 10 else f"{number:.0f}"
        text = text if np.isfinite(number) else ""
        ax.text(
            column, row, text + "*" * bool(marked[row, column]), ha="center", va="center", fontsize="small",
            color="white" if dark else "black",
        )  # fmt: skip
