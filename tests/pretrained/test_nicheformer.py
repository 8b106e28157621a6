"""Nicheformer against torch's own encoder and the description of its tokens."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from graph_toys import data_of
from nicheformer_toys import write_nicheformer
from scipy import sparse

import fimp_sc
from fimp_sc.data import BlockDataset, Destinations
from fimp_sc.model import FIMP
from fimp_sc.pretrained import CheckpointError, load

GENES = [*(f"ENSG{i:011d}" for i in range(28)), "ENSMUSG00000000001", "ENSMUSG00000000002"]
CONTEXT = {("human", "xenium"): [5, 9, 4], ("mouse", "10x 3' v3"): [6, 11, 3]}


def ranked(counts, means) -> list[int]:
    """Genes of a cell in their order, as the authors' notebooks make it; equal ones by their place."""
    means = np.nan_to_num(means)
    rounded = np.where((means % 1) >= 0.5, np.ceil(means), np.floor(means))
    values = counts / counts.sum() * 10_000 / np.where(rounded == 0, 1, rounded)
    return sorted(np.flatnonzero(values), key=lambda gene: (-round(values[gene], 9), gene))


def draw(n_cells: int, n_genes: int) -> np.ndarray:
    return np.random.default_rng(1).poisson(1.0, (n_cells, n_genes))


@torch.no_grad()
@pytest.mark.parametrize(("species", "assay"), CONTEXT)
@pytest.mark.parametrize("layer", [-1, 1])
def test_cells_by_themselves_equal_torch(tmp_path, species: str, assay: str, layer: int) -> None:
    reference = write_nicheformer(tmp_path, GENES, prefix="nicheformer." if layer == 1 else "")
    orthologs = pd.DataFrame({"mouse_symbol": ["A"], "human_symbol": ["B"]}) if species == "mouse" else None
    foundation = load("nicheformer", tmp_path, assay=assay, species=species, orthologs=orthologs, layer=layer)
    model, counts = foundation.read(), draw(6, len(GENES))
    tokenizer = model.embedding.tokenizer(torch.arange(30), 0, 0, np.arange(30, dtype=np.uint64))
    shown, pattern = torch.ones(1, 30, dtype=torch.bool), torch.zeros(6, dtype=torch.int64)
    feature, value, padding = tokenizer(sparse.csr_matrix(counts.astype(np.float32)), None, shown, pattern, 12)
    tokens, absent = model.embedding(feature, value, padding)
    ours = model.stack.alone(tokens, absent)
    means, n_layers = np.load(tmp_path / "xenium_mean_script.npy"), len(model.stack.layers)
    assert n_layers == (3 if layer == -1 else 1)
    for i, cell in enumerate(counts):
        chosen = ranked(cell, means)[:12]
        assert feature[i][~padding[i]].tolist() == chosen
        row = [*CONTEXT[species, assay], *(30 + gene for gene in chosen)]
        n = len(row)
        theirs = reference(torch.tensor([row + [1] * (40 - n)]), n_layers)[0, :n]
        torch.testing.assert_close(ours[i, :n], theirs, rtol=1e-5, atol=1e-5)


def test_embedding_is_the_mean_over_genes_and_is_saved(tmp_path) -> None:
    reference = write_nicheformer(tmp_path / "files", GENES)
    adata = anndata.AnnData(sparse.csr_matrix(draw(40, 30).astype(np.float32)))
    adata.var_names = GENES
    adata.obsm["spatial"] = np.random.default_rng(0).random((40, 2))
    fimp_sc.pp.spatial_graph(adata)
    FIMP.setup_anndata(adata)
    model = FIMP(
        adata, foundation=load("nicheformer", tmp_path / "files", assay="xenium"), n_tokens=100, messages=False
    )
    z, means = model.get_latent_representation(), np.load(tmp_path / "files" / "xenium_mean_script.npy")
    for i in (1, 5, 39):
        row = torch.tensor([[5, 9, 4, *(30 + gene for gene in ranked(adata.X[i].toarray()[0], means))]])
        expected = reference(row, 3)[0, 3:].mean(0).detach().numpy()
        np.testing.assert_allclose(z[i], expected, rtol=1e-4, atol=2e-5)
    model.train(1, accelerator="cpu", enable_progress_bar=False)
    model.save_pretrained(tmp_path / "saved")
    loaded = FIMP.from_pretrained(tmp_path / "saved", adata)
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())


