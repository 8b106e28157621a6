from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.spatial import cKDTree

from fimp_sc.data import CenteredTokenizer, ExpressionReader, GraphData, NodeGraph


def make_graph_data(
    n=90, n_genes=25, seed=0, *, expression=None, matrix=None, hidden=None, self_loops=True, n_neighbors=4
):
    """Cells in two libraries with a kNN graph in each, and log-normalized expression.

    Statistics are those of `expression`, values those of `matrix`.
    """
    rng = np.random.default_rng(seed)
    coordinates, library = rng.random((n, 2)), np.repeat([0, 1], [n // 3, n - n // 3])
    graph = sparse.lil_matrix((n, n))
    for code in (0, 1):
        mine = np.flatnonzero(library == code)
        for i, near in zip(mine, cKDTree(coordinates[mine]).query(coordinates[mine], n_neighbors + 1)[1], strict=True):
            graph[i, mine[near[1:]]] = 1.0
    if expression is None:
        expression = np.log1p(rng.poisson(1.0, (n, n_genes))).astype(np.float32)
    genes = np.arange(n_genes)
    statistics = ExpressionReader(expression, genes, "log", None).gene_statistics(np.arange(n // 2))
    return GraphData(
        expression=ExpressionReader(
            expression if matrix is None else matrix, genes, "log", statistics, batch=library, hidden=hidden
        ),
        graph=NodeGraph(graph.tocsr(), self_loops=self_loops),
        coordinates=coordinates,
        library=library,
        label=rng.integers(-1, 3, n),
        tokenizer=CenteredTokenizer(torch.from_numpy(rng.permutation(n_genes))),
    )


@pytest.fixture
def graph_data():
    return make_graph_data()


@pytest.fixture
def graph_data_factory():
    return make_graph_data
