"""Time series of measured and reconstructed signals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from fimp_sc._options import checked
from fimp_sc.data._modality import place_of
from fimp_sc.data.storage._elements import get_obs, missing_key
from fimp_sc.pl._figure._canvas import Canvas
from fimp_sc.pl._figure._common import modality_of_kind, node_positions, read_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from mudata import MuData
    from numpy.typing import ArrayLike, NDArray

_MAX_PANELS = 50
_MEASURED = "#444444"
_HIDDEN = "#e5e5e5"


@checked
def signals(
    mdata: MuData | AnnData,
    nodes: str | int | Sequence[str | int],
    *,
    modality: str | None = None,
    key: str | None = "fimp",
    hidden: str | ArrayLike | None = None,
    recording: str | None = None,
    times: tuple[float, float] | None = None,
    region_key: str = "region",
    title: str | Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | NDArray[np.object_] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
    **kwargs: Any,
) -> NDArray[np.object_] | Figure | None:
    """Plot measured signals of a few regions over time, one panel each, and their reconstruction.

    Parameters
    ----------
    mdata
        Object with signals, as :func:`fimp_sc.pp.fmri` makes it.
    nodes
        One or several of: a name of `.obs_names`; a region of `.obs[region_key]`; a position, counted from 0 in the
        modality. Or one bool for each node.
    modality
        Name of the modality; not needed if only one holds signals.
    key
        Layer with the reconstruction, of the shape of `.X`; NaN leaves gaps. None draws the signals alone.
    hidden
        Time points hidden from the model, to be shaded: bool `(n_obs, n_times)`, or the name of such a layer.
    recording
        Recording (in the column that the modality names as its `library_key`) to find regions in, needed where a
        region is in several.
    times
        First and last time to draw, in units of the axis: seconds where the sampling interval is known, time points
        otherwise.
    region_key
        Column of `.obs` with the names of regions, which become titles; `.obs_names` where there is no such column.
    title
        Titles of the panels, in the order of the axes; by default the regions.
    ax
        Axes to draw into, one for each panel; by default a new figure.
    show
        Show the figure and return nothing; by default if none of `ax`, `save` and `return_fig` is given.
    save
        File to write the figure to.
    return_fig
        Return the figure instead of the axes.
    **kwargs
        Passed to :meth:`matplotlib.axes.Axes.plot` for the reconstruction.

    Returns
    -------
    None if the figure is shown; else the figure if `return_fig`, else the axes, an array `(n_nodes,)`.

    Raises
    ------
    KeyError
        If a node, recording, layer or modality is not found.
    IndexError
        If a position is out of range.
    ValueError
        If the modality holds no signals, a region is in several recordings, `hidden` does not match the signals, there
        are no time points within `times`, or the number of axes `ax` is not that of nodes.
    """
    canvas = Canvas(ax, show, save, return_fig, title)
    name, adata, info = modality_of_kind(mdata, modality, "signal")
    where = place_of(mdata, name)
    among = _recording(adata, info, recording)
    column = region_key if region_key in adata.obs else None
    hint = "choose one with recording=, or give names of obs_names" if recording is None else "give positions instead"
    rows = node_positions(adata, nodes, column=column, among=among, hint=hint)
    if len(rows) > _MAX_PANELS:
        raise ValueError(f"{len(rows):,} nodes make a figure that nobody can read: draw at most {_MAX_PANELS} at once.")
    time, label = _time_axis(adata, info)
    shown = _within(time, times, label)
    time = time[shown]
    if adata.X is None:
        raise ValueError(f"{where}.X is None: store the signals there.")
    measured = read_rows(adata.X, f"{where}.X", rows)[:, shown]
    if key is not None and key not in adata.layers:
        advice = f"Run fimp_sc.tl.impute(mdata, modality={name!r}), or pass key=None to draw the signals alone."
        raise missing_key(key, f"{where}.layers", adata.layers, advice)
    made = None if key is None else read_rows(adata.layers[key], f"{where}.layers[{key!r}]", rows)[:, shown]
    covered = None if hidden is None else _hidden(adata, where, hidden, rows)[:, shown]

    titles = canvas.titles(_titles(adata, info, rows, column))
    panels = canvas.axes((9, 1.5 * len(rows) + 0.9), (len(rows),), sharex=True)
    for i, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        if covered is not None:
            _shade(panel, time, covered[i])
        panel.plot(time, measured[i], color=_MEASURED, linewidth=0.9, label="measured")
        if made is not None:
            panel.plot(time, made[i], **{"color": "C1", "linewidth": 1.3, "label": "reconstruction", **kwargs})
        panel.set_title(title, loc="left", fontsize="medium")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0)
    panels[-1].set_xlabel(label)
    panels[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize="small")
    return canvas.finish()


def _recording(adata: AnnData, info: dict[str, Any], recording: str | None) -> NDArray[np.bool_] | None:
    if recording is None:
        return None
    column = info.get("library_key")
    if column is None or column not in adata.obs:
        raise ValueError(f"recording={recording!r} does not apply: the modality names no column of recordings.")
    names = get_obs(adata, [column])[column].astype(str).to_numpy(dtype=object)
    chosen: NDArray[np.bool_] = names == str(recording)
    if not chosen.any():
        raise missing_key(recording, f"obs[{column!r}]", dict.fromkeys(names), "Name one of them with recording=.")
    return chosen


def _titles(adata: AnnData, info: dict[str, Any], rows: NDArray[np.int64], column: str | None) -> list[str]:
    if column is None:
        return [str(name) for name in adata.obs_names[rows]]
    titles = get_obs(adata, [column])[column].astype(str).to_numpy()[rows].tolist()
    library = info.get("library_key")
    if library is None or library not in adata.obs:
        return titles
    recordings = get_obs(adata, [library])[library].astype(str).to_numpy()
    if len(set(recordings)) == 1:
        return titles
    return [f"{title}, {recording}" for title, recording in zip(titles, recordings[rows], strict=True)]


def _time_axis(adata: AnnData, info: dict[str, Any]) -> tuple[NDArray[np.float64], str]:
    """Return when the time points were; of a part of a recording, when they were in the whole."""
    interval = info.get("sampling_interval")
    if interval is None:
        return np.arange(adata.n_vars, dtype=np.float64), "Time point"
    if "time" in adata.var:
        stored = np.asarray(adata.var["time"])
        if stored.dtype.kind in "uif" and np.isfinite(stored).all() and (np.diff(stored) > 0).all():
            return stored.astype(np.float64), "Time (s)"
    return np.arange(adata.n_vars) * float(interval), "Time (s)"


def _within(time: NDArray[np.float64], times: tuple[float, float] | None, label: str) -> NDArray[np.bool_]:
    if times is None:
        return np.ones(len(time), dtype=bool)
    first, last = times
    shown: NDArray[np.bool_] = (time >= first) & (time <= last)
    if not shown.any():
        raise ValueError(
            f"times={tuple(times)!r} has no time points: give first and last between {time[0]:g} and {time[-1]:g} "
            f"({label.lower()})."
        )
    return shown


def _hidden(adata: AnnData, where: str, hidden: Any, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    if isinstance(hidden, str):
        if hidden not in adata.layers:
            advice = "Pass an array or the name of a layer as hidden=."
            raise missing_key(hidden, f"{where}.layers", adata.layers, advice)
        where, array = f"{where}.layers[{hidden!r}]", adata.layers[hidden]
    else:
        where, array = "hidden", hidden if sparse.issparse(hidden) else np.asarray(hidden)
    if tuple(array.shape) != (adata.n_obs, adata.n_vars):
        raise ValueError(
            f"{where} has the shape {tuple(array.shape)}, but {adata.n_obs:,} signals of {adata.n_vars:,} time points "
            f"need {(adata.n_obs, adata.n_vars)}: repeat the value of a token for each of its time points."
        )
    values = read_rows(array, where, rows)
    unclear = ~np.isin(values, (0, 1))
    if unclear.any():
        raise ValueError(f"{where} must hold True and False (or 1 and 0), found {values[unclear][0]!r}.")
    return values.astype(bool)


def _shade(ax: Axes, time: NDArray[np.float64], covered: NDArray[np.bool_]) -> None:
    """Shade each stretch from halfway before its first time point to halfway after its last."""
    step = float(np.median(np.diff(time))) if len(time) > 1 else 1.0
    middle = (time[1:] + time[:-1]) / 2
    bounds = np.concatenate([[time[0] - step / 2], middle, [time[-1] + step / 2]])
    change = np.diff(np.concatenate([[0], covered.astype(np.int8), [0]]))
    stretches = zip(np.flatnonzero(change == 1), np.flatnonzero(change == -1), strict=True)
    for i, (start, stop) in enumerate(stretches):
        ax.axvspan(bounds[start], bounds[stop], color=_HIDDEN, linewidth=0, zorder=0, label="_" if i else "hidden")
