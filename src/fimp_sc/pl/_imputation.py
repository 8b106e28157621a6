"""Maps and agreement of measured and imputed expression."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata import AnnData

from fimp_sc._keys import joined_modalities
from fimp_sc._logging import warn
from fimp_sc._options import checked
from fimp_sc.data._modality import get_modality
from fimp_sc.data._study import is_mudata, resolve
from fimp_sc.data.expression._reader import ExpressionReader, GeneStatistics, used_as_is
from fimp_sc.data.storage._elements import get_matrix, in_memory, missing_key
from fimp_sc.data.validate._values import check_values
from fimp_sc.metrics import imputation_scores
from fimp_sc.metrics._common import as_index, expression
from fimp_sc.pl._figure._canvas import Canvas
from fimp_sc.pl._figure._coloring import Numbers, colormap
from fimp_sc.pl._figure._common import gene_columns, read_columns
from fimp_sc.pl._figure._map import draw_map
from fimp_sc.pl._figure._values import coordinates, panels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from mudata import MuData
    from numpy.typing import NDArray

_PANEL = 2.8  # inches
_FEW_ROWS = 3  # more stand two by two


@checked
def imputation(
    adata: AnnData | MuData,
    genes: str | Sequence[str],
    layer: str = "fimp",
    *,
    modality: str | None = None,
    observed_layer: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    size: float | None = None,
    cmap: str = "viridis",
    title: str | Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | NDArray[np.object_] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
    **kwargs: Any,
) -> NDArray[np.object_] | Figure | None:
    """Draw measured and imputed expression of genes, as maps on one color scale and against each other.

    The colors end at the 99.5th percentile, so that a few high values do not darken all others.

    The coefficient of determination (R²) in the last panel is that of all cells drawn there. It measures prediction
    only if the values were hidden from the model (``hidden`` of :func:`fimp_sc.tl.impute`).

    Parameters
    ----------
    adata
        Object with expression, coordinates and imputed values; or a MuData object.
    genes
        One gene or several; three panels for each, and for each sample, of which more than three stand two by two.
    layer
        Name that :func:`fimp_sc.tl.impute` wrote to, in `.layers` or (of some genes) in `.obsm`.
    modality
        Name of the modality of a MuData object that has the genes; by default the only one with values imputed under
        this name. Coordinates and samples that it lacks are those of the MuData object.
    observed_layer
        Layer with measured expression; by default the input of the imputation. If values were imputed on the log
        scale, counts are normalized as the model did: divided by the cell's total, multiplied by the total that
        :func:`fimp_sc.tl.impute` wrote to `.uns[layer]` (the median total if it wrote none), log1p.
    library_key
        Column of `.obs` with the sample of each cell; by default that of the imputation, if it had one and it is there.
    spatial_key
        Key of `.obsm` with the coordinates.
    size
        Marker area in square points; by default it follows from the number of cells.
    cmap
        Color map.
    title
        Titles of the panels, in the order of the axes; by default gene and sample, and the agreement in the third.
    ax
        Axes to draw into, one for each panel; by default a new figure.
    show
        Show the figure and return nothing; by default if none of `ax`, `save` and `return_fig` is given.
    save
        File to write the figure to.
    return_fig
        Return the figure instead of the axes.
    **kwargs
        Passed to :func:`squidpy.pl.spatial_scatter` of the maps, and by it to :meth:`matplotlib.axes.Axes.scatter`.

    Returns
    -------
    None if the figure is shown; else the figure if `return_fig`, else the axes, an array `(n_genes × n_samples, 3)`.

    Raises
    ------
    KeyError
        If a gene, layer, `library_key` or `spatial_key` is not found.
    ValueError
        If no gene is given, or one is there more than once.

    Warns
    -----
    UserWarning
        Genes that the model saw are not in the object any more, so that measured values are scaled by those left.
    """
    from matplotlib.colors import Normalize

    canvas = Canvas(ax, show, save, return_fig, title)
    names = [genes] if isinstance(genes, str) else list(genes)
    if is_mudata(adata):
        adata = _table(adata, modality, layer, names, [library_key], spatial_key)
    elif modality is not None:
        raise ValueError(f"modality={modality!r} is for MuData objects, found an AnnData object: leave it out.")
    imputed, known = _imputed(adata, layer)
    for name in names:
        for there, where in ((adata.var_names, "adata.var_names"), (known, f"the genes imputed as {layer!r}")):
            if name not in there:
                raise missing_key(name, where, there, "Name genes that were measured and imputed.")
    record = dict(adata.uns.get(layer, {}))
    observed = _observed(adata, names, record, observed_layer)
    where = f"the values imputed as {layer!r}"
    made = read_columns(imputed, where, gene_columns(known, names, f"the genes imputed as {layer!r}"))
    if library_key is None:
        # Several modalities may have been read together with a column of the whole object.
        used = dict(record.get("params", {})).get("library_key")
        library_key = used if used in adata.obs else None
    xy, samples = coordinates(adata, spatial_key), panels(adata, library_key)
    if size is None:
        size = float(np.clip(12_000 / max(len(rows) for _, rows in samples), 1, 45))
    n_rows = len(names) * len(samples)
    of = [name if library is None else f"{name}, {library}" for name in names for library, _ in samples]
    agreements = [_agreement(observed[rows, i], made[rows, i]) for i in range(len(names)) for _, rows in samples]
    of = [
        title
        for name, score in zip(of, agreements, strict=True)
        for title in (f"{name}, measured", f"{name}, imputed", score)
    ]
    titles = canvas.titles(of, _PANEL)
    beside = 1 if n_rows <= _FEW_ROWS else 2
    axes = canvas.axes((9.5 * beside, 3.1 * -(-n_rows // beside)), (n_rows, 3), beside=beside)
    for i in range(len(names)):
        both = np.concatenate([observed[:, i], made[:, i]])
        both = both[np.isfinite(both)]
        low, high = (min(float(both.min()), 0.0), float(both.max())) if both.size else (0.0, 1.0)
        high = high if high > low else low + 1.0
        # A few high values would leave all others in the darkest colors.
        brightest = max(float(np.percentile(both, 99.5)), low + 1e-9) if both.size else high
        for j, (_, rows) in enumerate(samples):
            place = i * len(samples) + j
            row = axes[place]
            for k, values in enumerate((observed, made)):
                colored = Numbers(values[:, i], colormap(cmap), Normalize(low, brightest))
                draw_map(row[k], xy, colored, rows, title=titles[3 * place + k], size=size, **kwargs)
            row[0].figure.colorbar(
                row[0].collections[0], ax=list(row[:2]), shrink=0.8, pad=0.02,
                extend="max" if brightest < high else "neither",
            )  # fmt: skip
            _draw_against(row[2], observed[rows, i], made[rows, i], (low, high), cmap)
            row[2].set_title(titles[3 * place + 2], fontsize="medium")
    return canvas.finish()


def _agreement(true: NDArray[Any], guess: NDArray[Any]) -> str:
    kept = np.isfinite(true) & np.isfinite(guess)
    score = "R² cannot be computed"
    if kept.any():
        r2 = imputation_scores(true[kept, None], guess[kept, None])["r2"]
        score = "R² undefined: constant" if np.isnan(r2) else f"R² = {r2:.2f}"
    return f"{score}, {kept.sum():,} cells"


def _draw_against(ax: Any, true: NDArray[Any], guess: NDArray[Any], limits: tuple[float, float], cmap: str) -> None:
    kept = np.isfinite(true) & np.isfinite(guess)
    if kept.any():
        # Cells lie on top of each other, most of all where nothing was measured.
        ax.hexbin(
            true[kept], guess[kept], gridsize=36, extent=(*limits, *limits), bins="log", mincnt=1, cmap=cmap,
            linewidths=0.1,
        )  # fmt: skip
    margin = 0.03 * (limits[1] - limits[0])
    ax.plot(limits, limits, color="#666666", linewidth=0.8, linestyle="--")
    ax.set_xlim(limits[0] - margin, limits[1] + margin)
    ax.set_ylim(limits[0] - margin, limits[1] + margin)
    ax.set_aspect("equal")
    ax.set_xlabel("measured")
    ax.set_ylabel("imputed")
    ax.spines[["top", "right"]].set_visible(False)


def _table(
    mdata: Any, modality: str | None, layer: str, genes: list[str], columns: list[str | None], spatial_key: str
) -> AnnData:
    """Return the modality with imputed genes, with columns and coordinates of the whole object or other modalities."""
    if modality is None:
        found = [name for name, part in mdata.mod.items() if layer in part.layers or layer in part.obsm]
        having = [name for name in found if set(genes) <= set(mdata.mod[name].var_names)]
        modality = (having or found)[0] if len(having or found) == 1 else None
    name, adata = get_modality(mdata, modality)
    names = joined_modalities(mdata)
    if names is None or name not in names:
        return adata
    nodes = resolve(mdata, names).nodes
    rows = nodes.obs_names.get_indexer(adata.obs_names)
    columns = [*columns, dict(dict(adata.uns.get(layer, {})).get("params", {})).get("library_key")]
    # Of a copy of the parts alone that are read, as nothing is to be written to the user's object.
    own = AnnData(
        adata.X, adata.obs.copy(), adata.var, uns=dict(adata.uns), obsm=dict(adata.obsm),
        layers={key: values for key, values in adata.layers.items() if key is not None},
    )  # fmt: skip
    for key in columns:
        if key is not None and key not in own.obs and key in nodes.obs:
            own.obs[key] = nodes.obs[key].iloc[rows].to_numpy()
    if spatial_key not in own.obsm and spatial_key in nodes.obsm:
        own.obsm[spatial_key] = nodes.obsm[spatial_key][rows]
    return own


def _imputed(adata: AnnData, layer: str) -> tuple[Any, pd.Index]:
    if layer not in adata.layers and layer not in adata.obsm:
        found = [*adata.layers, *adata.obsm]
        raise missing_key(layer, "adata.layers or adata.obsm", found, "Run fimp_sc.tl.impute(adata) first.")
    return expression(adata, layer)


def _observed(
    adata: AnnData, genes: list[str], record: dict[str, Any], observed_layer: str | None
) -> NDArray[np.float64]:
    """Return measured values ``(n_obs, len(genes))`` on the scale of the imputed ones."""
    params = dict(record.get("params", {}))
    own = params.get("layer")
    layer = own if observed_layer is None else observed_layer
    matrix = get_matrix(adata, layer)
    where = "the measured expression"
    values = read_columns(matrix, where, gene_columns(adata.var_names, genes, "adata.var_names"))
    recorded = record.get("input_scale")
    scale = recorded if layer == own else None
    if params.get("scale") == "counts":
        return np.expm1(values) if scale == "log" else values
    if params.get("scale") != "log" or recorded == "real":
        return values
    if scale is None:
        given = params.get("input_scale", "auto") if recorded is None else "auto"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of empty cells and genes, which the imputation told
            scale = check_values(matrix, where=where, input_scale=given)
        as_is = used_as_is(scale, None)
    else:
        as_is = used_as_is(scale, record.get("trained_scale"))
    if as_is:
        return values
    factor = _factor(adata, matrix, scale, record)
    return np.log1p((np.expm1(values) if scale == "log" else values) * factor[:, None])


def _factor(adata: AnnData, matrix: Any, scale: Any, record: dict[str, Any]) -> NDArray[np.float32]:
    """Return the size factor of each cell in the model; without a record, the one that scales to the median total."""
    if not {"total", "measured", "fraction", "trained_scale"} <= record.keys():
        return ExpressionReader(matrix, np.arange(adata.n_vars), scale, None).factor
    columns = adata.var_names.get_indexer(as_index(record["measured"])).astype(np.int64)
    gone = int((columns < 0).sum())
    if gone:
        warn(
            f"{gone:,} of the {len(columns):,} genes that the model saw have left the object since: measured values "
            "are scaled by those left. Draw before genes are selected for values as the model saw them.",
        )
    fraction = np.asarray(in_memory(record["fraction"], "adata.uns"), dtype=np.float32)
    statistics = GeneStatistics(np.zeros(len(fraction), dtype=np.float32), fraction, float(record["total"]))
    return ExpressionReader(matrix, columns, scale, statistics, trained_scale=record["trained_scale"]).factor
