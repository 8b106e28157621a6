"""FIMP and its variants as methods: public functions, and default settings but for what a variant's name says."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from _harness import Fit, Method, MissingError, Run

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from _problems import Annotation, Embedding, Masked, Missing


@dataclass(frozen=True)
class Variant:
    """What differs from the defaults.

    Attributes
    ----------
    model, train
        Arguments of ``FIMP`` and of ``FIMP.train``.
    n_neighbors
        Of the graph.
    near
        Whether near neighbors count more than far ones: by exp(-distance / mean distance).
    shuffled
        Whether positions are permuted within each section: the same graph of random cells.
    vectors
        Pretrained vectors of genes: a file of the folder of the data.
    permuted
        Whether these vectors are dealt out to other genes.
    deep
        Layers of a randomly initialized stack in scGPT's format, trained like the rest.
    foundation
        What is trained of the foundation model of ``--checkpoint``, see ``FIMP``.
    recipe
        Fields of ``fimp_sc._recipe.Recipe``.
    center
        What is subtracted from expression, see ``FIMP.setup_anndata``.
    """

    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    n_neighbors: int = 6
    near: bool = False
    shuffled: bool = False
    vectors: str | None = None
    permuted: bool = False
    deep: int = 0
    foundation: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    center: str = "training"


GENE_VECTORS = "spatialformer_gene_embeddings_512.npz"
DEFAULT = {"FIMP": Variant()}
CONTROLS = {"FIMP, shuffled positions": Variant(shuffled=True), "FIMP, no messages": Variant(model={"messages": False})}
VECTORS = {
    "FIMP, 32 tokens, gene vectors": Variant(model={"n_tokens": 32}, vectors=GENE_VECTORS),
    "FIMP, 32 tokens, gene vectors permuted": Variant(model={"n_tokens": 32}, vectors=GENE_VECTORS, permuted=True),
}
ABLATIONS = {
    "FIMP, 8 tokens": Variant(model={"n_tokens": 8}),
    "FIMP, 32 tokens": Variant(model={"n_tokens": 32}),
    "FIMP, 128 tokens": Variant(model={"n_tokens": 128}),
    "FIMP, 3 neighbors": Variant(n_neighbors=3),
    "FIMP, 12 neighbors": Variant(n_neighbors=12),
    "FIMP, near neighbors count more": Variant(near=True, model={"use_weights": True}),
    "FIMP, near ones of 12 count more": Variant(near=True, model={"use_weights": True}, n_neighbors=12),
    "FIMP, 1 layer": Variant(model={"n_layers": 1}),
    "FIMP, 3 layers": Variant(model={"n_layers": 3}),
    "FIMP, no self loops": Variant(model={"self_loops": False}),
    "FIMP, sum": Variant(model={"reduce": "sum"}),
    "FIMP, paper layer": Variant(model={"layer": "paper"}),
    "FIMP, 0 to 20 % hidden": Variant(train={"mask_ratio": (0.0, 0.2)}),
    "FIMP, 20 to 60 % hidden": Variant(train={"mask_ratio": (0.2, 0.6)}),
    "FIMP, random stack of 4 layers": Variant(deep=4),
}
# Each heuristic of the recipe switched off; titles say what is left out.
RECIPE = {
    f"FIMP without {what}": Variant(recipe=numbers)
    for what, numbers in {
        "components": {"components": False},
        "smoother": {"smoother": False},
        "shared components": {"mostly_signal": 0.0},
        "dropping noise": {"drop_noise": False},
        "gene scale (covariance)": {"gene_scale": 0.0},
        "whitening": {"whitening": 0.0},
        "start of layers": {"layers": False},
        "small first message": {"first_message": 1.0},
        "more steps on many cells": {"few_cells": 10**9},
        "averaging": {"averaging": 0.0},
        "rate of loadings": {"lr_loadings": 5e-4},
        "rate of heads": {"lr_head": 5e-4},
        "hiding genes of blocks": {"gene_mask_ratio": 0.0},
        "unmasked cells": {"mask_cells_labels": 1.0},
        "balance of classes": {"class_balance": 0.0},
        "self prediction": {"self_prediction": False},
        "least weight of neighbors": {"least_neighbor_weight": 0.0},
        "linear model of genes": {"linear_genes": 0},
        "smoothing": {"smoothing": False},
        "shifts": {"shifts": 0},
        "patience for labels": {"patience_labels": 3},
    }.items()
}
FOUNDATION = {
    "FIMP-scGPT, frozen": Variant(foundation="frozen"),
    "FIMP-scGPT, lora": Variant(foundation="lora"),
}
BATCHES = {f"FIMP, {center}": Variant(center=center) for center in ("batch", "matched")}
GROUPS = {
    "fimp": DEFAULT,
    "batches": BATCHES,
    "controls": CONTROLS,
    "vectors": VECTORS,
    "ablations": ABLATIONS,
    "recipe": RECIPE,
    "foundation": FOUNDATION,
}


def prepare(
    adata: AnnData,
    library_key: str | None,
    *,
    shuffle_seed: int | None = None,
    n_neighbors: int = 6,
    near: bool = False,
) -> AnnData:
    """Copy of `adata` with FIMP's spatial graph.

    With `shuffle_seed` the positions are permuted within each section first: the same graph joins random cells, which
    shows what the neighbors are worth. With `near` its weights fall with distance.
    """
    import fimp_sc

    adata = adata.copy()
    if shuffle_seed is not None:
        rng = np.random.default_rng(shuffle_seed)
        xy = np.array(adata.obsm["spatial"])
        sections = np.zeros(adata.n_obs, int) if library_key is None else adata.obs[library_key].astype(str).to_numpy()
        for name in np.unique(sections):
            idx = np.flatnonzero(sections == name)
            xy[idx] = xy[rng.permutation(idx)]
        adata.obsm["spatial"] = xy
    # A part of a section needs its own graph.
    fimp_sc.pp.spatial_graph(adata, library_key=library_key, overwrite=True, n_neighbors=n_neighbors)
    if near:
        weights = adata.obsp["spatial_distances"].copy()
        weights.data = np.exp(-weights.data / weights.data.mean())
        adata.obsp["spatial_connectivities"] = weights
    return adata


def annotate(problem: Annotation, run: Run, variant: Variant) -> Fit:
    """Labels of the query cells."""
    prepared = _graphs(problem.reference, problem, run, variant)
    how = {"labels_key": "label", "unlabeled_category": "Unknown", "library_key": problem.library_key}
    model, fit = train(prepared, run, variant, **how)
    if problem.query is not problem.reference:
        model = _apply(model, _graphs(problem.query, problem, run, variant))
    return replace(fit, values=np.asarray(model.predict()).astype(str))


def masked(problem: Masked, run: Run, variant: Variant) -> Fit:
    """Expression of the test cells, (n_test, n_vars)."""
    part = _graphs(problem.adata[~problem.test], problem, run, variant)
    model, fit = train(part, run, variant, library_key=problem.library_key, layer="linear")
    whole = _apply(model, _graphs(problem.adata, problem, run, variant))
    how = {"indices": np.flatnonzero(problem.test), "hidden": problem.hidden, "scale": "log"}
    return replace(fit, values=np.asarray(whole.get_expression(**how)))


def missing(problem: Missing, run: Run, variant: Variant) -> Fit:
    """Genes that the query lacks, (n_query, n_genes)."""
    model, fit = train(_graphs(problem.reference, problem, run, variant), run, variant)
    model = _apply(model, _graphs(problem.query, problem, run, variant))
    return replace(fit, values=np.asarray(model.get_expression(genes=problem.genes, scale="log")))


def embed(problem: Embedding, run: Run, variant: Variant) -> Fit:
    """The embedding that ``tl.embed`` writes, (n_obs, n_latent)."""
    prepared = _graphs(problem.adata, problem, run, variant)
    model, fit = train(prepared, run, variant, library_key=problem.library_key, center=variant.center)
    return replace(fit, values=model.get_latent_representation())


def groups(task: Callable[[Any, Run, Variant], Fit]) -> dict[str, dict[str, Method]]:
    """All variants as methods of `annotate`, `masked` or `embed`, by group."""
    return {group: {name: partial(_run, task, v) for name, v in named.items()} for group, named in GROUPS.items()}


def _run(task: Callable[[Any, Run, Variant], Fit], variant: Variant, problem: Any, run: Run) -> Fit:
    from fimp_sc._recipe import changed

    with changed(**variant.recipe):
        return task(problem, run, variant)


def _graphs(adata: AnnData, problem: Any, run: Run, variant: Variant) -> AnnData:
    shuffle = run.seed if variant.shuffled else None
    how = {"n_neighbors": variant.n_neighbors, "near": variant.near}
    return prepare(adata, problem.library_key, shuffle_seed=shuffle, **how)


def train(adata: AnnData | MuData, run: Run, variant: Variant, **setup: Any) -> tuple[Any, Fit]:
    """The trained model, and what it took; `setup` are arguments of ``FIMP.setup_anndata`` or ``FIMP.setup_mudata``."""
    from fimp_sc import pretrained
    from fimp_sc.model import FIMP

    (FIMP.setup_mudata if "modality" in setup else FIMP.setup_anndata)(adata, **setup)
    arguments = dict(variant.model)
    if variant.vectors is not None:
        arguments |= _with_vectors(adata, run, variant)
    if variant.foundation is not None:
        if run.checkpoint is None:
            raise MissingError("--checkpoint DIR names the folder of scGPT")
        arguments["foundation"] = pretrained.load("scgpt", run.checkpoint, train=variant.foundation)
    with tempfile.TemporaryDirectory() as folder:
        if variant.deep:
            arguments |= _random_stack(Path(folder), adata, variant.deep)
        model = FIMP(adata, random_state=run.seed, **arguments)
    started = time.process_time()
    how = {"max_epochs": 1 if run.quick else None, "accelerator": run.accelerator, "enable_progress_bar": False}
    model.train(**how, **variant.train)
    seconds = time.process_time() - started
    parameters = sum(p.numel() for p in model.module.parameters() if p.requires_grad)
    history = model.history
    validation = float(history["validation_loss"].min().iloc[0])
    weights = {"neighbors": model.neighbor_weight, "smoothed": model.smoothing_weight, "linear": model.linear_weight}
    shares = ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items()) if model.classes else ""
    return model, Fit(np.empty(0), parameters, len(history["train_loss"]), seconds, validation, shares)


def _apply(model: Any, adata: AnnData) -> Any:
    """The trained model bound to another section or a larger part of the same one; nothing is retrained."""
    from fimp_sc.model import FIMP

    return FIMP.load_query_data(adata, model)


def _with_vectors(adata: AnnData, run: Run, variant: Variant) -> dict[str, Any]:
    """Vectors of human genes for the genes of `adata`, by ``var["human_symbol"]``."""
    from fimp_sc.pretrained import GeneVectors, read_gene_vectors

    vectors = read_gene_vectors(run.data / str(variant.vectors))
    rows = {name: i for i, name in enumerate(vectors.names)}
    symbols = adata.var["human_symbol"].astype(str).to_numpy()
    mine = np.flatnonzero([s in rows for s in symbols])
    values = vectors.values[[rows[s] for s in symbols[mine]]]
    if variant.permuted:
        values = values[np.random.default_rng(run.seed).permutation(len(values))]
    return {"gene_embeddings": GeneVectors(adata.var_names[mine].astype(str).to_numpy(), values)}


def _random_stack(folder: Path, adata: AnnData, layers: int) -> dict[str, Any]:
    """A stack with random weights as wide as FIMP-base, for what depth alone gives."""
    from fimp_sc import pretrained
    from foundation import write_checkpoint

    genes = list(map(str, adata.var_names))
    write_checkpoint(folder, genes, width=64, layers=layers, heads=4, n_genes=len(genes) + 3)
    return {"foundation": pretrained.load("scgpt", folder, train="full"), "n_tokens": 16}
