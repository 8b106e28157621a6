"""What the benchmark scripts share: arguments, data, splits, scores and the result table."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.metrics import accuracy_score, f1_score
from sklearn.neighbors import NearestNeighbors

from fimp_sc.data.validate._values import check_values

HERE = Path(__file__).resolve().parent
UNLABELED = ("Unlabelled", "Ambiguous")
MIN_TRAIN_CELLS = 5  # a class with fewer labeled training cells is left out for every method


@dataclass(frozen=True)
class Data:
    """One data set.

    Attributes
    ----------
    file
        In the folder of the data; or, of a set that is fetched or made, a function, as "package:function".
    block_size
        Cells of a spatial block.
    library_key, label_key
        Columns of ``obs`` that separate sections and hold cell types.
    kept
        Share of the counts that are drawn at random and kept, alike in all seeds; the others are thrown away.
    """

    file: str
    block_size: int
    library_key: str | None = None
    label_key: str = "cell_type"
    kept: float = 1.0


DATA = {
    "dlpfc": Data("dlpfc_visium_151673.h5ad", 100),
    "dlpfc_151674": Data("dlpfc_visium_151674.h5ad", 100),
    "merfish": Data("merfish_hypothalamus_animal1.h5ad", 140, "bregma"),
    "starmap": Data("starmap_visual_cortex_1020.h5ad", 40),
    "toy": Data("fimp_sc.datasets:toy_tissue", 40, "section"),
    # As few counts as in bins of a few micrometres.
    "dlpfc_few_counts": Data("dlpfc_visium_151673.h5ad", 100, kept=0.03),
    # The sets of the paper, which squidpy downloads.
    "slideseqv2": Data("squidpy.datasets:slideseqv2", 400, None, "cluster"),
    "seqfish": Data("squidpy.datasets:seqfish", 200, None, "celltype_mapped_refined"),
}
ONLINE = ("slideseqv2", "seqfish")


def parser(
    doc: str | None, datasets: tuple[str, ...] = (), more: tuple[str, ...] = (), *, epochs: bool = False
) -> argparse.ArgumentParser:
    """Arguments that scripts share; with `epochs` also those of FIMP.

    `datasets` are the default of ``--datasets``, and with `more` its choices.
    """
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.set_defaults(max_epochs=None)
    p.add_argument("--data", type=Path, default=os.environ.get("FIMP_SC_DATA", HERE.parent.parent / "shared" / "data"))
    p.add_argument("--seeds", type=int, default=3, help="number of seeds: 0, 1, … (splits, hidden entries and FIMP)")
    p.add_argument("--accelerator", default="auto")
    p.add_argument("--quick", action="store_true", help="1 seed, 1 epoch: checks that the script runs")
    p.add_argument("--again", action="store_true", help="compute rows that are there already, too")
    if epochs:
        p.add_argument("--max-epochs", type=int, help="epochs of FIMP; default: FIMP's own")
    if datasets:
        p.add_argument("--datasets", nargs="+", default=list(datasets), choices=(*datasets, *more))
    return p


def parse(p: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line and apply ``--quick``."""
    args = p.parse_args()
    if args.quick:
        args.seeds, args.max_epochs = 1, 1
    return args


def load(name: str, folder: Path):
    """Read a data set; ``obs["cell_type"]`` holds its cell types, ``obs["label"]`` those that may be scored.

    The label is "Unknown" where there is no type, or one of `UNLABELED`. ``X`` is on a linear scale: values that are
    logarithms are turned back.
    """
    import anndata

    data = DATA[name]
    if ":" in data.file:
        module, function = data.file.split(":")
        adata = getattr(importlib.import_module(module), function)()
    else:
        path = Path(folder) / data.file
        if not path.exists():
            raise FileNotFoundError(
                f"{path} not found: give the folder of the .h5ad files with --data or FIMP_SC_DATA."
            )
        adata = anndata.read_h5ad(path)
    adata.obs["cell_type"] = labels = adata.obs[data.label_key].astype(str)
    adata.obs["label"] = labels.mask(labels.isin(UNLABELED) | adata.obs[data.label_key].isna(), "Unknown")
    adata.X = sp.csr_matrix(adata.X)
    if ":" in data.file:
        with warnings.catch_warnings(action="ignore"):  # empty genes are dropped by the tasks
            logarithms = check_values(adata.X, where="X") == "log"
        if logarithms:
            adata.X = adata.X.expm1()
    if data.kept < 1:
        counts = np.rint(adata.X.data).astype(np.int64)
        adata.X.data = np.random.default_rng(0).binomial(counts, data.kept).astype(adata.X.dtype)
        adata.X.eliminate_zeros()
    return adata


