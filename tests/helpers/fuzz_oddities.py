"""Oddities of the fuzzer: strange values of options, and strange changes of objects."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from fimp_sc import _option_rules, _options
from fimp_sc.data._modality import quiet_mudata

# Strange values of options


class Thing:
    """Something that no option takes."""

    def __repr__(self) -> str:
        return "<thing>"


NUMBERS = (-1, 0, 1, 2, 3, 1.5, -0.5, 0.25, 1.0, float("nan"), float("inf"), -float("inf"), True, False)
SCALARS = (np.int64(2), np.int8(-3), np.float32(0.5), np.float64("nan"), np.bool_(True), np.array(2), np.uint8(1))
TEXTS = ("", "False", "nothing", "spatial", "X_fimp", "counts", "type", "a/b", "é", "auto", "gene1", np.str_("type"))
LISTS: tuple[Any, ...] = (
    [], ["type"], ("a", "b"), (0.1, 0.4), (0.5, 0.1), (float("nan"), float("nan")), (1, 2, 3), [None], {}, {"x": 1},
    np.array([1, 2]), np.array(["gene1", "gene2"]), pd.Index(["gene0"]), {"a"}, range(3),
)  # fmt: skip
OTHERS = (None, Thing(), b"bytes", 1 + 2j, slice(2), print, int, pd.DataFrame({"x": [1]}), pd.NA, Path("nowhere"))
# Where a larger number is legitimate, and only takes longer than a test may.
LONG = ("n_permutations", "n_seeds", "smooth", "n_rings", "num_workers", "devices", "n_niches", "n_latent", "n_layers")
# What is not an option, or would leave this machine.
FIXED = ("adata", "mdata", "self", "registry", "architecture", "data", "images", "bold", "features", "gene_embeddings")
SEEDS = (0, 1, 2**32 - 1, 2**32, 10**12)


def strange(rng: np.random.Generator) -> Any:
    pools = (NUMBERS, SCALARS, TEXTS, LISTS, OTHERS)
    pool: Any = pools[rng.choice(len(pools), p=[0.35, 0.15, 0.2, 0.2, 0.1])]
    return pool[rng.integers(len(pool))]


def allowed(rng: np.random.Generator, rule: _option_rules.Rule | None) -> Any:
    """Return a value of the right kind, most often in range."""
    if isinstance(rule, _option_rules.Integer):
        return int(rule.low + rng.integers(-1, 3))
    if isinstance(rule, _option_rules.Real):
        low, high = max(rule.low, -1.0), min(rule.high, 2.0)
        return float(rng.choice([low, high, (low + high) / 2, low - 0.1, high + 0.1]))
    if isinstance(rule, _option_rules.Flag):
        return bool(rng.integers(2))
    if isinstance(rule, _option_rules.Choice):
        return rule.choices[rng.integers(len(rule.choices))]
    if isinstance(rule, _option_rules.Text | _option_rules.Label):
        return str(
            rng.choice(["type", "known", "section", "batch", "area", "spatial", "counts", "X_fimp", "new", "fimp"])
        )
    if isinstance(rule, _option_rules.Names):
        return [f"gene{i}" for i in rng.choice(24, rng.integers(1, 4), replace=False)]
    if isinstance(rule, _option_rules.Pair):
        return (allowed(rng, rule.of), allowed(rng, rule.of))
    if isinstance(rule, _option_rules.Accelerator):
        return str(rng.choice(["cpu", "auto", "gpu", "cuda", "mps", "tpu", "nothing"]))
    if isinstance(rule, _options.Arguments):
        names = [name for name in rule.parameters()[0] if name not in (*FIXED, *LONG, "foundation")]
        name = names[rng.integers(len(names))]
        return {name: option(rng, rule.owner, name)}
    return strange(rng)


def option(rng: np.random.Generator, owner: str, name: str) -> Any:
    rule = _options.rule_of(owner, name)
    if name == "random_state" and rng.random() < 0.3:
        return SEEDS[rng.integers(len(SEEDS))]
    return allowed(rng, rule) if rng.random() < 0.65 else strange(rng)


def options(rng: np.random.Generator, function: Callable[..., Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return the usual options of a function, none to three of them replaced."""
    signature = inspect.signature(function)
    owner = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
    named = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD and p.name not in FIXED]
    found = dict(usual)
    for name in rng.choice(named, min(rng.choice([0, 0, 1, 1, 1, 2]), len(named)), replace=False):
        value = option(rng, owner, str(name))
        if not (name in LONG and isinstance(value, int | np.integer) and value > 3):
            found[str(name)] = value
    if rng.random() < 0.03:
        found[str(rng.choice(["n_latent", "n_layer", "lr", "nothing", "epochs", "batch_size"]))] = strange(rng)
    return found


