"""The contract of figures: axes, titles, and the arguments ``ax``, ``show``, ``save`` and ``return_fig``."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

# Inches between a legend and what is beside it.
_MARGIN = 0.4
# Dots per inch of files, unless matplotlib's settings name another number.
_DPI = 200
# Letters of a title that an inch has room for.
_LETTERS = 11


class Canvas:
    """Axes of a figure, the user's or new ones, which are shown, written or returned at the end.

    Every figure of :mod:`fimp_sc.pl` has these five arguments, and ends with ``return canvas.finish()``.

    Parameters
    ----------
    ax
        Axes of the user, one or several of any shape; None for a new figure.
    show
        Whether to show the figure; by default if none of the other three is given.
    save
        File to write the figure to.
    return_fig
        Whether to return the figure instead of the axes.
    title
        Title of the user, or one for each panel.

    Raises
    ------
    ValueError
        ``show`` and ``return_fig`` are both True.
    """

    def __init__(
        self,
        ax: Axes | Sequence[Axes] | NDArray[np.object_] | None,
        show: bool | None,
        save: str | Path | None,
        return_fig: bool,
        title: str | Sequence[str] | None = None,
    ) -> None:
        if show and return_fig:
            raise ValueError("A figure that is shown is not returned: pass show=True or return_fig=True.")
        self._given, self._save, self._return_fig, self._title = ax, save, return_fig, title
        self._show = (ax is None and save is None and not return_fig) if show is None else show
        self._axes: Any = None

    def titles(self, defaults: Sequence[str], width: float | None = None) -> list[str]:
        """Return the titles of the panels: the user's, or these.

        Parameters
        ----------
        defaults
            Title of each panel.
        width
            Inches of a panel; longer titles are broken into lines.

        Raises
        ------
        ValueError
            The user's titles are more or fewer than the panels.
        """
        given = [self._title] if isinstance(self._title, str) else self._title
        if given is not None and len(given) != len(defaults):
            raise ValueError(
                f"title has {len(given):,} titles, but the figure has {len(defaults):,} panels: pass one for each."
            )
        titles = [str(title) for title in (defaults if given is None else given)]
        return titles if width is None else [fill(title, max(int(_LETTERS * width), 8)) for title in titles]

    def axes(
        self,
        figsize: tuple[float, float],
        shape: tuple[int, ...] = (),
        *,
        wrap: int | None = None,
        beside: int = 1,
        **layout: Any,
    ) -> Any:
        """Return the axes to draw into: one, or an array of them in this shape.

        Parameters
        ----------
        figsize
            Width and height of a new figure in inches.
        shape
            ``()``, ``(n_rows,)`` or ``(n_rows, n_columns)``.
        wrap
            Number of axes side by side in a new figure, at most: those of a longer row go on in the line below, and
            those of a single column are filled in line by line.
        beside
            Number of rows that a new figure without ``wrap`` has side by side.
        **layout
            Passed to :func:`matplotlib.pyplot.subplots` for a new figure without ``wrap``.

        Raises
        ------
        ValueError
            The user's axes are more or fewer than the panels.
        """
        from matplotlib import pyplot as plt

        if self._given is not None:
            given = np.asarray(self._given, dtype=object).ravel()
        elif wrap is not None:
            given = _wrapped(figsize, shape[0], shape[1], wrap)
        else:
            rows, columns = (*shape, 1, 1)[:2]
            layout = {"figsize": figsize, "layout": "constrained", **layout}
            grid = plt.subplots(-(-rows // beside), columns * beside, squeeze=False, **layout)[1].ravel()
            given = grid[: rows * columns]
            for empty in grid[rows * columns :]:
                empty.remove()
        if len(given) != np.prod(shape, dtype=int):
            raise ValueError(
                f"ax holds {len(given):,} axes, but the figure has {np.prod(shape, dtype=int):,} panels: pass one for "
                "each."
            )
        self._axes = given.reshape(shape) if shape else given[0]
        return self._axes

    def entitle(self, default: str = "") -> None:
        """Write the user's title, or this one, above the only panel."""
        (title,) = self.titles([default])
        self._axes.set_title(title, fontsize="medium")

    def finish(self, *, legend_room: float | None = None) -> Any:
        """Write and show the figure as asked for.

        Parameters
        ----------
        legend_room
            Inches beside each column of panels that a legend may take before a new figure grows; None leaves its size.

        Returns
        -------
        None if the figure was shown; else the figure if that was asked for, else the axes.
        """
        import matplotlib as mpl
        from matplotlib import pyplot as plt

        figure = np.ravel(self._axes)[0].figure.figure  # of a figure within a figure, the outer one
        self._write_plainly(figure)
        if legend_room is not None and self._given is None:
            _fit_legends(figure, legend_room)
        if self._save is not None:
            own = mpl.rcParams["savefig.dpi"]
            figure.savefig(self._save, bbox_inches="tight", dpi=_DPI if own == "figure" else own)
        if self._show:
            plt.show()
            return None
        return figure if self._return_fig else self._axes

    def _write_plainly(self, figure: Any) -> None:
        """Let names of genes and groups be drawn as they are, whose "$" would start a formula."""
        from matplotlib.ticker import FixedFormatter, FuncFormatter

        new = self._given is None
        texts = [legend for part in [figure, *figure.subfigs] for legend in part.legends] if new else []
        for ax in figure.axes if new else np.ravel(self._axes):
            texts += [ax.xaxis.label, ax.yaxis.label, *ax.texts, ax.get_legend()]
            texts += [ax.title] if self._title is None else []
            for axis in (ax.xaxis, ax.yaxis):
                # Others have numbers, of which powers are formulas.
                named = isinstance(axis.get_major_formatter(), FixedFormatter | FuncFormatter)
                texts += axis.get_ticklabels() if named else []
        for text in texts:
            parts = [text] if hasattr(text, "set_parse_math") else []
            parts += [text.get_title(), *text.get_texts()] if hasattr(text, "get_texts") else []
            for part in parts:
                part.set_parse_math(False)


