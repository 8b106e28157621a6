"""Random calls: strange objects and strange options, drawn from a seed, and a judge of what comes of them."""

from __future__ import annotations

import hashlib
import inspect
import re
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

import fimp_sc
from fimp_sc import _option_rules, _options
from fimp_sc.data._modality import quiet_mudata

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
QUICK = {"max_epochs": 1, "accelerator": "cpu", "verbose": False}


# Objects


@cache
def _section() -> AnnData:
    rng = np.random.default_rng(0)
    n_obs, n_vars = 60, 24
    kind = rng.integers(0, 3, n_obs)
    rate = 0.5 + 3 * (kind[:, None] == np.arange(n_vars) % 3)
    adata = AnnData(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)))
    adata.obs_names = [f"cell{i}" for i in range(n_obs)]
    adata.var_names = [f"gene{i}" for i in range(n_vars)]
    adata.obs["type"] = pd.Categorical(np.array(["a", "b", "c"])[kind])
    adata.obs["known"] = pd.Categorical(np.where(rng.random(n_obs) < 0.3, "Unknown", adata.obs["type"].astype(str)))
    adata.obs["section"] = pd.Categorical(np.repeat(["one", "two"], n_obs // 2))
    adata.obs["area"] = rng.random(n_obs)
    adata.obs["batch"] = pd.Categorical(np.array(["x", "y"])[rng.integers(0, 2, n_obs)])
    adata.obsm["spatial"] = rng.random((n_obs, 2)) * 100
    adata.layers["counts"] = adata.X.copy()
    return adata


@cache
def _done() -> AnnData:
    """A section with results of all tools."""
    adata = _section().copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fimp_sc.tl.embed(adata, library_key="section", **QUICK)
        fimp_sc.tl.annotate(adata, "known", library_key="section", **QUICK)
        fimp_sc.tl.impute(adata, library_key="section", **QUICK)
        fimp_sc.tl.niches(adata, 3, library_key="section")
        fimp_sc.tl.attention(adata, "type", library_key="section", n_permutations=10, min_edges=1, **QUICK)
        fimp_sc.tl.gene_pairs(adata, "type", n_genes=4, n_permutations=10, min_edges=1, min_support=1, verbose=False)
    return adata


@cache
def _model() -> fimp_sc.model.FIMP:
    adata = _section().copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fimp_sc.tl.annotate(adata, "known", library_key="section", **QUICK)
    return fimp_sc.tl.get_model(adata)


def _copied(data: Any) -> Any:
    with quiet_mudata():
        return data.copy()


@cache
def _recordings() -> MuData:
    rng = np.random.default_rng(1)
    bold = rng.normal(size=(2, 6, 40)) * 20 + 1e3
    labels = {"lobe": ["front", "back", "side"] * 2}
    return fimp_sc.pp.fmri(bold, coordinates=rng.normal(size=(6, 3)), n_neighbors=2, labels=labels)


@cache
def _pictures() -> MuData:
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 255, (10, 8, 8, 3)).astype(np.uint8)
    labels = {"site": ["bright", "dark"] * 5}
    return fimp_sc.pp.images(pixels, coordinates=rng.random((10, 2)), n_neighbors=2, labels=labels)


@cache
def _joint() -> MuData:
    rng = np.random.default_rng(3)
    names, points = [f"n{i}" for i in range(24)], rng.random((24, 2))
    rna = AnnData(sparse.csr_matrix(rng.poisson(2, (24, 10)).astype(np.float32)), obs=pd.DataFrame(index=names))
    bold = AnnData(rng.normal(5, 2, (20, 12)).astype(np.float32), obs=pd.DataFrame(index=names[4:]))
    bold.uns["fimp_modality"] = {"kind": "signal"}
    rna.var_names, bold.var_names = [f"g{i}" for i in range(10)], [f"t{i}" for i in range(12)]
    with quiet_mudata():
        mdata = MuData({"rna": rna, "bold": bold})
    mdata.obs["kind"] = pd.Categorical(np.array(["one", "two"])[rng.integers(0, 2, 24)])
    mdata.obsm["spatial"] = points
    near = np.linalg.norm(points[:, None] - points, axis=2).argsort(1)[:, 1:4]
    mdata.obsp["spatial_connectivities"] = sparse.csr_matrix(
        (np.ones(near.size), (np.repeat(np.arange(24), 3), near.ravel())), shape=(24, 24)
    )
    return mdata


# Snapshots


def snapshot(data: Any) -> dict[str, str]:
    """Return a digest of everything in an object by its place; of what is no object, none."""
    found: dict[str, str] = {}
    if not isinstance(data, AnnData | MuData):
        return found
    parts = {"": data} | (dict(data.mod) if isinstance(data, MuData) else {})
    for name, part in parts.items():
        found[f"{name}|obs_names"], found[f"{name}|var_names"] = _digest(part.obs_names), _digest(part.var_names)
        for slot in ("obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns"):
            entries = getattr(part, slot, None)
            for key in [] if entries is None else [key for key in entries if key is not None]:
                # scvi-tools' own identifiers, as documented.
                if not str(key).startswith("_scvi"):
                    found[f"{name}|{slot}|{key}"] = _digest(entries[key])
        if isinstance(part, AnnData):
            found[f"{name}|X"] = _digest(part.X)
            found[f"{name}|raw"] = _digest(None if part.raw is None else part.raw.X)
    return found


def _digest(value: Any) -> str:
    hashed = hashlib.sha1()
    _feed(hashed, value)
    return hashed.hexdigest()


def _feed(hashed: Any, value: Any) -> None:
    if sparse.issparse(value):
        hashed.update(f"{value.format} {value.dtype} {value.shape}".encode())
        for part in ("data", "indices", "indptr", "row", "col", "offsets"):
            if isinstance(getattr(value, part, None), np.ndarray):
                hashed.update(np.ascontiguousarray(getattr(value, part)).tobytes())
    elif isinstance(value, np.ndarray):
        hashed.update(f"{value.dtype} {value.shape}".encode())
        hashed.update(repr(value.tolist()).encode() if value.dtype == object else np.ascontiguousarray(value).tobytes())
    elif isinstance(value, pd.DataFrame):
        hashed.update(repr(list(value.columns)).encode())
        for i in range(value.shape[1]):
            _feed(hashed, value.iloc[:, i])
    elif isinstance(value, pd.Series | pd.Index | pd.Categorical):
        hashed.update(f"{value.dtype!r} {list(value)!r}".encode())
        if isinstance(value, pd.Series):
            _feed(hashed, value.index)
    elif isinstance(value, Mapping):
        for key in value:
            hashed.update(repr(key).encode())
            _feed(hashed, value[key])
    elif hasattr(value, "shape") and hasattr(value, "__getitem__"):  # in a file
        hashed.update(repr(np.asarray(value[...] if not hasattr(value, "to_memory") else value.to_memory())).encode())
    else:
        hashed.update(repr(value).encode())


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
    if isinstance(rule, _option_rules.Arguments):
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
