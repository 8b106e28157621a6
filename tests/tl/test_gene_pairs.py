from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import fimp_sc
from fimp_sc.datasets import toy_communication
from fimp_sc.tl import _gene_pairs

QUICK = {"verbose": False, "library_key": "section"}
KEY = ["source_group", "destination_group", "source_gene", "destination_gene"]
GRAPH = {"spatial_connectivities", "spatial_distances"}


def tissue(seed: int, n_obs: int = 400, *, planted: bool = True) -> ad.AnnData:
    """Return a tissue in which every cell has a molecule."""
    adata = toy_communication(n_obs, seed, planted=planted, n_genes=20)
    return adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()


@pytest.fixture(scope="session")
def tested() -> dict[tuple[int, bool], ad.AnnData]:
    """Tissues of two seeds, with and without a pair that speaks, in which pairs were tested; not to be changed."""
    out = {(seed, planted): tissue(seed, planted=planted) for seed in (11, 12) for planted in (True, False)}
    for adata in out.values():
        fimp_sc.tl.gene_pairs(adata, "cell_type", **QUICK)
    return out


@pytest.fixture
def read(tested) -> ad.AnnData:
    """Tissue in which pairs were tested; a copy that a test may change."""
    return tested[11, True].copy()


@pytest.fixture
def fresh() -> ad.AnnData:
    return tissue(5, 100)


def pairs(adata: ad.AnnData, key: str = "fimp_gene_pairs") -> pd.DataFrame:
    return adata.uns[key]["pairs"]


def expected_edges(adata: ad.AnnData) -> pd.Series:
    """Return the number of edges by source and destination group."""
    coo, kind = adata.obsp["spatial_connectivities"].tocoo(), adata.obs["cell_type"].to_numpy()
    return pd.DataFrame({"source": kind[coo.col], "destination": kind[coo.row]}).value_counts()


def support(adata: ad.AnnData) -> dict[tuple[str, str, str, str], float]:
    """Return the expected number of edges that join cells with both genes, of each pair of groups and of genes."""
    fraction = pd.DataFrame(adata.X.toarray() > 0, columns=adata.var_names)
    fraction = fraction.groupby(adata.obs["cell_type"].to_numpy()).mean()
    return {
        (source, destination, of, to): n * fraction.loc[source, of] * fraction.loc[destination, to]
        for (source, destination), n in expected_edges(adata).items()
        for of in adata.var_names for to in adata.var_names
    }  # fmt: skip


@pytest.mark.parametrize("seed", [11, 12])
def test_the_pair_that_speaks_ranks_first(tested, seed) -> None:
    adata = tested[seed, True]
    names = adata.uns["communication"]
    planted = [names["sender"], names["receiver"], names["ligand"], names["receptor"]]
    first = pairs(adata).iloc[0]
    assert first[KEY].tolist() == planted
    assert first["fdr"] < 0.02
    significant = pairs(adata)[pairs(adata)["fdr"] < 0.01]
    assert {*significant["source_gene"], *significant["destination_gene"]} <= {names["ligand"], names["receptor"]}


@pytest.mark.parametrize("seed", [11, 12])
def test_nothing_is_found_where_nothing_speaks(tested, seed) -> None:
    table = pairs(tested[seed, False])
    assert table["fdr"].min() > 0.05
    assert 0.02 < (table["pvalue"] < 0.05).mean() < 0.09
    assert table["z"].std() == pytest.approx(1, abs=0.15)
    assert len(table) > 2000


def test_results_and_their_record(read) -> None:
    result = read.uns["fimp_gene_pairs"]
    assert result["n_tests"] == len(result["pairs"])
    assert set(result["genes"]) == set(read.var_names)
    assert result["tool"] == "tl.gene_pairs"
    assert result["random_state"] == 0
    assert result["input_scale"] == "counts"
    asked = {"groupby": "cell_type", "null": "neighbors", "library_key": "section", "n_permutations": 100}
    assert asked.items() <= result["params"].items()
    assert (np.diff(result["pairs"]["pvalue"]) >= 0).all()
    assert (result["pairs"]["n_edges"] >= 30).all()
    assert not result["pairs"].duplicated(KEY).any()


