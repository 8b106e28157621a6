from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import fimp_sc
from fimp_sc.datasets import toy_communication
from fimp_sc.model.predict._attention import attention_data, genes_with_tokens
from fimp_sc.tl import _attention

QUICK = {"max_epochs": 1, "accelerator": "cpu", "verbose": False, "library_key": "section"}
SMALL = {**QUICK, "model_kwargs": {"n_latent": 16, "n_heads": 2, "n_tokens": 16}}
KEY = ["source_group", "destination_group", "source_gene", "destination_gene"]
GRAPH = {"spatial_connectivities", "spatial_distances"}


def tissue(seed: int, n_obs: int = 400, *, planted: bool = True) -> ad.AnnData:
    """Return a tissue in which every cell has a molecule."""
    adata = toy_communication(n_obs, seed, planted=planted, n_genes=20)
    return adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()


@pytest.fixture(scope="session")
def tissues() -> dict[tuple[int, bool], ad.AnnData]:
    """Attention read of tissues of two seeds, with and without a pair that speaks; not to be changed."""
    out = {(seed, planted): tissue(seed, planted=planted) for seed in (11, 12) for planted in (True, False)}
    for adata in out.values():
        fimp_sc.tl.attention(adata, "cell_type", **SMALL)
    return out


@pytest.fixture
def read(tissues) -> ad.AnnData:
    """Tissue in which attention was read; a copy that a test may change."""
    return tissues[11, True].copy()


@pytest.fixture(scope="session")
def model(tissues) -> fimp_sc.model.FIMP:
    return fimp_sc.tl.get_model(tissues[11, True])


@pytest.fixture
def fresh() -> ad.AnnData:
    return tissue(5, 100)


def pairs(adata: ad.AnnData, key: str = "fimp_attention") -> pd.DataFrame:
    return adata.uns[key]["pairs"]


@pytest.mark.parametrize("seed", [11, 12])
def test_the_pair_that_speaks_ranks_first(tissues, seed) -> None:
    adata = tissues[seed, True]
    names = adata.uns["communication"]
    planted = [names["sender"], names["receiver"], names["ligand"], names["receptor"]]
    first = pairs(adata).iloc[0]
    assert first[KEY].tolist() == planted
    assert first["fdr"] < 0.02
    significant = pairs(adata)[pairs(adata)["fdr"] < 0.01]
    assert {*significant["source_gene"], *significant["destination_gene"]} <= {names["ligand"], names["receptor"]}


@pytest.mark.parametrize("seed", [11, 12])
def test_nothing_is_found_where_nothing_speaks(tissues, seed) -> None:
    table = pairs(tissues[seed, False])
    assert table["fdr"].min() > 0.05
    assert 0.02 < (table["pvalue"] < 0.05).mean() < 0.09
    assert table["z"].std() == pytest.approx(1, abs=0.15)
    assert len(table) > 2000


def test_what_is_written(tissues, read) -> None:
    assert set(read.obsp) == {"fimp_attention", *GRAPH}
    influence, graph = read.obsp["fimp_attention"], read.obsp["spatial_connectivities"]
    assert influence.dtype == np.float32
    np.testing.assert_array_equal(influence.indices, graph.indices)
    np.testing.assert_array_equal(influence.indptr, graph.indptr)
    assert influence.diagonal().sum() == 0
    result = read.uns["fimp_attention"]
    assert result["n_tests"] == len(result["pairs"])
    assert set(result["genes"]) <= set(read.var_names)
    assert result["params"]["groupby"] == "cell_type"
    assert result["params"]["null"] == "neighbors"
    assert (np.diff(result["pairs"]["pvalue"]) >= 0).all()
    assert (result["pairs"]["n_edges"] >= 30).all()
    assert not result["pairs"].duplicated(KEY).any()


def test_table_of_groups_is_the_mean_over_edges(read) -> None:
    coo = read.obsp["fimp_attention"].tocoo()
    kind = read.obs["cell_type"].to_numpy()
    edges = pd.DataFrame({"source_group": kind[coo.col], "destination_group": kind[coo.row], "influence": coo.data})
    expected = edges.groupby(KEY[:2])["influence"].agg(["mean", "size"])
    table = read.uns["fimp_attention"]["groups"].astype(dict.fromkeys(KEY[:2], str)).set_index(KEY[:2])
    expected = expected.loc[table.index]
    np.testing.assert_allclose(table["influence"], expected["mean"], rtol=1e-5)
    np.testing.assert_array_equal(table["n_edges"], expected["size"])