def test_genes_of_the_file_of_the_authors(tmp_path) -> None:
    write_nicheformer(tmp_path, GENES)
    expected = load("nicheformer", tmp_path, assay="xenium")
    names = expected.vocabulary()
    assert names == {gene: row for row, gene in enumerate(GENES)}
    (tmp_path / "genes.txt").unlink()
    model = anndata.AnnData(sparse.csr_matrix((1, 30), dtype=np.float32), var=pd.DataFrame(index=GENES))
    model.write_h5ad(tmp_path / "model.h5ad")
    assert load("nicheformer", tmp_path, assay="xenium").vocabulary() == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"genes.txt": None}, r"no 'genes\.txt' or 'model\.h5ad'.*copy model\.h5ad there"),
        ({"genes.txt": "A B A"}, r"must name each gene once: found A"),
        ({"genes.txt": " ".join(f"G{i}" for i in range(40))}, "40 genes, but .* only 65 rows"),
        (
            {"genes.txt": "A B"},
            r"xenium_mean_script\.npy' must have a number for each of 2 genes, found float64",
        ),
        ({"xenium_mean_script.npy": None}, r"There is no file .*xenium_mean_script\.npy"),
        ({"xenium_mean_script.npy": "text"}, r"cannot be read as an array"),
        ({"config.json": '{"nheads": 3}'}, "nheads.*does not divide the width 16"),
        ({"config.json": '{"nlayers": 2}'}, "nlayers.*weights say 3"),
        ({"config.json": '{"learnable_pe": false}'}, "learnable_pe.*supported: True"),
    ],
)
def test_files_that_do_not_fit(tmp_path, change: dict, message: str) -> None:
    write_nicheformer(tmp_path, GENES)
    for name, content in change.items():
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load("nicheformer", tmp_path, assay="xenium").read()


def test_assays_must_be_known(tmp_path) -> None:
    write_nicheformer(tmp_path, GENES)
    for settings in ({}, {"assay": "visium"}):
        with pytest.raises(ValueError, match=r"pass assay= to load, one of 'merfish', .*as Visium, take the nearest"):
            load("nicheformer", tmp_path, **settings).read()


def test_tokens_of_a_section_with_the_real_genes_and_means(shared_data, tmp_path) -> None:
    source = shared_data / "nicheformer_tokens"
    genes = (source / "genes.txt").read_text().split()
    means = np.load(source / "dissociated_mean_script.npy")
    write_nicheformer(tmp_path, genes, means=means)
    adata = anndata.read_h5ad(shared_data / "dlpfc_visium_151673.h5ad")
    adata.var_names = adata.var["ensembl_id"].astype(str)
    adata = adata[:, ~adata.var_names.duplicated()].copy()
    fimp_sc.pp.spatial_graph(adata)
    with pytest.warns(UserWarning, match="genes are zero"):
        FIMP.setup_anndata(adata)
    model = FIMP(adata, foundation=load("nicheformer", tmp_path, assay="10x 3' v3"), n_tokens=30)
    chosen = np.arange(0, adata.n_obs, 60)
    batch = BlockDataset(data_of(model), n_layers=0, n_tokens=30)[Destinations(chosen, 0)]
    place = {gene: i for i, gene in enumerate(genes)}
    known = np.array([gene in place for gene in adata.var_names])
    assert known.sum() > 6_000
    column = np.flatnonzero(known)
    rows = np.array([place[gene] for gene in adata.var_names[known]])
    for i, cell in enumerate(chosen):
        full = np.zeros(len(genes))
        full[rows] = adata.X[cell].toarray()[0][column]
        found = batch["feature_id"][i][~batch["padding"][i]].tolist()
        assert [place[adata.var_names[gene]] for gene in found] == ranked(full, means)[:30]
