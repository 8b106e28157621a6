"""Which modality a figure is of, which of its nodes it shows, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from fimp_sc._keys import find_results
from fimp_sc.data._modality import MODALITY_KEY, described, get_modality
from fimp_sc.data._study import resolve
from fimp_sc.data.storage._elements import get_obs, missing_key, shorten
from fimp_sc.data.storage._rows import open_rows, storage

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import NDArray

    from fimp_sc.data._study import Modality

# Inches between a legend and what is beside it.
_MARGIN = 0.4


def results_of(
    data: AnnData | MuData, modality: str | Sequence[str] | None, holds: Callable[[Any, list[Modality]], bool]
) -> tuple[AnnData, list[Modality]]:
    """Return an object with the results that a figure shows, and the modalities that it brings together.

    Of several modalities read together these are nodes, columns, coordinates and graphs of all, see
    :class:`~fimp_sc.data._study.Study`, with what the whole object says of them in ``uns``, and the colors that the
    modalities have. Else it is the object, or the modality, itself, and there are no others.

    Parameters
    ----------
    data, modality
        What the user passed; see :func:`~fimp_sc._keys.find_results`.
    holds
        Whether an object, and the modalities that it brings together, hold what the figure shows.
    """
    target, names = find_results(data, modality, lambda held, names: holds(*_together(held, names)))
    return _together(target, names)


def _together(data: Any, names: list[str] | None) -> tuple[Any, list[Modality]]:
    if names is None:
        return data, []
    study = resolve(data, names)
    nodes = study.nodes
    for modality in study.modalities:
        nodes.uns |= {k: v for k, v in modality.adata.uns.items() if str(k).endswith("_colors") and k not in nodes.uns}
    nodes.uns |= dict(data.uns)
    return nodes, list(study.modalities)


def modality_of_kind(mdata: Any, modality: str | None, kind: str) -> tuple[str, AnnData, dict[str, Any]]:
    """Return name, object and description of a modality; without a name, of the only one of this kind.

    Raises
    ------
    MissingKeyError
        There is no such modality.
    TypeError
        Neither a MuData nor an AnnData object.
    ValueError
        It is of another kind, or none is named although there is not one alone.
    """
    if modality is None and hasattr(mdata, "mod"):
        fitting = [name for name, part in mdata.mod.items() if _info(part).get("kind") == kind]
        modality = fitting[0] if len(fitting) == 1 else None
    name, adata = get_modality(mdata, modality)
    info = _info(adata)
    if info.get("kind") != kind:
        found = f"is of kind {info['kind']!r}" if "kind" in info else "does not say what it holds"
        raise ValueError(
            f"The modality {name!r} {found}, and this figure is of kind {kind!r}: choose another with modality=, or "
            f"correct uns[{MODALITY_KEY!r}]['kind']."
        )
    return name, adata, info


def _info(adata: AnnData) -> dict[str, Any]:
    return dict(described(adata) or {})


def node_positions(
    adata: AnnData,
    nodes: Any,
    *,
    argument: str = "nodes",
    column: str | None = None,
    among: NDArray[np.bool_] | None = None,
    hint: str = "",
) -> NDArray[np.int64]:
    """Return the positions of nodes in the order in which they are asked for.

    Parameters
    ----------
    nodes
        A name or position, or several, or one bool for each node. A name is looked up in ``obs_names``, then in
        ``obs[column]``.
    argument
        Name of the argument, for messages.
    among
        ``(n_obs,)`` nodes to look names up in; all by default.
    hint
        What to do where a name stands for several nodes, for the message.

    Raises
    ------
    MissingKeyError
        No node has this name.
    IndexError
        There is no such position.
    TypeError
        Neither names nor positions.
    ValueError
        No nodes, bools of another number, or a name of several nodes.
    """
    if not isinstance(nodes, str | Integral) and (not np.iterable(nodes) or isinstance(nodes, bytes)):
        found = type(nodes).__name__
        raise TypeError(f"{argument} must be a name, a position, or a list of these, found an object of type {found}.")
    wanted: list[Any] = [nodes] if isinstance(nodes, str | Integral) else list(nodes)
    if wanted and all(isinstance(item, bool | np.bool_) for item in wanted):
        if len(wanted) != adata.n_obs:
            raise ValueError(
                f"{argument} are {len(wanted):,} bools, but there are {adata.n_obs:,} nodes: one for each."
            )
        wanted = np.flatnonzero(wanted).tolist()
    if not wanted:
        raise ValueError(f"{argument} is empty: name at least one.")
    inside = np.ones(adata.n_obs, dtype=bool) if among is None else among
    names = np.asarray(adata.obs_names, dtype=object)
    other = names if column is None else get_obs(adata, [column])[column].astype(str).to_numpy(dtype=object)
    return np.array([_position(item, argument, names, other, inside, column, hint) for item in wanted], dtype=np.int64)


def _position(
    item: Any,
    argument: str,
    names: NDArray[Any],
    other: NDArray[Any],
    inside: NDArray[np.bool_],
    column: str | None,
    hint: str,
) -> int:
    if isinstance(item, Integral):
        if not 0 <= int(item) < len(names):
            raise IndexError(f"{argument} has the position {item}, and positions go from 0 to {len(names) - 1}.")
        return int(item)
    found = np.flatnonzero((names == str(item)) & inside)
    if not found.size:
        found = np.flatnonzero((other == str(item)) & inside)
    if not found.size:
        where = "obs_names" if column is None else f"obs_names and obs[{column!r}]"
        raise missing_key(item, where, dict.fromkeys(other[inside]), "Name nodes of this modality.")
    if found.size > 1:
        listed = shorten([repr(name) for name in names[found]])
        raise ValueError(f"{item!r} stands for {found.size:,} nodes, {listed}: {hint or 'give positions instead'}.")
    return int(found[0])


def read_rows(matrix: Any, where: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Return rows of a matrix in memory or in a file, dense."""
    values: Any = open_rows(matrix, where).read(rows)
    return values.toarray() if sparse.issparse(values) else np.asarray(values)


