"""Strange objects and options end well: with a result that can be used, or with an error that helps.

``FIMP_SC_FUZZ=3000 pytest tests/test_fuzz.py`` tries as many cases; ``FIMP_SC_FUZZ_FROM`` is the first seed.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import cache

import numpy as np
import pytest
from fuzz_objects import _model, _section
from fuzz_oddities import SAME, _dense
from fuzzing import embedding_of, run, written_and_read

import fimp_sc

FIRST, NUMBER = int(os.environ.get("FIMP_SC_FUZZ_FROM", "0")), int(os.environ.get("FIMP_SC_FUZZ", "60"))
STRIDE = 20
case = cache(run)


@pytest.fixture(autouse=True)
def _files_that_go_away(tmp_path, monkeypatch) -> None:
    """Strange names of files and folders are written to where tests write."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("first", range(FIRST, FIRST + NUMBER, STRIDE))
def test_strange_calls_end_well(first: int) -> None:
    cases = [case(seed) for seed in range(first, min(first + STRIDE, FIRST + NUMBER))]
    bad = [found for found in cases if found.outcome not in ("ok", "clear")]
    assert not bad, "\n\n".join(map(str, bad))


def test_both_outcomes_occur() -> None:
    """Neither of them is all that the cases show."""
    outcomes = Counter(case(seed).outcome for seed in range(STRIDE))
    assert outcomes["ok"] >= 2
    assert outcomes["clear"] >= 2


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return embedding_of(_section().copy())


@pytest.mark.parametrize("name", SAME)
def test_the_same_numbers_give_the_same_embedding(expected, name) -> None:
    adata = _section().copy()
    adata.X = SAME[name](_dense(adata))
    np.testing.assert_allclose(embedding_of(adata), expected, atol=1e-4)


@pytest.mark.parametrize("backed", [None, "r"])
def test_files_give_the_same_embedding(expected, backed, tmp_path) -> None:
    adata = written_and_read(_section(), tmp_path, backed=backed)
    np.testing.assert_allclose(embedding_of(adata), expected, atol=1e-4)


def test_layer_gives_the_same_embedding(expected) -> None:
    adata = _section().copy()
    adata.X = np.full(adata.shape, np.nan)
    np.testing.assert_allclose(embedding_of(adata, layer="counts"), expected, atol=1e-4)


def test_order_of_cells_and_genes_does_not_matter_to_a_model() -> None:
    """A graph that exists moves along with the cells."""
    rng = np.random.default_rng(0)
    adata = _section().copy()
    fimp_sc.pp.spatial_graph(adata, library_key="section")
    cells, genes = rng.permutation(adata.n_obs), rng.permutation(adata.n_vars)
    other = adata[cells][:, genes].copy()
    how = {"model": _model(), "max_epochs": None}
    np.testing.assert_allclose(embedding_of(other, **how), embedding_of(adata, **how)[cells], atol=1e-4)
