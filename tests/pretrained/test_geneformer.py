"""Geneformer's tokens, layers and files against transformers, the paper's description and real dictionaries."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter

import anndata
import numpy as np
import pytest
import torch
from geneformer_toys import dictionaries, ranked, write_bert, write_dictionaries, write_geneformer
from graph_toys import data_of
from scipy import sparse

import fimp_sc
from fimp_sc.data import BlockDataset, Destinations, RankTokenizer
from fimp_sc.model import FIMP
from fimp_sc.pretrained import CheckpointError, load

GENES = [f"ENSG{i:011d}" for i in range(30)]


def order(model, counts: np.ndarray, n_tokens: int, visible=None):
    """Tokens of cells that the model makes of counts, all of them visible by default."""
    n_cells, n_genes = counts.shape
    visible = torch.ones(1, n_genes, dtype=torch.bool) if visible is None else torch.from_numpy(visible)
    pattern = torch.zeros(n_cells, dtype=torch.int64) if len(visible) == 1 else torch.arange(n_cells)
    tokenizer = model.embedding.tokenizer(torch.arange(n_genes), 0, 0, np.arange(n_genes, dtype=np.uint64))
    return tokenizer(sparse.csr_matrix(counts.astype(np.float32)), None, visible, pattern, n_tokens)


def draw(n_cells: int, n_genes: int, seed: int = 0) -> np.ndarray:
    counts = np.random.default_rng(seed).poisson(1.5, (n_cells, n_genes))
    counts[-1] = 0
    return counts


@torch.no_grad()
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel"])
def test_cells_by_themselves_equal_transformers(tmp_path, version: int, kind: str) -> None:
    bert, content = write_geneformer(tmp_path, GENES, version, kind=kind)
    model = load("geneformer", tmp_path).read()
    counts = draw(6, len(GENES))
    counts[1, 5:] = 0
    feature, value, padding = order(model, counts, 12)
    tokens, absent = model.embedding(feature, value, padding)
    states = [tokens, *model.stack.alone_states(tokens, absent)]
    # The last layer of the file is left out, as its authors do.
    assert len(states) == 3
    first, last = ([2], [3]) if version == 2 else ([], [])
    for i, cell in enumerate(counts[:-1]):
        chosen, values = ranked(cell, GENES, content, 12)
        assert [content["token_dictionary_gc1M"][GENES[f]] for f in feature[i][~padding[i]]] == chosen
        # Values are those before the division by the total.
        np.testing.assert_allclose(value[i][~padding[i]] * 10_000 / cell.sum(), values, rtol=1e-5)
        theirs = bert(torch.tensor([first + chosen + last]), output_hidden_states=True).hidden_states
        for a, b in zip(states, theirs, strict=False):
            expected, n = b[0], len(chosen)
            if version == 2:
                torch.testing.assert_close(a[i, :2], expected[[0, n + 1]], rtol=1e-5, atol=1e-5)
                expected = expected[1:-1]
            torch.testing.assert_close(a[i, len(first + last) :][:n], expected, rtol=1e-5, atol=1e-5)
    assert padding[-1].all()
    assert all(torch.isfinite(state).all() for state in states)


@torch.no_grad()
def test_layer_and_pooling_are_settings(tmp_path) -> None:
    write_geneformer(tmp_path / "2", GENES, 2)
    write_geneformer(tmp_path / "1", GENES, 1)
    assert [len(load("geneformer", tmp_path / "2", layer=i).read().stack.layers) for i in (-1, 1, 3)] == [3, 1, 3]
    poolings = [load("geneformer", tmp_path / "2", **how).read() for how in ({}, {"pooling": "mean"})]
    assert [model.embedding.pooling for model in poolings] == ["cls", "mean"]
    assert load("geneformer", tmp_path / "1").read().embedding.pooling == "mean"
    with pytest.raises(ValueError, match="must be 'mean', as this version has no <cls>"):
        load("geneformer", tmp_path / "1", pooling="cls").read()
    with pytest.raises(ValueError, match="'cls' or 'mean': found 'max'"):
        load("geneformer", tmp_path / "2", pooling="max").read()
    with pytest.raises(ValueError, match="layer must be from 1 to 3"):
        load("geneformer", tmp_path / "2", layer=0).read()
    with pytest.raises(TypeError, match=r"load\('geneformer'\) got n_heads=, and takes .*layer, pooling"):
        load("geneformer", tmp_path / "2", n_heads=3)


def test_no_more_tokens_than_there_are_positions(tmp_path) -> None:
    write_geneformer(tmp_path, GENES, 2, n_positions=9)
    model = load("geneformer", tmp_path).read()
    feature, value, padding = order(model, draw(5, len(GENES)), 100)
    assert feature.shape == (5, 7)
    assert model.embedding(feature, value, padding)[0].shape == (5, 9, 24)


def test_rows_of_some_genes(tmp_path) -> None:
    write_geneformer(tmp_path, GENES, 2)
    foundation = load("geneformer", tmp_path)
    rows = foundation.vocabulary()
    chosen = np.array([rows[GENES[7]], -1, rows[GENES[2]]])
    some, all_genes = foundation.read(chosen), foundation.read()
    assert some.embedding.known.tolist() == [True, False, True]
    pair = (torch.tensor([[2, 0]]), torch.tensor([[rows[GENES[2]], rows[GENES[7]]]]))
    nothing = torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)
    for a, b in zip(some.embedding(pair[0], *nothing), all_genes.embedding(pair[1], *nothing), strict=True):
        torch.testing.assert_close(a, b)
    again = foundation.build(some.config)
    again.embedding.load_state_dict(some.embedding.state_dict())
    assert torch.equal(again.embedding.usual, some.embedding.usual)
    for rows_that_are_none, message in (([-1, -1], "None of the 2 genes"), ([30], "found 30 to 30")):
        with pytest.raises(ValueError, match=message):
            foundation.read(np.array(rows_that_are_none))


def test_counts_of_one_gene_are_added(tmp_path) -> None:
    """Two columns of one gene, one of which is an older id, and the other may be hidden."""
    names = {"OLD": GENES[0], "SYMBOL": GENES[1], **{gene: gene for gene in GENES}, "NOWHERE": "ENSG99999999999"}
    _, content = write_geneformer(tmp_path, GENES[:2], 2, names=names)
    content["gene_median_dictionary_gc1M"] |= {GENES[0]: 1.0, GENES[1]: 1.0}
    write_dictionaries(tmp_path, content)
    foundation = load("geneformer", tmp_path)
    vocabulary = foundation.vocabulary()
    assert [*vocabulary] == [*GENES[:2], "OLD", "SYMBOL"]
    model = foundation.read(np.array([vocabulary[name] for name in (GENES[0], "SYMBOL", "OLD")]))
    assert model.embedding.embeddings.table.num_embeddings == 2 + 2
    feature, value, _ = order(model, np.array([[2, 3, 2], [1, 3, 1]]), 5)
    assert feature.tolist() == [[0, 1], [1, 0]]
    assert value.tolist() == [[4, 3], [3, 2]]
    hidden = np.array([[True, True, False], [False, True, True]])
    feature, value, _ = order(model, np.array([[2, 3, 2], [1, 3, 1]]), 5, hidden)
    assert feature.tolist() == [[1, 0], [1, 0]]
    assert value.tolist() == [[3, 2], [3, 1]]


def test_what_is_hidden_is_no_token() -> None:
    rng = np.random.default_rng(0)
    counts, visible = draw(8, 20), rng.random((8, 20)) < 0.5
    tokenizer = RankTokenizer(np.arange(20), np.ones(20), 50)
    rows = sparse.csr_matrix(counts.astype(np.float32))
    feature, _, padding = tokenizer(rows, None, torch.from_numpy(visible), torch.arange(8), 50)
    for i in range(8):
        shown = np.flatnonzero(visible[i] & (counts[i] > 0))
        assert sorted(feature[i][~padding[i]].tolist()) == shown.tolist()
        # Equal values are in the order of the vocabulary.
        assert feature[i][~padding[i]].tolist() == sorted(shown, key=lambda gene: (-counts[i, gene], gene))


def test_order_of_columns_does_not_matter(tmp_path) -> None:
    write_geneformer(tmp_path, GENES, 2)
    foundation = load("geneformer", tmp_path)
    rows = np.array([foundation.vocabulary()[gene] for gene in GENES])
    counts, turn = draw(6, len(GENES)), np.random.default_rng(1).permutation(len(GENES))
    feature, _, padding = order(foundation.read(rows), counts, 9)
    moved, _, _ = order(foundation.read(rows[turn]), counts[:, turn], 9)
    assert torch.equal(torch.from_numpy(turn)[moved][~padding], feature[~padding])


# Files ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_other_files_of_the_same_model(tmp_path) -> None:
    bert, content = write_geneformer(tmp_path / "a", GENES, 2, names={"X": GENES[0]})
    other = write_dictionaries(tmp_path / "b", content, "json")
    shutil.copy(tmp_path / "a" / "config.json", other)
    torch.save(bert.state_dict(), other / "pytorch_model.bin")
    one, two = (load("geneformer", folder) for folder in (tmp_path / "a", other))
    assert one.vocabulary() == two.vocabulary()
    a, b = one.read(), two.read()
    assert a.config == b.config
    for part in ("embedding", "stack"):
        theirs = getattr(b, part).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in getattr(a, part).state_dict().items())


class Trap:
    """Makes a folder when a pickle is read the usual way."""

    def __reduce__(self):
        import os

        return os.mkdir, ("trapped",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("token_dictionary_gc1M", {"<pad>": 0, GENES[0]: Trap()}, "asks for .*nothing was executed"),
        ("token_dictionary_gc1M", ["<pad>"], "must hold a dictionary, found list"),
        ("token_dictionary_gc1M", {"<pad>": 0, GENES[0]: 0}, "a token of its own"),
        ("token_dictionary_gc1M", {GENES[0]: 0}, "and '<pad>' one"),
        ("token_dictionary_gc1M", {"<pad>": 0, GENES[0]: 1.5}, "a whole number.*found 1.5 for 'ENSG"),
        ("token_dictionary_gc1M", {"<pad>": 0, GENES[0]: 99}, "tokens up to 99.*only 34 rows"),
        ("gene_median_dictionary_gc1M", {GENES[0]: 1.0}, "no median of 29 genes"),
        ("gene_median_dictionary_gc1M", {GENES[0]: 0.0}, "a number above zero"),
        ("gene_median_dictionary_gc1M", {GENES[0]: float("nan")}, "a number above zero"),
        ("ensembl_mapping_dict_gc1M", {"A": 3}, "the Ensembl id of a gene for each name, found 3"),
        ("token_dictionary_other", {"<pad>": 0}, "must hold one token_dictionary.*several"),
        ("token_dictionary_gc1M", None, r"must hold one token_dictionary.*none: copy it there"),
        ("gene_median_dictionary_gc1M", None, r"must hold one gene_median_dictionary.*none"),
    ],
)
def test_dictionaries_that_cannot_be_used(tmp_path, monkeypatch, name: str, content, message: str) -> None:
    write_geneformer(tmp_path, GENES, 2)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"{name}.pkl"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        load("geneformer", tmp_path).read()
    assert not (tmp_path / "trapped").exists()


def test_models_of_another_kind(tmp_path) -> None:
    write_geneformer(tmp_path, GENES, 2)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "roberta"}))
    with pytest.raises(CheckpointError, match=r"model_type.*supported: 'bert'"):
        load("geneformer", tmp_path).read()


# Real dictionaries ----------------------------------------------------------------------------------------------------


def plain_tokens(counts, names, tokens: dict, medians: dict, mapping: dict, version: int):
    """Values of the tokens of a cell, step by step as the authors' tokenizer makes them; by a name's gene."""
    if version == 2:
        genes = [mapping.get(name.upper()) for name in names]
    else:
        genes = [name if name in tokens else mapping.get(name.upper()) for name in names]
    merged = [gene for gene in dict.fromkeys(genes) if gene is not None]
    column = {gene: i for i, gene in enumerate(merged)}
    summed = np.zeros((len(counts), len(merged)))
    for i, gene in enumerate(genes):
        if gene is not None:
            summed[:, column[gene]] += counts[:, i]
    kept = [gene for gene in merged if gene in tokens]
    scaled = summed[:, [column[gene] for gene in kept]] / counts.sum(1, keepdims=True) * 10_000
    return scaled / np.array([float(medians[gene]) for gene in kept]), kept, genes


@pytest.mark.parametrize(("version", "n_tokens"), [(1, 2048), (2, 4094), (2, 300)])
def test_tokens_of_a_section_with_the_real_dictionaries(shared_data, tmp_path, version: int, n_tokens: int) -> None:
    source = shared_data / "geneformer_dictionaries"
    paths = {name: next(source.glob(f"V{version}_{name}*")) for name in ("token", "gene_median")}
    paths["mapping"] = next(source.glob("V2_ensembl_mapping*"))
    for path in paths.values():
        (tmp_path / path.name).symlink_to(path)
    tokens, medians, mapping = (pickle.loads(path.read_bytes()) for path in paths.values())
    write_bert(tmp_path, len(tokens), n_positions={1: 2048, 2: 4096}[version])
    adata = anndata.read_h5ad(shared_data / "dlpfc_visium_151673.h5ad")
    chosen = np.arange(0, adata.n_obs, 60)
    counts, names = adata.X[chosen].toarray().astype(np.float64), [str(name) for name in adata.var_names]
    values, kept, genes = plain_tokens(counts, names, tokens, medians, mapping, version)
    duplicated = {gene for gene, number in Counter(genes).items() if gene in tokens and number > 1}
    assert len(duplicated) == {1: 3, 2: 5}[version]

    fimp_sc.pp.spatial_graph(adata)
    with pytest.warns(UserWarning, match="39 of 7,319 genes are zero"):
        FIMP.setup_anndata(adata)
    model = FIMP(adata, foundation=load("geneformer", tmp_path), n_tokens=n_tokens)
    batch = BlockDataset(data_of(model), n_layers=0, n_tokens=n_tokens)[Destinations(chosen, 0)]
    cells = [feature[~absent].tolist() for feature, absent in zip(batch["feature_id"], batch["padding"], strict=True)]
    assert values.shape[1] > 5_800
    seen = set()
    for row, cell in zip(values, cells, strict=True):
        found = [genes[i] for i in cell]
        place = dict(zip(kept, row, strict=True))
        assert len(set(found)) == len(found) == min((row > 0).sum(), n_tokens)
        # Equal values may be in any order there; here they are in that of their tokens.
        np.testing.assert_allclose([place[gene] for gene in found], np.sort(row)[::-1][: len(found)], rtol=1e-12)
        expected = sorted((gene for gene in kept if place[gene] > 0), key=lambda gene: tokens[gene])
        expected = sorted(expected, key=lambda gene: -np.float64(f"{place[gene]:.12g}"))[:n_tokens]
        assert found == expected
        seen |= set(found)
    assert n_tokens < 2000 or len(duplicated & seen) > 1


def test_dictionaries_of_the_toy_are_as_the_real_ones() -> None:
    content = dictionaries(GENES, 1)
    assert {type(value) for value in content["gene_median_dictionary_gc1M"].values()} == {np.float64}
    assert np.int16 in {type(value) for value in content["token_dictionary_gc1M"].values()}