def test_attention_and_score_of_pairs(read, model) -> None:
    genes = list(read.uns["fimp_attention"]["genes"])
    mean, n_edges, names = model.get_gene_attention(read.obs["cell_type"], genes=genes)
    totals = np.asarray(read.X.sum(1))
    values = np.log1p(read.X.toarray() / totals * np.median(totals))[:, read.var_names.get_indexer(genes)]
    strata = read.obs["section"].astype(str) + read.obs["cell_type"].astype(str)
    values = values - pd.DataFrame(values).groupby(strata.to_numpy()).transform("mean").to_numpy()
    coo, kind = read.obsp["spatial_connectivities"].tocoo(), read.obs["cell_type"].to_numpy()
    for _, row in pairs(read).iloc[[0, 1, 50, 1000, -1]].iterrows():
        source, destination, of, to = row[KEY]
        s, d, g, h = names.index(source), names.index(destination), genes.index(of), genes.index(to)
        assert row["attention"] == pytest.approx(mean[s, d, g, h], abs=1e-6)
        assert row["n_edges"] == n_edges[s, d]
        chosen = (kind[coo.col] == source) & (kind[coo.row] == destination)
        edges = pd.DataFrame({"i": coo.row[chosen], "j": coo.col[chosen]})
        k = edges.groupby("i")["j"].transform("size").to_numpy()
        term = values[edges["i"], h] * values[edges["j"], g] / k
        assert row["score"] == pytest.approx(term.sum() / np.sqrt((term**2).sum()), rel=1e-3, abs=1e-4)


def test_order_of_cells_does_not_matter(read, model) -> None:
    order = np.random.default_rng(0).permutation(read.n_obs)
    other = read[order].copy()
    del other.uns["fimp_attention"], other.obsp["fimp_attention"]
    fimp_sc.tl.attention(other, "cell_type", model=model, **QUICK)
    there, here = other.obsp["fimp_attention"], read.obsp["fimp_attention"]
    np.testing.assert_allclose(there.toarray(), here[order][:, order].toarray(), rtol=1e-4, atol=1e-6)
    table = pd.concat([pairs(read).set_index(KEY), pairs(other).set_index(KEY).add_prefix("other_")], axis=1)
    assert len(table) == len(pairs(read))
    for name in ("attention", "score", "n_edges"):
        np.testing.assert_allclose(table[name], table[f"other_{name}"], rtol=1e-3, atol=1e-4)
    # Other permutations are drawn.
    assert table["z"].corr(table["other_z"]) > 0.97


def test_batch_size_does_not_matter(read) -> None:
    fimp_sc.tl.attention(read, "cell_type", key_added="other", inference_kwargs={"batch_size": 13}, **SMALL)
    one, other = (read.obsp[key].toarray() for key in ("fimp_attention", "other"))
    np.testing.assert_allclose(one, other, rtol=1e-4)
    pd.testing.assert_frame_equal(pairs(read), pairs(read, "other"), rtol=1e-4)


def test_the_model_is_used_again_and_the_seed_repeats(read, model, trainings) -> None:
    for key in "ab":
        fimp_sc.tl.attention(read, "cell_type", key_added=key, model=model, **QUICK)
    assert not trainings
    pd.testing.assert_frame_equal(pairs(read, "a"), pairs(read, "b"))
    fimp_sc.tl.attention(read, "cell_type", key_added="c", model=model, random_state=1, **QUICK)
    assert (pairs(read, "c")["z"] != pairs(read, "a")["z"]).any()


@pytest.mark.parametrize("statistic", ["covariance", "content", "attention"])
@pytest.mark.parametrize("null", ["neighbors", "labels"])
def test_other_questions(read, model, null, statistic) -> None:
    names = read.uns["communication"]
    genes = [names["ligand"], names["receptor"], *(g for g in read.var_names if g not in names.values())][:8]
    how = {"null": null, "statistic": statistic, "genes": genes, "n_permutations": 20}
    fimp_sc.tl.attention(read, "cell_type", key_added="k", model=model, **how, **QUICK)
    table = pairs(read, "k")
    assert set(read.uns["k"]["genes"]) == set(genes)
    assert {*table["source_gene"], *table["destination_gene"]} <= set(genes)
    assert table["pvalue"].between(0, 1, inclusive="right").all()
    same = table.merge(pairs(read)[[*KEY, "attention"]], on=KEY, suffixes=("", "_before"))
    assert len(same) > 50
    np.testing.assert_allclose(same["attention"], same["attention_before"], rtol=1e-4, atol=1e-7)
    if statistic == "attention":
        np.testing.assert_allclose(table["score"], table["attention"], rtol=1e-5)
    if null == "labels" and statistic == "attention":
        # Ligand and receptor are markers of their types: no other cells have them.
        planted = table[(table[KEY] == [names[n] for n in ("sender", "receiver", "ligand", "receptor")]).all(axis=1)]
        assert (planted["z"] > 3).all()


