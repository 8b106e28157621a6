"""Two tables, of expression and of proteins, that are read together."""

from __future__ import annotations

import mudata
import numpy as np
import pandas as pd
import pytest
from graph_toys import data_of
from protein_toys import N_GENES, cells_with_proteins
from scipy import sparse

import fimp_sc
from fimp_sc.data._modality import quiet_mudata
from fimp_sc.model import FIMP
from fimp_sc.pretrained import load

BOTH = ["rna", "protein"]
QUICK = {
    "max_epochs": 1, "accelerator": "cpu", "verbose": False, "train_kwargs": {"batch_size": 32},
    "model_kwargs": {"n_latent": 16, "n_heads": 2, "n_tokens": 12},
}  # fmt: skip
AGAIN = {"accelerator": "cpu", "verbose": False}


def test_tools_read_two_tables_together(tmp_path, only_changed) -> None:
    mdata = cells_with_proteins()
    with only_changed(mdata, ("", "obsm", "X_fimp"), ("", "uns", "X_fimp")):
        fimp_sc.tl.embed(mdata, modality=BOTH, **QUICK)
    model = fimp_sc.tl.get_model(mdata)
    assert list(model.genes) == [*mdata["rna"].var_names, *mdata["protein"].var_names]
    assert mdata.uns["X_fimp"]["input_scale"] == {"rna": "counts", "protein": "counts"}
    written = [(name, slot, "fimp") for name in BOTH for slot in ("layers", "uns")]
    with only_changed(mdata, *written, ("", "uns", "fimp")):
        fimp_sc.tl.impute(mdata, **AGAIN)
    assert fimp_sc.tl.get_model(mdata) is model
    values = model.get_expression()
    np.testing.assert_array_equal(mdata["rna"].layers["fimp"], values[:, :N_GENES])
    np.testing.assert_array_equal(mdata["protein"].layers["fimp"], values[:, N_GENES:])
    totals = {name: np.median(np.asarray(mdata[name].X.sum(1))) for name in BOTH}
    assert {name: mdata[name].uns["fimp"]["target_sum"] for name in BOTH} == pytest.approx(totals)
    made = fimp_sc.pl.imputation(mdata, "CD1", show=False)
    measured = data_of(model).expression.rows(np.arange(mdata.n_obs))[:, N_GENES + 1]
    np.testing.assert_allclose(made[0, 0].collections[0].get_array(), measured, rtol=1e-5)
    fimp_sc.tl.impute(mdata, genes=["CD2", mdata["rna"].var_names[4]], key_added="few", **AGAIN)
    np.testing.assert_allclose(mdata["protein"].obsm["few"][:, 0], values[:, N_GENES + 2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mdata["rna"].obsm["few"][:, 0], values[:, 4], rtol=1e-5, atol=1e-6)
    fimp_sc.tl.niches(mdata, 2, verbose=False)
    fimp_sc.pl.spatial(mdata, ["fimp_niche", "CD0"], show=False)
    counts = model.get_expression(scale="counts")
    factor = totals["protein"] / np.asarray(mdata["protein"].X.sum(1))
    np.testing.assert_allclose(counts[:, N_GENES:], np.expm1(values[:, N_GENES:]) / factor, rtol=1e-3, atol=1e-3)

    model.save(tmp_path / "model")
    other = FIMP.load(tmp_path / "model", mdata, accelerator="cpu")
    np.testing.assert_array_equal(other.get_latent_representation(), mdata.obsm["X_fimp"])
    np.testing.assert_array_equal(other.get_expression(), values)
    with quiet_mudata():
        mdata.write(tmp_path / "object.h5mu")
        again = mudata.read_h5mu(tmp_path / "object.h5mu")
    fimp_sc.tl.embed(again, model=tmp_path / "model", **AGAIN)
    np.testing.assert_array_equal(again.obsm["X_fimp"], mdata.obsm["X_fimp"])


def test_cells_and_tables_in_another_order_have_the_same_results() -> None:
    mdata = cells_with_proteins()
    fimp_sc.tl.annotate(mdata, "cell_type", modality=BOTH, **QUICK)
    model = fimp_sc.tl.get_model(mdata)
    order = np.random.default_rng(0).permutation(mdata.n_obs)
    with quiet_mudata():
        rna, protein = mdata["rna"][order].copy(), mdata["protein"][order[::-1]].copy()
        other = mudata.MuData({"protein": protein, "rna": rna})
    fimp_sc.tl.embed(other, modality=["protein", "rna"], model=model, **AGAIN)
    rows = other.obs_names.get_indexer(mdata.obs_names)
    np.testing.assert_allclose(other.obsm["X_fimp"][rows], model.get_latent_representation(), rtol=1e-3, atol=1e-4)


def test_pairs_of_genes_and_proteins_are_tested(only_changed) -> None:
    mdata = cells_with_proteins()
    rna = mdata["rna"]
    rna.obs["side"] = np.where(rna.obsm["spatial"][:, 1] > np.median(rna.obsm["spatial"][:, 1]), "up", "down")
    names = ["CD0", rna.var_names[3], "CD4", rna.var_names[7]]
    every = pd.MultiIndex.from_product([names, names], names=["source", "target"]).to_frame(index=False)
    # Cells of a side and section swap places, whatever is around them, and pairs have a direction.
    how = {"min_edges": 3, "min_support": 1, "n_permutations": 20, "pairs": every, "domain_key": "section"}
    with only_changed(mdata, ("", "obsp", "influence"), ("", "uns", "influence")):
        fimp_sc.tl.attention(mdata, "side", modality=BOTH, library_key="section", key_added="influence", **QUICK)
    graph = rna.obsp["spatial_connectivities"]
    np.testing.assert_array_equal(mdata.obsp["influence"].toarray() > 0, graph.toarray() > 0)
    with only_changed(mdata, ("", "uns", "k")):
        fimp_sc.tl.gene_pairs(mdata, "side", library_key="section", key_added="k", verbose=False, **how)
    table = mdata.uns["k"]["pairs"]
    assert {*table["source_gene"]} == {*table["destination_gene"]} == set(names)
    columns = []
    for name in names:
        part = mdata["protein" if name in mdata["protein"].var_names else "rna"]
        counts = part.X.toarray()
        totals = counts.sum(1)
        columns.append(np.log1p(counts[:, part.var_names.get_loc(name)] / totals * np.median(totals)))
    values = pd.DataFrame(np.stack(columns, axis=1), columns=names)
    values -= values.groupby((rna.obs["section"].astype(str) + rna.obs["side"]).to_numpy()).transform("mean")
    coo, side = graph.tocoo(), rna.obs["side"].to_numpy()
    for _, row in table.iterrows():
        chosen = (side[coo.col] == row["source_group"]) & (side[coo.row] == row["destination_group"])
        i, j = coo.row[chosen], coo.col[chosen]
        assert row["n_edges"] == len(i)
        term = values[row["destination_gene"]].to_numpy()[i] * values[row["source_gene"]].to_numpy()[j]
        term /= np.bincount(i)[i]
        assert row["score"] == pytest.approx(term.sum() / np.sqrt((term**2).sum()), rel=1e-3, abs=1e-4)


def test_hidden_proteins_are_predicted_from_expression() -> None:
    mdata = cells_with_proteins(n_obs=400)
    rng = np.random.default_rng(0)
    hidden = np.zeros(mdata["protein"].shape, dtype=bool)
    hidden[:, :6] = rng.random((mdata.n_obs, 6)) < 0.3
    mdata["protein"].layers["hide"] = hidden
    how = QUICK | {"max_epochs": 15, "model_kwargs": {"n_latent": 32, "n_heads": 2, "n_tokens": 24}}
    fimp_sc.tl.impute(mdata, modality=BOTH, hidden="hide", **how)
    counts = mdata["protein"].X.toarray()
    true = np.log1p(counts / counts.sum(1, keepdims=True) * np.median(counts.sum(1)))
    made = mdata["protein"].layers["fimp"]
    error = mean = 0.0
    for i in range(6):
        own = hidden[:, i]
        error += np.square(made[own, i] - true[own, i]).sum()
        mean += np.square(true[own, i] - true[~own, i].mean()).sum()
    assert error < 0.8 * mean


def test_names_that_both_tables_have_follow_that_of_their_table() -> None:
    mdata = cells_with_proteins(shared="CD3E")
    FIMP.setup_mudata(mdata, modality=BOTH, input_scale={"protein": "normalized"})
    model = FIMP(mdata, n_latent=16)
    assert [model.genes[0], model.genes[N_GENES], model.genes[N_GENES + 1]] == ["rna:CD3E", "protein:CD3E", "CD1"]
    states = model.registry["field_registries"]["X"]["state_registry"]["tables"]
    assert {name: state["input_scale"] for name, state in states.items()} == {"rna": "counts", "protein": "normalized"}
    mdata["rna"].var_names = ["CD3E", "protein:CD3E", *mdata["rna"].var_names[2:]]
    with pytest.raises(ValueError, match="'protein:CD3E' would be the name of two columns"):
        FIMP.setup_mudata(mdata, modality=BOTH)


def test_a_cell_without_proteins_is_described_by_its_genes() -> None:
    """Its own genes change its embedding, as the warning says."""
    mdata = cells_with_proteins()
    mdata["protein"].X[0] = 0
    with pytest.warns(UserWarning, match="cells are empty.*described by their other modalities and their neighbors;"):
        fimp_sc.tl.embed(mdata, modality=BOTH, **QUICK)
    before, model = mdata.obsm["X_fimp"].copy(), fimp_sc.tl.get_model(mdata)
    counts = mdata["rna"].X.toarray()
    counts[0] = counts[0, ::-1]
    mdata["rna"].X = sparse.csr_matrix(counts)
    with pytest.warns(UserWarning, match="cells are empty"):
        fimp_sc.tl.embed(mdata, model=model, **AGAIN)
    assert np.abs(mdata.obsm["X_fimp"] - before)[0].max() > 1e-3


def test_what_cannot_be_read(scgpt_checkpoint) -> None:
    mdata = cells_with_proteins()
    with pytest.raises(ValueError, match=r"is for expression alone; this model reads \['rna', 'protein'\]"):
        fimp_sc.tl.embed(
            mdata, modality=BOTH, foundation=load("scgpt", scgpt_checkpoint(mdata["rna"].var_names)), verbose=False
        )
    with pytest.raises(ValueError, match=r"input_scale names 'prot', and the tables that are read are \['rna'"):
        fimp_sc.tl.embed(mdata, modality=BOTH, input_scale={"prot": "log"}, **QUICK)
    with pytest.raises(ValueError, match="one modality is read"):
        fimp_sc.tl.embed(mdata, modality="rna", input_scale={"rna": "log"}, **QUICK)
    fimp_sc.tl.embed(mdata, modality=BOTH, **QUICK)
    model = fimp_sc.tl.get_model(mdata)
    with pytest.raises(ValueError, match=r"reads \['rna', 'protein'\], and this call one modality: name the modal"):
        fimp_sc.tl.embed(mdata["rna"].copy(), model=model, **AGAIN)
    del mdata.mod["protein"]
    with pytest.raises(KeyError, match=r"'protein' is not in mdata\.mod.*train a model on \['rna'\] alone"):
        fimp_sc.tl.annotate(mdata, "cell_type", model=model, **AGAIN)
    with pytest.raises(ValueError, match="and this call one modality"):
        fimp_sc.tl.embed(mdata, modality=["rna"], model=model, **AGAIN)
    with pytest.raises(ValueError, match=r"dictionary, with keys of \['rna', 'protein'\]"):
        model.get_expression(hidden=np.zeros((mdata.n_obs, 3), dtype=bool))
