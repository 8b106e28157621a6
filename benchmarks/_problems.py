"""What methods are asked: problems without what must not be seen, each with the function that scores the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from _common import (
    DATA,
    expression_scores,
    folds,
    label_scores,
    load,
    log_normalize,
    spatial_block_ids,
    split_labels,
    totals,
)

if TYPE_CHECKING:
    from anndata import AnnData

HIDDEN = 0.15
Scores = Callable[[np.ndarray], dict[str, float]]


@dataclass(frozen=True)
class Annotation:
    """Cell types of cells whose label is hidden.

    Attributes
    ----------
    reference
        ``X`` as it is in the file; ``obs["label"]`` is "Unknown" where a label must not be used.
    query
        Cells to annotate; the very object `reference` where all cells are there in training. Its genes may differ.
    library_key
        Column of ``obs`` that separates sections.
    blocks
        Spatial block of each cell of the reference, (n_reference,), for validation.
    target
        Median total of the training cells over the genes that both have: target of the log-normalization.
    """

    data: str
    reference: AnnData
    query: AnnData
    library_key: str | None
    blocks: np.ndarray
    target: float


@dataclass(frozen=True)
class Masked:
    """Hidden expression of held-out cells.

    Attributes
    ----------
    adata
        ``layers["linear"]``: as in the file, 0 where hidden. ``X``: log-normalized float32 CSR, 0 where hidden, by
        totals of visible values over the share of a total that their genes have in the training cells.
    test
        (n_obs,) bool, cells that are scored. Methods are trained on the others, with a graph of these alone.
    hidden
        (n_obs, n_vars) bool CSR, entries of test cells that must not be seen.
    """

    data: str
    adata: AnnData
    test: np.ndarray
    hidden: sp.csr_matrix
    library_key: str | None


@dataclass(frozen=True)
class Embedding:
    """Features without labels; ``obs["label"]`` is not there."""

    data: str
    adata: AnnData
    library_key: str | None


@dataclass(frozen=True)
class Missing:
    """Genes that another section did not measure.

    Attributes
    ----------
    reference
        ``X`` as it is in the file, of the genes that both sections have.
    query
        The other section without `genes`.
    genes
        Names of those that are to be predicted there.
    target
        Median total of the reference, to which predictions are log-normalized.
    """

    data: str
    reference: AnnData
    query: AnnData
    genes: list[str]
    library_key: str | None
    target: float


def held_out_section(folder: Path) -> tuple[Annotation, Scores]:
    """DLPFC 151673 → 151674, two sections with different gene lists."""
    train, query = load("dlpfc", folder), load("dlpfc_151674", folder)
    truth = query.obs["label"].to_numpy().copy()
    query.obs["label"] = "Unknown"
    del train.obs["cell_type"], query.obs["cell_type"]
    both = np.r_[train.obs["label"].to_numpy(), truth]
    scored = split_labels(both, np.arange(len(both)) >= train.n_obs)[2][train.n_obs :]
    shared = train.var_names.intersection(query.var_names)
    target = float(np.median(totals(train[:, shared].X)))
    problem = Annotation("dlpfc", train, query, None, spatial_block_ids(train, "dlpfc", 0), target)
    return problem, lambda labels: label_scores(truth[scored], labels[scored])


def held_out_blocks(
    data: str, folder: Path, seed: int, *, inductive: bool = False, scattered: bool = False
) -> tuple[Annotation, Scores]:
    """About 20 % of the cells in whole spatial blocks, or `scattered`; without them in training if `inductive`."""
    adata = load(data, folder)
    blocks = spatial_block_ids(adata, data, seed)
    held_out = folds(np.arange(adata.n_obs) if scattered else blocks, 5, seed) == 0
    truth = adata.obs["label"].to_numpy()
    labels, _, test = split_labels(truth, held_out)
    adata.obs["label"] = labels
    del adata.obs["cell_type"]
    reference = adata[~held_out].copy() if inductive else adata
    target = float(np.median(totals(adata.X[~held_out])))
    part = blocks[~held_out] if inductive else blocks
    problem = Annotation(data, reference, adata, DATA[data].library_key, part, target)
    return problem, lambda labels: label_scores(truth[test], labels[test])


def hide(n_obs: int, n_vars: int, test: np.ndarray, seed: int) -> sp.csr_matrix:
    """Hidden entries as boolean CSR (n_obs, n_vars): 15 % of the entries of the `test` rows."""
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(test)
    row, col = np.nonzero(rng.random((len(rows), n_vars)) < HIDDEN)
    return sp.csr_matrix((np.ones(len(row), bool), (rows[row], col)), shape=(n_obs, n_vars))


def hidden_expression(data: str, folder: Path, seed: int) -> tuple[Masked, Scores]:
    """15 % of the entries of the cells in held-out blocks; the truth is log-normalized by totals of whole cells."""
    section = load(data, folder)
    test = folds(spatial_block_ids(section, data, seed), 5, seed) == 0
    # A gene without expression in the training cells cannot be learned by any method.
    adata = section[:, np.asarray(section.X[~test].sum(axis=0)).ravel() > 0].copy()
    del adata.obs["label"], adata.obs["cell_type"]
    target = float(np.median(totals(adata.X[~test])))
    full = log_normalize(adata.X, target)
    hidden = hide(*adata.shape, test, seed)
    mask = hidden[test].toarray()
    truth = full[test].toarray()[mask]
    mean = np.broadcast_to(np.asarray(full[~test].mean(axis=0)).ravel(), mask.shape)[mask]
    seen = sp.csr_matrix(adata.X - adata.X.multiply(hidden))
    seen.eliminate_zeros()
    share = np.asarray(seen[~test].sum(axis=0), np.float64).ravel()
    adata.layers["linear"] = seen
    adata.X = log_normalize(seen, target * (1 - hidden @ (share / share.sum())))
    problem = Masked(data, adata, test, hidden, DATA[data].library_key)
    return problem, lambda predicted: expression_scores(truth, predicted[mask], mean)


def missing_genes(folder: Path, seed: int) -> tuple[Missing, Scores]:
    """A fifth of the genes of DLPFC 151674 that 151673 has; the truth is log-normalized by totals of whole cells."""
    reference, query = load("dlpfc", folder), load("dlpfc_151674", folder)
    # A gene without expression in the training cells cannot be learned by any method.
    known = reference.var_names[np.asarray(reference.X.sum(axis=0)).ravel() > 0]
    shared = known.intersection(query.var_names)
    chosen = np.random.default_rng(seed).permutation(len(shared)) < len(shared) // 5
    reference, whole = reference[:, shared].copy(), query[:, shared]
    for adata in (reference, query):
        del adata.obs["label"], adata.obs["cell_type"]
    target = float(np.median(totals(reference.X)))
    truth = log_normalize(whole.X, target).toarray()[:, chosen]
    seen = whole[:, ~chosen].copy()
    problem = Missing("dlpfc", reference, seen, shared[chosen].tolist(), None, target)

    def scores(found: np.ndarray) -> dict[str, float]:
        varies = truth.std(axis=0) > 0
        t, f = truth[:, varies], np.asarray(found, np.float64)[:, varies]
        tc, fc = t - t.mean(axis=0), f - f.mean(axis=0)
        size = np.sqrt((tc**2).sum(axis=0) * (fc**2).sum(axis=0))
        # A gene that is predicted alike in all cells has no correlation: it counts as 0.
        pearson = np.divide((tc * fc).sum(axis=0), size, out=np.zeros(len(size)), where=size > 1e-9)
        r2 = 1 - ((t - f) ** 2).sum(axis=0) / (tc**2).sum(axis=0)
        often = (t > 0).mean(axis=0) >= 0.1
        return {
            "pearson": float(pearson.mean()),
            "r2": float(r2.mean()),
            "pearson_expressed": float(pearson[often].mean()),
            "r2_expressed": float(r2[often].mean()),
        }

    return problem, scores


def without_labels(data: str, folder: Path) -> tuple[Embedding, AnnData]:
    """All cells, and the same object with what was taken out."""
    whole = load(data, folder)
    adata = whole.copy()
    adata.obs = adata.obs[[key for key in (DATA[data].library_key,) if key is not None]]
    return Embedding(data, adata, DATA[data].library_key), whole
