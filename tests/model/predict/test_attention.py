from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from fimp_sc.data import BlockDataset, Destinations
from fimp_sc.model import FIMP
from fimp_sc.model.predict._attention import attention_data

GENES = 12


@pytest.fixture(scope="session")
def chosen(trained) -> list[str]:
    """Genes that are tokens of many cells, and one that is the token of few."""
    order = np.asarray((trained.adata.X > 0).sum(0)).ravel().argsort()[::-1]
    return [str(gene) for gene in trained.adata.var_names[np.r_[order[: GENES - 1], order[-1]]]]


def batch_of_all(model: FIMP, n_layers: int) -> dict:
    data = attention_data(model, None)
    dataset = BlockDataset(data, n_layers=n_layers, n_tokens=model.n_tokens)
    return dataset[Destinations(np.arange(model.adata.n_obs), 0)]


def heads(attention, tokens: torch.Tensor) -> list[torch.Tensor]:
    return list(tokens.chunk(attention.n_heads, dim=-1))


@torch.no_grad()
def naive_attention(model: FIMP, groups: pd.Series, genes: list[str]) -> pd.Series:
    """Mean attention by source group, destination group, source gene and destination gene, edge by edge."""
    batch = batch_of_all(model, 0)
    tokens, padding = model.module.network.tokens(batch)
    first = tokens.shape[1] - batch["feature_id"].shape[1]
    layer = model.module.network.layers[0]
    normed = layer.attention_norm(tokens)
    query, key = layer.attention.query(normed), layer.attention.key(normed)
    names = [
        {
            str(model.genes[gene]): first + slot
            for slot, (gene, absent) in enumerate(zip(ids.tolist(), gone.tolist(), strict=True))
            if not absent and model.genes[gene] in genes
        }
        for ids, gone in zip(batch["feature_id"], batch["padding"], strict=True)
    ]
    rows, edges = [], {}
    coo = model.adata.obsp["spatial_connectivities"].tocoo()
    for i, j in zip(coo.row.tolist(), coo.col.tolist(), strict=True):
        if i == j or pd.isna(groups.iloc[i]) or pd.isna(groups.iloc[j]):
            continue
        pair = (groups.iloc[j], groups.iloc[i])
        edges[pair] = edges.get(pair, 0) + 1
        weights = torch.zeros(tokens.shape[1], tokens.shape[1])
        for q, k in zip(heads(layer.attention, query[i]), heads(layer.attention, key[j]), strict=True):
            scores = (q @ k.T / q.shape[1] ** 0.5).masked_fill(padding[j], -torch.inf)
            weights += scores.softmax(1) / layer.attention.n_heads
        rows += [(*pair, of, to, float(weights[a, b])) for to, a in names[i].items() for of, b in names[j].items()]
    columns = ["source", "destination", "source_gene", "destination_gene", "attention"]
    total = pd.DataFrame(rows, columns=columns).groupby(columns[:4])["attention"].sum()
    return total / total.index.droplevel([2, 3]).map(edges).to_numpy()


def test_gene_attention_is_the_mean_over_edges(trained, chosen) -> None:
    groups = trained.adata.obs["cell_type"].astype(object).where(trained.adata.obs["cell_type"] != "CD34+")
    groups.iloc[:6] = np.nan
    mean, n_edges, names = trained.get_gene_attention(groups, genes=chosen)
    assert mean.shape == (len(names), len(names), GENES, GENES)
    assert mean.dtype == np.float32
    assert names == sorted(groups.dropna().unique())
    expected = np.zeros(mean.shape)
    for (source, destination, of, to), value in naive_attention(trained, groups, chosen).items():
        expected[names.index(source), names.index(destination), chosen.index(of), chosen.index(to)] = value
    assert expected.max() > 0.01
    np.testing.assert_array_equal(np.isnan(mean).all((2, 3)), n_edges == 0)
    np.testing.assert_allclose(np.nan_to_num(mean), expected, atol=1e-6)


def test_groups_are_matched_by_the_names_of_nodes(trained, chosen) -> None:
    groups = trained.adata.obs["region"]
    shuffled = groups.sample(frac=1, random_state=0)
    assert (shuffled.to_numpy() != groups.to_numpy()).any()
    one, other = (trained.get_gene_attention(of, genes=chosen) for of in (groups, shuffled))
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])
    unnamed = trained.get_gene_attention(groups.to_numpy(), genes=chosen)
    np.testing.assert_array_equal(one[1], unnamed[1])


def test_edges_are_counted_by_groups(trained, chosen) -> None:
    groups = trained.adata.obs["region"]
    _, n_edges, names = trained.get_gene_attention(groups, genes=chosen[:2])
    coo = trained.adata.obsp["spatial_connectivities"].tocoo()
    real = coo.row != coo.col
    table = pd.crosstab(groups.to_numpy()[coo.col[real]], groups.to_numpy()[coo.row[real]])
    np.testing.assert_array_equal(n_edges, table.reindex(index=names, columns=names, fill_value=0))


