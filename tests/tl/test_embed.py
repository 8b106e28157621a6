"""`tl.embed`: what it writes, what it leaves alone, and other sections."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import fimp_sc
from fimp_sc.model import FIMP
from fimp_sc.tl._call._results import storable

GRAPH = {
    "obsp": {"spatial_connectivities", "spatial_distances"},
    "uns": {"spatial_neighbors", "X_fimp"},
    "obsm": {"X_fimp"},
}


def test_writes_the_embedding_and_the_graph_and_nothing_else(tissue, quick, unchanged) -> None:
    with unchanged(tissue, **GRAPH):
        assert fimp_sc.tl.embed(tissue, library_key="section", **quick) is None
    z = tissue.obsm["X_fimp"]
    assert z.shape == (100, 16)
    assert z.dtype == np.float32
    assert np.isfinite(z).all()
    np.testing.assert_allclose(fimp_sc.tl.get_model(tissue).get_latent_representation(), z, atol=1e-6)


def test_record_says_how_it_was_made(tissue, quick) -> None:
    tissue.layers["counts"] = tissue.X.copy()
    fimp_sc.tl.embed(tissue, library_key="section", layer="counts", random_state=4, **quick)
    record = tissue.uns["X_fimp"]
    assert record["params"]["layer"] == "counts"
    assert record["params"]["library_key"] == "section"
    assert record["model"]["layer"] == "practical"
    assert record["model"]["n_latent"] == 16
    assert record["random_state"] == 4
    assert record["epochs"] == 1
    assert {"fimp-sc", "torch", "scvi-tools", "anndata"} == set(record["versions"])


def test_record_has_nothing_that_an_older_anndata_cannot_read(tissue, quick) -> None:
    fimp_sc.tl.embed(tissue, **quick)

    def values(held):
        return [one for value in held.values() for one in (values(value) if isinstance(value, dict) else [value])]

    for key in ("X_fimp", "spatial_neighbors"):
        assert all(value is not None for value in values(tissue.uns[key])), key


def teststorable_reaches_nested_parameters() -> None:
    given = {"a": None, "b": {"c": None, "d": (1, 2), "e": {"f": None, "g": 0}}, "h": False}
    assert storable(given) == {"b": {"d": [1, 2], "e": {"g": 0}}, "h": False}


def test_graph_that_is_there_is_used_as_it_is(tissue, quick, unchanged) -> None:
    fimp_sc.pp.spatial_graph(tissue, method="delaunay", library_key="section", key_added="mine")
    with unchanged(tissue, obsm={"X_fimp"}, uns={"X_fimp"}):
        fimp_sc.tl.embed(tissue, connectivities_key="mine_connectivities", library_key="section", **quick)
    used = fimp_sc.tl.get_model(tissue).adata.obsp["mine_connectivities"]
    assert (used != tissue.obsp["mine_connectivities"]).nnz == 0


def test_sections_are_never_joined(tissue, quick) -> None:
    fimp_sc.tl.embed(tissue, library_key="section", **quick)
    edges = tissue.obsp["spatial_connectivities"].tocoo()
    section = tissue.obs["section"].to_numpy()
    assert (section[edges.row] == section[edges.col]).all()
    assert edges.nnz > 100


def test_a_section_does_not_see_the_other(tissue, quick) -> None:
    """Change the cells of one section: the embedding of the other stays (values on the log scale, one batch)."""
    tissue.X = tissue.X.log1p()
    tissue.obs["batch"] = "one"
    options = {"library_key": "section", "batch_key": "batch", "input_scale": "log"}
    fimp_sc.tl.embed(tissue, **options, **quick)
    model = fimp_sc.tl.get_model(tissue)
    other = tissue.obs["section"].to_numpy() == "section_2"
    before = tissue.obsm["X_fimp"].copy()
    # Cells of section 2 change places among each other, so that means over all cells stay.
    order = np.arange(100)
    order[other] = np.roll(order[other], 7)
    moved = tissue.copy()
    moved.X = tissue.X[order]
    fimp_sc.tl.embed(moved, model=model, **options, accelerator="cpu", verbose=False)
    np.testing.assert_allclose(moved.obsm["X_fimp"][~other], before[~other], atol=2e-5)
    assert (np.abs(moved.obsm["X_fimp"] - before).max(1)[other] > 1e-4).all()


def test_copy_leaves_the_object_alone(tissue, quick, unchanged) -> None:
    with unchanged(tissue):
        result = fimp_sc.tl.embed(tissue, copy=True, **quick)
    assert result is not tissue
    fimp_sc.tl.embed(tissue, **quick)
    np.testing.assert_array_equal(result.obsm["X_fimp"], tissue.obsm["X_fimp"])


def test_same_seed_same_result(tissue, quick) -> None:
    for key, seed in (("a", 1), ("b", 1), ("c", 2)):
        fimp_sc.tl.embed(tissue, key_added=key, random_state=seed, **quick)
    np.testing.assert_array_equal(tissue.obsm["a"], tissue.obsm["b"])
    assert np.abs(tissue.obsm["a"] - tissue.obsm["c"]).max() > 1e-3


def test_survives_a_file(tissue, quick, tmp_path) -> None:
    fimp_sc.tl.embed(tissue, library_key="section", **quick)
    tissue.write_h5ad(tmp_path / "tissue.h5ad")
    again = ad.read_h5ad(tmp_path / "tissue.h5ad")
    np.testing.assert_array_equal(again.obsm["X_fimp"], tissue.obsm["X_fimp"])
    assert again.uns["X_fimp"]["params"]["library_key"] == "section"
    assert again.uns["X_fimp"]["model"]["n_latent"] == 16
    fimp_sc.tl.embed(again, library_key="section", key_added="again", **quick)
    np.testing.assert_array_equal(again.obsm["again"], tissue.obsm["X_fimp"])


def test_view_becomes_an_object_of_its_own_and_the_parent_stays(tissue, quick, unchanged) -> None:
    view = tissue[10:80]
    with unchanged(tissue):
        fimp_sc.tl.embed(view, **quick)
    assert view.obsm["X_fimp"].shape == (70, 16)
    assert list(view.obs_names) == list(tissue.obs_names[10:80])
    alone = tissue[10:80].copy()
    fimp_sc.tl.embed(alone, **quick)
    np.testing.assert_array_equal(alone.obsm["X_fimp"], view.obsm["X_fimp"])


@pytest.mark.parametrize("kind", ["csc", "dense", "integers"])
def test_storage_of_the_matrix_does_not_matter(tissue, quick, unchanged, kind: str) -> None:
    stored = tissue.copy()
    stored.X = {
        "csc": sparse.csc_matrix(tissue.X), "dense": tissue.X.toarray(), "integers": tissue.X.toarray().astype(np.int64)
    }[kind]  # fmt: skip
    with unchanged(stored, **GRAPH):
        fimp_sc.tl.embed(stored, **quick)
    fimp_sc.tl.embed(tissue, **quick)
    np.testing.assert_allclose(stored.obsm["X_fimp"], tissue.obsm["X_fimp"], atol=1e-4)


@pytest.mark.parametrize("scale", ["counts", "normalized", "log", "auto"])
def test_input_scales(tissue, quick, unchanged, scale: str) -> None:
    plain = tissue.copy()
    if scale == "normalized":
        tissue.X = tissue.X * np.float32(0.37)
    elif scale == "log":
        tissue.X = tissue.X.log1p()
    with unchanged(tissue, **GRAPH):
        fimp_sc.tl.embed(tissue, input_scale=scale, **quick)
    fimp_sc.tl.embed(plain, input_scale="counts", **quick)
    distance = np.abs(tissue.obsm["X_fimp"] - plain.obsm["X_fimp"]).max()
    # Scaling all cells alike cancels in normalization up to the target total; log values are used as they are.
    if scale in ("counts", "auto"):
        assert distance == 0
    else:
        assert distance > 1e-3


# Trained models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["object", "str", "path"])
def test_trained_model_on_another_gene_list(reference, section, tmp_path, unchanged, monkeypatch, how: str) -> None:
    model = reference
    if how != "object":
        reference.save(str(tmp_path / "model"))
        model = tmp_path / "model" if how == "path" else str(tmp_path / "model")

    def train(*args, **kwargs):
        raise AssertionError("no second training")

    monkeypatch.setattr(FIMP, "train", train)
    with unchanged(section, **GRAPH):
        fimp_sc.tl.embed(section, model=model, accelerator="cpu", verbose=False)
    assert section.obsm["X_fimp"].shape == (section.n_obs, 16)
    assert np.isfinite(section.obsm["X_fimp"]).all()
    bound = fimp_sc.tl.get_model(section)
    assert bound is not reference
    np.testing.assert_array_equal(bound.genes, reference.genes)


def test_trained_model_on_its_own_tissue_gives_the_same(reference, tissue) -> None:
    fimp_sc.tl.embed(tissue, model=reference, library_key="section", accelerator="cpu", verbose=False)
    np.testing.assert_allclose(tissue.obsm["X_fimp"], reference.get_latent_representation(), atol=1e-5)


def test_keys_of_the_section_may_differ_from_those_of_the_model(reference, tissue) -> None:
    fimp_sc.tl.embed(tissue, model=reference, library_key="section", accelerator="cpu", verbose=False)
    other = tissue.copy()
    other.obs["slide"] = other.obs.pop("section")
    other.obsm["xy"] = other.obsm.pop("spatial")
    other.obsp["nn_connectivities"] = other.obsp.pop("spatial_connectivities")
    other.layers["raw"] = other.X
    other.X = None
    fimp_sc.tl.embed(
        other, model=reference, library_key="slide", spatial_key="xy", connectivities_key="nn_connectivities",
        layer="raw", accelerator="cpu", verbose=False,
    )  # fmt: skip
    np.testing.assert_allclose(other.obsm["X_fimp"], tissue.obsm["X_fimp"], atol=1e-5)


@pytest.mark.parametrize(
    ("what", "value"), [("model_kwargs", {"n_latent": 8}), ("train_kwargs", {"batch_size": 8}), ("n_layers", 1)]
)
def test_arguments_without_effect_on_a_trained_model_are_an_error(
    reference, section, unchanged, what: str, value
) -> None:
    with unchanged(section), pytest.raises(ValueError, match=f"{what} would have no effect"):
        fimp_sc.tl.embed(section, model=reference, **{what: value})


def test_arguments_of_training_can_all_come_by_train_kwargs(section) -> None:
    usual = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False}
    fimp_sc.tl.embed(section, model_kwargs={"n_latent": 8}, train_kwargs=usual)
    assert len(fimp_sc.tl.get_model(section).history["train_loss"]) == 2


def test_untrained_model_is_an_error(tissue, section, unchanged) -> None:
    fimp_sc.pp.spatial_graph(tissue)
    FIMP.setup_anndata(tissue)
    with unchanged(section), pytest.raises(ValueError, match="not trained"):
        fimp_sc.tl.embed(section, model=FIMP(tissue, n_latent=16))


def test_folder_without_a_model_is_an_error(section, unchanged, tmp_path) -> None:
    with unchanged(section), pytest.raises(ValueError, match=r"no model\.safetensors in .*model\.save\(folder\)"):
        fimp_sc.tl.embed(section, model=tmp_path)


def test_no_shared_gene_is_an_error(reference, section, unchanged) -> None:
    section.var_names = [f"ENSG{i:03d}" for i in range(section.n_vars)]
    with (
        unchanged(section),
        pytest.raises(ValueError, match=r"Only 0 of the 30 genes of the model are in adata\.var_names"),
    ):
        fimp_sc.tl.embed(section, model=reference, verbose=False)


# Failures leave the object as it was ----------------------------------------------------------------------------------


def spoil(adata: ad.AnnData, how: str) -> dict:
    """Make the object unusable, and return the arguments of the call."""
    if how in ("negative", "nan", "fractional"):
        adata.X.data[5] = {"negative": -1.0, "nan": np.nan, "fractional": 0.5}[how]
        return {"input_scale": "counts"}
    if how == "duplicates":
        adata.var_names = ["gene"] * adata.n_vars
    if how == "no coordinates":
        del adata.obsm["spatial"]
    if how == "coordinates":
        adata.obsm["spatial"][3] = np.nan
    if how == "graph shape":
        # An object cannot hold a graph of another shape: it comes in with the wrong kind instead.
        adata.obsp["spatial_connectivities"] = np.ones((adata.n_obs, adata.n_obs))
    if how == "joined":
        ring = sparse.identity(adata.n_obs, format="csr")[np.roll(np.arange(adata.n_obs), 1)]
        adata.obsp["spatial_connectivities"] = sparse.csr_matrix(ring)
        return {"library_key": "section"}
    if how == "no edges":
        adata.obsp["spatial_connectivities"] = sparse.csr_matrix((adata.n_obs, adata.n_obs))
    return {
        "layer": {"layer": "missing"},
        "library": {"library_key": "missing"},
        "batch": {"batch_key": "missing"},
        "graph key": {"connectivities_key": "missing"},
        "scale": {"input_scale": "raw"},
        "option": {"model_kwargs": {"n_latent": 10, "n_heads": 4}},
        "train option": {"train_kwargs": {"validation_size": 2.0}},
        "epochs twice": {"max_epochs": 1, "train_kwargs": {"max_epochs": 2}},
    }.get(how, {})


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("negative", ValueError, "below zero"),
        ("nan", ValueError, "NaN"),
        ("fractional", ValueError, "not whole numbers"),
        ("duplicates", ValueError, "duplicate gene names"),
        ("no coordinates", KeyError, "'spatial' is not in adata.obsm"),
        ("coordinates", ValueError, "NaN or infinite for 1 of"),
        ("graph shape", TypeError, "must be a sparse matrix"),
        ("joined", ValueError, "edges that join samples"),
        ("no edges", ValueError, "no edges between nodes"),
        ("layer", KeyError, "'missing' is not in adata.layers"),
        ("library", KeyError, "library_key="),
        ("batch", KeyError, "batch_key="),
        ("epochs twice", ValueError, "are the same argument"),
        ("graph key", KeyError, "connectivities_key="),
        ("scale", ValueError, "input_scale must be one of .* found 'raw'"),
        ("option", ValueError, "not a multiple"),
        ("train option", ValueError, "validation_size"),
    ],
)
def test_object_is_unchanged_when_a_call_fails(tissue, quick, unchanged, how: str, error, message: str) -> None:
    arguments = spoil(tissue, how)
    with unchanged(tissue), pytest.raises(error, match=message):
        fimp_sc.tl.embed(tissue, **{**quick, **arguments})
    with pytest.raises(KeyError):
        fimp_sc.tl.get_model(tissue)


def test_object_is_unchanged_when_training_is_interrupted(tissue, quick, unchanged, monkeypatch) -> None:
    def train(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(FIMP, "train", train)
    with unchanged(tissue), pytest.raises(KeyboardInterrupt):
        fimp_sc.tl.embed(tissue, **quick)


def test_object_is_unchanged_when_training_diverges(tissue, quick, unchanged, monkeypatch) -> None:
    monkeypatch.setattr(FIMP, "get_latent_representation", lambda self: np.full((100, 16), np.nan, dtype=np.float32))
    with unchanged(tissue), pytest.raises(FloatingPointError, match="training diverged"):
        fimp_sc.tl.embed(tissue, **quick)


def test_other_types_are_refused(tissue, quick) -> None:
    with pytest.raises(TypeError, match="Expected an AnnData object, found DataFrame"):
        fimp_sc.tl.embed(tissue.to_df(), **quick)


def test_cells_and_genes_may_be_numbered(tissue, quick) -> None:
    adata = tissue[tissue.obs["section"] == "section_1"].copy()
    fimp_sc.pp.spatial_graph(adata)
    adata.obs_names, adata.var_names = [[str(i) for i in range(n)] for n in adata.shape]
    adata.layers["mask"] = np.zeros(adata.shape, dtype=bool)
    adata.layers["mask"][:, 0] = True
    numbered = adata.copy()
    # As after adata.obs.reset_index(inplace=True), which anndata itself does not turn into text.
    numbered.obs.index, numbered.var.index = pd.RangeIndex(adata.n_obs), pd.RangeIndex(adata.n_vars)
    for one in (adata, numbered):
        fimp_sc.tl.embed(one, **quick)
        fimp_sc.tl.annotate(one, "label", **quick)
        fimp_sc.tl.niches(one, 2, n_seeds=2, verbose=False)
        fimp_sc.tl.impute(one, hidden="mask", **quick)
        fimp_sc.tl.attention(one, "label", n_permutations=10, **quick)
        fimp_sc.tl.gene_pairs(one, "label", n_permutations=10, min_edges=5, verbose=False)
    assert isinstance(numbered.obs.index, pd.RangeIndex)
    for slot, key in (("obsm", "X_fimp"), ("obsm", "fimp_label_probabilities"), ("layers", "fimp")):
        np.testing.assert_array_equal(getattr(numbered, slot)[key], getattr(adata, slot)[key])
    for key in ("fimp_label", "fimp_niche"):
        assert list(numbered.obs[key]) == list(adata.obs[key])
    assert (numbered.obsp["fimp_attention"] != adata.obsp["fimp_attention"]).nnz == 0
    pairs = [one.uns["fimp_gene_pairs"]["pairs"] for one in (adata, numbered)]
    pd.testing.assert_frame_equal(*pairs)