def test_scores_are_covariances_over_neighbors(read) -> None:
    totals = np.asarray(read.X.sum(1))
    values = pd.DataFrame(np.log1p(read.X.toarray() / totals * np.median(totals)), columns=read.var_names)
    strata = read.obs["section"].astype(str) + read.obs["cell_type"].astype(str)
    values = values - values.groupby(strata.to_numpy()).transform("mean")
    coo, kind = read.obsp["spatial_connectivities"].tocoo(), read.obs["cell_type"].to_numpy()
    n_edges = expected_edges(read)
    for _, row in pairs(read).iloc[[0, 1, 50, 1000, -1]].iterrows():
        source, destination, of, to = row[KEY]
        assert row["n_edges"] == n_edges[source, destination]
        chosen = (kind[coo.col] == source) & (kind[coo.row] == destination)
        edges = pd.DataFrame({"i": coo.row[chosen], "j": coo.col[chosen]})
        k = edges.groupby("i")["j"].transform("size").to_numpy()
        term = values[to].to_numpy()[edges["i"]] * values[of].to_numpy()[edges["j"]] / k
        assert row["score"] == pytest.approx(term.sum() / np.sqrt((term**2).sum()), rel=1e-3, abs=1e-4)


def test_pairs_are_tested_where_enough_cells_express_both(read) -> None:
    fimp_sc.tl.gene_pairs(read, "cell_type", key_added="k", min_support=40, **QUICK)
    expected = {key for key, number in support(read).items() if number >= 40}
    assert set(pairs(read, "k")[KEY].itertuples(index=False, name=None)) == expected
    assert 0 < len(expected) < len(pairs(read))


def test_order_of_cells_does_not_matter(read) -> None:
    order = np.random.default_rng(0).permutation(read.n_obs)
    other = read[order].copy()
    fimp_sc.tl.gene_pairs(other, "cell_type", **QUICK)
    table = pd.concat([pairs(read).set_index(KEY), pairs(other).set_index(KEY).add_prefix("other_")], axis=1)
    assert len(table) == len(pairs(read))
    for name in ("score", "n_edges"):
        np.testing.assert_allclose(table[name], table[f"other_{name}"], rtol=1e-3, atol=1e-4)
    # Other permutations are drawn.
    assert table["z"].corr(table["other_z"]) > 0.97


def test_the_seed_repeats_and_no_model_is_trained(read, trainings) -> None:
    for key, seed in (("a", 0), ("b", 0), ("c", 1)):
        fimp_sc.tl.gene_pairs(read, "cell_type", key_added=key, random_state=seed, **QUICK)
    assert not trainings
    with pytest.raises(KeyError, match="No model is known"):
        fimp_sc.tl.get_model(read)
    pd.testing.assert_frame_equal(pairs(read, "a"), pairs(read, "b"))
    assert (pairs(read, "c")["z"] != pairs(read, "a")["z"]).any()


def test_labels_are_permuted_for_the_other_null(read) -> None:
    names = read.uns["communication"]
    genes = [names["ligand"], names["receptor"], *(g for g in read.var_names if g not in names.values())][:8]
    how = {"null": "labels", "genes": genes, "n_permutations": 20}
    fimp_sc.tl.gene_pairs(read, "cell_type", key_added="k", **how, **QUICK)
    table = pairs(read, "k")
    assert set(read.uns["k"]["genes"]) == set(genes)
    assert {*table["source_gene"], *table["destination_gene"]} <= set(genes)
    assert table["pvalue"].between(0, 1, inclusive="right").all()
    # Ligand and receptor are markers of their types: no other cells have them.
    planted = table[(table[KEY] == [names[n] for n in ("sender", "receiver", "ligand", "receptor")]).all(axis=1)]
    assert (planted["z"] > 3).all()


def test_pairs_to_test(read, caplog) -> None:
    names = read.uns["communication"]
    asked = pd.DataFrame(
        {"ligand": [names["ligand"], "CD74", "NONE"], "receptor": [names["receptor"], "CD52", "CD74"]},
        index=list("xyz"),
    )
    fimp_sc.tl.gene_pairs(read, "cell_type", pairs=asked, key_added="k", **QUICK)
    assert "1 of 3 pairs name a gene that is not known" in caplog.text
    table = pairs(read, "k")
    found = set(zip(table["source_gene"], table["destination_gene"], strict=True))
    assert found == {(names["ligand"], names["receptor"]), ("CD74", "CD52")}
    assert table.iloc[0][KEY].tolist() == [names["sender"], names["receiver"], names["ligand"], names["receptor"]]


def test_genes_that_vary_most_are_chosen(read) -> None:
    fimp_sc.tl.gene_pairs(read, "cell_type", n_genes=5, min_support=1, key_added="k", **QUICK)
    totals = np.asarray(read.X.sum(1))
    variance = pd.Series(np.log1p(read.X.toarray() / totals * np.median(totals)).var(0), read.var_names)
    assert set(read.uns["k"]["genes"]) == set(variance.nlargest(5).index)


