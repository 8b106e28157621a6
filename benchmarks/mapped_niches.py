"""Niches of one section in the next: found in DLPFC 151673, mapped to 151674, against cortical layers.

All methods are told the number of niches and nothing else. `ari_reference` and `ari` compare niches of 151673 and of
151674 with the layers, `ari_both` those of both sections at once, by their names: where niches of two sections are
found apart, their names have nothing to do with each other.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.metrics import adjusted_rand_score

import _fimp
import _harness
from _baselines import fit_pca
from _common import load, log_normalize, totals
from _harness import Fit, Method, Run
from embedding import UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

N_NICHES = 7


def sections(folder: Path) -> tuple[list[AnnData], Callable[[np.ndarray], dict[str, float]]]:
    """Both sections without labels, and the scores of their niches, one section after the other."""
    both = [load(data, folder) for data in ("dlpfc", "dlpfc_151674")]
    layer = np.concatenate([adata.obs["label"].astype(str) for adata in both])
    first, known = np.arange(len(layer)) < both[0].n_obs, ~np.isin(layer, UNKNOWN)
    for adata in both:
        adata.obs = adata.obs[[]]

    def scores(found: np.ndarray) -> dict[str, float]:
        parts = {"ari_reference": first & known, "ari": ~first & known, "ari_both": known}
        return {name: float(adjusted_rand_score(layer[part], found[part])) for name, part in parts.items()}

    return both, scores


def fimp(problem: list[AnnData], run: Run, *, how: str) -> Fit:
    """Niches of embeddings by a model of the first section (mapped), of each, or of both together."""
    from fimp_sc import tl

    reference, query = (_fimp.prepare(adata, None) for adata in problem)
    train: dict[str, Any] = {"random_state": run.seed, "accelerator": run.accelerator, "verbose": False}
    train |= {"max_epochs": 1} if run.quick else {}
    niches: dict[str, Any] = {"random_state": run.seed, "verbose": False}
    if how == "together":
        tl.embed([reference, query], **train)
        tl.niches([reference, query], N_NICHES, **niches)
        return _found(reference, query)
    tl.embed(reference, **train)
    tl.niches(reference, N_NICHES, **niches)
    if how == "mapped":
        tl.embed(query, model=tl.get_model(reference), accelerator=run.accelerator, verbose=False)
        tl.niches(query, reference=reference, verbose=False)
    else:
        tl.embed(query, **train)
        tl.niches(query, N_NICHES, **niches)
    return _found(reference, query)


def components(problem: list[AnnData], run: Run) -> Fit:
    """Niches of PCs of the first section, averaged over neighbors, mapped in the same way."""
    from fimp_sc import tl

    reference, query = (_fimp.prepare(adata, None) for adata in problem)
    shared = reference.var_names.intersection(query.var_names)
    target = float(np.median(totals(reference[:, shared].X)))
    values = [log_normalize(adata[:, shared].X, target) for adata in (reference, query)]
    pca = fit_pca(values[0])
    for adata, own in zip((reference, query), values, strict=True):
        adata.obsm["X_fimp"] = pca.transform(own.toarray())
    tl.niches(reference, N_NICHES, random_state=run.seed, verbose=False)
    tl.niches(query, reference=reference, verbose=False)
    return _found(reference, query)


def _found(reference: AnnData, query: AnnData) -> Fit:
    fit = query.obs.get("fimp_niche_fit")
    note = "" if fit is None else f"{100 * float((fit < 0.01).mean()):.1f} % of 151674 fit none"
    return Fit(np.concatenate([adata.obs["fimp_niche"].astype(str) for adata in (reference, query)]), note=note)


GROUPS: dict[str, dict[str, Method]] = {
    "baselines": {"PCs, mapped": components},
    "fimp": {
        "FIMP, mapped": partial(fimp, how="mapped"),
        "FIMP, a model for each section": partial(fimp, how="each"),
        "FIMP, both sections together": partial(fimp, how="together"),
    },
}

if __name__ == "__main__":
    _harness.main(
        "mapped_niches",
        __doc__,
        ("dlpfc",),
        lambda data, args, seed: sections(args.data),
        GROUPS,
        default=("baselines", "fimp"),
    )
