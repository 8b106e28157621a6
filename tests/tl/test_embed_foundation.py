"""Embeddings by foundation models and from vectors of genes."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

import fimp_sc
from fimp_sc.model import FIMP
from fimp_sc.pretrained import load

GRAPH = {
    "obsp": {"spatial_connectivities", "spatial_distances"},
    "uns": {"spatial_neighbors", "X_fimp"},
    "obsm": {"X_fimp"},
}


@pytest.fixture
def zero_shot(tissue, scgpt_checkpoint):
    """Arguments that embed with scGPT as it is."""
    genes = [gene for i, gene in enumerate(tissue.var_names) if i % 5]
    return {
        "foundation": load("scgpt", scgpt_checkpoint(genes)), "zero_shot": True, "accelerator": "cpu",
        "verbose": False, "model_kwargs": {"n_tokens": 8},
    }  # fmt: skip


@pytest.fixture
def no_training(monkeypatch) -> None:
    def train(*args, **kwargs):
        raise AssertionError("nothing is to be trained")

    monkeypatch.setattr(FIMP, "train", train)


@pytest.mark.usefixtures("no_training")
def test_foundation_model_as_it_is(tissue, zero_shot, unchanged, tmp_path) -> None:
    with unchanged(tissue, **GRAPH):
        fimp_sc.tl.embed(tissue, library_key="section", **zero_shot)
    z = tissue.obsm["X_fimp"]
    assert z.shape == (100, 16)
    assert z.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    by_hand = tissue.copy()
    FIMP.setup_anndata(by_hand, library_key="section")
    model = FIMP(by_hand, foundation=zero_shot["foundation"], n_tokens=8)
    np.testing.assert_allclose(z, model.get_latent_representation(), atol=1e-6)
    record = tissue.uns["X_fimp"]
    assert record["epochs"] == 0
    assert record["model"]["foundation"]["name"] == "scgpt"
    assert record["model"]["foundation"]["checkpoint"] == str(zero_shot["foundation"].folder)
    assert record["params"]["library_key"] == "section"
    tissue.write_h5ad(tmp_path / "tissue.h5ad")
    again = ad.read_h5ad(tmp_path / "tissue.h5ad")
    np.testing.assert_array_equal(again.obsm["X_fimp"], z)
    assert again.uns["X_fimp"]["model"]["foundation"]["name"] == "scgpt"
    assert again.uns["X_fimp"]["model"]["architecture"]["foundation"]["embsize"] == 16
    fimp_sc.tl.embed(again, library_key="section", key_added="again", **zero_shot)
    np.testing.assert_array_equal(again.obsm["again"], z)


@pytest.mark.usefixtures("no_training")
def test_model_that_was_not_trained_serves_other_sections(tissue, section, zero_shot, tmp_path) -> None:
    fimp_sc.tl.embed(tissue, **zero_shot)
    model = fimp_sc.tl.get_model(tissue)
    model.save(str(tmp_path / "model"))
    for key, given in (("a", model), ("b", tmp_path / "model")):
        fimp_sc.tl.embed(section, model=given, key_added=key, accelerator="cpu", verbose=False)
    np.testing.assert_allclose(section.obsm["a"], section.obsm["b"], atol=1e-6)
    assert section.obsm["a"].std(0).max() > 1e-3


def test_foundation_model_that_is_trained(tissue, zero_shot, quick) -> None:
    fimp_sc.tl.embed(tissue, key_added="before", **zero_shot)
    for key, part in (("frozen", "frozen"), ("tuned", "lora")):
        foundation = load("scgpt", zero_shot["foundation"].folder, train=part)
        fimp_sc.tl.embed(tissue, key_added=key, foundation=foundation, **{**quick, "model_kwargs": {"n_tokens": 8}})
        assert tissue.uns[key]["epochs"] == 1
    np.testing.assert_allclose(tissue.obsm["frozen"], tissue.obsm["before"], atol=1e-6)
    assert np.abs(tissue.obsm["tuned"] - tissue.obsm["before"]).max() > 1e-5


def test_zero_shot_needs_a_foundation_model(tissue, quick, unchanged) -> None:
    with (
        unchanged(tissue),
        pytest.raises(ValueError, match=r"zero_shot=True needs .* foundation=fimp_sc.pretrained.load"),
    ):
        fimp_sc.tl.embed(tissue, zero_shot=True, **quick)


def test_object_is_unchanged_when_the_checkpoint_is_broken(tissue, zero_shot, unchanged) -> None:
    (zero_shot["foundation"].folder / "best_model.pt").write_bytes(b"nothing")
    with unchanged(tissue), pytest.raises(ValueError, match=r"best_model\.pt"):
        fimp_sc.tl.embed(tissue, **zero_shot)
    with pytest.raises(KeyError):
        fimp_sc.tl.get_model(tissue)


def test_imputing_after_zero_shot_trains(tissue, zero_shot) -> None:
    fimp_sc.tl.embed(tissue, **zero_shot)
    untrained = fimp_sc.tl.get_model(tissue)
    fimp_sc.tl.impute(tissue, max_epochs=1, accelerator="cpu", verbose=False)
    model = fimp_sc.tl.get_model(tissue)
    assert model is not untrained
    assert model.is_trained
    assert not untrained.is_trained
    assert np.isfinite(tissue.layers["fimp"]).all()


def test_ids_of_the_genes_may_be_a_column_of_the_object(tissue, zero_shot, unchanged) -> None:
    # Without equal values in a cell, whose order is drawn by the names of genes.
    weight = np.random.default_rng(0).uniform(1, 2, tissue.n_vars)
    tissue.X = tissue.X.multiply(weight).tocsr().astype(np.float32)
    zero_shot["input_scale"] = "normalized"
    fimp_sc.tl.embed(tissue, key_added="by_name", **zero_shot)
    fimp_sc.pp.match_genes(tissue, zero_shot["foundation"].folder, key_added="id")
    tissue.var_names = [f"gene {i}" for i in range(tissue.n_vars)]
    foundation = load("scgpt", zero_shot["foundation"].folder, vocabulary_key="id")
    with unchanged(tissue, obsm={"by_id"}, uns={"by_id"}):
        fimp_sc.tl.embed(tissue, key_added="by_id", **{**zero_shot, "foundation": foundation})
    np.testing.assert_allclose(tissue.obsm["by_id"], tissue.obsm["by_name"], atol=1e-5)


def test_vectors_of_genes_from_a_file(tissue, quick, unchanged, tmp_path) -> None:
    vectors = np.random.default_rng(0).standard_normal((tissue.n_vars, 5)).astype(np.float32)
    path = tmp_path / "vectors.npz"

    def with_vectors(file) -> dict:
        return quick | {"model_kwargs": quick["model_kwargs"] | {"gene_embeddings": file}}

    np.savez(path, names=np.asarray(tissue.var_names, dtype=str), vectors=vectors)
    with unchanged(tissue, **GRAPH):
        fimp_sc.tl.embed(tissue, **with_vectors(path))
    assert tissue.uns["X_fimp"]["model"]["gene_embeddings"] == str(path)
    assert fimp_sc.tl.get_model(tissue).module.network.embedding.vectors.shape == (30, 5)
    tissue.write_h5ad(tmp_path / "tissue.h5ad")
    fimp_sc.tl.embed(tissue, key_added="plain", **quick)
    assert np.abs(tissue.obsm["plain"] - tissue.obsm["X_fimp"]).max() > 1e-3
    with pytest.raises(ValueError, match="vectors"):
        fimp_sc.tl.embed(tissue, **with_vectors(tmp_path / "no_vectors.npz"))