def library(adata, name: str) -> np.ndarray | None:
    """Section of each cell of a data set, or None when it is one section."""
    return sections(adata, DATA[name].library_key)


def sections(adata, library_key: str | None) -> np.ndarray | None:
    """Section of each cell, (n_obs,), or None when all are of one section."""
    return None if library_key is None else adata.obs[library_key].astype(str).to_numpy()


def log_normalize(x, target: float | np.ndarray) -> sp.csr_matrix:
    """log(1 + x / total of the cell * target), float32 CSR (n_obs, n_vars); one target or that of each cell."""
    x = sp.csr_matrix(x, dtype=np.float64, copy=True)
    x = sp.csr_matrix(sp.diags(target / np.maximum(totals(x), 1e-12)) @ x)
    x.data = np.log1p(x.data)
    return x.astype(np.float32)


def totals(x) -> np.ndarray:
    """Sum of each row, shape (n_obs,)."""
    return np.asarray(x.sum(axis=1)).ravel()


def as_seen(values: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Log-normalized values (n, g) of whole cells, scaled anew by totals of visible ones: what is hidden must not show.

    Visible values then have the part of a total that their genes have in all cells.
    """
    linear = np.expm1(values)
    share = linear.mean(axis=0) / linear.mean(axis=0).sum()
    total = (linear * visible).sum(axis=1)
    wanted = np.median(linear.sum(axis=1)) * (np.broadcast_to(visible, linear.shape) @ share)
    return np.log1p(linear * np.where(total > 0, wanted / np.maximum(total, 1e-12), 1)[:, None]).astype(np.float32)


def neighbors(coordinates: np.ndarray, k: int, lib: np.ndarray | None = None) -> sp.csr_matrix:
    """Binary CSR (n, n): row i has the k nearest other cells of the same section."""
    n = len(coordinates)
    lib = np.zeros(n, int) if lib is None else lib
    rows, cols = [], []
    for name in np.unique(lib):
        idx = np.flatnonzero(lib == name)
        near = NearestNeighbors(n_neighbors=k).fit(coordinates[idx]).kneighbors(return_distance=False)
        rows.append(np.repeat(idx, k))
        cols.append(idx[near].ravel())
    rows, cols = np.concatenate(rows), np.concatenate(cols)
    return sp.csr_matrix((np.ones(len(rows), np.float32), (rows, cols)), shape=(n, n))


def spatial_block_ids(adata, name: str, seed: int) -> np.ndarray:
    """Spatial block of each cell, shape (n_obs,)."""
    from fimp_sc.data import spatial_tiles

    xy = np.asarray(adata.obsm["spatial"], float)
    return spatial_tiles(xy, DATA[name].block_size, library=library(adata, name), random_state=seed)


def folds(blocks: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """Fold of each cell, shape (n_obs,): whole spatial blocks, filled so that the folds have about equal size."""
    ids, sizes = np.unique(blocks, return_counts=True)
    fold, filled = {}, np.zeros(n_folds)
    for i in np.random.default_rng(seed).permutation(len(ids)):
        f = int(filled.argmin())
        fold[ids[i]] = f
        filled[f] += sizes[i]
    return np.array([fold[b] for b in blocks])


def split_labels(labels: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Apply the class rule.

    Classes with fewer than `MIN_TRAIN_CELLS` labeled training cells cannot be learned: they are hidden in training and
    left out of the scores. Returns the labels for training ("Unknown" for test cells and such classes) and the
    boolean masks of training and test cells to use, each of shape (n_obs,).
    """
    labels = np.asarray(labels, dtype=object)
    known = labels != "Unknown"
    classes, counts = np.unique(labels[known & ~test].astype(str), return_counts=True)
    usable = known & np.isin(labels.astype(str), classes[counts >= MIN_TRAIN_CELLS])
    train, test = usable & ~test, usable & test
    return np.where(train, labels, "Unknown"), train, test


def label_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-F1; macro-F1 is the mean over the classes that are present in `truth`."""
    truth, predicted = np.asarray(truth).astype(str), np.asarray(predicted).astype(str)
    f1 = f1_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(truth, predicted)), "macro_f1": float(f1)}


def expression_scores(truth: np.ndarray, predicted: np.ndarray, gene_mean: np.ndarray) -> dict[str, float]:
    """R² and MSE over hidden entries.

    Parameters
    ----------
    truth, predicted, gene_mean
        Shape (n_entries,): true and predicted value, and mean of the entry's gene in the training cells.

    Returns
    -------
    ``r2`` is measured around the grand mean of the hidden entries, ``r2_gene`` around the training mean of each gene,
    so that predicting the gene mean scores 0.
    """
    truth, predicted, gene_mean = (np.asarray(a, np.float64) for a in (truth, predicted, gene_mean))
    sse = ((truth - predicted) ** 2).sum()
    return {
        "r2": float(1 - sse / ((truth - truth.mean()) ** 2).sum()),
        "r2_gene": float(1 - sse / ((truth - gene_mean) ** 2).sum()),
        "mse": float(sse / truth.size),
    }


class Results:
    """Rows of (data, method, seed, scores) in one CSV, which is written whenever a row is added."""

    def __init__(self, name: str, args: argparse.Namespace, group: str = "data") -> None:
        self.args, self.group, self.keys = args, group, [group, "method", "seed"]
        self.path = HERE / "results" / f"{name}{'_quick' if args.quick else ''}.csv"
        self.new: list[dict[str, object]] = []

    def has(self, data: str, method: str, seed: int) -> bool:
        """Whether the CSV has this row."""
        rows = self._read()
        return bool(len(rows) and ((rows[self.group] == data) & (rows.method == method) & (rows.seed == seed)).any())

    def wants(self, data: str, method: str, seed: int) -> bool:
        """Whether this row is to be computed: it is not there, or all are asked for."""
        return self.args.again or self.args.quick or not self.has(data, method, seed)

    def add(
        self,
        data: str,
        method: str,
        seed: int,
        scores: dict[str, float],
        started: float | None = None,
        note: str = "",
    ) -> None:
        """Add one row in place of an older one; `started` is a ``time.perf_counter()`` value from before the method."""
        row: dict[str, object] = {self.group: data, "method": method, "seed": seed, **scores}
        if started is not None:
            row["seconds"] = time.perf_counter() - started
        if note:
            row["note"] = note
        row |= {"max_epochs": "default" if self.args.max_epochs is None else self.args.max_epochs, **environment()}
        print(data, method, f"seed {seed}:", ", ".join(f"{k} {v:.4g}" for k, v in scores.items()), flush=True)
        self.new.append(row)
        table, old = pd.DataFrame([row]), self._read()
        if len(old):
            same = pd.MultiIndex.from_frame(old[self.keys]).isin(pd.MultiIndex.from_frame(table[self.keys]))
            table = pd.concat([old[~same], table]).sort_values([self.group], kind="stable")
        self.path.parent.mkdir(exist_ok=True)
        unfinished = self.path.with_suffix(f".{os.getpid()}")
        table.to_csv(unfinished, index=False, float_format="%.5g")
        unfinished.replace(self.path)

    def finish(self) -> None:
        """Print mean ± standard deviation over the seeds of all rows of the groups and methods that were run."""
        if not self.new:
            print("nothing to run: all rows are there")
            return
        run, table = pd.DataFrame(self.new), self._read()
        keys = self.keys[:2]
        table = table[pd.MultiIndex.from_frame(table[keys]).isin(pd.MultiIndex.from_frame(run[keys]))]
        known = {*self.keys, "seconds", "note", "max_epochs", *environment()}
        scores = [c for c in table.columns if c not in known]
        print(f"\n| {self.group} | method | " + " | ".join(scores) + " |\n" + "|---" * (2 + len(scores)) + "|")
        for (data, method), rows in table.groupby(keys, sort=False):
            cells = [f"{rows[c].mean():.3f} ± {rows[c].std(ddof=0):.3f}" for c in scores]
            print(f"| {data} | {method} | " + " | ".join(cells) + " |")
        print(f"\nwritten: {os.path.relpath(self.path)}")

    def _read(self) -> pd.DataFrame:
        if not self.path.exists():
            return pd.DataFrame()
        return pd.read_csv(self.path, dtype={self.group: str, "method": str, "max_epochs": str})


def environment() -> dict[str, str | int]:
    """Machine and versions, without names or dates."""
    row: dict[str, str | int] = {"machine": f"{platform.system()} {platform.machine()}", "cpus": os.cpu_count() or 0}
    row["python"] = platform.python_version()
    for package in ("fimp-sc", "torch", "scvi-tools", "anndata", "scikit-learn", "numpy"):
        try:
            row[package] = version(package)
        except PackageNotFoundError:
            row[package] = ""
    return row
