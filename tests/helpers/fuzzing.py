"""Random calls: strange objects and strange options, drawn from a seed, and a judge of what comes of them."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from anndata import AnnData
from fuzz_objects import QUICK, _copied, _done, _joint, _model, _pictures, _recordings, _section, snapshot
from fuzz_oddities import GRAPHS, _graph, mutated, options, strange
from mudata import MuData

import fimp_sc
from fimp_sc import _options

PACKAGE = str(Path(fimp_sc.__file__).parent)
# What a user may expect; a KeyError names a key, an IndexError a position.
CLEAR = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    FileNotFoundError,
    FileExistsError,
    ImportError,
    FloatingPointError,
)

# Calls


@dataclass
class Case:
    """A call, and what came of it."""

    seed: int
    name: str
    oddities: list[str]
    given: dict[str, Any]
    outcome: str = "ok"
    message: str = ""
    changed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        given = {name: "<model>" if isinstance(v, fimp_sc.model.FIMP) else v for name, v in self.given.items()}
        text = f"seed {self.seed}: {self.name}({given}) on {self.oddities}: {self.outcome}"
        return f"{text}\n{self.message}" + (f"\nchanged: {self.changed}" if self.changed else "")


TOOLS: dict[str, dict[str, Any]] = {
    "embed": {"library_key": "section", **QUICK},
    "annotate": {"labels_key": "known", **QUICK},
    "impute": {**QUICK},
    "niches": {"n_niches": 3},
    "attention": {"groupby": "type", "n_permutations": 10, "min_edges": 1, **QUICK},
    "gene_pairs": {
        "groupby": "type",
        "n_genes": 4,
        "n_permutations": 10,
        "min_edges": 1,
        "min_support": 1,
        "verbose": False,
    },
}
FIGURES: dict[str, dict[str, Any]] = {
    "spatial": {"color": "type", "show": False},
    "attention": {"show": False},
    "attention_arrows": {"cell": 5, "show": False},
    "gene_pairs": {"show": False},
    "niche_composition": {"groupby": "type", "show": False},
    "imputation": {"genes": "gene1", "show": False},
}
PREDICTIONS = ("get_latent_representation", "predict", "get_expression", "get_edge_influence", "get_gene_attention")


def draw(seed: int) -> tuple[Case, Callable[[], Any], Any]:
    """Return a case, the call, and the object that it must not change beyond its results."""
    rng = np.random.default_rng(seed)
    families = {"tl": 0.4, "tl model": 0.1, "pp": 0.12, "pl": 0.12, "FIMP": 0.1, "mudata": 0.1, "makers": 0.06}
    family = str(rng.choice(list(families), p=list(families.values())))
    data: Any = _done().copy() if family in ("pl", "tl model") or rng.random() < 0.3 else _section().copy()
    if family == "mudata":
        data = _copied((_recordings, _pictures, _joint)[rng.integers(3)]())
    data, oddities = mutated(rng, data)
    if family == "pp":
        name = str(rng.choice(["spatial_graph", "spatial_graph", "match_genes", "to_pyg"]))
        function = getattr(fimp_sc.pp, name)
        usual: dict[str, Any] = {"vocabulary": [f"gene{i}" for i in range(20)]} if name == "match_genes" else {}
    elif family == "pl":
        name = str(rng.choice(list(FIGURES)))
        function, usual = getattr(fimp_sc.pl, name), FIGURES[name]
    elif family == "makers":
        return _maker(seed, rng)
    elif family == "FIMP":
        return _with_model(seed, rng, data, oddities)
    elif family == "mudata" and rng.random() < 0.25:
        name = str(rng.choice(["signals", "image_graph"]))
        usual = {"nodes": [0], "show": False, "key": None} if name == "signals" else {"show": False}
        function = getattr(fimp_sc.pl, name)
    else:
        name = str(rng.choice(list(TOOLS)))
        function, usual = getattr(fimp_sc.tl, name), TOOLS[name]
        if family == "tl model" and name not in ("niches", "gene_pairs"):
            usual = {key: value for key, value in usual.items() if key != "max_epochs"} | {"model": _model()}
        if family == "mudata":
            usual = {key: value for key, value in usual.items() if key != "library_key"}
            usual |= {"labels_key": "lobe"} if name == "annotate" else {}
            names = list(data.mod) if isinstance(data, MuData) else ["rna"]
            if name != "niches" and len(names) > 1 and rng.random() < 0.7:
                usual |= {"modality": names}
    given = options(rng, function, usual)
    case = Case(seed, f"{function.__module__.split('._')[0]}.{name}", oddities, given)
    return case, lambda: function(data, **given), data


def _with_model(seed: int, rng: np.random.Generator, data: Any, oddities: list[str]) -> tuple[Case, Any, Any]:
    """Set up, build, train and predict, with strange options in one of these steps."""
    step = str(rng.choice(["setup_anndata", "FIMP", "train", "predict"]))
    model_class = fimp_sc.model.FIMP
    if step == "predict":
        name = PREDICTIONS[rng.integers(len(PREDICTIONS))]
        function = getattr(model_class, name)
        usual = {"groups": _section().obs["type"], "genes": ["gene1", "gene2"]} if name == "get_gene_attention" else {}
        given = options(rng, function, usual)
        if rng.random() < 0.3:
            given["adata"] = data
        return Case(seed, f"FIMP.{name}", oddities, given), lambda: function(_model(), **given), data
    function = getattr(model_class, "__init__" if step == "FIMP" else step)
    steps: dict[str, dict[str, Any]] = {
        "setup_anndata": {},
        "FIMP": {},
        "train": {"max_epochs": 1, "accelerator": "cpu"},
    }
    given = options(rng, function, steps[step])
    steps[step] = given

    def call() -> Any:
        # A graph, which the class itself does not build.
        if isinstance(data, AnnData) and "spatial_connectivities" not in data.obsp and data.n_obs:
            data.obsp["spatial_connectivities"] = _graph(data)
            before = snapshot(data)
            call.before = before  # type: ignore[attr-defined]
        model_class.setup_anndata(data, **steps["setup_anndata"])
        model = model_class(data, **steps["FIMP"])
        model.train(**{"enable_progress_bar": False, **steps["train"]})
        return model.get_latent_representation()

    return Case(seed, f"FIMP, {step}", oddities, given), call, data


def _maker(seed: int, rng: np.random.Generator) -> tuple[Case, Any, Any]:
    """Functions that make objects from arrays."""
    n, name = 8, str(rng.choice(["features", "images", "fmri"]))
    values: dict[str, Any] = {
        "features": rng.normal(size=(n, 4)), "images": rng.integers(0, 255, (n, 6, 6, 3)).astype(np.uint8),
        "fmri": rng.normal(size=(2, n, 20)),
    }  # fmt: skip
    usual: dict[str, Any] = {"coordinates": rng.random((n, 3 if name == "fmri" else 2))}
    if name == "features":
        usual["adjacency"] = GRAPHS[str(rng.choice(list(GRAPHS)))](_graph(AnnData(np.ones((n, 1), np.float32))))
    array = values[name]
    kind = rng.integers(8)
    if kind == 0:
        array = array.astype(str)
    elif kind == 1:
        array = array.astype(float) * np.nan
    elif kind == 2:
        array = array[:1]
    elif kind == 3:
        array = array[0]
    elif kind == 4:
        array = strange(rng)
    if rng.random() < 0.3:
        usual["coordinates"] = strange(rng)
    function = getattr(fimp_sc.pp, name)
    given = options(rng, function, usual)
    return Case(seed, f"fimp_sc.pp.{name}", [f"array {kind}"], given), lambda: function(array, **given), None


# What may be written by a call that succeeds, by the name of the tool: patterns of places of a snapshot
WRITTEN = {
    "embed": r"(obsm|uns)\|{key}$", "annotate": r"(obs|obsm|uns)\|{key}(_confidence|_probabilities)?$",
    "impute": r"(layers|obsm|uns)\|{key}$", "niches": r"(obs|uns)\|{key}(_colors)?$",
    "attention": r"(obsp|uns)\|{key}$", "gene_pairs": r"uns\|{key}$",
    "spatial_graph": r"(obsp\|{key}_(connectivities|distances)|uns\|{key}_neighbors)$",
    "match_genes": r"(var|uns)\|{key}", "graph": r"(obsp\|\w+_(connectivities|distances)|uns\|\w+_neighbors)$",
}  # fmt: skip
KEYS = {
    "embed": "X_fimp", "impute": "fimp", "niches": "fimp_niche", "attention": "fimp_attention",
    "gene_pairs": "fimp_gene_pairs",
    "spatial_graph": "spatial",
    "match_genes": "fimp_vocabulary_id",
}  # fmt: skip


def run(seed: int) -> Case:
    """Draw a case, run it, and judge it: ``"ok"``, ``"clear"`` (an error that helps), or what is wrong."""
    case, call, data = draw(seed)
    before = snapshot(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = call()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            case.outcome, case.message = _judge(error, case)
            result = None
        finally:
            _close_figures()
    before = getattr(call, "before", before)
    after = snapshot(data)
    changed = sorted(place for place in before.keys() | after.keys() if before.get(place) != after.get(place))
    if case.outcome == "ok":
        tool = case.name.rpartition(".")[2]
        written = case.name.startswith(("fimp_sc.tl", "fimp_sc.pp")) and not case.given.get("copy")
        key = case.given.get("key_added") or KEYS.get(tool) or f"fimp_{case.given.get('labels_key')}".replace("/", "_")
        patterns = [WRITTEN[name].format(key=re.escape(str(key))) for name in (tool, "graph") if name in WRITTEN]
        changed = [place for place in changed if not (written and any(re.search(p, place) for p in patterns))]
        if case.name.startswith("fimp_sc.pl.spatial"):  # scanpy's convention: colors of categories
            changed = [place for place in changed if not place.endswith("_colors")]
        problem = _unusable(data if result is None else result, tool, str(key), written)
        if problem:
            case.outcome, case.message = "unusable", problem
    case.changed = changed
    if changed:
        case.outcome = "changed"
    return case


def _judge(error: BaseException, case: Case) -> tuple[str, str]:
    text = "".join(traceback.format_exception(error))
    frames = traceback.extract_tb(error.__traceback__)
    ours = frames[-1].filename.startswith(PACKAGE)
    said = str(error)
    words = {*_options.OPTIONS, *case.given, "adata", "mdata", "data", "features", "images", "bold", "adjacency"}
    words |= {"obs", "obsm", "obsp", "uns", "layers", "coordinates", "vocabulary", "nodes", "cells", "graph"}
    words |= {"AnnData", "expression", "file", "files", "orthologs", "aliases", "connectivity", "radius"}
    named = any(re.search(rf"\b{re.escape(str(word))}\b", said) for word in words)
    if ours and named and isinstance(error, CLEAR) and len(said) > 20:
        return "clear", f"{type(error).__name__}: {said}"
    return "unclear", text


def _unusable(data: Any, tool: str, key: str, written: bool) -> str:
    """Return what is wrong with a result, if anything is."""
    if isinstance(data, np.ndarray) and data.dtype.kind == "f":
        return "" if np.isfinite(data).all() else "array with values that are not finite"
    if not written or not isinstance(data, AnnData):
        return ""
    if tool == "embed":
        found = data.obsm[key]
        return "" if found.shape[0] == data.n_obs and np.isfinite(found).all() else "embedding is not finite"
    if tool == "annotate":
        found = data.obsm[f"{key}_probabilities"]
        right = np.allclose(found.sum(1), 1, atol=1e-4) and data.obs[key].notna().all()
        return "" if right else "probabilities do not add up to one"
    if tool == "niches":
        return "" if data.obs[key].notna().all() else "cells without niche"
    if tool == "gene_pairs":
        return "" if data.uns[key]["pairs"]["pvalue"].between(0, 1).all() else "p-values are no probabilities"
    if tool == "attention":
        return "" if np.isfinite(data.obsp[key].data).all() else "influence is not finite"
    return ""


def _close_figures() -> None:
    from matplotlib import pyplot as plt

    plt.close("all")


def embedding_of(adata: AnnData, **how: Any) -> np.ndarray:
    """Return the embedding of a quick training, or of a given model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fimp_sc.tl.embed(adata, **({"library_key": "section", **QUICK} | how))
    return np.asarray(adata.obsm["X_fimp"])


def written_and_read(adata: AnnData, folder: Path, **how: Any) -> AnnData:
    adata.write_h5ad(folder / "section.h5ad")
    return ad.read_h5ad(folder / "section.h5ad", **how)
