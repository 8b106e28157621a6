"""Types and ranges of all options in one table, and the decorator that checks calls against it.

An option of a public function is looked up by its name, or by ``"function.name"`` where functions differ. Where its
default is ``None``, ``None`` is allowed. numpy's scalars count as the numbers, flags and texts that they are, and are
handed on as those of Python. Rules of dictionaries of options look up this table, and stand beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial, wraps
from importlib import import_module
from typing import Any, TypeVar, overload

from fimp_sc._option_rules import (
    FOREIGN,
    Accelerator,
    Axes,
    Choice,
    Color,
    ColorMap,
    Devices,
    FigureFile,
    Flag,
    FoundationModel,
    Indices,
    Integer,
    Label,
    Mask,
    Model,
    Names,
    Object,
    Pair,
    Place,
    Real,
    Rule,
    Source,
    Text,
    Trained,
    Values,
    foreign_parameters,
)

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Arguments(Rule):
    """A dictionary of arguments of another function, which are checked as if they were passed to it.

    Attributes
    ----------
    of
        ``"module:name"`` of the function or class.
    only, without
        Which of its parameters are meant.
    """

    of: str = ""
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        return "a dictionary of arguments by name"

    def read(self, value: Any, name: str) -> Any:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return NotImplemented
        known, further = self.parameters()
        found = {}
        for key, given in value.items():
            if key in known:
                found[key] = checked_value(self.owner, known[key], given, f"{name}[{key!r}]")
            elif further is None or key in further:
                found[key] = given
            else:
                nested = self.place_of(key)
                close = get_close_matches(key, known, n=1) or get_close_matches(key, further, n=1)
                hint = f"Did you mean {close[0]!r}?" if close else f"It takes {', '.join(known)}."
                if nested is not None:
                    hint = f"Pass it as {name}={nested}."
                hint = of_foundation(key) if self.owner == "FIMP" and key in FOUNDATION else hint
                raise TypeError(f"{name} has {key!r}, which {self.owner} does not take. {hint}")
        return found

    def place_of(self, key: str) -> str | None:
        """Return the dictionary by which an argument is passed, also within another one; ``None`` if there is none."""
        known, further = self.parameters()
        if key in known or key in (further or ()):
            return f"{{{key!r}: ...}}"
        for name in known:
            rule = OPTIONS.get(name)
            within = rule.place_of(key) if isinstance(rule, Arguments) else None
            if within is not None:
                return f"{{{name!r}: {within}}}"
        return None

    @property
    def owner(self) -> str:
        """Name of the function or class."""
        return self.of.rpartition(":")[2]

    def parameters(self) -> tuple[dict[str, inspect.Parameter], tuple[str, ...] | None]:
        """Return the parameters that are meant, and the names of others that are taken, ``None`` for any."""
        module, _, path = self.of.partition(":")
        target: Any = import_module(module)
        for step in path.split("."):
            target = getattr(target, step)
        parameters = inspect.signature(target).parameters
        named = {
            name: parameter
            for name, parameter in parameters.items()
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            and (name in self.only if self.only else name not in ("self", *self.without))
        }
        if "trainer_kwargs" in parameters:
            return named, foreign_parameters("trainer")
        return named, None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not self.only else ()


@dataclass(frozen=True)
class Keywords(Rule):
    """Further keywords, which a function of another package takes; their values are left to it.

    Attributes
    ----------
    of
        ``"trainer"`` (of scvi-tools and Lightning), or the method of matplotlib's axes: ``"scatter"`` or ``"plot"``.
    also
        Others of a function that hands the rest on to that one.
    """

    of: str = ""
    also: tuple[str, ...] = ()

    def accept(self, value: Any, name: str, *, none: bool = False) -> Any:
        known = (*foreign_parameters(self.of), *self.also)
        for keyword in value:
            if keyword not in known:
                close = get_close_matches(keyword, known, n=1)
                hint = f" Did you mean {close[0]}=?" if close else ""
                plan = OPTIONS["plan_kwargs"] if self.of == "trainer" else None
                within = plan.place_of(keyword) if isinstance(plan, Arguments) else None
                if within is not None:
                    hint = f" Pass it as plan_kwargs={within}."
                raise TypeError(f"Unexpected keyword argument {keyword}=, which {FOREIGN[self.of]} has neither.{hint}")
        return value


_MODEL = Arguments(of="fimp_sc.model:FIMP", without=("adata", "registry"))
_TRAIN = Arguments(of="fimp_sc.model:FIMP.train")
_INFERENCE = Arguments(of="fimp_sc.model:FIMP.get_latent_representation", only=("batch_size", "strategy", "distribute"))
# Arguments of foundation models, which belong to their handle, by the name that they have there.
FOUNDATION = {
    "checkpoint": "checkpoint", "train_foundation": "train", "train": "train", "source": "neighbor_states",
    "neighbor_states": "neighbor_states", "aggregate": "aggregate", "species": "species", "orthologs": "orthologs",
    "vocabulary_key": "vocabulary_key",
}  # fmt: skip
_SCALES = ("auto", "counts", "normalized", "log", "real")
_SEVERAL_MODALITIES = (
    "embed", "annotate", "impute", "attention", "gene_pairs", "niches", "get_model", "setup_mudata",
    "spatial", "niche_composition", "attention_arrows",
)  # fmt: skip
_KEY = Text("the name of a key")
_COLUMN = Text("the name of a column")

# Keywords of squidpy's maps beside those that figures set themselves.
_SQUIDPY = (
    "shape", "img_res_key", "img_alpha", "img_cmap", "img_channel", "crop_coord", "frameon", "outline",
    "outline_color", "outline_width", "scalebar_dx", "scalebar_units", "scalebar_kwargs", "axis_label",
)  # fmt: skip

OPTIONS: dict[str, Rule | None] = {
    # model
    "n_latent": Integer(1, 1 << 14),
    "n_layers": Integer(1, 100),
    "n_heads": Integer(1, 1 << 10),
    "n_tokens": Integer(1),
    "FIMP.layer": Choice(("practical", "paper")),
    "self_loops": Flag(),
    "messages": Flag(),
    "use_weights": Flag(),
    "reduce": Choice(("mean", "sum")),
    "dropout": Real(0, 1, open_right=True),
    "label_weight": Real(0),
    "foundation": FoundationModel(),
    "load.name": Text("the name of a foundation model"),
    "checkpoint": Place(),
    "load.train": Trained(),
    "neighbor_states": Choice(("evolving", "static")),
    "aggregate": Choice(("layer", "final")),
    "gene_embeddings": Source(),
    "orthologs": Source(),
    "aliases": Source(),
    "vocabulary": Source(),
    "groups": Values("a list with the group of each node"),
    "node_names": Values(),
    "feature_names": Values(),
    "region_names": Values(),
    "recordings": Values(),
    "train_recordings": Values(),
    "names": Values(),
    "hidden": Mask(),
    "impute.hidden": Mask(named=True),
    "signals.hidden": Mask(named=True),
    "train.hidden": Mask(by_modality=True),
    "get_expression.hidden": Mask(by_modality=True),
    "indices": Indices(),
    "train_indices": Indices(),
    "validation_indices": Indices(),
    "species": Choice(("human", "mouse")),
    "vocabulary_key": _COLUMN,
    "random_state": Integer(0, 2**32 - 1),
    # training
    "max_epochs": Integer(
        1, hint="Leave it out for the default; zero_shot=True in fimp_sc.tl.embed uses a foundation model untrained."
    ),
    "accelerator": Accelerator(),
    "devices": Devices(),
    "num_workers": Integer(0),
    "validation_size": Real(0, 1, open_right=True),
    "batch_size": Integer(1),
    "mask_ratio": Pair(Real(0, 1)),
    "gene_mask_ratio": Real(0, 1),
    "mask_cells": Real(0, 1),
    "class_balance": Real(0, 1),
    "early_stopping": Flag(),
    "early_stopping_patience": Integer(0),
    "early_stopping_min_delta": Real(0),
    "trainer_kwargs": Keywords(of="trainer"),
    "plan_kwargs": Arguments(of="fimp_sc.model.train._plan:FIMPTrainingPlan", without=("module",)),
    "lr": Real(0, open_left=True),
    "lr_loadings": Real(0, open_left=True),
    "lr_head": Real(0, open_left=True),
    "lr_foundation": Real(0, open_left=True),
    "weight_decay": Real(0),
    "gradient_clip": Real(0, open_left=True),
    # predictions
    "strategy": Choice(("auto", "blocks", "layers")),
    "distribute": Flag(),
    "soft": Flag(),
    "decoder": Flag(),
    "scale": Choice(("log", "counts")),
    "get_expression.genes": Names(one=False),
    "get_gene_attention.genes": Names(one=False),
    "get_edge_influence.layer": Integer(0),
    # an object, and keys of it
    "adata": Object(),
    "mdata": Object(),
    "modality": Text("the name of a modality"),
    **{f"{tool}.modality": Names() for tool in _SEVERAL_MODALITIES},
    "layer": _KEY,
    "observed_layer": _KEY,
    "labels_key": _COLUMN,
    "unlabeled_category": Label(),
    "groupby": _COLUMN,
    "library_key": _COLUMN,
    "batch_key": _COLUMN,
    "region_key": _COLUMN,
    "gene_key": _COLUMN,
    "spatial_key": Text(
        "the name of a key",
        hint="Coordinates are one entry of obsm: adata.obsm['spatial'] = adata.obs[['x', 'y']].to_numpy() makes one.",
    ),
    "connectivities_key": Text(
        "the name of a key", hint="Leave it out to build the graph of nearest neighbors where there is none."
    ),
    "use_rep": _KEY,
    "key": _KEY,
    "signals.key": Text("the name of a key", none=True),
    "key_added": _KEY,
    "input_scale": Choice(_SCALES, by_modality=True),
    "setup_anndata.input_scale": Choice(_SCALES),
    "center": Choice(("training", "batch")),
    # tools
    "zero_shot": Flag(),
    "model": Model(),
    "verbose": Flag(),
    "copy": Flag(),
    "overwrite": Flag(),
    "model_kwargs": _MODEL,
    "train_kwargs": _TRAIN,
    "inference_kwargs": _INFERENCE,
    "impute.genes": Names(),
    "n_niches": Integer(2),
    "reference": Object(),
    "niches.method": Choice(("mixture", "leiden")),
    "smooth": Integer(0),
    "n_components": Integer(1, none=True),
    "covariance_type": Choice(("tied", "full", "diag", "spherical")),
    "n_range": Pair(Integer(2)),
    "n_seeds": Integer(2),
    "gene_pairs.genes": Names(one=False),
    "n_genes": Integer(1),
    "gene_pairs.n_genes": Integer(1, none=True),
    "domain_key": _COLUMN,
    "n_permutations": Integer(10),
    "min_edges": Integer(1),
    "min_support": Real(0),
    # preprocessing
    "spatial_graph.method": Choice(("knn", "radius", "delaunay", "grid")),
    "images.method": Choice(("knn", "radius")),
    "fmri.method": Choice(("structural", "coordinates", "functional")),
    "orientation": Choice(("region_time", "time_region")),
    "n_neighbors": Integer(1),
    "spatial_graph.n_neighbors": Integer(0),
    "n_rings": Integer(1),
    "radius_km": Real(0, open_left=True),
    "width_um": Real(0, open_left=True),
    "width_px": Real(1),
    "microns_per_pixel": Real(0, open_left=True),
    "spot_images.scale": Real(0, open_left=True),
    "spot_images.image_size": Integer(1, 1 << 12),
    "lazy": Flag(),
    "tokenizer": Place(),
    "directed": Flag(),
    "max_tokens": Integer(1),
    "text.edges": None,  # which is anything with pairs of names
    "channels": Choice(("last", "first")),
    "sampling_interval": Real(0, open_left=True),
    "top_fraction": Real(0, 1, open_left=True),
    "threshold": Real(0, open_left=True),
    # figures
    "title": Text(),
    **{f"{figure}.title": Names() for figure in ("spatial", "imputation", "signals")},
    "color": Color(several=True),
    "image_graph.color": Color(),
    "fdr": Real(0, 1),
    "numbers": Flag(),
    "n_top": Integer(1),
    "attention.value": Choice(("influence", "z", "n_edges")),
    "gene_pairs.x": Choice(("z", "correlation", "score")),
    "niche_composition.kind": Choice(("auto", "bars", "heatmap")),
    "history.model": None,  # which is anything with a history
    "source_group": Label(),
    "destination_group": Label(),
    "imputation.genes": Names(),
    "edges": Flag(),
    "img": Flag(),
    "max_images": Integer(1, hint="Pass images=False for points alone."),
    "image_graph.image_size": Real(0, 1, open_left=True),
    "size": Real(0, open_left=True),
    "recording": _KEY,
    "times": Pair(Real()),
    "cmap": ColorMap(),
    "ax": Axes(),
    **{f"{figure}.ax": Axes(several=True) for figure in ("spatial", "imputation", "signals")},
    **{f"{figure}.kwargs": Keywords(of="scatter", also=_SQUIDPY) for figure in ("spatial", "imputation")},
    "image_graph.kwargs": Keywords(of="scatter"),
    "signals.kwargs": Keywords(of="plot"),
    "show": Flag(),
    "return_fig": Flag(),
    "save": FigureFile(),
    # toys
    "n_obs": Integer(1),
    "planted": Flag(),
}
"""Rules by name of the option, or by ``"function.name"``; ``None`` where a function checks by itself."""


@overload
def checked(function: F) -> F: ...
@overload
def checked(**rules: Rule) -> Callable[[F], F]: ...
def checked(function: Any = None, **rules: Rule) -> Any:
    """Check the options of every call of ``function`` before it runs.

    Parameters
    ----------
    **rules
        Rules of options of this function alone, beside those of :data:`OPTIONS`.

    Raises
    ------
    TypeError
        An argument is unknown, missing, or of another type than :data:`OPTIONS` says.
    ValueError
        One is out of range.
    """
    if function is None:
        return partial(checked, **rules)
    signature = inspect.signature(function)
    owner = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
    OPTIONS.update({f"{owner}.{name}": rule for name, rule in rules.items()})

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{owner}() {error}.{_elsewhere(signature, kwargs)}") from None
        for name, value in bound.arguments.items():
            bound.arguments[name] = checked_value(owner, signature.parameters[name], value, name)
        return function(*bound.args, **bound.kwargs)

    return call


def rule_of(owner: str, name: str) -> Rule | None:
    """Return the rule of an option, if it has one."""
    return OPTIONS.get(f"{owner.rpartition('.')[2]}.{name}", OPTIONS.get(name))


def checked_value(owner: str, parameter: inspect.Parameter, value: Any, name: str) -> Any:
    """Return the value of one option as functions read it."""
    rule = rule_of(owner, parameter.name)
    return value if rule is None else rule.accept(value, name, none=parameter.default is None)


def of_foundation(name: str) -> str:
    """Return where an argument of a foundation model belongs."""
    argument = "" if name == "checkpoint" else f", {FOUNDATION[name]}=..."
    hint = f"Write foundation=fimp_sc.pretrained.load(name, checkpoint{argument})."
    if name in ("species", "orthologs"):
        hint += f" Of gene vectors, gene_embeddings=fimp_sc.pretrained.read_gene_vectors(file, {name}=...)."
    return hint


def _elsewhere(signature: inspect.Signature, given: Mapping[str, Any]) -> str:
    """Return where keywords belong that a function does not take."""
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        return ""
    unknown = next((name for name in given if name not in signature.parameters), None)
    if unknown is None:
        return ""
    # Tools have a checkpoint of their training, too.
    trains = unknown == "checkpoint" and "train_kwargs" in signature.parameters and "foundation" not in given
    if unknown in FOUNDATION and "foundation" in signature.parameters and not trains:
        return f" {of_foundation(unknown)}"
    for place in ("model_kwargs", "train_kwargs", "inference_kwargs"):
        rule = OPTIONS[place]
        if place in signature.parameters and isinstance(rule, Arguments):
            within = rule.place_of(unknown)
            if within is not None:
                return f" Pass it as {place}={within}."
    close = get_close_matches(unknown, signature.parameters, n=1)
    return f" Did you mean {close[0]}=?" if close else ""
