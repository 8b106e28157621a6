"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import pytest
import torch

import fimp_sc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

mpl.use("Agg")
# More threads than free cores make small tensors many times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real sections; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FIMP_SC_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data not found in {folder}; set FIMP_SC_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def _toy() -> AnnData:
    return fimp_sc.datasets.toy_tissue(n_obs=240, random_state=0)


@pytest.fixture
def toy(_toy: AnnData) -> AnnData:
    """Toy tissue of 240 cells x 765 genes in two sections; a copy that a test may change."""
    return _toy.copy()


@pytest.fixture
def small_toy(_toy: AnnData) -> AnnData:
    """Toy tissue of 240 cells x the 60 genes with most molecules; a copy that a test may change."""
    genes = _toy.X.sum(axis=0).A1.argsort()[::-1][:60]
    return _toy[:, genes].copy()


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    from matplotlib import pyplot as plt

    plt.close("all")