def gene_columns(names: pd.Index, genes: Sequence[str], where: str) -> NDArray[np.int64]:
    """Return the position of each gene among names that have it.

    Parameters
    ----------
    where
        What the names are, for messages.

    Raises
    ------
    ValueError
        A gene is there more than once.
    """
    for gene in genes:
        if np.count_nonzero(names == gene) > 1:
            raise ValueError(
                f"{gene!r} is the name of several genes in {where}: call adata.var_names_make_unique() to tell them "
                "apart."
            )
    return np.array([names.get_loc(gene) for gene in genes], dtype=np.int64)


def read_columns(matrix: Any, where: str, columns: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return columns of a matrix in memory or in a file, dense."""
    kind = storage(matrix)
    if kind == "memory":
        open_rows(matrix, where)  # which refuses what is no matrix of real numbers
    pieces: Any = [matrix]
    # By columns scipy, and files of CSC, are read as they are: rows of the latter cannot be.
    if kind in {"dask", "dense"} or (kind == "sparse" and matrix.format == "csr"):
        pieces = (piece for _, piece in open_rows(matrix, where).stream())
    parts = [piece[:, columns] for piece in pieces]
    return np.concatenate([np.asarray(p.toarray() if sparse.issparse(p) else p, dtype=np.float64) for p in parts])


def as_list(axes: Any) -> list[Any]:
    """Return axes, one or several of any shape, as a list."""
    return list(np.ravel(axes)) if isinstance(axes, Sequence | np.ndarray) else [axes]


def fit_legends(figure: Any, room: float, n_rows: int = 1) -> None:
    """Let a figure grow until the legends beside its axes fit, and lay it out, so that its first drawing is right.

    Parameters
    ----------
    room
        Inches beside the axes that a legend may take before the figure grows.
    n_rows
        Rows of axes, with a legend beside each.
    """
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


def finish(ax: Any, show: bool, save: Any) -> bool:
    """Write and show the figure of ``ax`` where that is asked for; return whether it was shown."""
    from matplotlib import pyplot as plt

    if save is not None:
        ax.figure.figure.savefig(save, bbox_inches="tight")  # of a figure within a figure, the outer one
    if show:
        plt.show()
    return show
