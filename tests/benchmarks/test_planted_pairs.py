"""The simulated tissues hold what the benchmark says, and methods are scored by it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse


@pytest.fixture
def planted(load_script):
    return load_script("planted_pairs")


def correlations(adata, acts) -> np.ndarray:
    """Correlation of the second gene with the mean of the first over neighbors, as ``acts``."""
    x, graph = adata.layers["log"].toarray(), adata.obsp["spatial_connectivities"]
    types, table = adata.obs["type"].cat.codes.to_numpy(), adata.uns["table"]
    out = np.zeros(acts.shape)
    for i, (first, second) in enumerate(table.to_numpy()):
        of, to = x[:, adata.var_names.get_loc(first)], x[:, adata.var_names.get_loc(second)]
        for sender, receiver in np.ndindex(acts.shape[1:]):
            senders = sparse.csr_matrix(graph.multiply(types == sender))
            n = np.asarray(senders.sum(1)).ravel()
            cells = (types == receiver) & (n > 0)
            out[i, sender, receiver] = np.corrcoef((senders @ of)[cells] / n[cells], to[cells])[0, 1]
    return out


def test_pairs_act_where_they_are_planted_and_decoys_only_follow_the_tissue(planted):
    adata, acts = planted.tissue("plain", 0.8, 0)
    assert acts.sum((1, 2)).tolist() == [1] * 10 + [0] * 20
    found = correlations(adata, acts)
    assert found[acts].min() > 0.15
    assert np.abs(found[~acts]).mean() < 0.06
    assert np.quantile(np.abs(found[~acts]), 0.99) < found[acts].min()
    for kind in ("domains", "gradients"):
        adata, acts = planted.tissue(kind, 0.8, 0)
        found = correlations(adata, acts)
        assert found[acts].mean() > 0.2
        assert found[10:].mean() > 0.15, "decoys go together in neighbors"


def test_scores_are_those_of_tests_below_the_level(planted):
    acts = np.zeros((3, 2, 2), dtype=bool)
    acts[0, 0, 1] = acts[1, 1, 0] = True
    fdr = np.full(acts.shape, 0.5)
    fdr[0, 0, 1], fdr[2, 0, 0], fdr[1, 0, 0], fdr[1, 1, 0] = 0.01, 0.05, 0.02, np.nan
    assert planted.score(fdr, acts) == pytest.approx({"power": 0.5, "found": 3, "wrong": 2, "false_rate": 2 / 3})
    by_pair = planted.score(np.array([0.01, 0.2, 0.04]), acts)
    assert by_pair == pytest.approx({"power": 0.5, "found": 2, "wrong": 1, "false_rate": 0.5})


def test_the_tool_finds_them_and_a_correlation_finds_the_domains(planted, load_script):
    harness = load_script("_harness")
    adata, acts = planted.tissue("domains", 0.8, 0)
    run = harness.Run(0, True, None)
    ours = planted.score(planted.fimp(adata, run).values, acts)
    theirs = planted.score(planted.spearman(adata, run).values, acts)
    assert ours["power"] >= 0.85
    assert ours["false_rate"] <= 0.1
    assert theirs["false_rate"] > 0.5