def test_pairs_to_test(read, model, caplog) -> None:
    names = read.uns["communication"]
    asked = pd.DataFrame(
        {"ligand": [names["ligand"], "CD74", "NONE"], "receptor": [names["receptor"], "CD52", "CD74"]},
        index=list("xyz"),
    )
    fimp_sc.tl.attention(read, "cell_type", pairs=asked, key_added="k", model=model, **QUICK)
    assert "1 of 3 pairs name a gene that is not known" in caplog.text
    table = pairs(read, "k")
    tested = set(zip(table["source_gene"], table["destination_gene"], strict=True))
    assert tested == {(names["ligand"], names["receptor"]), ("CD74", "CD52")}
    assert table.iloc[0][KEY].tolist() == [names["sender"], names["receiver"], names["ligand"], names["receptor"]]


def test_pairs_with_too_little_support_are_not_tested(read, model) -> None:
    fimp_sc.tl.attention(read, "cell_type", key_added="k", model=model, min_support=40, **QUICK)
    genes = list(read.uns["k"]["genes"])
    present = genes_with_tokens(model, attention_data(model, None), genes)
    share = pd.DataFrame(present, columns=genes).groupby(read.obs["cell_type"].to_numpy()).mean()
    n_edges = read.uns["k"]["groups"].set_index(KEY[:2])["n_edges"]
    expected = {
        (source, destination, of, to)
        for (source, destination), n in n_edges.items() for of in genes for to in genes
        if n * share.loc[source, of] * share.loc[destination, to] >= 40
    }  # fmt: skip
    assert set(pairs(read, "k")[KEY].itertuples(index=False, name=None)) == expected
    assert 0 < len(expected) < len(pairs(read))


def test_cells_without_group_are_left_out(read, model) -> None:
    read.obs["part"] = read.obs["cell_type"].astype(object).where(np.arange(read.n_obs) % 3 > 0)
    fimp_sc.tl.attention(read, "part", key_added="k", model=model, **QUICK)
    assert read.obsp["k"].nnz == read.obsp["fimp_attention"].nnz, "influence is that of all edges"
    kept = read.obs["part"].notna().to_numpy()
    edges = read.obsp["spatial_connectivities"][kept][:, kept].nnz
    assert read.uns["k"]["groups"]["n_edges"].sum() == edges


@pytest.mark.parametrize(("name", "how"), [("Unknown", {}), ("to do", {"unlabeled_category": "to do"})])
def test_the_unlabeled_category_is_no_group(read, model, name, how) -> None:
    kept = np.arange(read.n_obs) % 3 > 0
    read.obs["missing"] = read.obs["cell_type"].astype(object).where(kept)
    read.obs["named"] = pd.Categorical(read.obs["missing"].fillna(name))
    for column in ("missing", "named"):
        fimp_sc.tl.attention(read, column, key_added=column, model=model, **how, **QUICK)
    assert read.uns["named"]["params"]["unlabeled_category"] == name
    for table in ("groups", "pairs"):
        one, other = (read.uns[key][table] for key in ("missing", "named"))
        pd.testing.assert_frame_equal(one, other)
        assert not (other[KEY[:2]].astype(str) == name).any(axis=None)


