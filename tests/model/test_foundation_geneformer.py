"""FIMP with Geneformer: embedding, training, saving, and what is read of its messages."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from geneformer_toys import ranked, write_geneformer
from graph_toys import data_of
from scipy import sparse

import fimp_sc
from fimp_sc.data import BlockDataset, Destinations
from fimp_sc.model import FIMP
from fimp_sc.pretrained import load

N_TOKENS = 10
# Heads and then one half of a low-rank change start at zero: only the third step reaches the other half.
QUICK = {"max_epochs": 1, "accelerator": "cpu", "batch_size": 32, "enable_progress_bar": False}
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def ids(_model_tissue) -> list[str]:
    """Ensembl ids of the genes of the tissue, every seventh of which the model does not know."""
    return [f"ENSG{i:011d}" for i in range(_model_tissue.n_vars)]


@pytest.fixture(scope="module", params=[1, 2])
def model_files(request, ids, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"geneformer{request.param}")
    bert, content = write_geneformer(folder, [gene for i, gene in enumerate(ids) if i % 7], request.param)
    return folder, bert, content


@pytest.fixture
def cells(tissue, ids):
    tissue.var_names = ids
    return tissue


def make(adata, folder, setup=None, *, n_tokens=N_TOKENS, **kwargs) -> FIMP:
    FIMP.setup_anndata(adata, **(setup or {}))
    return FIMP(adata, foundation=load("geneformer", folder, **kwargs), n_tokens=n_tokens)


@torch.no_grad()
def alone(bert, content, adata, pooling: str | None = None, hidden: int = -2) -> np.ndarray:
    """Embeddings of cells by themselves, from transformers."""
    special = "<cls>" in content["token_dictionary_gc1M"]
    out = []
    for counts in adata.X.toarray():
        tokens, _ = ranked(counts, adata.var_names, content, N_TOKENS)
        row = [2, *tokens, 3] if special else tokens
        states = bert(torch.tensor([row]), output_hidden_states=True).hidden_states[hidden][0]
        mean = states[1:-1].mean(0) if special else states.mean(0)
        out.append(states[0] if special and pooling != "mean" else mean)
    return torch.stack(out).numpy()


@pytest.mark.parametrize("settings", [{}, {"pooling": "mean"}, {"layer": -1}])
def test_without_neighbors_cells_are_what_transformers_makes_of_them(cells, model_files, settings: dict) -> None:
    folder, bert, content = model_files
    graph = sparse.lil_matrix((120, 120))
    graph[0, 1] = 1.0
    cells.obsp["spatial_connectivities"] = graph.tocsr()
    with pytest.warns(UserWarning, match="119 of 120 nodes have no neighbors"):
        z = make(cells, folder, **settings).get_latent_representation()
    expected = alone(bert, content, cells, settings.get("pooling"), settings.get("layer", -2))
    np.testing.assert_allclose(z[1:], expected[1:], **TOLERANCE)
    assert np.abs(z[0] - expected[0]).max() > 1e-3


def test_order_of_cells_and_genes_does_not_matter(cells, model_files) -> None:
    rng = np.random.default_rng(0)
    rows, genes = rng.permutation(120), rng.permutation(cells.n_vars)
    moved = cells[rows, genes].copy()
    expected = make(cells, model_files[0]).get_latent_representation()[rows]
    np.testing.assert_allclose(make(moved, model_files[0]).get_latent_representation(), expected, **TOLERANCE)


def test_other_values_than_counts_are_refused(cells, model_files) -> None:
    cells.layers["counts"] = cells.X.copy()
    cells.X = cells.X.log1p() * np.float32(0.7)
    with pytest.raises(ValueError, match=r"reads raw counts, and the values .* are log-normalized.*layer="):
        make(cells, model_files[0], {"input_scale": "log"})
    assert make(cells, model_files[0], {"layer": "counts"}).get_latent_representation().shape == (120, 24)


def test_hidden_values_are_never_read(cells, model_files) -> None:
    model = make(cells, model_files[0])
    hidden = np.random.default_rng(0).random(cells.shape) < 0.4
    changed = cells.copy()
    values = cells.X.toarray()
    changed.X = sparse.csr_matrix(np.where(hidden, 50, values).astype(np.float32))
    batches = [
        BlockDataset(data_of(model, adata, hidden), n_layers=0, n_tokens=100)[Destinations(np.arange(120), 0)]
        for adata in (cells, changed)
    ]
    for name in ("feature_id", "value", "padding"):
        assert torch.equal(batches[0][name], batches[1][name])
    there = ~batches[0]["padding"]
    row = torch.arange(120)[:, None].expand(there.shape)[there]
    assert not hidden[row, batches[0]["feature_id"][there]].any()
    # All others that are expressed and known are there.
    known = np.arange(cells.n_vars) % 7 > 0
    assert there.sum() == ((values > 0) & ~hidden & known).sum()


def test_cells_without_a_known_gene_have_an_embedding(cells, model_files) -> None:
    values = cells.X.toarray()
    values[:5] = 0
    values[:5, [0, 7]] = 1
    cells.X = sparse.csr_matrix(values)
    graph = sparse.lil_matrix(cells.obsp["spatial_connectivities"])
    graph[:2] = 0
    cells.obsp["spatial_connectivities"] = graph.tocsr()
    with pytest.warns(UserWarning, match="have no neighbors"):
        z = make(cells, model_files[0]).get_latent_representation(batch_size=1)
    assert np.isfinite(z).all()
    np.testing.assert_allclose(z[0], z[1], **TOLERANCE)


@pytest.mark.parametrize("how", [{"batch_size": 7}, {"strategy": "layers"}])
def test_how_it_is_computed_does_not_matter(cells, model_files, how: dict) -> None:
    for mode in ({}, {"aggregate": "final"}):
        model = make(cells, model_files[0], **mode)
        np.testing.assert_allclose(
            model.get_latent_representation(**how), model.get_latent_representation(), **TOLERANCE
        )


MAY_CHANGE = {
    "frozen": (),
    "full": ("embedding.", "stack."),
    "last:1": ("stack.layers.1.",),
    "lora:2": (".up", ".down"),
}


@pytest.mark.parametrize("trained", MAY_CHANGE)
def test_training_changes_what_it_says(cells, model_files, tmp_path, trained: str) -> None:
    model = make(cells, model_files[0], {"labels_key": "label"}, train=trained)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    model.train(**QUICK)
    changed = {name for name, value in model.module.state_dict().items() if not torch.equal(value, before[name])}
    inner = {name.removeprefix("network.") for name in changed if name.startswith("network.")}
    allowed = MAY_CHANGE[trained]
    assert {name for name in inner if not name.startswith(allowed) and not name.endswith(allowed)} == set()
    for part in allowed:
        assert any(name.startswith(part) or name.endswith(part) for name in inner), part
    assert model.predict(soft=True).shape == (120, 4)
    assert np.isfinite(model.get_expression()).all()
    with pytest.raises(ValueError, match="nor has one that reads ranks"):
        model.get_expression(decoder=True)
    if trained == "lora:2":
        model.save_pretrained(tmp_path / "saved")
        loaded = FIMP.from_pretrained(tmp_path / "saved", cells)
        np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())


@torch.no_grad()
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_influence_is_that_on_the_embedding(cells, model_files, pooling: str | None) -> None:
    """One layer, whose messages are computed edge by edge."""
    model = make(cells, model_files[0], layer=1, pooling=pooling)
    pooling = model.module.network.embedding.pooling
    found = model.get_edge_influence().toarray()
    data, network = data_of(model), model.module.network
    batch = BlockDataset(data, n_layers=0, n_tokens=N_TOKENS)[Destinations(np.arange(120), 0)]
    tokens, padding = network.tokens(batch)
    attention = network.stack.layers[0].attention
    heads = [
        part(tokens).unflatten(2, (3, -1)).transpose(1, 2) for part in (attention.query, attention.key, attention.value)
    ]
    graph = cells.obsp["spatial_connectivities"].tocoo()
    assert graph.nnz == (found > 0).sum()
    for i, j in list(zip(graph.row, graph.col, strict=True))[::25]:
        score = heads[0][i] @ heads[1][j].mT / np.sqrt(8)
        message = score.masked_fill(padding[j], -torch.inf).softmax(-1) @ heads[2][j]
        message = message.transpose(0, 1).flatten(1) @ attention.output.weight.T
        n_class = network.embedding.n_class
        mean = message[0] if pooling == "cls" else message[n_class:][~padding[i, n_class:]].mean(0)
        np.testing.assert_allclose(found[i, j], mean.norm().item(), rtol=1e-4)


def test_attention_between_genes_is_read(cells, model_files) -> None:
    model = make(cells, model_files[0])
    genes = [gene for i, gene in enumerate(cells.var_names) if i % 7][:6]
    attention, *_ = model.get_gene_attention(cells.obs["section"], genes=genes)
    assert attention.shape == (2, 2, 6, 6)
    assert (attention[0, 0] > 0).any()


def test_symbols_mouse_genes_and_chosen_ids(cells, ids, tmp_path) -> None:
    """The same tokens by Ensembl id, by symbol, by the gene's ortholog, and by a column of ids."""
    symbols = [f"GENE{i}" for i in range(len(ids))]
    write_geneformer(tmp_path, ids, 2, names=dict(zip(symbols, ids, strict=True)))
    expected = make(cells, tmp_path).get_latent_representation()
    cells.var["ensembl"] = ids
    cells.var_names = symbols
    np.testing.assert_array_equal(make(cells, tmp_path).get_latent_representation(), expected)
    mouse = cells.copy()
    mouse.var_names = [name.capitalize() for name in symbols]
    orthologs = pd.DataFrame({"mouse_symbol": mouse.var_names, "human_symbol": symbols, "type": "ortholog_one2one"})
    found = make(mouse, tmp_path, species="mouse", orthologs=orthologs).get_latent_representation()
    np.testing.assert_array_equal(found, expected)
    # Without names of symbols, a column of ids is matched first.
    (tmp_path / "ensembl_mapping_dict_gc1M.pkl").unlink()
    with pytest.raises(ValueError, match=r"The vocabulary holds Ensembl ids.*match_genes"):
        make(cells, tmp_path)
    fimp_sc.pp.match_genes(cells, load("geneformer", tmp_path).vocabulary())
    found = make(cells, tmp_path, vocabulary_key="fimp_vocabulary_id").get_latent_representation()
    np.testing.assert_array_equal(found, expected)


def test_tools_take_it(cells, model_files) -> None:
    foundation = load("geneformer", model_files[0])
    how = {"foundation": foundation, "n_tokens": N_TOKENS, "verbose": False, "accelerator": "cpu"}
    fimp_sc.tl.embed(cells, zero_shot=True, **how)
    np.testing.assert_allclose(
        cells.obsm["X_fimp"], make(cells.copy(), model_files[0]).get_latent_representation(), **TOLERANCE
    )
    before = cells.X.copy()
    fimp_sc.tl.impute(cells, max_epochs=1, **how)
    assert np.isfinite(cells.layers["fimp"]).all()
    assert (before != cells.X).nnz == 0
    assert isinstance(cells, anndata.AnnData)
