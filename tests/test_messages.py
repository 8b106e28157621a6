"""Warnings and log lines as the user sees them."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest

from fimp_sc import pp, tl
from fimp_sc._logging import user_messages, warn
from fimp_sc.model import FIMP

QUICK = {
    "max_epochs": 1, "accelerator": "cpu", "verbose": False, "train_kwargs": {"batch_size": 32},
    "model_kwargs": {"n_latent": 16, "n_heads": 2, "n_tokens": 12},
}  # fmt: skip
LABELS, CELLS, GENES, ALONE = "a single cell", "cells are empty", "genes are zero", "have no neighbors"


@pytest.fixture
def odd(small_toy):
    """Cells with all that a warning is for: an empty cell, an empty gene, a cell alone, a label of one cell."""
    adata = small_toy[::8, :30].copy()
    adata.obs["label"] = np.where(np.arange(adata.n_obs) < 1, "rare", adata.obs["section"].astype(str))
    values = adata.X.toarray() + 1
    values[3], values[:, 4] = 0, 0
    adata.X = values
    pp.spatial_graph(adata, library_key="section")
    graph = adata.obsp["spatial_connectivities"].tolil()
    graph[7] = 0
    adata.obsp["spatial_connectivities"] = graph.tocsr()
    return adata


def check(caught: list, *expected: str) -> None:
    """Each warning comes once, and points at this file."""
    assert {warning.filename for warning in caught} == {__file__}
    for text in expected:
        assert sum(text in str(warning.message) for warning in caught) == 1, text
    assert len(caught) == len(expected)


def test_warnings_of_tools_point_at_the_call_and_come_once(odd) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tl.annotate(odd, "label", library_key="section", **QUICK)
    check(caught, LABELS, CELLS, GENES, ALONE)
    (line,) = {warning.lineno for warning in caught}
    assert "tl.annotate(odd" in Path(__file__).read_text(encoding="utf-8").splitlines()[line - 1]
    other = odd.copy()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tl.embed(other, model=tl.get_model(odd), accelerator="cpu", verbose=False)
    check(caught, CELLS, ALONE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pp.match_genes(odd, list(odd.var_names[:2]))
        pp.spatial_graph(odd)
    check(caught, "in the vocabulary", ALONE)


def test_warnings_of_the_model_point_at_the_call(odd) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FIMP.setup_anndata(odd, labels_key="label", library_key="section")
    check(caught, LABELS, CELLS, GENES, ALONE)
    model = FIMP(odd, n_latent=16, n_heads=2, use_weights=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # through Lightning, several times
        model.train(max_epochs=1, accelerator="cpu", batch_size=32, enable_progress_bar=False)
    check(caught, "use_weights=True")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FIMP.load_query_data(odd.copy(), model)
    check(caught, CELLS, ALONE, "use_weights=True")


def test_warnings_of_images_point_at_the_call(pictures) -> None:
    FIMP.setup_mudata(pictures)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FIMP(pictures, token_size=2)
    check(caught, "are left out")


def test_a_call_says_the_same_thing_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with user_messages(verbose=False):
            warn("one")
            with user_messages(verbose=False):
                warn("one")
            warn("two")
    check(caught, "one", "two")
    with pytest.warns(UserWarning, match="one"):
        warn("one")


def test_niches_say_what_they_found(small_toy, caplog) -> None:
    small_toy.obsm["X_fimp"] = np.random.default_rng(0).normal(size=(small_toy.n_obs, 5))
    for verbose in (False, True):
        with caplog.at_level(logging.INFO, logger="fimp_sc"):
            tl.niches(small_toy, smooth=0, n_seeds=2, n_range=(2, 4), verbose=verbose)
        assert len(caplog.records) == verbose
    text = caplog.records[0].getMessage()
    assert text.startswith(f"{small_toy.uns['fimp_niche']['n_niches']} niches (the largest stable number from 2 to 4)")
    assert f"{small_toy.n_obs} cells" in text
    assert "obsm['X_fimp'] (5 columns)" in text


def test_methods_that_the_model_lacks_are_not_listed(small_toy) -> None:
    pp.spatial_graph(small_toy, library_key="section")
    FIMP.setup_anndata(small_toy, library_key="section")
    model = FIMP(small_toy, n_latent=16, n_heads=2)
    for name in ("get_normalized_expression", "differential_abundance"):
        for listed in (FIMP, model):
            assert name not in dir(listed)
            assert not hasattr(listed, name)
            assert "get_latent_representation" in dir(listed)
    with pytest.raises(AttributeError, match=r"get_expression\(\)"):
        model.get_normalized_expression()
