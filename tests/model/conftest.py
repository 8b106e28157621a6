from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

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


@pytest.fixture(scope="session")
def saved(trained, tmp_path_factory) -> Path:
    """The trained model of this folder's tests, saved; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    trained.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copied"))


@pytest.fixture
def distinct(tissue):
    """The tissue with log-normalized values of which no two of a cell are equal: bins then depend on nothing else."""
    rng = np.random.default_rng(0)
    values = np.log1p(tissue.X.toarray()) + rng.random(tissue.shape) * 0.3
    tissue.X = sparse.csr_matrix(np.where(tissue.X.toarray() > 0, values, 0).astype(np.float32))
    return tissue


@pytest.fixture(scope="session")
def checkpoint(scgpt_checkpoint, _model_tissue):
    """A checkpoint that knows all genes of the tissue but every seventh, and some others."""
    genes = [gene for i, gene in enumerate(_model_tissue.var_names) if i % 7]
    return scgpt_checkpoint(["OTHER1", *genes[::-1], "OTHER2"])


@pytest.fixture
def make(checkpoint):
    """Set up and make a model around the foundation model."""

    def build(adata, setup=None, *, folder=checkpoint, train="frozen", n_tokens=10, **kwargs) -> FIMP:
        FIMP.setup_anndata(adata, **(setup or {}))
        how = {
            name: kwargs.pop(name)
            for name in ("neighbor_states", "aggregate", "species", "orthologs", "vocabulary_key")
            if name in kwargs
        }
        foundation = fimp_sc.pretrained.load("scgpt", folder, train=train, **how)
        return FIMP(adata, **{"foundation": foundation, "n_tokens": n_tokens, **kwargs})

    return build
