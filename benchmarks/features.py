"""Classes of nodes of a citation graph whose features are words, each of them a token.

The graph is simulated, because Cora and its like cannot be had without a download; it has Cora's size and shape, and
the figures say nothing about Cora itself. 2,708 papers of 7 classes (Cora's sizes) have about 5,220 links, 81 % within
the class: papers differ in how loyal they are to it, and those that are not cite one other class. Each has about 18 of
1,433 words: every class has topics of its own words, beside words that all classes share, and part of the papers say
little about their class. Split as in Planetoid: 20 labeled papers of each class for training, 500 for validation
(early stopping, hyperparameters), 1,000 for the test.
Transductive: words and links of all papers are there in training.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

import _harness
import _nodes
from _baselines import spatial_features
from _harness import Fit, Run
from _nodes import Nodes
from _smoothing import averaged

CLASS_SIZES = (818, 426, 418, 351, 298, 217, 180)
N_WORDS, N_EDGES, WITHIN = 1433, 5278, 0.81
WORDS_EACH, TOPICAL = 18, 0.25  # mean number of words of a paper; mean share of them from its class's topics
N_TRAIN, N_VALIDATION, N_TEST = 20, 500, 1000


def cite(seed: int) -> tuple[sp.csr_matrix, sp.csr_matrix, np.ndarray]:
    """Words (n, 1433) of 0 and 1, symmetric links (n, n), and classes (n,)."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(CLASS_SIZES)), CLASS_SIZES))
    n = len(labels)
    fame = rng.pareto(2.5, n) + 0.2  # how much a paper is cited
    chance = {c: fame * (labels == c) / fame[labels == c].sum() for c in range(len(CLASS_SIZES))}
    # Every paper cites at least one other.
    source = np.r_[np.arange(n), rng.integers(n, size=N_EDGES - n)]
    target = np.empty_like(source)
    loyalty = rng.beta(WITHIN, 1 - WITHIN, n)
    second = (labels + rng.integers(1, len(CLASS_SIZES), n)) % len(CLASS_SIZES)
    for i, paper in enumerate(source):
        c = labels[paper] if rng.random() < loyalty[paper] else second[paper]
        target[i] = rng.choice(n, p=chance[c])
    links = sp.coo_matrix((np.ones(N_EDGES, np.float32), (source, target)), shape=(n, n)).tocsr()
    links = ((links + links.T) > 0).astype(np.float32)
    links.setdiag(0)
    links.eliminate_zeros()

    common = rng.dirichlet(np.full(N_WORDS, 0.3))
    topics = rng.dirichlet(np.full(N_WORDS, 0.02), (len(CLASS_SIZES), 3))  # three topics in each class
    share = rng.beta(1, 1 / TOPICAL - 1, n)
    rows, columns = [], []
    for i, c in enumerate(labels):
        words = share[i] * topics[c, rng.integers(3)] + (1 - share[i]) * common
        chosen = np.unique(rng.choice(N_WORDS, max(3, rng.poisson(WORDS_EACH + 1)), p=words))
        rows.append(np.full(len(chosen), i))
        columns.append(chosen)
    where = np.concatenate(rows), np.concatenate(columns)
    return sp.csr_matrix((np.ones(len(where[0]), np.float32), where), shape=(n, N_WORDS)), links, labels


def split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training, validation and test papers, boolean (n,)."""
    order = np.random.default_rng(seed).permutation(len(labels))
    train = np.concatenate([order[labels[order] == c][:N_TRAIN] for c in np.unique(labels)])
    rest = order[~np.isin(order, train)]
    parts = train, rest[:N_VALIDATION], rest[N_VALIDATION : N_VALIDATION + N_TEST]
    return tuple(np.isin(np.arange(len(labels)), part) for part in parts)


def problem(data: str, args: Any, seed: int) -> tuple[Nodes, Callable[[np.ndarray], dict[str, float]]]:
    """The papers of which 620 have a class, and the scores of 1,000 others."""
    import fimp_sc

    words, links, truth = cite(seed)
    train, validation, test = split(truth, seed)
    labels = np.where(train | validation, truth, -1)

    def build(order: np.ndarray) -> Any:
        return fimp_sc.pp.features(words, links[order][:, order], labels=_nodes.known(labels))

    x = normalize(words, norm="l1").toarray() * np.float32(WORDS_EACH)
    return Nodes(x, links, labels, train, validation, build), _nodes.scores(truth, test)


def logistic(problem: Nodes, run: Run, kind: str) -> Fit:
    """Logistic regression on words of a paper, of its neighbors, of both, or on means of means over both."""
    features = spatial_features(problem.x, problem.graph)
    features[TWICE] = averaged(problem.x, problem.graph, times=2)
    models = [LogisticRegression(C=c, max_iter=3000) for c in (0.1, 1.0, 10.0, 100.0)]
    return Fit(_nodes.most_accurate(problem, features[kind], models))


TWICE = "mean of own and neighbors, twice"
BASELINES = {
    f"logistic, {kind}": partial(logistic, kind=kind) for kind in ("own", "neighbors", "own + neighbors", TWICE)
}
GROUPS = _nodes.groups(BASELINES, "FIMP, shuffled graph", hidden=64)

if __name__ == "__main__":
    default = ("baselines", "networks", "fimp")
    _harness.main("features", __doc__, ("simulated citations",), problem, GROUPS, default=default, more=())
