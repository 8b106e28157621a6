from __future__ import annotations

from collections import Counter

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

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


def ends(row: pd.Series) -> frozenset[tuple[str, str]]:
    """Return group and gene of both ends, which have no order."""
    return frozenset([(row["source_group"], row["source_gene"]), (row["destination_group"], row["destination_gene"])])


def joined(adata: ad.AnnData) -> dict[tuple[str, str], int]:
    """Return the number of edges between any two groups, each edge once whichever way it goes."""
    graph, kind = adata.obsp["spatial_connectivities"], adata.obs["cell_type"].astype(str).to_numpy()
    edges = np.transpose(sparse.triu(graph + graph.T).nonzero())
    return Counter(tuple(sorted((kind[i], kind[j]))) for i, j in edges)


def support(adata: ad.AnnData) -> dict[frozenset[tuple[str, str]], float]:
    """Return the expected number of edges that join cells with both genes, of each pair of groups and of genes."""
    fraction = pd.DataFrame(adata.X.toarray() > 0, columns=adata.var_names)
    fraction = fraction.groupby(adata.obs["cell_type"].to_numpy()).mean()
    return {
        frozenset([(one, of), (other, to)]): n * fraction.loc[one, of] * fraction.loc[other, to]
        for (one, other), n in joined(adata).items()
        for of in adata.var_names for to in adata.var_names
    }  # fmt: skip


def planted_ends(adata: ad.AnnData) -> frozenset[tuple[str, str]]:
    names = adata.uns["communication"]
    return frozenset([(names["sender"], names["ligand"]), (names["receiver"], names["receptor"])])


@pytest.mark.parametrize("seed", [11, 12])
def test_the_pair_that_speaks_ranks_first(tested, seed) -> None:
    adata = tested[seed, True].copy()
    names = adata.uns["communication"]
    first = pairs(adata).iloc[0]
    assert ends(first) == planted_ends(adata)
    # Cells that hear the same senders are alike, and compared with each other: that costs power in so small a tissue.
    assert first["z"] > 3
    significant = pairs(adata)[pairs(adata)["fdr"] < 0.01]
    assert {*significant["source_gene"], *significant["destination_gene"]} <= {names["ligand"], names["receptor"]}
    fimp_sc.tl.gene_pairs(adata, "cell_type", domain_key="section", key_added="k", **QUICK)
    first = pairs(adata, "k").iloc[0]
    assert ends(first) == planted_ends(adata)
    assert first["fdr"] < 0.02


def test_the_pair_that_speaks_is_significant() -> None:
    adata = tissue(12, 800)
    fimp_sc.tl.gene_pairs(adata, "cell_type", **QUICK)
    first, second = (pairs(adata).iloc[i] for i in (0, 1))
    assert ends(first) == planted_ends(adata)
    assert first["fdr"] < 0.02
    assert second["z"] < first["z"] - 1


@pytest.mark.parametrize("seed", [11, 12])
def test_nothing_is_found_where_nothing_speaks(tested, seed) -> None:
    table = pairs(tested[seed, False])
    assert table["fdr"].min() > 0.05
    assert 0.02 < (table["pvalue"] < 0.05).mean() < 0.09
    assert table["z"].std() == pytest.approx(1, abs=0.15)
    assert len(table) > 1000


def test_results_and_their_record(read) -> None:
    result = read.uns["fimp_gene_pairs"]
    assert result["n_tests"] == len(result["pairs"])
    assert set(result["genes"]) == set(read.var_names)
    assert result["tool"] == "tl.gene_pairs"
    assert result["random_state"] == 0
    assert result["input_scale"] == "counts"
    asked = {"groupby": "cell_type", "library_key": "section", "n_permutations": 100, "min_edges": 30}
    assert asked.items() <= result["params"].items()
    assert not result["directed"]
    expected = support(read)
    tested = {ends(row) for _, row in result["pairs"].iterrows()}
    assert tested == {key for key, number in expected.items() if number >= 10}
    assert result["n_untested"] == len(expected) - len(tested) > 100
    assert result["n_untested_groups"] == 0
    assert (np.diff(result["pairs"]["pvalue"]) >= 0).all()
    assert (result["pairs"]["n_edges"] >= 30).all()
    assert not result["pairs"].duplicated(KEY).any()


