from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import fimp_sc
from fimp_sc.datasets import toy_communication
from fimp_sc.tl import _attention

QUICK = {"max_epochs": 1, "accelerator": "cpu", "verbose": False, "library_key": "section"}
SMALL = {**QUICK, "model_kwargs": {"n_latent": 16, "n_heads": 2, "n_tokens": 16}}
KEY = ["source_group", "destination_group"]
GRAPH = {"spatial_connectivities", "spatial_distances"}


def tissue(seed: int, n_obs: int = 400) -> ad.AnnData:
    """Return a tissue in which every cell has a molecule."""
    adata = toy_communication(n_obs, seed, n_genes=20)
    return adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()


@pytest.fixture(scope="session")
def first() -> ad.AnnData:
    """Tissue in which attention was read; not to be changed."""
    adata = tissue(11)
    fimp_sc.tl.attention(adata, "cell_type", **SMALL)
    return adata


@pytest.fixture
def read(first) -> ad.AnnData:
    """Tissue in which attention was read; a copy that a test may change."""
    return first.copy()


@pytest.fixture(scope="session")
def model(first) -> fimp_sc.model.FIMP:
    return fimp_sc.tl.get_model(first)


@pytest.fixture
def fresh() -> ad.AnnData:
    return tissue(5, 100)


def groups(adata: ad.AnnData, key: str = "fimp_attention") -> pd.DataFrame:
    return adata.uns[key]["groups"]


def test_what_is_written(read) -> None:
    assert set(read.obsp) == {"fimp_attention", *GRAPH}
    influence, graph = read.obsp["fimp_attention"], read.obsp["spatial_connectivities"]
    assert influence.dtype == np.float32
    np.testing.assert_array_equal(influence.indices, graph.indices)
    np.testing.assert_array_equal(influence.indptr, graph.indptr)
    assert influence.diagonal().sum() == 0
    result = read.uns["fimp_attention"]
    assert result["params"]["groupby"] == "cell_type"
    assert result["tool"] == "tl.attention"
    assert len(result["groups"]) == 9
    assert result["groups"]["pvalue"].between(0, 1, inclusive="right").all()


def test_influence_is_that_of_the_model(read, model) -> None:
    assert (model.get_edge_influence() != read.obsp["fimp_attention"]).nnz == 0


def test_table_of_groups_is_the_mean_over_edges(read) -> None:
    coo = read.obsp["fimp_attention"].tocoo()
    kind = read.obs["cell_type"].to_numpy()
    edges = pd.DataFrame({"source_group": kind[coo.col], "destination_group": kind[coo.row], "influence": coo.data})
    expected = edges.groupby(KEY)["influence"].agg(["mean", "size"])
    table = read.uns["fimp_attention"]["groups"].astype(dict.fromkeys(KEY, str)).set_index(KEY)
    expected = expected.loc[table.index]
    np.testing.assert_allclose(table["influence"], expected["mean"], rtol=1e-5)
    np.testing.assert_array_equal(table["n_edges"], expected["size"])


def test_order_of_cells_does_not_matter(read, model) -> None:
    order = np.random.default_rng(0).permutation(read.n_obs)
    other = read[order].copy()
    del other.uns["fimp_attention"], other.obsp["fimp_attention"]
    fimp_sc.tl.attention(other, "cell_type", model=model, **QUICK)
    there, here = other.obsp["fimp_attention"], read.obsp["fimp_attention"]
    np.testing.assert_allclose(there.toarray(), here[order][:, order].toarray(), rtol=1e-4, atol=1e-6)
    table = pd.concat([groups(read).set_index(KEY), groups(other).set_index(KEY).add_prefix("other_")], axis=1)
    assert len(table) == len(groups(read))
    for name in ("influence", "n_edges"):
        np.testing.assert_allclose(table[name], table[f"other_{name}"], rtol=1e-3, atol=1e-4)
    # Other permutations are drawn.
    assert table["z"].corr(table["other_z"]) > 0.97


def test_the_model_is_used_again_and_the_seed_repeats(read, model, trainings) -> None:
    for key in "ab":
        fimp_sc.tl.attention(read, "cell_type", key_added=key, model=model, **QUICK)
    assert not trainings
    pd.testing.assert_frame_equal(groups(read, "a"), groups(read, "b"))
    fimp_sc.tl.attention(read, "cell_type", key_added="c", model=model, random_state=1, **QUICK)
    assert (groups(read, "c")["z"] != groups(read, "a")["z"]).any()


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
    pd.testing.assert_frame_equal(groups(read, "missing"), groups(read, "named"))
    assert not (groups(read, "named")[KEY].astype(str) == name).any(axis=None)


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
        both = [read.uns[key]["groups"].astype(dict.fromkeys(KEY, str)).set_index(KEY) for key in ("k", "types")]
        assert both[0].loc[("True", "True"), "n_edges"] == both[1].loc[("Dendritic", "Dendritic"), "n_edges"]


def test_where_permutations_do_not_vary_pvalues_are_one(fresh, caplog) -> None:
    """Every sample is one group: groups that are permuted within samples stay as they are."""
    fimp_sc.tl.attention(fresh, "section", n_permutations=10, **SMALL)
    found = groups(fresh)
    assert len(found)
    assert (found[["pvalue", "fdr"]] == 1).all(axis=None)
    assert (found["z"] == 0).all()
    assert "No permutation differs from what was found" in caplog.text


def test_groups_with_few_edges_are_not_tested(read, model) -> None:
    n_edges = groups(read)["n_edges"]
    fimp_sc.tl.attention(read, "cell_type", key_added="k", min_edges=int(n_edges.median()), model=model, **QUICK)
    table = groups(read, "k")
    np.testing.assert_array_equal(table["pvalue"].isna(), n_edges < int(n_edges.median()))
    assert table["influence"].notna().all()


