"""The main job on the toy tissue, scored against simple baselines."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import fimp_sc

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

_UNLABELED = "Unknown"
_BLOCK_SIZE = 60
_HIDDEN_BLOCKS = 1 / 3
_N_NEIGHBORS = 10
_N_COMPONENTS = 50
_N_REBUILD = 20
_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#d3d3d3")  # four regions, and not known


def run_demo(
    output_dir: str | Path = "fimp-sc-demo", max_epochs: int | None = None, random_state: int = 0
) -> dict[str, float]:
    """Embed, annotate and impute the toy tissue, print a report, and write a figure and an object.

    Half of each cell's molecules are hidden to score the imputation, and the region of every cell in a third of the
    spatial blocks is hidden to score the annotation. The baselines see exactly what the model sees.

    Parameters
    ----------
    output_dir
        Folder to write to; made if missing.
    max_epochs
        Upper limit of passes over the data in each training; by default the tools' own.
    random_state
        Seed of the tissue, of what is hidden, and of the training.

    Returns
    -------
    Score by name: accuracies on cells whose region was hidden, and R² of hidden molecules.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    adata, truth, unseen = _make_task(random_state)
    hidden = (adata.obs["region"] == _UNLABELED).to_numpy()
    _say(
        f"Toy tissue: {adata.n_obs} cells x {adata.n_vars} genes in {adata.obs['section'].nunique()} sections.\n"
        f"Hidden to keep score: the region of {hidden.sum()} cells, in whole spatial blocks (for annotate), "
        "and half of each cell's molecules (for impute)."
    )

    shared = {"library_key": "section", "random_state": random_state}
    training = {"max_epochs": max_epochs}
    # The last one uses the model of the one before.
    calls: dict[str, dict[str, Any]] = {
        "embed": training,
        "annotate": {"labels_key": "region", **training},
        "impute": {},
    }
    for name, options in calls.items():
        _say(f"\nfimp.tl.{name} ...")
        started = perf_counter()
        getattr(fimp_sc.tl, name)(adata, **options, **shared)
        _say(f"fimp.tl.{name} took {perf_counter() - started:.0f} s")
    size = _model_size(adata)

    seen, target = _log_normalize(adata.X, size), _log_normalize(unseen, size)
    averaged = _neighbor_mean(adata, seen)
    own_parts, rebuilt = _principal_components(seen, random_state)
    averaged_parts, _ = _principal_components(averaged, random_state)
    labels = _label_scores(
        np.asarray(truth.astype(str)),
        hidden,
        features={
            "regression, own expression": own_parts,
            f"regression, mean of {_N_NEIGHBORS} neighbors": averaged_parts,
            "regression, both": np.hstack([own_parts, averaged_parts]),
            "regression, X_fimp (tl.embed)": adata.obsm["X_fimp"],
        },
        predictions={"fimp_region (tl.annotate)": adata.obs["fimp_region"].to_numpy(dtype=str)},
    )
    mean = seen.mean(axis=0)
    molecules = pd.DataFrame.from_dict(
        {
            "gene mean": _r2(mean[None], target, mean),
            f"mean of {_N_NEIGHBORS} neighbors": _r2(averaged, target, mean),
            f"own expression, {_N_REBUILD} components": _r2(rebuilt, target, mean),
            "layer fimp (tl.impute)": _r2(np.asarray(adata.layers["fimp"]), target, mean),
        },
        orient="index",
        columns=["R2"],
    )

    adata.obs["region_truth"] = truth
    h5ad, figure = folder / "toy_tissue.h5ad", folder / "toy_tissue.png"
    adata.write_h5ad(h5ad)
    _draw(adata, figure)
    _say(_report(adata, labels, molecules))
    _say(f"\nFigure: {figure.resolve()}\nObject: {h5ad.resolve()}")
    return {**labels["accuracy"].to_dict(), **molecules["R2"].to_dict()}


def _report(adata: AnnData, labels: pd.DataFrame, molecules: pd.DataFrame) -> str:
    written = {
        "tl.embed": [f'.obsm["X_fimp"] {adata.obsm["X_fimp"].shape}', '.obsp["spatial_connectivities"]'],
        "tl.annotate": [
            '.obs["fimp_region"]',
            '.obs["fimp_region_confidence"]',
            f'.obsm["fimp_region_probabilities"] {adata.obsm["fimp_region_probabilities"].shape}',
        ],
        "tl.impute": [f'.layers["fimp"] {adata.layers["fimp"].shape}'],
    }
    width = max(map(len, [*labels.index, *molecules.index])) + 2
    lines = ["", "What was written"]
    lines += [f"  {tool:<12} {', '.join(keys)}" for tool, keys in written.items()]
    lines += ["", "Region of the cells whose region was hidden", f"  {'':<{width}}accuracy  macro-F1"]
    lines += [f"  {name:<{width}}{row['accuracy']:8.3f}  {row['macro-F1']:8.3f}" for name, row in labels.iterrows()]
    lines += ["", "Expression of the hidden molecules, log scale", f"  {'':<{width}}{'R2':>8}"]
    lines += [f"  {name:<{width}}{row['R2']:8.3f}" for name, row in molecules.iterrows()]
    return "\n".join(lines)