@torch.no_grad()
def naive_influence(model: FIMP) -> np.ndarray:
    """``(n_layers, n, n)``: lengths of messages to summary tokens, edge by edge, NaN without an edge."""
    network = model.module.network
    inputs = []
    handles = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args)) for layer in network.layers]
    n = model.adata.n_obs
    network.states(batch_of_all(model, len(network.layers)), 1)
    for handle in handles:
        handle.remove()
    graph = model.adata.obsp["spatial_connectivities"].tocoo()
    out = np.full((len(inputs), n, n), np.nan)
    for level, (layer, (tokens, padding, *_)) in enumerate(zip(network.layers, inputs, strict=True)):
        practical = hasattr(layer, "attention_norm")
        x = layer.attention_norm(tokens) if practical else tokens
        attention = layer.attention
        query, key, value = attention.query(x[:, 0]), attention.key(x), attention.value(x)
        weight = (attention.output if practical else layer.combine).weight
        for i, j in zip(graph.row.tolist(), graph.col.tolist(), strict=True):
            parts = [
                (k[~padding[j]] @ q / len(q) ** 0.5).softmax(0) @ v[~padding[j]]
                for q, k, v in zip(*(heads(attention, part) for part in (query[i], key[j], value[j])), strict=True)
            ]
            out[level, i, j] = torch.linalg.norm(weight @ torch.cat(parts))
    return out


def assert_influence(model: FIMP) -> None:
    expected = naive_influence(model)
    graph = sparse.csr_matrix(model.adata.obsp["spatial_connectivities"])
    for layer, wanted in [(0, expected[0]), (1, expected[1]), (None, expected.mean(0))]:
        found = model.get_edge_influence(layer=layer, batch_size=17)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.indptr, graph.indptr)
        np.testing.assert_array_equal(found.indices, graph.indices)
        np.testing.assert_allclose(found.data, wanted[found.nonzero()], rtol=2e-4)
    assert found.data.min() > 0


def test_influence_is_the_length_of_messages(trained) -> None:
    assert_influence(trained)


def test_influence_in_the_layer_of_the_paper(tissue, make_model, train) -> None:
    assert_influence(train(make_model(tissue, layer="paper")))


def test_self_loops_are_left_out(tissue, make_model, train) -> None:
    graph = sparse.lil_matrix(tissue.obsp["spatial_connectivities"])
    graph.setdiag(1)
    without = tissue.copy()
    tissue.obsp["spatial_connectivities"] = graph.tocsr()
    found = train(make_model(tissue)).get_edge_influence()
    assert found.diagonal().sum() == 0
    assert (found != 0).sum() == without.obsp["spatial_connectivities"].nnz


@pytest.mark.parametrize("batch_size", [1, 50, 1000])
def test_blocks_do_not_matter(trained, chosen, batch_size) -> None:
    one, other = (trained.get_edge_influence(batch_size=size) for size in (None, batch_size))
    np.testing.assert_allclose(one.toarray(), other.toarray(), rtol=1e-4)
    groups = trained.adata.obs["region"]
    one, other = (trained.get_gene_attention(groups, genes=chosen, batch_size=size)[0] for size in (None, batch_size))
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_foundation_stack_is_read_layer_by_layer(tissue, make) -> None:
    model = make(tissue)
    found = [model.get_edge_influence(layer=layer) for layer in (0, 1, None)]
    np.testing.assert_allclose(found[2].toarray(), (found[0] + found[1]).toarray() / 2, rtol=1e-5)
    assert min(part.data.min() for part in found) > 0
    np.testing.assert_array_equal(found[0].indices, tissue.obsp["spatial_connectivities"].indices)
    known = [str(gene) for gene in model.genes[:5]]
    mean, _, _ = model.get_gene_attention(tissue.obs["region"], genes=known)
    assert np.nanmax(mean) > 0
    with pytest.raises(ValueError, match=r"layer must be from 0 to 1, found 2"):
        model.get_edge_influence(layer=2)


def test_unusable_input(tissue, trained, make, make_model) -> None:
    final = make(tissue, aggregate="final")
    with pytest.raises(ValueError, match=r"use a model with aggregate='layer'"):
        final.get_edge_influence()
    with pytest.raises(ValueError, match="aggregate='final'"):
        final.get_gene_attention(tissue.obs["region"], genes=list(final.genes[:2]))
    with pytest.raises(RuntimeError, match="train"):
        make_model(tissue).get_edge_influence()
    with pytest.raises(KeyError, match="'nothing'"):
        trained.get_gene_attention(trained.adata.obs["region"], genes=["nothing"])
    with pytest.raises(ValueError, match="one entry per node, 120: found 3"):
        trained.get_gene_attention(["a", "b", "a"], genes=list(trained.genes[:2]))
    with pytest.raises(ValueError, match="gene more than once"):
        trained.get_gene_attention(trained.adata.obs["region"], genes=[trained.genes[0]] * 2)
    with pytest.raises(TypeError, match="groups holds numbers"):
        trained.get_gene_attention(np.linspace(0, 1, 120), genes=list(trained.genes[:2]))


@pytest.mark.filterwarnings("ignore:.*are left out. Choose another token_size")
def test_models_without_genes_are_refused(pictures) -> None:
    FIMP.setup_mudata(pictures, modality="image")
    model = FIMP(pictures, n_latent=16, n_heads=2, token_size=2)
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match="reads no expression"):
        model.get_edge_influence()