@pytest.mark.parametrize("verbose", [True, False])
def test_permutations_are_counted_for_the_user(read, model, capfd, verbose) -> None:
    fimp_sc.tl.attention(read, "cell_type", key_added="k", model=model, **{**QUICK, "verbose": verbose})
    shown = "".join(capfd.readouterr())
    assert ("Permutations, influence: 100%" in shown) is verbose
    assert verbose or not shown


def test_results_survive_a_file(read, tmp_path) -> None:
    read.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_frame_equal(groups(again), groups(read))
    assert (again.obsp["fimp_attention"] != read.obsp["fimp_attention"]).nnz == 0
    fimp_sc.pl.attention(again, show=False).figure.canvas.draw()
    fimp_sc.pl.attention_arrows(again, 0, show=False).figure.canvas.draw()


def test_copy_leaves_the_object_alone(fresh, unchanged) -> None:
    with unchanged(fresh):
        out = fimp_sc.tl.attention(fresh, "cell_type", copy=True, **SMALL)
    assert {"fimp_attention", *GRAPH} <= set(out.obsp)


def test_only_results_and_graph_are_written(fresh, unchanged) -> None:
    with unchanged(fresh, obsp={"fimp_attention", *GRAPH}, uns={"fimp_attention", "spatial_neighbors"}):
        assert fimp_sc.tl.attention(fresh, "cell_type", **SMALL) is None


def test_a_call_that_fails_late_writes_nothing(fresh, unchanged, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise MemoryError("no memory")

    monkeypatch.setattr(_attention, "group_tests", fail)
    with unchanged(fresh), pytest.raises(MemoryError):
        fimp_sc.tl.attention(fresh, "cell_type", **SMALL)


def test_foundation_stack(fresh, scgpt_checkpoint, unchanged) -> None:
    checkpoint = scgpt_checkpoint(list(fresh.var_names))
    whole, layers = (fimp_sc.pretrained.load("scgpt", checkpoint, aggregate=how) for how in ("final", "layer"))
    how = {**QUICK, "min_edges": 10, "model_kwargs": {"n_tokens": 12}}
    with unchanged(fresh), pytest.raises(ValueError, match=r"use a model with aggregate='layer'"):
        fimp_sc.tl.attention(fresh, "cell_type", foundation=whole, **how)
    fimp_sc.tl.attention(fresh, "cell_type", foundation=layers, **how)
    assert fresh.obsp["fimp_attention"].data.min() > 0


BAD = [
    ({"model_kwargs": {"messages": False}}, ValueError, "without messages there is no attention"),
    ({"groupby": "type"}, KeyError, r"'type' is not in adata\.obs"),
    ({"groupby": "one"}, ValueError, "has one group only, 'same', and 0 of "),
    ({"groupby": "half"}, ValueError, "has one group only, 'A', and 50 of "),
    ({"groupby": "none"}, ValueError, "has no group, and "),
    ({"groupby": "size"}, TypeError, r"holds numbers .dtype float64, .* not groups.* pandas\.cut"),
    ({"groupby": "number"}, TypeError, "holds numbers .dtype int64, 300 different ones., not groups"),
    ({"groupby": "barcode", "min_edges": 1}, ValueError, "300 groups of 300 cells: far too many"),
    (
        {"min_edges": 10**6},
        ValueError,
        "Nothing to test: no pair of 3 groups has min_edges=1000000 edges",
    ),
    ({"n_permutations": 3}, ValueError, "at least 10"),
    ({"genes": ["CD74"]}, TypeError, "unexpected keyword argument 'genes'"),
    ({"gene_embeddings": "a.npz"}, TypeError, "Pass it as model_kwargs={'gene_embeddings': ...}"),
]


@pytest.fixture(scope="session")
def odd() -> ad.AnnData:
    """Tissue with columns that are no groups; not to be changed."""
    adata = tissue(5, 301)[:300].copy()
    rng = np.random.default_rng(0)
    adata.obs["one"] = "same"
    adata.obs["half"] = np.where(np.arange(300) < 50, "Unknown", "A")
    adata.obs["none"] = np.nan
    adata.obs["size"], adata.obs["number"] = rng.random(300), np.arange(300)
    adata.obs["barcode"] = adata.obs_names
    return adata


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_unusable_input_is_told_before_training(odd, unchanged, trainings, arguments, error, message) -> None:
    arguments = {"groupby": "cell_type", **arguments}
    with unchanged(odd), pytest.raises(error, match=message):
        fimp_sc.tl.attention(odd, key_added="k", **SMALL | arguments)
    assert not trainings


def test_images_have_no_genes(pictures) -> None:
    with pytest.raises(ValueError, match="attention reads genes"):
        fimp_sc.tl.attention(pictures, "site", modality="image", verbose=False)


def test_several_modalities(joint, only_changed) -> None:
    how = {"max_epochs": 1, "accelerator": "cpu", "verbose": False, "n_permutations": 10, "min_edges": 3}
    size = {"n_latent": 16, "n_heads": 2, "token_size": {"image": 2}}
    with only_changed(joint, ("", "obsp", "k"), ("", "uns", "k")):
        fimp_sc.tl.attention(joint, "kind", modality=["rna", "image"], key_added="k", model_kwargs=size, **how)
    influence, graph = joint.obsp["k"], joint.obsp["spatial_connectivities"]
    read = joint.obs_names.isin([*joint["rna"].obs_names, *joint["image"].obs_names])
    assert not read.all(), "nodes with signals alone have no place in the model"
    np.testing.assert_array_equal(influence.toarray() > 0, (graph.toarray() > 0) & read[:, None] & read)
