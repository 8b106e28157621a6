"""Calls of several threads give what they give one after the other."""

from __future__ import annotations

import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import anndata as ad
import numpy as np
import pytest
import torch

import fimp_sc
from fimp_sc.model import FIMP

# Sums round otherwise where memory lies otherwise; other random numbers change results by more than a hundredth.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def side_by_side(*tasks):
    """Do all tasks at once, each in a thread of its own."""
    barrier = Barrier(len(tasks))

    def start(task):
        barrier.wait(60)
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result(600) for future in [pool.submit(start, task) for task in tasks]]


@pytest.fixture
def process():
    """The global state that results must neither depend on nor change."""

    def state():
        levels = {name: logging.getLogger(name).level for name in ("fimp_sc", "lightning.pytorch", "scvi")}
        return torch.get_rng_state().tolist(), list(warnings.filters), levels, logging.getLogger("fimp_sc").handlers[:]

    before = state()
    yield
    assert state() == before


@pytest.mark.usefixtures("process")
def test_calls_in_threads_give_what_they_give_one_after_the_other(tissue, quick) -> None:
    def embed(seed: int, part: ad.AnnData):
        adata = part.copy()
        fimp_sc.tl.embed(adata, **{**quick, "max_epochs": 3, "random_state": seed})
        return adata.obsm["X_fimp"], fimp_sc.tl.get_model(adata).history["train_loss"].to_numpy(dtype=float)

    # Parts are cut here: anndata hides a warning of pandas while it makes one, which threads undo for each other.
    cases = [(0, tissue[:80].copy()), (1, tissue[20:].copy()), (0, tissue.copy())]
    expected = [embed(*case) for case in cases]
    found = side_by_side(*[lambda case=case: embed(*case) for case in cases])
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a[0], b[0], **ROUNDING)
        np.testing.assert_allclose(a[1], b[1], **ROUNDING)


@pytest.mark.usefixtures("process")
def test_models_of_threads_are_made_and_trained_as_alone(tissue) -> None:
    fimp_sc.pp.spatial_graph(tissue, n_neighbors=4)

    def made(seed: int) -> dict[str, np.ndarray]:
        adata = tissue.copy()
        FIMP.setup_anndata(adata, labels_key="label")
        model = FIMP(adata, n_latent=16, n_heads=2, random_state=seed)
        model.train(2, accelerator="cpu", batch_size=16, enable_progress_bar=False)
        return {name: value.numpy() for name, value in model.module.state_dict().items()}

    expected = [made(seed) for seed in (3, 4)]
    found = side_by_side(lambda: made(3), lambda: made(4))
    for a, b in zip(expected, found, strict=True):
        for name, value in a.items():
            np.testing.assert_allclose(value, b[name], err_msg=name, **ROUNDING)
    weights = [np.concatenate([value.ravel() for name, value in part.items() if "weight" in name]) for part in expected]
    assert np.abs(weights[0] - weights[1]).max() > 0.1, "seeds differ by more than rounding"


@pytest.mark.usefixtures("process")
def test_niches_in_threads_are_those_of_one_call_after_the_other(tissue) -> None:
    rng = np.random.default_rng(0)
    objects = []
    for n_obs in (400, 300, 400):
        adata = ad.AnnData(obsm={"X_fimp": rng.normal(size=(n_obs, 6)) + 4 * rng.integers(0, 4, (n_obs, 1))})
        adata.obsm["spatial"] = rng.random((n_obs, 2))
        fimp_sc.pp.spatial_graph(adata)
        objects.append(adata)

    def divided(number: int) -> tuple[list[str], np.ndarray]:
        adata = objects[number].copy()
        fimp_sc.tl.niches(adata, n_range=(2, 6), random_state=number, verbose=False)
        return adata.obs["fimp_niche"].tolist(), adata.uns["fimp_niche"]["stability"]["stability"].to_numpy()

    expected = [divided(number) for number in range(3)]
    found = side_by_side(*[lambda number=number: divided(number) for number in range(3)])
    for (names, stability), (there, other) in zip(expected, found, strict=True):
        assert names == there
        np.testing.assert_array_equal(stability, other)