def _wrapped(figsize: tuple[float, float], n_rows: int, n_columns: int, wrap: int) -> NDArray[np.object_]:
    """Return new axes, ``n_rows × n_columns``, of which at most ``wrap`` are side by side."""
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=figsize, layout="compressed")
    # Each row that is broken is a figure of its own, so that one legend has room beside all its lines.
    broken = n_columns > wrap
    parts = figure.subfigures(n_rows, 1, squeeze=False).ravel() if broken else [figure]
    n = n_columns if broken else n_rows * n_columns
    columns = wrap if broken else min(wrap, n_rows) if n_columns == 1 else n_columns
    made = []
    for part in parts:
        grid = part.subplots(-(-n // columns), columns, squeeze=False).ravel()
        for empty in grid[n:]:
            empty.remove()
        made.append(grid[:n])
    return np.concatenate(made)


def _fit_legends(figure: Any, room: float) -> None:
    """Let a figure grow until the legends beside its axes fit, and lay it out, so that its first drawing is right."""
    width, height = figure.get_size_inches()
    # How large a legend is does not depend on where it will be.
    beside: dict[int, float] = {}
    for ax in figure.axes:
        if ax.get_legend() is not None:
            place, extent = ax.get_subplotspec(), ax.get_legend().get_window_extent()
            column = place.colspan.start
            beside[column] = max(beside.get(column, 0.0), extent.width / figure.dpi + _MARGIN - room)
            height = max(height, place.get_gridspec().nrows * (extent.height / figure.dpi + _MARGIN))
    parts = figure.subfigs or [figure]
    for extent in [legend.get_window_extent() for part in parts for legend in part.legends]:
        beside[0] = max(beside.get(0, 0.0), extent.width / figure.dpi + _MARGIN - room)
        height = max(height, len(parts) * (extent.height / figure.dpi + _MARGIN))
    figure.set_size_inches(width + sum(beside.values()), height)
    for _ in range(2):  # the first finds how wide axes of equal aspect become, beside which a legend stands
        figure.draw_without_rendering()