def residuals(adata: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Return which cells are averaged to be compared with each, and values minus these, all cells by all cells."""
    totals = np.asarray(adata.X.sum(1))
    value = np.log1p(adata.X.toarray() / totals * np.median(totals))
    strata = (adata.obs["section"].astype(str) + adata.obs["cell_type"].astype(str)).to_numpy()

    def minus_mean(x: np.ndarray) -> np.ndarray:
        x = pd.DataFrame(x)
        return (x - x.groupby(strata).transform("mean")).to_numpy()

    average = adata.obsp["spatial_connectivities"].toarray() + np.eye(adata.n_obs)
    average /= average.sum(1, keepdims=True)
    around = minus_mean(value)
    around = average @ average @ (around / around.std(0))
    around -= around.mean(0)
    u, size, _ = np.linalg.svd(around, full_matrices=False)
    around = u[:, :10] * size[:10]
    compared = np.zeros((adata.n_obs,) * 2)
    for i in range(adata.n_obs):
        others = np.flatnonzero((strata == strata[i]) & (np.arange(adata.n_obs) != i))
        far = ((adata.obsm["spatial"][others] - adata.obsm["spatial"][i]) ** 2).sum(1)
        near = others[np.argsort(far)[:30]]
        apart, n_alike = ((around[near] - around[i]) ** 2).sum(1), int(np.ceil(len(near) * 12 / 30))
        alike = near[np.argsort(apart)[:n_alike]]
        assert np.diff(np.sort(apart))[n_alike - 1] > 1e-4 * apart.min(), "rounding decides: take another tissue"
        compared[i, alike] = 1 / len(alike)
    value = minus_mean(value)
    return compared, minus_mean(value - compared @ value)


@pytest.mark.parametrize("directed", [True, False])
@pytest.mark.parametrize("domain_key", [None, "section"])
def test_scores_are_covariances_over_neighbors(directed, domain_key) -> None:
    """Against all cells by all cells."""
    read = tissue(1, 300)
    fimp_sc.pp.spatial_graph(read, library_key="section", n_neighbors=10)
    how = {"domain_key": domain_key, "n_permutations": 10, "min_support": 1}
    if directed:
        how["pairs"] = pd.DataFrame({"source": read.var_names[:10], "target": read.var_names[10:]})
    fimp_sc.tl.gene_pairs(read, "cell_type", key_added="k", **how, **QUICK)
    assert read.uns["k"]["directed"] is directed
    compared, values = residuals(read)
    if domain_key is not None:
        totals = np.asarray(read.X.sum(1))
        values = pd.DataFrame(np.log1p(read.X.toarray() / totals * np.median(totals)))
        strata = [read.obs["section"].tolist(), read.obs["cell_type"].tolist()]
        values, compared = (values - values.groupby(strata).transform("mean")).to_numpy(), compared * 0
    noise = (np.eye(read.n_obs) - compared) @ (np.eye(read.n_obs) - compared).T
    edge = read.obsp["spatial_connectivities"].toarray() > 0
    kind = read.obs["cell_type"].to_numpy()
    within = 0
    for _, row in pairs(read, "k").iloc[:: 10 if directed else 50].iterrows():
        source, destination = kind == row["source_group"], kind == row["destination_group"]
        of, to = (values[:, read.var_names.get_loc(row[f"{side}_gene"])] for side in ("source", "destination"))
        there = edge & destination[:, None] & source
        weight = there / np.maximum(there.sum(1, keepdims=True), 1)
        if not directed:
            back = edge & source[:, None] & destination
            weight = weight + (back / np.maximum(back.sum(1, keepdims=True), 1)).T
            there = np.triu(there | there.T) if row["source_group"] == row["destination_group"] else there | back.T
        assert row["n_edges"] == there.sum()
        total = to @ weight @ of
        if row["source_group"] == row["destination_group"]:
            own = weight.sum(1)
            total -= (weight * noise).sum() / (own @ np.diag(noise)) * (own @ (to * of))
            within += 1
        assert row["score"] == pytest.approx(total / np.sqrt(to**2 @ weight**2 @ of**2), rel=1e-3, abs=1e-4)
        size = (weight.sum(1) @ to**2) * (weight.sum(0) @ of**2)
        assert row["correlation"] == pytest.approx(total / np.sqrt(size), rel=1e-3, abs=1e-4)
    assert within


def test_pairs_are_tested_where_enough_cells_express_both(read) -> None:
    fimp_sc.tl.gene_pairs(read, "cell_type", key_added="k", min_support=40, **QUICK)
    expected = {key for key, number in support(read).items() if number >= 40}
    assert {ends(row) for _, row in pairs(read, "k").iterrows()} == expected
    assert len(expected) == len(pairs(read, "k"))
    assert 0 < len(expected) < len(pairs(read))


def test_groups_with_few_edges_are_counted(read) -> None:
    edges = sorted(joined(read).values())
    fimp_sc.tl.gene_pairs(read, "cell_type", key_added="k", min_edges=edges[2], **QUICK)
    assert read.uns["k"]["n_untested_groups"] == 2
    assert set(pairs(read, "k")["n_edges"]) == set(edges[2:])


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


def shifted(adata: ad.AnnData) -> ad.AnnData:
    """Return the tissue with genes A, B and C that only differ between its halves, a domain each."""
    rng = np.random.default_rng(0)
    low = adata.obsm["spatial"][:, 0] < np.median(adata.obsm["spatial"][:, 0])
    counts = rng.poisson(np.where(low, 3, 9)[:, None], (adata.n_obs, 3))
    more = ad.AnnData(sparse.hstack([adata.X, counts]).tocsr().astype(np.float32), obs=adata.obs, obsm=adata.obsm)
    more.var_names = [*adata.var_names, *"ABC"]
    more.obs["half"], more.uns["communication"] = np.where(low, "low", "high"), adata.uns["communication"]
    return more


def test_domains_are_no_discovery() -> None:
    """Genes that a domain shares go together in neighbors, which is found only if cells swap places across domains."""
    adata = shifted(tissue(3, 800))
    found = {}
    for domain_key in (None, "half", "section"):
        fimp_sc.tl.gene_pairs(adata, "cell_type", domain_key=domain_key, **QUICK)
        table = pairs(adata)
        significant = table[table["fdr"] <= 0.05]
        shared = significant[significant[KEY[2:]].isin(list("ABC")).all(axis=1)]
        found[domain_key] = len(shared)
        assert adata.uns["fimp_gene_pairs"]["params"].get("domain_key") == domain_key
        # What acts is found whatever the cells are compared with.
        assert planted_ends(adata) in {ends(row) for _, row in significant.iterrows()}
    assert found["section"] >= 30
    assert max(found[None], found["half"]) <= 1


def test_cells_without_domain_are_left_out(read) -> None:
    read.obs["part"] = read.obs["section"].astype(object).where(np.arange(read.n_obs) % 3 > 0, "Unknown")
    fimp_sc.tl.gene_pairs(read, "cell_type", domain_key="part", key_added="k", min_support=1, **QUICK)
    kept = read[np.arange(read.n_obs) % 3 > 0]
    assert pairs(read, "k").drop_duplicates(KEY[:2])["n_edges"].sum() == sum(joined(kept).values())


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_names_of_cells_need_not_be_unique(read) -> None:
    kept = pairs(read)
    read.obs["half"] = read.obs["section"].astype(str)
    read.obs_names = ["cell"] * read.n_obs
    fimp_sc.tl.gene_pairs(read, "cell_type", key_added="k", **QUICK)
    pd.testing.assert_frame_equal(pairs(read, "k"), kept)
    fimp_sc.tl.gene_pairs(read, "cell_type", domain_key="half", key_added="d", **QUICK)
    assert len(pairs(read, "d")) == len(kept)


def test_cells_without_coordinates_are_compared_by_their_surroundings(read, caplog) -> None:
    del read.obsm["spatial"]
    fimp_sc.tl.gene_pairs(read, "cell_type", key_added="k", **{**QUICK, "verbose": True})
    assert "near are those with alike surroundings" in caplog.text
    assert ends(pairs(read, "k").iloc[0]) == planted_ends(read)


COLUMNS = [
    ("source", "target"),
    ("ligand", "receptor"),
    ("ligand_complex", "receptor_complex"),
    ("gene_a", "gene_b"),
    ("source_genesymbol", "target_genesymbol"),
    ("genesymbol_intercell_source", "genesymbol_intercell_target"),
]


@pytest.mark.parametrize("columns", COLUMNS)
def test_pairs_to_test(read, columns) -> None:
    names = read.uns["communication"]
    asked = pd.DataFrame(
        {columns[0]: [names["ligand"], "CD74", "NONE"], columns[1]: [names["receptor"], "CD52", "CD74"]},
        index=list("xyz"),
    )
    if columns[0].startswith(("ligand_", "genesymbol")):
        # Columns of the same table that name something else.
        asked["source"], asked["target"] = "B cell", "T cell"
    with pytest.warns(UserWarning, match=r"1 of 3 pairs name a gene that is not in adata\.var_names.*: NONE"):
        fimp_sc.tl.gene_pairs(read, "cell_type", pairs=asked, key_added="k", **QUICK)
    table = pairs(read, "k")
    found = set(zip(table["source_gene"], table["destination_gene"], strict=True))
    assert found == {(names["ligand"], names["receptor"]), ("CD74", "CD52")}
    assert table.iloc[0][KEY].tolist() == [names["sender"], names["receiver"], names["ligand"], names["receptor"]]
    assert read.uns["k"]["directed"]


def test_rows_without_a_name_are_warned_of(read) -> None:
    asked = pd.DataFrame({"gene_a": ["CD74", None, ""], "gene_b": ["CD52", "CD74", "CD74"]})
    with pytest.warns(UserWarning, match="2 of 3 rows of pairs name no gene in 'gene_a' or 'gene_b'"):
        fimp_sc.tl.gene_pairs(read, "cell_type", pairs=asked, key_added="k", **QUICK)
    assert set(read.uns["k"]["genes"]) == {"CD74", "CD52"}


def test_a_complex_is_as_much_as_its_least_gene(read) -> None:
    totals = np.asarray(read.X.sum(1))
    value = np.log1p(read.X.toarray() / totals * np.median(totals))
    least = value[:, read.var_names.get_indexer(["CD74", "CD52"])].min(1, keepdims=True)
    with_least = ad.AnnData(np.hstack([value, least]), obs=read.obs, obsm=read.obsm, obsp=read.obsp)
    with_least.var_names = [*read.var_names, "LEAST"]
    how = {"input_scale": "log", "min_support": 1, "domain_key": "section", **QUICK}
    names = read.uns["communication"]
    for name in ("CD52_CD74", "LEAST"):
        asked = pd.DataFrame({"ligand": [names["ligand"], name], "receptor": [name, names["receptor"]]})
        fimp_sc.tl.gene_pairs(with_least, "cell_type", pairs=asked, key_added=name, **how)
    of_complex = pairs(with_least, "CD52_CD74")
    assert set(of_complex["source_gene"]) == {"CD52_CD74", names["ligand"]}
    numbers = ["correlation", "score", "z", "pvalue", "n_edges"]
    pd.testing.assert_frame_equal(of_complex[numbers], pairs(with_least, "LEAST")[numbers])


def test_genes_restrict_pairs(read) -> None:
    asked = pd.DataFrame({"source": ["CD74", "CD74"], "target": ["CD52", "LST1"]})
    with pytest.warns(UserWarning, match=r"1 of 2 pairs .* not among those of genes=.*: LST1"):
        fimp_sc.tl.gene_pairs(read, "cell_type", pairs=asked, genes=["CD74", "CD52"], key_added="k", **QUICK)
    assert set(read.uns["k"]["genes"]) == {"CD74", "CD52"}


def test_all_genes_are_chosen_if_asked(read, monkeypatch) -> None:
    fimp_sc.tl.gene_pairs(read, "cell_type", n_genes=None, n_permutations=10, key_added="k", **QUICK)
    assert set(read.uns["k"]["genes"]) == set(read.var_names)
    monkeypatch.setattr(_gene_pairs, "_MOST", 19)
    with pytest.raises(ValueError, match="All pairs of 20 genes are too many to test: lower n_genes"):
        fimp_sc.tl.gene_pairs(read, "cell_type", n_genes=None, key_added="k", **QUICK)


def test_genes_that_vary_most_are_chosen(read) -> None:
    fimp_sc.tl.gene_pairs(read, "cell_type", n_genes=5, min_support=1, key_added="k", **QUICK)
    totals = np.asarray(read.X.sum(1))
    variance = pd.Series(np.log1p(read.X.toarray() / totals * np.median(totals)).var(0), read.var_names)
    assert set(read.uns["k"]["genes"]) == set(variance.nlargest(5).index)


def test_cells_without_group_are_left_out(read) -> None:
    kept = np.arange(read.n_obs) % 3 > 0
    read.obs["part"] = read.obs["cell_type"].astype(object).where(kept)
    fimp_sc.tl.gene_pairs(read, "part", key_added="k", min_support=1, **QUICK)
    assert pairs(read, "k").drop_duplicates(KEY[:2])["n_edges"].sum() == sum(joined(read[kept]).values())


@pytest.mark.parametrize(("name", "how"), [("Unknown", {}), ("to do", {"unlabeled_category": "to do"})])
def test_the_unlabeled_category_is_no_group(read, name, how) -> None:
    read.obs["missing"] = read.obs["cell_type"].astype(object).where(np.arange(read.n_obs) % 3 > 0)
    read.obs["named"] = pd.Categorical(read.obs["missing"].fillna(name))
    for column in ("missing", "named"):
        fimp_sc.tl.gene_pairs(read, column, key_added=column, **how, **QUICK)
    assert read.uns["named"]["params"]["unlabeled_category"] == name
    pd.testing.assert_frame_equal(pairs(read, "missing"), pairs(read, "named"))
    assert not (pairs(read, "named")[KEY[:2]].astype(str) == name).any(axis=None)


@pytest.mark.parametrize("domain_key", [None, "section"])
def test_where_permutations_do_not_vary_pvalues_are_one(fresh, caplog, domain_key) -> None:
    how = {**QUICK, "min_support": 1, "n_permutations": 10, "layer": "log", "input_scale": "log", "min_edges": 1}
    how |= {"domain_key": domain_key}
    # All cells of a group are alike.
    kind = np.asarray(fresh.obs["cell_type"].cat.codes)
    fresh.layers["log"] = np.random.default_rng(0).random((3, fresh.n_vars))[kind]
    fimp_sc.tl.gene_pairs(fresh, "cell_type", **how)
    found = pairs(fresh)
    assert len(found)
    assert (found[["pvalue", "fdr"]] == 1).all(axis=None)
    assert (found["z"] == 0).all()
    assert "No permutation differs from what was found" in caplog.text
    caplog.clear()
    # A gene that is constant within groups, and a group of one cell.
    values = np.log1p(fresh.X.toarray())
    values[:, 0] = np.array([1.3, 0.7, 2.9])[kind]
    fresh.layers["log"] = values
    fresh.obs["kind"] = np.where(np.arange(fresh.n_obs) == 50, "one cell", fresh.obs["cell_type"].astype(str))
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
    assert ("Pairs of genes: 100%" in shown) is verbose
    assert verbose or not shown


def test_what_is_tested_nowhere_is_warned_of(read) -> None:
    asked = pd.DataFrame({"source": ["CD74", read.uns["communication"]["ligand"]], "target": ["CD74", "CD52"]})
    fraction = pd.DataFrame(read.X.toarray() > 0, columns=read.var_names)
    fraction = fraction.groupby(read.obs["cell_type"].to_numpy()).mean()
    kind, coo = read.obs["cell_type"].to_numpy(), read.obsp["spatial_connectivities"].tocoo()
    directed = Counter(zip(kind[coo.col], kind[coo.row], strict=True))
    most = [
        max(
            n * fraction.loc[source, of] * fraction.loc[destination, to]
            for (source, destination), n in directed.items()
        )
        for of, to in asked.to_numpy()
    ]
    said, left = asked.iloc[np.argsort(most)].to_numpy().tolist()
    message = f"1 of 2 pairs of genes are tested between no groups.*express both: {said[0]} → {said[1]}\\."
    with pytest.warns(UserWarning, match=message):
        fimp_sc.tl.gene_pairs(read, "cell_type", min_support=np.mean(most), pairs=asked, key_added="k", **QUICK)
    assert (pairs(read, "k")[KEY[2:]] == left).all(axis=None)


def test_what_is_not_tested_is_told(read, caplog) -> None:
    fimp_sc.tl.gene_pairs(read, "cell_type", min_support=40, key_added="k", **{**QUICK, "verbose": True})
    result = read.uns["k"]
    assert f"{result['n_tests']:,} tests of pairs of genes between 6 pairs of groups" in caplog.text
    assert f"0 pairs of groups with fewer than min_edges=30 edges, and {result['n_untested']:,} tests" in caplog.text


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
    ({"pairs": pd.DataFrame({"from": ["a"], "to": ["b"]})}, KeyError, "Name the columns 'ligand' and 'receptor'"),
    ({"pairs": pd.DataFrame({"source": ["a"], "target": ["b"]})}, ValueError, "None of the 1 pairs"),
    ({"pairs": pd.DataFrame({"source": [], "target": []})}, ValueError, "no rows"),
    ({"pairs": pd.DataFrame([["a"] * 3], columns=["source", "target", "target"])}, ValueError, "more than one column"),
    ({"pairs": [("a", "b")]}, TypeError, "must be a data frame"),
    ({"null": "labels"}, TypeError, "unexpected keyword argument 'null'"),
    ({"domain_key": "region"}, KeyError, r"'region' is not in adata\.obs.*Name a column of domains"),
    ({"domain_key": "number"}, TypeError, "holds numbers .dtype int64, 300 different ones., not groups"),
    ({"domain_key": "nowhere"}, ValueError, "has no domain: all 300 cells are missing or 'Unknown'"),
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
    adata.obs["nowhere"] = "Unknown"
    adata.obs["one"], adata.obs["number"], adata.obs["barcode"] = "same", np.arange(300), adata.obs_names
    return adata


@pytest.mark.filterwarnings("ignore:1 of 20 genes are zero")
@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_unusable_input_is_told(odd, unchanged, arguments, error, message) -> None:
    arguments = {"groupby": "cell_type", **arguments}
    with unchanged(odd), pytest.raises(error, match=message):
        fimp_sc.tl.gene_pairs(odd, key_added="k", **QUICK | arguments)


def test_genes_that_do_not_vary_are_told(fresh) -> None:
    fresh.layers["log"] = np.ones(fresh.shape)
    with pytest.raises(ValueError, match="Nothing to test: no gene varies between cells"):
        fimp_sc.tl.gene_pairs(fresh, "cell_type", layer="log", input_scale="log", **QUICK)


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
    low, high = np.minimum(coo.row, coo.col), np.maximum(coo.row, coo.col)
    edges = pd.DataFrame({"low": low, "high": high}).drop_duplicates()
    first, second = (kind[edges[end]].astype(str) for end in ("low", "high"))
    swap = first > second
    groups = pd.DataFrame({"s": np.where(swap, second, first), "d": np.where(swap, first, second)})
    seen = groups[(measured[edges["low"]] & measured[edges["high"]])].value_counts()
    table = pairs(joint, "k")
    assert {*table["source_gene"], *table["destination_gene"]} <= set(joint["rna"].var_names)
    counts = table.astype(dict.fromkeys(KEY[:2], str)).groupby(KEY[:2])["n_edges"].agg(["min", "max"])
    for groups, count in counts.iterrows():
        assert count.tolist() == [seen[groups]] * 2
    assert seen.sum() < len(edges)


def test_domains_of_numbered_cells_are_theirs(fresh) -> None:
    numbered = fresh.copy()
    numbered.obs.index = np.arange(numbered.n_obs)
    for adata in (fresh, numbered):
        fimp_sc.tl.gene_pairs(adata, "cell_type", domain_key="section", **QUICK)
    pd.testing.assert_frame_equal(pairs(numbered), pairs(fresh))