# Strange objects: each takes a generator and an object, and returns an object


def _dense(adata: AnnData) -> np.ndarray:
    return adata.X.toarray() if sparse.issparse(adata.X) else np.asarray(adata.X, dtype=np.float32)


def _with_x(change: Callable[[np.ndarray], Any]) -> Callable[[Any, AnnData], AnnData]:
    def mutate(rng: np.random.Generator, adata: AnnData) -> AnnData:
        adata.X = change(_dense(adata))
        return adata

    return mutate


def _one(value: Any, dtype: Any = np.float64) -> Callable[[np.ndarray], Any]:
    def change(values: np.ndarray) -> Any:
        values = values.astype(dtype)
        values[min(3, len(values) - 1), 0] = value
        return values

    return change


def _unsorted(values: np.ndarray) -> Any:
    matrix = sparse.csr_matrix(values)
    for start, stop in zip(matrix.indptr, matrix.indptr[1:], strict=False):
        matrix.indices[start:stop] = matrix.indices[start:stop][::-1].copy()
        matrix.data[start:stop] = matrix.data[start:stop][::-1].copy()
    matrix.has_sorted_indices = False
    return matrix


def _twice(values: np.ndarray) -> Any:
    """Halves of every value, stored in two entries."""
    matrix = sparse.csr_matrix(values)
    data, indices = np.repeat(matrix.data / 2, 2), np.repeat(matrix.indices, 2)
    return sparse.csr_matrix((data, indices, matrix.indptr * 2), shape=matrix.shape)


def _explicit_zeros(values: np.ndarray) -> Any:
    full = sparse.csr_matrix(np.ones_like(values))
    full.data = values.ravel().copy()
    return full


# Other ways to hold the same numbers, with which results must be the same.
SAME: dict[str, Callable[[np.ndarray], Any]] = {
    "dense": lambda x: x, "csc": sparse.csc_matrix, "csr array": sparse.csr_array, "float64": lambda x: x.astype(float),
    "int64": lambda x: sparse.csr_matrix(x.astype(np.int64)), "uint8": lambda x: x.astype(np.uint8),
    "fortran": np.asfortranarray, "unsorted": _unsorted, "duplicates": _twice, "explicit zeros": _explicit_zeros,
    "float16": lambda x: x.astype(np.float16), "int32": lambda x: x.astype(np.int32),
}  # fmt: skip

EXPRESSION: dict[str, Callable[[Any, AnnData], AnnData]] = {
    **{f"X {name}": _with_x(change) for name, change in SAME.items()},
    "X sparse float16": _with_x(lambda x: _half(x)),
    "X bool": _with_x(lambda x: x > 0),
    "X object": _with_x(lambda x: x.astype(object)),
    "X complex": _with_x(lambda x: x.astype(complex)),
    "X text": _with_x(lambda x: x.astype(str)),
    "X nan": _with_x(_one(np.nan)),
    "X inf": _with_x(_one(np.inf)),
    "X negative": _with_x(_one(-1.5)),
    "X one huge": _with_x(_one(1e300)),
    "X half a count": _with_x(_one(0.5)),
    "X huge": _with_x(lambda x: x * 1e20),
    "X large": _with_x(lambda x: x * 1e9),
    "X tiny": _with_x(lambda x: x * 1e-30),
    "X zero": _with_x(lambda x: x * 0),
    "X scaled": _with_x(lambda x: (x - x.mean(0)) / (x.std(0) + 1e-9)),
    "X log": _with_x(np.log1p),
    "X constant": _with_x(np.ones_like),
    "X masked": _with_x(lambda x: np.ma.masked_array(x, x > 3)),
}


def _half(values: np.ndarray) -> Any:
    matrix = sparse.csr_matrix(values)
    matrix.data = matrix.data.astype(np.float16)
    return matrix


