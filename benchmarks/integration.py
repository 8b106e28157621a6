"""Sections together: is technique removed from the embedding, and is tissue kept apart?

`hard_pair`: DLPFC 151673 with 151674, whose genes are multiplied by log-normal factors (standard deviation 0.5 of the
logarithm, drawn by the seed) and of whose counts 40 % are kept at random. `unequal`: the same without layers L5, L6 and
white matter in the second section. `merfish`: two neighboring sections of one brain, which hardly differ; seeds are
those of the methods alone.

Of DLPFC, where classes are layers, every method's features are averaged once over the 6 nearest neighbors and the cell
itself; of MERFISH, where they are cell types, they are scored as they are. `ilisi`: inverse Simpson
index of sections among the 30 nearest cells, less 1, mean over cells: 0 where sections are apart, 1 where both are as
frequent everywhere. `purity`: cells of the same class among these. `transfer`: accuracy of classes by the 15 nearest
cells of the other section; of classes that both have, mean of both directions; `transfer_whole` from the first section
alone. `ari`: a Gaussian mixture of as many components as there are classes on both sections together, against
these. Harmony needs harmonypy (2.1 for the rows here).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

import _embeddings
import _fimp
import _harness
from _common import load, neighbors, sections
from _harness import Fit, Method, Run
from _problems import Embedding
from _smoothing import averaged
from embedding import N_NEIGHBORS, UNKNOWN, domains

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

N_NEAREST, N_VOTES = 30, 15
SPREAD, KEPT = 0.5, 0.4
ABSENT = ("L5", "L6", "WM")


def distorted(adata: AnnData, seed: int) -> AnnData:
    """A section whose genes are multiplied by factors and of whose counts a part is lost."""
    adata, rng = adata.copy(), np.random.default_rng(seed)
    factor = np.exp(rng.normal(0, SPREAD, adata.n_vars))
    counts = sp.csr_matrix(adata.X, dtype=np.float64)
    more = np.rint(counts.data * factor[counts.indices]).astype(np.int64)
    counts.data = rng.binomial(more, KEPT).astype(np.float64)
    counts.eliminate_zeros()
    adata.X = counts.astype(np.float32)
    return adata


def pair(data: str, folder: Path, seed: int) -> AnnData:
    """Two sections as one object with classes in ``obs["label"]``."""
    import anndata

    if data == "merfish":
        whole = load("merfish", folder)
        whole.obs["section"] = whole.obs["bregma"].astype(str)
        return whole
    first, second = load("dlpfc", folder), load("dlpfc_151674", folder)
    shared = first.var_names.intersection(second.var_names)
    second = distorted(second[:, shared], seed)
    if data == "unequal":
        second = second[~second.obs["label"].isin(ABSENT)].copy()
    named = {"151673": first[:, shared].copy(), "151674": second}
    return anndata.concat(named, label="section", index_unique="-")


def problem(data: str, args: Any, seed: int) -> tuple[Embedding, Callable[[np.ndarray], dict[str, float]]]:
    """Both sections without classes, and the scores of features."""
    adata = pair(data, args.data, seed)
    truth, section = adata.obs["label"].to_numpy().astype(str), adata.obs["section"].to_numpy().astype(str)
    known, names = ~np.isin(truth, UNKNOWN), np.unique(section)
    graph = neighbors(np.asarray(adata.obsm["spatial"], float), N_NEIGHBORS, sections(adata, "section"))
    adata.obs = adata.obs[["section"]]

    def scores(features: np.ndarray) -> dict[str, float]:
        smooth = features if data == "merfish" else averaged(features, graph)
        near = NearestNeighbors(n_neighbors=N_NEAREST + 1).fit(smooth).kneighbors(smooth, return_distance=False)[:, 1:]
        fraction = np.stack([(section[near] == name).mean(axis=1) for name in names])
        transfer = [_transfer(smooth, truth, known, section, *pair) for pair in (names, names[::-1])]
        found = domains(smooth, len(np.unique(truth[known])), seed)
        return {
            "ilisi": float((1 / (fraction**2).sum(axis=0) - 1).mean() / (len(names) - 1)),
            "purity": float((truth[near] == truth[:, None]).mean(axis=1)[known].mean()),
            "transfer": float(np.mean(transfer)),
            "transfer_whole": transfer[0],
            "ari": float(adjusted_rand_score(truth[known], found[known])),
        }

    return Embedding(data, adata, "section"), scores


def _transfer(
    features: np.ndarray, truth: np.ndarray, known: np.ndarray, section: np.ndarray, reference: str, query: str
) -> float:
    train = known & (section == reference)
    test = known & (section == query) & np.isin(truth, np.unique(truth[train]))
    model = KNeighborsClassifier(N_VOTES).fit(features[train], truth[train])
    return float((model.predict(features[test]) == truth[test]).mean())


def harmony(posed: Embedding, run: Run, *, mean: bool) -> Fit:
    """Harmony on principal components, with the mean over neighbors or without."""
    try:
        import harmonypy
    except ImportError as error:
        raise _harness.MissingError("harmonypy is not installed") from error
    components = _embeddings.pca(posed, "own").values
    how = {"random_state": run.seed, "verbose": False}
    found = np.asarray(harmonypy.run_harmony(components, posed.adata.obs, ["section"], **how).Z_corr)
    found = found if len(found) == len(components) else found.T
    return Fit(averaged(found, _embeddings.spatial(posed, _embeddings.N_RING)) if mean else found)


def scvi(posed: Embedding, run: Run) -> Fit:
    """Latent means of scVI with sections as batches."""
    import anndata
    from scvi import settings
    from scvi.model import SCVI

    genes = _embeddings.variable_genes(posed)
    adata = anndata.AnnData(_embeddings.counts(posed)[:, genes], posed.adata.obs.copy())
    settings.seed = run.seed
    SCVI.setup_anndata(adata, batch_key="section")
    return _embeddings.trained(SCVI(adata, **_embeddings.SCVI), run, _embeddings.SCVI_EPOCHS, "elbo_validation")


OURS = _fimp.groups(_fimp.embed)
GROUPS: dict[str, dict[str, Method]] = {
    "baselines": {
        "PCA": lambda posed, run: _embeddings.pca(posed, "own"),
        "PCA, mean of neighbors": lambda posed, run: _embeddings.pca(posed, "mean"),
        "Harmony": partial(harmony, mean=False),
        "Harmony, mean of neighbors": partial(harmony, mean=True),
    },
    "scvi": {"scVI": scvi},
    "fimp": OURS["fimp"],
    "batches": OURS["batches"],
}

if __name__ == "__main__":
    _harness.main(
        "integration",
        __doc__,
        ("hard_pair", "unequal", "merfish"),
        problem,
        GROUPS,
        default=("baselines", "fimp", "batches"),
        more=(),
    )
