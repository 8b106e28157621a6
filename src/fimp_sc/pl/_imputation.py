"""Imputed expression beside what was measured."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc.data._access import get_matrix, missing_key
from fimp_sc.data._value_checks import check_values
from fimp_sc.metrics import imputation_scores
from fimp_sc.metrics._common import expression
from fimp_sc.pl._common import finish
from fimp_sc.pl._spatial import _MISSING_COLOUR, _coordinates, _panels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray


def imputation(
    adata: AnnData,
    genes: str | Sequence[str],
    layer: str = "fimp",
    *,
    observed_layer: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    size: float | None = None,
    cmap: str = "viridis",
    show: bool = True,
    save: str | Path | None = None,
    **kwargs: Any,
) -> NDArray[np.object_] | None:
    """Draw measured and imputed expression of genes, as maps on one colour scale and against each other.

    The colours end at the 99.5th percentile, so that a few high values do not darken all others.

    The coefficient of determination (R²) in the last panel tells how close they are in all cells drawn there; only of
    values that were hidden (``hidden`` of :func:`fimp_sc.tl.impute`) it tells how well unseen values are predicted.

    Parameters
    ----------
    adata
        Object with expression, coordinates and imputed values.
    genes
        One gene or several; one row of panels for each, and for each sample.
    layer
        Name that :func:`fimp_sc.tl.impute` wrote to, in `.layers` or (of some genes) in `.obsm`.
    observed_layer
        Layer with measured expression; by default that which was imputed from. Where values were imputed on the log
        scale, counts are brought there: divided by the cell's total, multiplied by the median total, log1p.
    library_key
        Column of `.obs` that tells the samples apart; by default that of the imputation, if it had one.
    spatial_key
        Key of `.obsm` with the coordinates.
    size
        Marker area in square points; by default it follows from the number of cells.
    cmap
        Colour map.
    show
        Show the figure and return nothing; if False, return the axes.
    save
        File to write the figure to.
    **kwargs
        Passed to :meth:`matplotlib.axes.Axes.scatter` of the maps.

    Returns
    -------
    Array of axes `(n_genes × n_samples, 3)` if `show` is False, else None.

    Raises
    ------
    KeyError
        If a gene, layer, `library_key` or `spatial_key` is not found.
    ValueError
        If no gene is given.
    """
    from matplotlib import colormaps
    from matplotlib import pyplot as plt

    names = [genes] if isinstance(genes, str) else list(genes)
    if not names:
        raise ValueError("genes is empty: name at least one gene of adata.var_names.")
    imputed, known = _imputed(adata, layer)
    for name in names:
        for there, where in ((adata.var_names, "adata.var_names"), (known, f"the genes imputed as {layer!r}")):
            if name not in there:
                raise missing_key(name, where, there, "Name genes that were measured and imputed.")
    params = dict(dict(adata.uns.get(layer, {})).get("params", {}))
    observed = _observed(adata, names, params, observed_layer)
    made = _columns(imputed, known.get_indexer(pd.Index(names)))
    library_key = params.get("library_key") if library_key is None else library_key
    xy, panels = _coordinates(adata, spatial_key), _panels(adata, library_key)
    if size is None:
        size = float(np.clip(12_000 / max(len(rows) for _, rows in panels), 1, 45))
    style = {"s": size, "linewidths": 0, "cmap": colormaps[cmap].with_extremes(bad=_MISSING_COLOUR), **kwargs}

    figure, axes = plt.subplots(
        len(names) * len(panels), 3, figsize=(9.5, 3.1 * len(names) * len(panels)), squeeze=False, layout="constrained"
    )
    for i, name in enumerate(names):
        both = np.concatenate([observed[:, i], made[:, i]])
        both = both[np.isfinite(both)]
        low, high = (min(float(both.min()), 0.0), float(both.max())) if both.size else (0.0, 1.0)
        high = high if high > low else low + 1.0
        # A few high values would leave all others in the darkest colours.
        brightest = max(float(np.percentile(both, 99.5)), low + 1e-9) if both.size else high
        for j, (library, rows) in enumerate(panels):
            row = axes[i * len(panels) + j]
            title = name if library is None else f"{name}, {library}"
            for ax, values, what in ((row[0], observed, "measured"), (row[1], made, "imputed")):
                points = ax.scatter(
                    xy[rows, 0], xy[rows, 1], c=values[rows, i], vmin=low, vmax=brightest, plotnonfinite=True, **style
                )
                ax.set_title(f"{title}, {what}", fontsize="medium")
                ax.set_aspect("equal")
                ax.set_xticks([])
                ax.set_yticks([])
            figure.colorbar(
                points, ax=list(row[:2]), shrink=0.8, pad=0.02, extend="max" if brightest < high else "neither"
            )
            _draw_against(row[2], observed[rows, i], made[rows, i], (low, high), cmap)
    return None if finish(axes[0, 0], show, save) else np.asarray(axes, dtype=object)


def _draw_against(ax: Any, true: NDArray[Any], guess: NDArray[Any], limits: tuple[float, float], cmap: str) -> None:
    kept = np.isfinite(true) & np.isfinite(guess)
    score = "R² cannot be computed"
    if kept.any():
        # Cells lie on top of each other, most of all where nothing was measured.
        ax.hexbin(
            true[kept], guess[kept], gridsize=36, extent=(*limits, *limits), bins="log", mincnt=1, cmap=cmap,
            linewidths=0.1,
        )  # fmt: skip
        r2 = imputation_scores(true[kept, None], guess[kept, None])["r2"]
        score = "R² undefined: constant" if np.isnan(r2) else f"R² = {r2:.2f}"
    margin = 0.03 * (limits[1] - limits[0])
    ax.plot(limits, limits, color="#666666", linewidth=0.8, linestyle="--")
    ax.set_xlim(limits[0] - margin, limits[1] + margin)
    ax.set_ylim(limits[0] - margin, limits[1] + margin)
    ax.set_aspect("equal")
    ax.set_title(f"{score}, {kept.sum():,} cells", fontsize="medium")
    ax.set_xlabel("measured")
    ax.set_ylabel("imputed")
    ax.spines[["top", "right"]].set_visible(False)


def _imputed(adata: AnnData, layer: str) -> tuple[Any, pd.Index]:
    if layer not in adata.layers and layer not in adata.obsm:
        found = [*adata.layers, *adata.obsm]
        raise missing_key(layer, "adata.layers or adata.obsm", found, "Run fimp_sc.tl.impute(adata) first.")
    return expression(adata, layer)


def _observed(
    adata: AnnData, names: list[str], params: dict[str, Any], observed_layer: str | None
) -> NDArray[np.float64]:
    """Return measured values ``(n_obs, len(names))`` on the scale of the imputed ones."""
    matrix = get_matrix(adata, params.get("layer") if observed_layer is None else observed_layer)
    values = _columns(matrix, adata.var_names.get_indexer(pd.Index(names)))
    if params.get("scale") == "log":
        scale = params.get("input_scale", "auto")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of empty cells and genes, which the imputation told
            scale = check_values(matrix, where="the measured expression", input_scale=scale)
        if scale in {"counts", "normalized"}:
            total = np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()
            values = np.log1p(values / np.where(total > 0, total, 1)[:, None] * np.median(total[total > 0]))
    return values


def _columns(matrix: Any, columns: NDArray[np.integer]) -> NDArray[np.float64]:
    values = matrix[:, columns]
    return np.asarray(values.toarray() if sparse.issparse(values) else values, dtype=np.float64)
