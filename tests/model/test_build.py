"""What a model is built from: genes found in a vocabulary, pretrained vectors, checkpoints; and what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest

import fimp_sc
from fimp_sc.model import FIMP
from fimp_sc.pretrained import CheckpointError

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
# Of the values of `distinct`.
LOG = {"input_scale": "log"}


def test_ids_from_match_genes_are_used(distinct, make, checkpoint) -> None:
    expected = make(distinct, LOG).get_latent_representation()
    fimp_sc.pp.match_genes(distinct, checkpoint, key_added="id")
    renamed = distinct.copy()
    renamed.var_names = [f"ENSG{i:011d}" for i in range(40)]
    model = make(renamed, LOG, vocabulary_key="id")
    np.testing.assert_allclose(model.get_latent_representation(), expected, **TOLERANCE)
    # A gene is what its id says: with the ids of other genes cells are others.
    renamed.var["id"] = np.roll(renamed.var["id"], 1)
    assert np.abs(make(renamed, LOG, vocabulary_key="id").get_latent_representation() - expected).max() > 1e-2
    with pytest.raises(KeyError, match=r"'nothing' is not in adata\.var.*match_genes"):
        make(renamed, LOG, vocabulary_key="nothing")


def test_saved_model_does_not_need_the_ids_again(distinct, make, checkpoint, tmp_path) -> None:
    fimp_sc.pp.match_genes(distinct, checkpoint, key_added="id")
    model = make(distinct, LOG, vocabulary_key="id")
    model.save(str(tmp_path / "model"))
    del distinct.var["id"]
    loaded = FIMP.load(str(tmp_path / "model"), adata=distinct, accelerator="cpu")
    np.testing.assert_allclose(loaded.get_latent_representation(), model.get_latent_representation(), **TOLERANCE)


def test_mouse_genes_are_matched_by_a_table(distinct, make, tmp_path) -> None:
    expected = make(distinct, LOG).get_latent_representation()
    mouse = distinct.copy()
    mouse.var_names = [f"Mouse{i}x" for i in range(40)]
    table = pd.DataFrame({"mouse_symbol": mouse.var_names, "human_symbol": distinct.var_names})
    table.to_csv(tmp_path / "orthologs.tsv", sep="\t", index=False)
    model = make(mouse, LOG, species="mouse", orthologs=tmp_path / "orthologs.tsv")
    np.testing.assert_allclose(model.get_latent_representation(), expected, **TOLERANCE)
    assert model.init_params_["non_kwargs"]["foundation"]["orthologs"] == str(tmp_path / "orthologs.tsv")


def test_no_gene_known_is_an_error(tissue, make) -> None:
    tissue.var_names = [f"nothing{i}" for i in range(40)]
    with pytest.raises(ValueError, match=r"knows none of the 40 genes.*nothing0.*match_genes"):
        make(tissue)
    with pytest.raises(ValueError, match="gene_embeddings knows none of the 40 genes"):
        FIMP(tissue, gene_embeddings={"TP53": [1.0, 2.0]})


# Vectors of genes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dict", "npz", "frame"])
def test_fimp_base_starts_from_vectors_of_genes(tissue, train, tmp_path, form: str) -> None:
    known = np.arange(40) % 5 > 0
    genes = tissue.var_names[known].to_numpy(dtype=str)[::-1]
    vectors = np.random.default_rng(0).standard_normal((len(genes), 6)).astype(np.float32) + 3
    given = {
        "dict": dict(zip(genes, vectors, strict=True)),
        "frame": pd.DataFrame(vectors, index=genes),
        "npz": tmp_path / "vectors.npz",
    }[form]
    np.savez(tmp_path / "vectors.npz", names=genes, vectors=vectors)
    FIMP.setup_anndata(tissue)
    model = FIMP(tissue, gene_embeddings=given, n_latent=16, n_heads=2, n_tokens=12)
    identities = model.module.network.embedding.identities().detach().numpy()
    centered = vectors[::-1] - vectors.mean(0)
    expected = centered @ centered.T
    found = identities[known] @ identities[known].T
    np.testing.assert_allclose(found / np.trace(found), expected / np.trace(expected), atol=1e-5)
    # Genes without a vector have an identity of their own.
    own = identities[~known]
    assert np.linalg.matrix_rank(own) == len(own)
    train(model)
    assert model.init_params_["non_kwargs"]["gene_embeddings"] in ("dict", "DataFrame", str(tmp_path / "vectors.npz"))
    expected = model.get_latent_representation()
    (tmp_path / "vectors.npz").unlink()
    model.save(str(tmp_path / "model"))
    loaded = FIMP.load(str(tmp_path / "model"), adata=tissue, accelerator="cpu")
    np.testing.assert_allclose(loaded.get_latent_representation(), expected, **TOLERANCE)
    query = FIMP.load_query_data(tissue.copy(), loaded)
    np.testing.assert_allclose(query.get_latent_representation(), expected, **TOLERANCE)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folder": None}, r"load\('scgpt'\) needs checkpoint, the folder with args\.json"),
        ({"gene_embeddings": {"A": [1.0]}}, "gene_embeddings are for FIMP-base"),
        ({"token_size": 4}, "token_size is that of foundation='scgpt' itself"),
        ({"train": "half"}, "train must be .* found 'half'"),
        ({"train": "last:3"}, "N from 1 to 2"),
        ({"neighbor_states": "other"}, "neighbor_states must be"),
        ({"aggregate": "other"}, "aggregate must be"),
        ({"n_tokens": 0}, r"n_tokens must be a whole number of at least 1 \(or None\), found 0"),
        ({"species": "rat"}, "species"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tissue, make, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tissue, **arguments)


@pytest.mark.parametrize("name", ["vit", "brainlm"])
def test_expression_is_not_what_models_of_images_and_signals_read(tissue, tmp_path, name: str) -> None:
    FIMP.setup_anndata(tissue)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).touch()
    with pytest.raises(ValueError, match=f"'{name}' reads one modality, of .*; this model is set up with expression"):
        FIMP(tissue, foundation=fimp_sc.pretrained.load(name, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint": "folder"}, r"Write foundation=fimp_sc\.pretrained\.load\(name, checkpoint\)"),
        ({"train_foundation": "lora"}, r"load\(name, checkpoint, train=\.\.\.\)"),
        ({"source": "static"}, r"load\(name, checkpoint, neighbor_states=\.\.\.\)"),
        ({"species": "mouse"}, r"gene_embeddings=fimp_sc\.pretrained\.read_gene_vectors\(file, species=\.\.\.\)"),
    ],
)
def test_arguments_of_foundation_models_belong_to_their_handle(tissue, arguments: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        FIMP(tissue, **arguments)
    with pytest.raises(TypeError, match=message):
        fimp_sc.tl.embed(tissue, model_kwargs=arguments)
    with pytest.raises(TypeError, match=message):
        fimp_sc.tl.embed(tissue, foundation="scgpt", **arguments)


def test_names_alone_are_no_foundation_models(tissue) -> None:
    message = r"found 'scgpt'\. Write foundation=fimp_sc\.pretrained\.load\('scgpt', checkpoint\)"
    for call in (FIMP, fimp_sc.tl.embed, fimp_sc.tl.annotate):
        with pytest.raises(TypeError, match=message):
            call(tissue, foundation="scgpt", **({"labels_key": "label"} if call is fimp_sc.tl.annotate else {}))


def test_missing_and_damaged_checkpoints_are_refused(tissue, make, checkpoint, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="missing_folder"):
        make(tissue, folder=tmp_path / "missing_folder")
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    weights = (folder / "best_model.pt").read_bytes()
    (folder / "best_model.pt").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match=r"best_model\.pt"):
        make(tissue, folder=folder)


def test_budget_of_tokens_is_larger_for_a_foundation_model(tissue, make) -> None:
    assert make(tissue, n_tokens=None).n_tokens == 200
    assert FIMP(tissue).n_tokens == 16