def _mutation(registry: dict[str, Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        registry[function.__name__.strip("_").replace("_", " ")] = function
        return function

    return add


@_mutation(EXPRESSION)
def no_x(rng: Any, adata: AnnData) -> AnnData:
    adata.X = None
    return adata


@_mutation(EXPRESSION)
def empty_rows(rng: Any, adata: AnnData) -> AnnData:
    values = _dense(adata)
    values[rng.choice(len(values), 5)] = 0
    values[:, 0] = 0
    adata.X = sparse.csr_matrix(values)
    return adata


@_mutation(EXPRESSION)
def layer_nan(rng: Any, adata: AnnData) -> AnnData:
    adata.layers["counts"] = _dense(adata) * np.nan
    return adata


@_mutation(EXPRESSION)
def raw(rng: Any, adata: AnnData) -> AnnData:
    adata.raw = adata
    return adata


@_mutation(EXPRESSION)
def gene_names(rng: Any, adata: AnnData) -> AnnData:
    n = adata.n_vars
    kind = rng.integers(6)
    if kind == 0:
        adata.var_names = ["gene"] * n
    elif kind == 1:
        adata.var_names = [str(i) for i in range(n)]
    elif kind == 2:
        adata.var_names = [f"a/{i}" for i in range(n)]
    elif kind == 3:
        adata.var_names = ["", *[f"g{i}" for i in range(1, n)]]
    elif kind == 4:
        adata.var = pd.DataFrame(index=pd.Index(np.arange(n)))
    else:
        adata.var_names = [f"Gene{i}" for i in range(n)]
    return adata


@_mutation(EXPRESSION)
def cell_names(rng: Any, adata: AnnData) -> AnnData:
    names = [*adata.obs_names[:-1], adata.obs_names[0]] if rng.random() < 0.5 else [str(i) for i in range(adata.n_obs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.obs_names = names
    return adata


@_mutation(EXPRESSION)
def few(rng: Any, adata: AnnData) -> AnnData:
    return adata[: rng.integers(0, 12)].copy()


@_mutation(EXPRESSION)
def few_genes(rng: Any, adata: AnnData) -> AnnData:
    return adata[:, : rng.integers(0, 4)].copy()


@_mutation(EXPRESSION)
def view(rng: Any, adata: AnnData) -> AnnData:
    some = adata[np.sort(rng.permutation(adata.n_obs)[: max(adata.n_obs - 5, 1)])]
    _ = some.X  # of sparse float16 anndata itself cannot read it
    return some


@_mutation(EXPRESSION)
def permuted(rng: Any, adata: AnnData) -> AnnData:
    return adata[rng.permutation(adata.n_obs)][:, rng.permutation(adata.n_vars)].copy()


COLUMNS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "all nan": lambda rng, n: np.full(n, np.nan),
    "some nan": lambda rng, n: pd.Categorical(np.where(rng.random(n) < 0.5, "a", "b")).map({"a": "a"}),
    "real": lambda rng, n: rng.random(n),
    "whole": lambda rng, n: rng.integers(0, 3, n),
    "whole as real": lambda rng, n: np.where(rng.random(n) < 0.2, np.nan, rng.integers(0, 3, n)),
    "bool": lambda rng, n: rng.random(n) < 0.5,
    "one class": lambda rng, n: ["a"] * n,
    "a class per cell": lambda rng, n: [f"c{i}" for i in range(n)],
    "mixed": lambda rng, n: pd.Series([1, "a", None, 2.5] * n)[:n].to_numpy(dtype=object),
    "unused": lambda rng, n: pd.Categorical(["a", "b"] * (n // 2) + ["a"] * (n % 2), categories=["z", "b", "a"]),
    "words": lambda rng, n: np.array(["nan", "", "NA", "a", "b"])[rng.integers(0, 5, n)],
    "dates": lambda rng, n: pd.date_range("2020", periods=n),
    "lists": lambda rng, n: pd.Series([[1]] * n, dtype=object).to_numpy(),
    "slash": lambda rng, n: np.array(["a/b", "c"])[rng.integers(0, 2, n)],
    "nullable": lambda rng, n: pd.array([1, None, 2] * n, dtype="Int64")[:n],
    "text": lambda rng, n: pd.array(["a", None, "b"] * n, dtype="string")[:n],
    "infinite": lambda rng, n: np.where(rng.random(n) < 0.5, np.inf, 1.0),
}


@_mutation(EXPRESSION)
def column(rng: Any, adata: AnnData) -> AnnData:
    name = str(rng.choice(list(COLUMNS)))
    where = str(rng.choice(["type", "known", "section", "batch"]))
    adata.obs[where] = COLUMNS[name](rng, adata.n_obs)
    return adata


@_mutation(EXPRESSION)
def column_again(rng: Any, adata: AnnData) -> AnnData:
    return column(rng, adata)


def _graph(adata: AnnData) -> Any:
    rng = np.random.default_rng(0)
    n = adata.n_obs
    degree = min(4, max(n - 1, 0))
    row, col = np.repeat(np.arange(n), degree), rng.integers(0, max(n, 1), n * degree)
    graph = sparse.csr_matrix((np.ones(len(row), dtype=np.float32), (row, col)), shape=(n, n))
    graph.data[:] = 1
    return graph


def _spoiled(graph: Any, value: float) -> Any:
    graph.data[0] = value
    return graph


GRAPHS: dict[str, Callable[[Any], Any]] = {
    "dense": lambda g: g.toarray(), "csc": lambda g: g.tocsc(), "ints": lambda g: g.astype(np.int64),
    "bool": lambda g: g.astype(bool), "empty": lambda g: g * 0,
    "only loops": lambda g: sparse.eye(g.shape[0]).tocsr(),
    "negative": lambda g: _spoiled(g, -1), "nan": lambda g: _spoiled(g, np.nan), "inf": lambda g: _spoiled(g, np.inf),
    "huge": lambda g: _spoiled(g, 1e30), "directed": lambda g: sparse.triu(g).tocsr(),
    "zeros": lambda g: _spoiled(g, 0),
    "weights": lambda g: g.multiply(0.3).tocsr(), "frame": lambda g: pd.DataFrame(g.toarray()),
    "complex": lambda g: g.astype(complex), "complete": lambda g: sparse.csr_matrix(np.ones(g.shape)),
    "text": lambda g: g.toarray().astype(str), "isolated": lambda g: sparse.vstack([g[:1] * 0, g[1:]]).tocsr(),
    "good": lambda g: g, "csr array": sparse.csr_array,
}  # fmt: skip


@_mutation(EXPRESSION)
def graph(rng: Any, adata: AnnData) -> AnnData:
    made = GRAPHS[str(rng.choice(list(GRAPHS)))](_graph(adata)) if adata.n_obs else None
    if isinstance(made, pd.DataFrame):
        made.index = made.columns = adata.obs_names
    if made is not None:
        adata.obsp["spatial_connectivities"] = made
    return adata


@_mutation(EXPRESSION)
def graph_again(rng: Any, adata: AnnData) -> AnnData:
    return graph(rng, adata)


@_mutation(EXPRESSION)
def no_graph(rng: Any, adata: AnnData) -> AnnData:
    for key in list(adata.obsp):
        del adata.obsp[key]
    return adata


def _all(value: Any) -> Callable[[np.ndarray], Any]:
    def change(places: np.ndarray) -> Any:
        return np.full_like(places, value)

    return change


PLACES: dict[str, Callable[[np.ndarray], Any]] = {
    "nan": lambda p: np.where(np.arange(len(p))[:, None] == 0, np.nan, p), "inf": lambda p: p + np.inf,
    "equal": _all(1.0), "line": lambda p: p * [1, 0], "1d": lambda p: p[:, :1],
    "3d": lambda p: np.hstack([p, p[:, :1]]),
    "4d": lambda p: np.hstack([p, p]), "ints": lambda p: p.astype(int), "huge": lambda p: p * 1e300,
    "large": lambda p: p * 1e15, "far": lambda p: p + 1e12, "tiny": lambda p: p * 1e-200,
    "text": lambda p: p.astype(str),
    "object": lambda p: p.astype(object), "sparse": sparse.csr_matrix, "float32": lambda p: p.astype(np.float32),
    "complex": lambda p: p + 1j, "bool": lambda p: p > 50, "none": lambda p: p[:, :0],
    "pairs": lambda p: np.round(p / 50),
}  # fmt: skip


@_mutation(EXPRESSION)
def places(rng: Any, adata: AnnData) -> AnnData:
    adata.obsm["spatial"] = PLACES[str(rng.choice(list(PLACES)))](np.asarray(adata.obsm["spatial"], dtype=float))
    return adata


@_mutation(EXPRESSION)
def places_as_frame(rng: Any, adata: AnnData) -> AnnData:
    frame = pd.DataFrame(np.asarray(adata.obsm["spatial"]), columns=["x", "y"], index=adata.obs_names)
    adata.obsm["spatial"] = frame if rng.random() < 0.5 else frame.assign(name="a")
    return adata


@_mutation(EXPRESSION)
def no_places(rng: Any, adata: AnnData) -> AnnData:
    del adata.obsm["spatial"]
    return adata


JUNK: dict[str, Any] = {
    "spatial": {}, "fimp_modality": "image", "X_fimp": 3, "spatial_neighbors": "old", "fimp_niche": {"n_niches": None},
    "fimp_attention": {"groups": 1}, "fimp_gene_pairs": {"pairs": 1},
    "fimp": {"genes": None}, "fimp_known": [], "fimp_niche_colors": "red",
}  # fmt: skip


@_mutation(EXPRESSION)
def junk(rng: Any, adata: AnnData) -> AnnData:
    key = str(rng.choice(list(JUNK)))
    adata.uns[key] = JUNK[key]
    return adata


@_mutation(EXPRESSION)
def kind(rng: Any, adata: AnnData) -> AnnData:
    adata.uns["fimp_modality"] = [{"kind": "signal"}, {"kind": "nothing"}, {}, {"kind": "feature"}][rng.integers(4)]
    return adata


REPRESENTATIONS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "nan": lambda rng, n: np.full((n, 3), np.nan), "constant": lambda rng, n: np.ones((n, 3)),
    "one column": lambda rng, n: rng.random((n, 1)), "no column": lambda rng, n: np.empty((n, 0)),
    "3d": lambda rng, n: rng.random((n, 2, 2)), "text": lambda rng, n: rng.random((n, 2)).astype(str),
    "sparse": lambda rng, n: sparse.random(n, 5, 0.5, "csr", random_state=0),
    "ints": lambda rng, n: rng.integers(0, 9, (n, 3)),
    "huge": lambda rng, n: rng.random((n, 3)) * 1e300, "complex": lambda rng, n: rng.random((n, 2)) + 1j,
    "wide": lambda rng, n: rng.random((n, 80)), "bool": lambda rng, n: rng.random((n, 4)) < 0.5,
    "two values": lambda rng, n: np.repeat([[0.0], [1.0]], [n // 2, n - n // 2], axis=0),
}  # fmt: skip


@_mutation(EXPRESSION)
def representation(rng: Any, adata: AnnData) -> AnnData:
    adata.obsm["X_fimp"] = REPRESENTATIONS[str(rng.choice(list(REPRESENTATIONS)))](rng, adata.n_obs)
    return adata


@_mutation(EXPRESSION)
def damaged_results(rng: Any, adata: AnnData) -> AnnData:
    places = [
        (slot, key) for slot in ("obs", "obsm", "obsp", "layers", "uns") for key in getattr(adata, slot)
        if key is not None and "fimp" in str(key)
    ]  # fmt: skip
    if places:
        slot, key = places[rng.integers(len(places))]
        held = getattr(adata, slot)
        if isinstance(held[key], Mapping) and len(held[key]) and rng.random() < 0.6:
            changed = dict(held[key])
            del changed[list(changed)[rng.integers(len(changed))]]
            held[key] = changed
        else:
            del held[key]
    return adata


@_mutation(EXPRESSION)
def not_an_object(rng: Any, adata: AnnData) -> Any:
    return [None, "adata.h5ad", adata.to_df() if adata.X is not None else 1, _dense(adata), {}, AnnData, [adata]][
        rng.integers(7)
    ]


def mutated(rng: np.random.Generator, data: Any) -> tuple[Any, list[str]]:
    """Return an object with none to three oddities, and their names."""
    names = [str(name) for name in rng.choice(list(EXPRESSION), rng.choice([0, 1, 1, 1, 2]), replace=False)]
    done = []
    for name in names:
        if isinstance(data, MuData):
            part = str(rng.choice(list(data.mod)))
            try:
                changed = EXPRESSION[name](rng, data.mod[part].copy())
                with quiet_mudata():
                    data = MuData({**data.mod, part: changed}) if isinstance(changed, AnnData) else changed
            except Exception:  # an oddity that does not fit, or that anndata itself refuses
                continue
        elif isinstance(data, AnnData):
            try:
                data = EXPRESSION[name](rng, data)
            except Exception:
                continue
        done.append(name)
    return data, done