def test_cells_without_group_are_left_out(read) -> None:
    kept = np.arange(read.n_obs) % 3 > 0
    read.obs["part"] = read.obs["cell_type"].astype(object).where(kept)
    fimp_sc.tl.gene_pairs(read, "part", key_added="k", min_support=1, **QUICK)
    edges = read.obsp["spatial_connectivities"][kept][:, kept].nnz
    assert pairs(read, "k").drop_duplicates(KEY[:2])["n_edges"].sum() == edges


@pytest.mark.parametrize(("name", "how"), [("Unknown", {}), ("to do", {"unlabeled_category": "to do"})])
def test_the_unlabeled_category_is_no_group(read, name, how) -> None:
    read.obs["missing"] = read.obs["cell_type"].astype(object).where(np.arange(read.n_obs) % 3 > 0)
    read.obs["named"] = pd.Categorical(read.obs["missing"].fillna(name))
    for column in ("missing", "named"):
        fimp_sc.tl.gene_pairs(read, column, key_added=column, **how, **QUICK)
    assert read.uns["named"]["params"]["unlabeled_category"] == name
    pd.testing.assert_frame_equal(pairs(read, "missing"), pairs(read, "named"))
    assert not (pairs(read, "named")[KEY[:2]].astype(str) == name).any(axis=None)


def test_where_permutations_do_not_vary_pvalues_are_one(fresh, caplog) -> None:
    """Every sample is one group: groups that are permuted within samples stay as they are."""
    how = {**QUICK, "min_support": 1, "n_permutations": 10}
    fimp_sc.tl.gene_pairs(fresh, "section", null="labels", **how)
    found = pairs(fresh)
    assert len(found)
    assert (found[["pvalue", "fdr"]] == 1).all(axis=None)
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
    fimp_sc.tl.gene_pairs(fresh, "kind", key_added="k", **how)
    table = pairs(fresh, "k")
    still = (table[KEY[2:]] == fresh.var_names[0]).any(axis=1) | (table[KEY[:2]] == "one cell").any(axis=1)
    assert 20 < still.sum() < len(table)
    assert (table.loc[still, ["pvalue", "fdr"]] == 1).all(axis=None)
    assert table["pvalue"].between(0, 1, inclusive="right").all()
    assert table.loc[~still, "pvalue"].min() < 0.1
    assert "No permutation differs" not in caplog.text


@pytest.mark.parametrize("verbose", [True, False])
def test_permutations_are_counted_for_the_user(read, capfd, verbose) -> None:
    fimp_sc.tl.gene_pairs(read, "cell_type", key_added="k", **{**QUICK, "verbose": verbose})
    shown = "".join(capfd.readouterr())
    assert ("Permutations, pairs of genes: 100%" in shown) is verbose
    assert verbose or not shown


def test_what_is_tested_nowhere_is_said(read, caplog) -> None:
    asked = pd.DataFrame({"source": ["CD74", read.uns["communication"]["ligand"]], "target": ["CD74", "CD52"]})
    most = [
        max(number for key, number in support(read).items() if key[2:] == pair)
        for pair in asked.itertuples(index=False, name=None)
    ]
    fimp_sc.tl.gene_pairs(read, "cell_type", min_support=np.mean(most), pairs=asked, key_added="k", **QUICK)
    said, left = asked.iloc[np.argsort(most)].to_numpy().tolist()
    assert "1 of 2 pairs of genes are tested between no groups" in caplog.text
    assert f"express both: {said[0]} → {said[1]}." in caplog.text
    assert (pairs(read, "k")[KEY[2:]] == left).all(axis=None)


def test_results_survive_a_file(read, tmp_path) -> None:
    read.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_frame_equal(pairs(again), pairs(read))
    fimp_sc.pl.gene_pairs(again, show=False).figure.canvas.draw()


def test_only_results_and_graph_are_written(fresh, unchanged) -> None:
    how = {"min_edges": 10, "min_support": 1, **QUICK}
    with unchanged(fresh):
        out = fimp_sc.tl.gene_pairs(fresh, "cell_type", copy=True, **how)
    assert set(out.obsp) >= GRAPH
    with unchanged(fresh, obsp=GRAPH, uns={"fimp_gene_pairs", "spatial_neighbors"}):
        assert fimp_sc.tl.gene_pairs(fresh, "cell_type", **how) is None
    pd.testing.assert_frame_equal(pairs(fresh), pairs(out))