def _make_task(random_state: int) -> tuple[AnnData, pd.Categorical, NDArray[np.float32]]:
    """Return the object the model may see, all regions, and the molecules it may not see."""
    adata = fimp_sc.datasets.toy_tissue(random_state=random_state)
    rng = np.random.default_rng(random_state)
    seen = adata.X.copy()
    seen.data = rng.binomial(seen.data.astype(np.int64), 0.5).astype(np.float32)
    unseen = (adata.X - seen).toarray()
    seen.eliminate_zeros()
    adata.X = seen
    left = seen.getnnz(axis=0) > 0  # a gene of which nothing is left to see
    adata, unseen = adata[:, left].copy(), unseen[:, left]

    blocks = fimp_sc.data.spatial_tiles(
        adata.obsm["spatial"], _BLOCK_SIZE, library=adata.obs["section"].to_numpy(), random_state=random_state
    )
    names = rng.permutation(np.unique(blocks))
    hidden = np.isin(blocks, names[: round(_HIDDEN_BLOCKS * len(names))])
    truth = adata.obs["region"].array
    known = np.where(hidden, _UNLABELED, truth.astype(str))
    adata.obs["region"] = pd.Categorical(known, categories=[*truth.categories, _UNLABELED])
    for key in ("region", "region_truth", "fimp_region"):
        adata.uns[f"{key}_colors"] = list(_COLORS)
    return adata, truth, unseen


def _model_size(adata: AnnData) -> float:
    """Return the number of molecules to which the model scales every cell."""
    return float(fimp_sc.tl.get_model(adata).module.target_sum)


def _log_normalize(counts: Any, size: float) -> NDArray[np.float32]:
    dense = counts.toarray() if hasattr(counts, "toarray") else np.asarray(counts)
    total = dense.sum(axis=1, keepdims=True)
    return np.log1p(dense * (size / np.maximum(total, 1))).astype(np.float32)


def _neighbor_mean(adata: AnnData, values: NDArray[np.float32]) -> NDArray[np.float32]:
    from sklearn.neighbors import NearestNeighbors

    mean = np.empty_like(values)
    for rows in adata.obs.groupby("section", observed=True).indices.values():
        xy = adata.obsm["spatial"][rows]
        nearest = NearestNeighbors(n_neighbors=_N_NEIGHBORS + 1).fit(xy).kneighbors(xy, return_distance=False)[:, 1:]
        mean[rows] = values[rows][nearest].mean(axis=1)
    return mean


def _principal_components(
    values: NDArray[np.float32], random_state: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the leading scores, and the values rebuilt from the first few of them."""
    from sklearn.decomposition import PCA

    pca = PCA(_N_COMPONENTS, svd_solver="randomized", random_state=random_state).fit(values)
    scores = pca.transform(values)
    return scores, scores[:, :_N_REBUILD] @ pca.components_[:_N_REBUILD] + pca.mean_


def _label_scores(
    truth: NDArray[np.str_],
    hidden: NDArray[np.bool_],
    features: dict[str, NDArray[np.float32]],
    predictions: dict[str, NDArray[np.str_]],
) -> pd.DataFrame:
    """Score logistic regressions on features, and given predictions, on the cells whose label was hidden."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    answers = {}
    for name, values in features.items():
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        answers[name] = probe.fit(values[~hidden], truth[~hidden]).predict(values[hidden])
    answers |= {name: labels[hidden] for name, labels in predictions.items()}
    scores = {
        name: {
            "accuracy": accuracy_score(truth[hidden], answer),
            "macro-F1": f1_score(truth[hidden], answer, average="macro", zero_division=0),
        }
        for name, answer in answers.items()
    }
    return pd.DataFrame.from_dict(scores, orient="index")


def _r2(prediction: NDArray[np.float32], target: NDArray[np.float32], mean: NDArray[np.float32]) -> float:
    return float(1 - np.square(target - prediction).sum() / np.square(target - mean).sum())


def _draw(adata: AnnData, path: Path) -> None:
    from matplotlib import pyplot as plt

    with plt.ioff():
        colors = ["region_truth", "region", "fimp_region", "fimp_region_confidence"]
        fimp_sc.pl.spatial(adata, colors, library_key="section", show=False)
        plt.gcf().savefig(path, dpi=120)
        plt.close()


def _say(text: str = "") -> None:
    print(text, flush=True)