def test_a_word_for_no_group_is_warned_of(read, model) -> None:
    read.obs["part"] = read.obs["cell_type"].astype(object).where(np.arange(read.n_obs) % 3 > 0, "Unassigned")
    n = -(-read.n_obs // 3)
    with pytest.warns(UserWarning, match=f"'Unassigned' for {n} .*unlabeled_category='Unassigned'"):
        fimp_sc.tl.attention(read, "part", key_added="k", model=model, **QUICK)


@pytest.mark.parametrize("dtype", [bool, int, float, "Int64", "boolean", object])
def test_groups_may_be_flags_and_whole_numbers(read, model, dtype) -> None:
    kind = read.obs["cell_type"] == "Dendritic"
    read.obs["kind"] = kind.astype(bool).astype(dtype)
    if dtype in (float, "Int64", "boolean", object):
        read.obs.loc[read.obs_names[:9], "kind"] = None
    fimp_sc.tl.attention(read, "kind", key_added="k", model=model, **QUICK)
    names = ["False", "True"] if dtype in (bool, "boolean", object) else ["0", "1"]
    assert list(read.uns["k"]["groups"]["source_group"].cat.categories) == names
    fimp_sc.tl.attention(read, "cell_type", key_added="types", model=model, **QUICK)
    if dtype is bool:
        both = [
            read.uns[key]["groups"].astype(dict.fromkeys(KEY[:2], str)).set_index(KEY[:2]) for key in ("k", "types")
        ]
        assert both[0].loc[("True", "True"), "n_edges"] == both[1].loc[("Dendritic", "Dendritic"), "n_edges"]


def test_where_permutations_do_not_vary_pvalues_are_one(fresh, caplog) -> None:
    """Every sample is one group: groups that are dealt out within samples stay as they are."""
    how = {**SMALL, "min_support": 1, "n_permutations": 10}
    fimp_sc.tl.attention(fresh, "section", null="labels", **how)
    for table in ("groups", "pairs"):
        found = fresh.uns["fimp_attention"][table]
        assert len(found)
        assert (found["pvalue"] == 1).all()
        assert (found["fdr"] == 1).all()
        assert (found["z"] == 0).all()
    assert "No permutation differs from what was found" in caplog.text
    caplog.clear()
    # A gene that is constant within groups, and a group of one cell.
    kind = np.asarray(fresh.obs["cell_type"].cat.codes)
    values = np.log1p(fresh.X.toarray())
    values[:, 0] = np.array([1.3, 0.7, 2.9])[kind]
    fresh.layers["log"] = values
    fresh.obs["kind"] = np.where(np.arange(fresh.n_obs) == 50, "one cell", fresh.obs["cell_type"].astype(str))
    how |= {"layer": "log", "input_scale": "log", "min_edges": 1}
    fimp_sc.tl.attention(fresh, "kind", key_added="k", **how)
    table = pairs(fresh, "k")
    still = (table[KEY[2:]] == fresh.var_names[0]).any(axis=1) | (table[KEY[:2]] == "one cell").any(axis=1)
    assert 20 < still.sum() < len(table)
    assert (table.loc[still, ["pvalue", "fdr"]] == 1).all(axis=None)
    assert table["pvalue"].between(0, 1, inclusive="right").all()
    assert table.loc[~still, "pvalue"].min() < 0.1
    assert "No permutation differs" not in caplog.text


@pytest.mark.parametrize("verbose", [True, False])
def test_permutations_are_counted_for_the_user(read, model, capfd, verbose) -> None:
    fimp_sc.tl.attention(read, "cell_type", key_added="k", model=model, **{**QUICK, "verbose": verbose})
    shown = "".join(capfd.readouterr())
    assert ("Permutations, pairs of genes: 100%" in shown) is verbose
    assert ("Permutations, influence: 100%" in shown) is verbose
    assert verbose or not shown


def test_what_is_tested_nowhere_is_said(read, model, caplog) -> None:
    asked = pd.DataFrame({"source": ["CD74", read.uns["communication"]["ligand"]], "target": ["CD74", "CD52"]})
    genes = pd.unique(asked.to_numpy().ravel())
    present = genes_with_tokens(model, attention_data(model, None), genes)
    share = pd.DataFrame(present, columns=genes).groupby(read.obs["cell_type"].to_numpy()).mean()
    n_edges = read.uns["fimp_attention"]["groups"].set_index(KEY[:2])["n_edges"]
    support = [
        max(n * share.loc[source, of] * share.loc[destination, to] for (source, destination), n in n_edges.items())
        for of, to in asked.itertuples(index=False)
    ]
    how = {"min_support": np.mean(support), "pairs": asked, "key_added": "k", "model": model}
    fimp_sc.tl.attention(read, "cell_type", **how, **QUICK)
    said, tested = asked.iloc[np.argsort(support)].to_numpy().tolist()
    assert "1 of 2 pairs of genes are tested between no groups" in caplog.text
    assert f"have both as tokens: {said[0]} → {said[1]}." in caplog.text
    assert (pairs(read, "k")[KEY[2:]] == tested).all(axis=None)


def test_results_survive_a_file(read, tmp_path) -> None:
    read.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    for table in ("groups", "pairs"):
        pd.testing.assert_frame_equal(again.uns["fimp_attention"][table], read.uns["fimp_attention"][table])
    assert (again.obsp["fimp_attention"] != read.obsp["fimp_attention"]).nnz == 0
    for draw in (fimp_sc.pl.attention, fimp_sc.pl.gene_pairs):
        draw(again, show=False).figure.canvas.draw()
    fimp_sc.pl.attention_arrows(again, 0, show=False).figure.canvas.draw()


def test_copy_leaves_the_object_alone(fresh, unchanged) -> None:
    with unchanged(fresh):
        out = fimp_sc.tl.attention(fresh, "cell_type", copy=True, min_edges=10, min_support=1, **SMALL)
    assert {"fimp_attention", *GRAPH} <= set(out.obsp)


def test_only_results_and_graph_are_written(fresh, unchanged) -> None:
    with unchanged(fresh, obsp={"fimp_attention", *GRAPH}, uns={"fimp_attention", "spatial_neighbors"}):
        assert fimp_sc.tl.attention(fresh, "cell_type", min_edges=10, min_support=1, **SMALL) is None


def test_a_call_that_fails_late_writes_nothing(fresh, unchanged, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise MemoryError("no memory")

    monkeypatch.setattr(_attention, "gene_tests", fail)
    with unchanged(fresh), pytest.raises(MemoryError):
        fimp_sc.tl.attention(fresh, "cell_type", **SMALL)


def test_foundation_stack(fresh, scgpt_checkpoint, unchanged) -> None:
    checkpoint = scgpt_checkpoint(list(fresh.var_names))
    whole, layers = (fimp_sc.pretrained.load("scgpt", checkpoint, aggregate=how) for how in ("final", "layer"))
    how = {**QUICK, "min_edges": 10, "min_support": 1, "model_kwargs": {"n_tokens": 12}}
    with unchanged(fresh), pytest.raises(ValueError, match=r"use a model with aggregate='layer'"):
        fimp_sc.tl.attention(fresh, "cell_type", foundation=whole, **how)
    fimp_sc.tl.attention(fresh, "cell_type", foundation=layers, **how)
    assert fresh.obsp["fimp_attention"].data.min() > 0
    assert pairs(fresh)["attention"].max() > 0


BAD = [
    ({"model_kwargs": {"messages": False}}, ValueError, "without messages there is no attention"),
    ({"groupby": "type"}, KeyError, r"'type' is not in adata\.obs"),
    ({"groupby": "one"}, ValueError, "has one group only, 'same', and 0 of "),
    ({"groupby": "half"}, ValueError, "has one group only, 'A', and 50 of "),
    ({"groupby": "none"}, ValueError, "has no group, and "),
    ({"groupby": "size"}, TypeError, r"holds numbers .dtype float64, .* not groups.* pandas\.cut"),
    ({"groupby": "number"}, TypeError, "holds numbers .dtype int64, 300 different ones., not groups"),
    ({"groupby": "barcode", "min_edges": 1}, ValueError, "300 groups of 300 cells: far too many"),
    ({"genes": ["CD74", "nothing"]}, KeyError, "'nothing' is not in adata.var_names"),
    ({"genes": []}, ValueError, "genes must be a list of names that is not empty"),
    ({"genes": ["NEVER"]}, ValueError, "Nothing to test: .* min_support=10 edges .* Lower min_support"),
    ({"pairs": pd.DataFrame({"from": ["a"], "to": ["b"]})}, KeyError, "Name the columns 'source' and 'target'"),
    ({"pairs": pd.DataFrame({"source": ["a"], "target": ["b"]})}, ValueError, "None of the 1 pairs"),
    ({"pairs": pd.DataFrame({"source": [], "target": []})}, ValueError, "no rows"),
    ({"pairs": pd.DataFrame([["a"] * 3], columns=["source", "target", "target"])}, ValueError, "more than one column"),
    ({"pairs": [("a", "b")]}, TypeError, "must be a data frame"),
    ({"null": "nothing"}, ValueError, "null"),
    ({"statistic": "nothing"}, ValueError, "statistic"),
    ({"n_permutations": 3}, ValueError, "at least 10"),
    ({"inference_kwargs": {"strategy": "layers"}}, ValueError, "batch_size.* alone, found .strategy."),
    ({"n_genes": 0}, ValueError, "n_genes must be .* at least 1"),
    ({"influence_layer": 9}, ValueError, "layer must be from 0 to 1, found 9"),
    ({"min_edges": 10**6}, ValueError, "Nothing to test: no pair of 3 groups has min_edges=1000000 edges, of "),
    ({"min_support": 10**6}, ValueError, "Nothing to test: .* min_support=1000000 edges"),
]


@pytest.fixture(scope="session")
def odd() -> ad.AnnData:
    """Tissue with columns that are no groups, and a gene that is expressed nowhere; not to be changed."""
    adata = tissue(5, 301)[:300].copy()
    adata.var_names = [*adata.var_names[:-1], "NEVER"]
    adata.X = adata.X.multiply(np.arange(20) < 19).tocsr()
    adata.X.eliminate_zeros()
    rng = np.random.default_rng(0)
    adata.obs["one"] = "same"
    adata.obs["half"] = np.where(np.arange(300) < 50, "Unknown", "A")
    adata.obs["none"] = np.nan
    adata.obs["size"], adata.obs["number"] = rng.random(300), np.arange(300)
    adata.obs["barcode"] = adata.obs_names
    return adata


@pytest.mark.filterwarnings("ignore:1 of 20 genes are zero")
@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_unusable_input_is_told_before_training(odd, unchanged, trainings, arguments, error, message) -> None:
    arguments = {"groupby": "cell_type", **arguments}
    with unchanged(odd), pytest.raises(error, match=message):
        fimp_sc.tl.attention(odd, key_added="k", **SMALL | arguments)
    assert not trainings


def test_a_model_that_is_passed_is_checked_before_permutations(read, model, unchanged, monkeypatch) -> None:
    monkeypatch.setattr(_attention, "group_tests", None)
    other = read[:, read.var_names[:-1]].copy()
    other.var_names = [*other.var_names[:-1], "NEW"]
    with unchanged(other), pytest.raises(KeyError, match="'NEW' is not in the genes of the model that are measured"):
        fimp_sc.tl.attention(other, "cell_type", genes=["CD74", "NEW"], key_added="k", model=model, **QUICK)
    with pytest.raises(ValueError, match="Nothing to test"):
        fimp_sc.tl.attention(other, "cell_type", min_edges=10**6, key_added="k", model=model, **QUICK)


def test_images_have_no_genes(pictures) -> None:
    with pytest.raises(ValueError, match="attention reads genes"):
        fimp_sc.tl.attention(pictures, "site", modality="image", verbose=False)


def test_several_modalities(joint, only_changed) -> None:
    how = {"max_epochs": 1, "accelerator": "cpu", "verbose": False, "n_permutations": 10, "min_edges": 3}
    size = {"n_latent": 16, "n_heads": 2, "token_size": {"image": 2}}
    with only_changed(joint, ("", "obsp", "k"), ("", "uns", "k")):
        fimp_sc.tl.attention(
            joint, "kind", modality=["rna", "image"], key_added="k", min_support=1, model_kwargs=size, **how
        )
    influence, graph = joint.obsp["k"], joint.obsp["spatial_connectivities"]
    read = joint.obs_names.isin([*joint["rna"].obs_names, *joint["image"].obs_names])
    assert not read.all(), "nodes with signals alone have no place in the model"
    np.testing.assert_array_equal(influence.toarray() > 0, (graph.toarray() > 0) & read[:, None] & read)
    table = pairs(joint, "k")
    assert {*table["source_gene"], *table["destination_gene"]} <= set(joint["rna"].var_names)
    assert table["attention"].max() > 0


def test_cells_without_expression_are_left_out_of_pairs_of_genes(joint) -> None:
    """All of them would be alike in every gene, and be neighbors."""
    how = {"max_epochs": 1, "accelerator": "cpu", "verbose": False, "n_permutations": 10, "min_edges": 3}
    size = {"n_latent": 16, "n_heads": 2, "token_size": {"bold": 3}}
    fimp_sc.tl.attention(
        joint, "kind", modality=["rna", "bold"], key_added="k", min_support=1, model_kwargs=size, **how
    )
    measured = joint.obs_names.isin(joint["rna"].obs_names)
    kind, coo = joint.obs["kind"].to_numpy(), joint.obsp["spatial_connectivities"].tocoo()
    edges = pd.DataFrame({"s": kind[coo.col], "d": kind[coo.row]})[measured[coo.row] & measured[coo.col]].value_counts()
    counts = pairs(joint, "k").astype(dict.fromkeys(KEY[:2], str)).groupby(KEY[:2])["n_edges"].agg(["min", "max"])
    for groups, count in counts.iterrows():
        assert count.tolist() == [edges[groups]] * 2
    assert edges.sum() < joint.uns["k"]["groups"]["n_edges"].sum()
