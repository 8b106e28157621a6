"""The contract of figures: axes to draw into, and the arguments ``ax``, ``show``, ``save`` and ``return_fig``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

# Inches between a legend and what is beside it.
_MARGIN = 0.4


class Canvas:
    """Axes of a figure, the user's or new ones, which are shown, written or returned at the end.

    Every function of :mod:`fimp_sc.pl` has these four arguments, and ends with ``return canvas.finish()``.

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
    ) -> None:
        if show and return_fig:
            raise ValueError("A figure that is shown is not returned: pass show=True or return_fig=True.")
        self._given, self._save, self._return_fig = ax, save, return_fig
        self._show = (ax is None and save is None and not return_fig) if show is None else show
        self._axes: Any = None

    def axes(self, figsize: tuple[float, float], shape: tuple[int, ...] = (), **layout: Any) -> Any:
        """Return the axes to draw into: one, or an array of them in this shape.

        Parameters
        ----------
        figsize
            Width and height of a new figure in inches.
        shape
            ``()``, ``(n_rows,)`` or ``(n_rows, n_columns)``.
        **layout
            Passed to :func:`matplotlib.pyplot.subplots` for a new figure.

        Raises
        ------
        ValueError
            The user's axes are more or fewer than the panels.
        """
        from matplotlib import pyplot as plt

        if self._given is None:
            rows, columns = (*shape, 1, 1)[:2]
            layout = {"figsize": figsize, "layout": "constrained", **layout}
            given = plt.subplots(rows, columns, squeeze=False, **layout)[1].ravel()
        else:
            given = np.asarray(self._given, dtype=object).ravel()
        if len(given) != np.prod(shape, dtype=int):
            raise ValueError(
                f"ax holds {len(given):,} axes, but the figure has {np.prod(shape, dtype=int):,} panels: pass one for "
                "each."
            )
        self._axes = given.reshape(shape) if shape else given[0]
        return self._axes

    def finish(self, *, legend_room: float | None = None) -> Any:
        """Write and show the figure as asked for.

        Parameters
        ----------
        legend_room
            Inches beside the panels that a legend may take before a new figure grows; None leaves its size.

        Returns
        -------
        None if the figure was shown; else the figure if that was asked for, else the axes.
        """
        from matplotlib import pyplot as plt

        figure = np.ravel(self._axes)[0].figure.figure  # of a figure within a figure, the outer one
        if legend_room is not None and self._given is None:
            _fit_legends(figure, legend_room, len(np.atleast_1d(self._axes)))
        if self._save is not None:
            figure.savefig(self._save, bbox_inches="tight")
        if self._show:
            plt.show()
            return None
        return figure if self._return_fig else self._axes


def _fit_legends(figure: Any, room: float, n_rows: int) -> None:
    """Let a figure grow until the legends beside its axes fit, and lay it out, so that its first drawing is right."""
    legends = [ax.get_legend() for ax in figure.axes if ax.get_legend() is not None]
    if legends:
        # How large a legend is does not depend on where it will be.
        extents = [legend.get_window_extent() for legend in legends]
        width, height = figure.get_size_inches()
        width += max(0.0, max(extent.width for extent in extents) / figure.dpi + _MARGIN - room)
        height = max(height, n_rows * (max(extent.height for extent in extents) / figure.dpi + _MARGIN))
        figure.set_size_inches(width, height)
    for _ in range(2):  # the first finds how wide axes of equal aspect become, beside which a legend stands
        figure.draw_without_rendering()