def test_a_call_that_fails_late_writes_nothing(fresh, unchanged, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise MemoryError("no memory")

    monkeypatch.setattr(_gene_pairs, "gene_tests", fail)
    with unchanged(fresh), pytest.raises(MemoryError):
        fimp_sc.tl.gene_pairs(fresh, "cell_type", min_edges=10, min_support=1, **QUICK)


def test_later_calls_keep_the_keys_of_the_earlier(fresh) -> None:
    """Also those that are not read here."""
    fresh.layers["counts"], fresh.X = fresh.X.copy(), fresh.X * 0
    fresh.obs["kit"] = pd.Categorical(np.where(np.arange(fresh.n_obs) % 2, "a", "b"))
    model = {"n_latent": 16, "n_heads": 2, "n_tokens": 8}
    quick = {"max_epochs": 1, "accelerator": "cpu", "verbose": False}
    keys = {"layer": "counts", "library_key": "section", "batch_key": "kit", "center": "batch"}
    fimp_sc.tl.embed(fresh, model_kwargs=model, **keys, **quick)
    before = fimp_sc.tl.get_model(fresh)
    fimp_sc.tl.gene_pairs(fresh, "cell_type", min_edges=10, min_support=1, verbose=False)
    assert keys.items() <= fresh.uns["fimp_gene_pairs"]["params"].items()
    fimp_sc.tl.impute(fresh, **quick)
    assert keys.items() <= fresh.uns["fimp"]["params"].items()
    assert fimp_sc.tl.get_model(fresh) is before


def test_a_call_after_it_does_not_miss_a_model(fresh, caplog) -> None:
    fimp_sc.tl.gene_pairs(fresh, "cell_type", min_edges=10, min_support=1, **QUICK)
    model = {"n_latent": 16, "n_heads": 2, "n_tokens": 8}
    fimp_sc.tl.impute(fresh, max_epochs=1, accelerator="cpu", verbose=False, model_kwargs=model)
    assert "model of the earlier results" not in caplog.text
    assert fresh.uns["fimp"]["params"]["library_key"] == "section"


def test_a_word_for_no_group_is_warned_of(read) -> None:
    read.obs["part"] = read.obs["cell_type"].astype(object).where(np.arange(read.n_obs) % 3 > 0, "Unassigned")
    n = -(-read.n_obs // 3)
    with pytest.warns(UserWarning, match=f"'Unassigned' for {n} .*unlabeled_category='Unassigned'"):
        fimp_sc.tl.gene_pairs(read, "part", key_added="k", **QUICK)


def test_samples_that_are_joined_are_warned_of(fresh) -> None:
    with pytest.warns(UserWarning, match=r"edges join different samples.*library_key='section'"):
        fimp_sc.tl.gene_pairs(fresh, "cell_type", min_edges=10, min_support=1, verbose=False)


BAD = [
    ({"groupby": "type"}, KeyError, r"'type' is not in adata\.obs"),
    ({"groupby": "one"}, ValueError, "has one group only, 'same', and 0 of "),
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
    ({"statistic": "attention"}, TypeError, "unexpected keyword argument 'statistic'"),
    ({"n_permutations": 3}, ValueError, "at least 10"),
    ({"n_genes": 0}, ValueError, "n_genes must be .* at least 1"),
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
    adata.obs["one"], adata.obs["number"], adata.obs["barcode"] = "same", np.arange(300), adata.obs_names
    return adata


@pytest.mark.filterwarnings("ignore:1 of 20 genes are zero")
@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_unusable_input_is_told(odd, unchanged, arguments, error, message) -> None:
    arguments = {"groupby": "cell_type", **arguments}
    with unchanged(odd), pytest.raises(error, match=message):
        fimp_sc.tl.gene_pairs(odd, key_added="k", **QUICK | arguments)


def test_images_have_no_genes(pictures) -> None:
    with pytest.raises(ValueError, match="gene_pairs reads genes"):
        fimp_sc.tl.gene_pairs(pictures, "site", modality="image", verbose=False)


def test_cells_without_expression_are_left_out(joint, only_changed) -> None:
    """All of them would be alike in every gene, and be neighbors."""
    with only_changed(joint, ("", "uns", "k")):
        fimp_sc.tl.gene_pairs(
            joint, "kind", modality=["rna", "bold"], key_added="k", min_edges=3, min_support=1, verbose=False
        )
    measured = joint.obs_names.isin(joint["rna"].obs_names)
    kind, coo = joint.obs["kind"].to_numpy(), joint.obsp["spatial_connectivities"].tocoo()
    edges = pd.DataFrame({"s": kind[coo.col], "d": kind[coo.row]})
    seen = edges[measured[coo.row] & measured[coo.col]].value_counts()
    table = pairs(joint, "k")
    assert {*table["source_gene"], *table["destination_gene"]} <= set(joint["rna"].var_names)
    counts = table.astype(dict.fromkeys(KEY[:2], str)).groupby(KEY[:2])["n_edges"].agg(["min", "max"])
    for groups, count in counts.iterrows():
        assert count.tolist() == [seen[groups]] * 2
    assert seen.sum() < len(edges)
