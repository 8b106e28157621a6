from __future__ import annotations

import numpy as np
import pytest

import fimp_sc
from fimp_sc.model import FIMP

SIZE = {"n_latent": 16, "n_heads": 2, "n_tokens": 12}
TRAIN = {"max_epochs": 2, "accelerator": "cpu", "batch_size": 32, "enable_progress_bar": False}


def _tissue():
    adata = fimp_sc.datasets.toy_tissue(n_obs=120, random_state=1)
    genes = np.asarray(adata.X.sum(axis=0)).ravel().argsort()[::-1][:40]
    adata = adata[:, np.sort(genes)].copy()
    # The four most frequent types, the others unlabeled in two ways.
    labels = adata.obs["cell_type"].astype(object)
    frequent = labels.value_counts().index[:4]
    labels[~labels.isin(frequent)] = np.nan
    labels.iloc[[0, 5, 9]] = "Unknown"
    adata.obs["label"] = labels.astype("category")
    fimp_sc.pp.spatial_graph(adata, library_key="section", n_neighbors=4)
    return adata


@pytest.fixture(scope="session")
def _model_tissue():
    return _tissue()


@pytest.fixture
def tissue(_model_tissue):
    """120 cells x 40 genes in two sections with a graph; a copy that a test may change."""
    return _model_tissue.copy()


@pytest.fixture(scope="session")
def trained(_model_tissue) -> FIMP:
    """A model trained for two epochs with labels; not to be changed. Its object is `trained.adata`."""
    adata = _model_tissue.copy()
    FIMP.setup_anndata(adata, labels_key="label", library_key="section")
    model = FIMP(adata, **SIZE)
    model.train(**TRAIN)
    return model


@pytest.fixture
def make_model():
    """Set up and make a small untrained model."""

    def make(adata, setup=None, **kwargs) -> FIMP:
        FIMP.setup_anndata(adata, **(setup or {}))
        return FIMP(adata, **{**SIZE, **kwargs})

    return make


@pytest.fixture
def train():
    """Train quickly and quietly."""

    def run(model: FIMP, **kwargs) -> FIMP:
        model.train(**{**TRAIN, **kwargs})
        return model

    return run
