from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc.data.storage._elements import missing_key
from fimp_sc.data.storage._rows import open_rows
from fimp_sc.metrics._common import expression, split

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from numpy.typing import ArrayLike, NDArray

    from fimp_sc.data.storage._rows import MatrixRows

_ROWS = 4096


@overload
def imputation_scores(
    truth: Any, imputed: Any, /, *, entries: Any = ..., gene_means: ArrayLike | None = ...
) -> dict[str, Any]: ...
@overload
def imputation_scores(
    adata: AnnData,
    truth: str | None,
    imputed: str | None,
    /,
    *,
    entries: Any = ...,
    gene_means: ArrayLike | None = ...,
) -> dict[str, Any]: ...
def imputation_scores(*given: Any, entries: Any = None, gene_means: ArrayLike | None = None) -> dict[str, Any]:
    """Compare imputed expression with what was measured, on the same scale.

    ``imputation_scores(truth, imputed)`` takes matrices; ``imputation_scores(adata, "log", "fimp", entries="hidden")``
    layers. Only entries that the imputation did not see tell how good it is: name them with ``entries``.

    Parameters
    ----------
    *given
        True and imputed values, ``(n_obs, n_genes)`` each, dense or sparse (zeros count); or an object and two names of
        layers, ``None`` for ``X``. Of :func:`fimp_sc.tl.impute` with ``genes`` the name of its entry in ``obsm``.
    entries
        Boolean ``(n_obs, n_genes)``, dense or sparse, or the name of such a layer: what is scored. All by default.
    gene_means
        ``(n_genes,)`` means that ``r2_gene`` is measured around, of cells that the imputation learned from. By default
        the means of the entries themselves.

    Returns
    -------
    ``r2`` around the mean of all entries; ``r2_gene`` around the mean of each gene, so that predicting ``gene_means``
    scores 0; ``mse``; ``n_entries``; and ``r2_per_gene``, ``(n_genes,)`` around the mean of the gene (a series with
    their names for an object; NaN where a gene does not vary). Entries that are NaN in either matrix are left out. A
    score whose truth does not vary is NaN.

    Raises
    ------
    KeyError
        When a layer is missing.
    ValueError
        When shapes differ, or no entry is left.
    """
    adata, truth, imputed = split(given)
    genes: pd.Index | None = None
    held = {"truth": truth, "imputed values": imputed} | ({} if entries is None else {"entries": entries})
    if adata is not None:
        names: dict[str, pd.Index] = {}
        for name, key in held.items():
            held[name], names[name] = expression(adata, key) if key is None or isinstance(key, str) else (key, None)
        genes = names["imputed values"]
    readers = {name: _reader(matrix, name) for name, matrix in held.items()}
    columns: dict[str, NDArray[np.int64] | None] = dict.fromkeys(readers)
    if genes is not None:
        for name, there in names.items():
            if there is not None and not there.equals(genes):
                place = there.get_indexer(genes).astype(np.int64)
                if (place < 0).any():
                    gene = genes[np.flatnonzero(place < 0)[0]]
                    raise missing_key(gene, f"the genes of the {name}", there, "Score genes that were measured.")
                columns[name] = place
    shapes = {}
    for name, reader in readers.items():
        chosen = columns[name]
        shapes[name] = (reader.shape[0], reader.shape[1] if chosen is None else len(chosen))
    if len(set(shapes.values())) > 1:
        raise ValueError(f"Cells and genes differ: the shapes are {shapes}.")
    n_genes = shapes["truth"][1]

    number, total, error = np.zeros((3, n_genes))
    for true, guess, kept in _pieces(readers, columns):
        number += kept.sum(axis=0)
        total += np.where(kept, true, 0.0).sum(axis=0)
        error += np.where(kept, (true - guess) ** 2, 0.0).sum(axis=0)
    n_entries = number.sum()
    if not n_entries:
        raise ValueError("No entry is left to score: all are NaN, or entries= has none.")
    mean = total / np.maximum(number, 1)
    around = np.zeros(n_genes)
    for true, _, kept in _pieces(readers, columns):
        around += np.where(kept, (true - mean) ** 2, 0.0).sum(axis=0)
    center = mean if gene_means is None else np.asarray(gene_means, dtype=np.float64).ravel()
    if center.shape != mean.shape:
        raise ValueError(f"gene_means has {center.size:,} values, but there are {n_genes:,} genes: one for each.")
    per_gene = _r2(error, around)
    return {
        "r2": float(_r2(error.sum(), (around + number * (mean - total.sum() / n_entries) ** 2).sum())),
        "r2_gene": float(_r2(error.sum(), (around + number * (mean - center) ** 2).sum())),
        "mse": float(error.sum() / n_entries),
        "n_entries": int(n_entries),
        "r2_per_gene": per_gene if genes is None else pd.Series(per_gene, index=genes),
    }


def _reader(matrix: Any, name: str) -> MatrixRows:
    if sparse.issparse(matrix):
        matrix = sparse.csr_matrix(matrix)
    elif isinstance(matrix, pd.DataFrame) or not hasattr(matrix, "shape"):
        matrix = np.asarray(matrix)
    return open_rows(matrix, f"the {name}")


def _pieces(
    readers: dict[str, MatrixRows], columns: dict[str, NDArray[np.int64] | None]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]]:
    """Yield true and imputed values of some cells, dense, and which of them count."""
    n_obs = readers["truth"].shape[0]
    for start in range(0, n_obs, _ROWS):
        nodes = np.arange(start, min(start + _ROWS, n_obs))
        read: dict[str, NDArray[Any]] = {}
        for name, reader in readers.items():
            rows: Any = reader.read(nodes)
            rows = rows.toarray() if sparse.issparse(rows) else rows
            read[name] = rows if columns[name] is None else rows[:, columns[name]]
        true, guess = read["truth"].astype(np.float64), read["imputed values"].astype(np.float64)
        kept = ~(np.isnan(true) | np.isnan(guess))
        if "entries" in read:
            kept &= read["entries"].astype(bool)
        yield true, guess, kept


def _r2(error: Any, around: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(around > 0, 1 - error / around, np.nan)
