"""Samples that lie over each other and are joined by a graph: found with what names them, and nothing else is."""

from __future__ import annotations

import re
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import squidpy  # noqa: F401  # importing it warns
from scipy import sparse
from scipy.spatial import cKDTree

import fimp_sc
from fimp_sc.data._samples import warn_joined_samples
from fimp_sc.pp import spatial_graph

N = 400


def places(n=N, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 2)) * 100


def nearest(coordinates, k=6) -> sparse.csr_matrix:
    near = cKDTree(coordinates).query(coordinates, k=k + 1)[1]
    row = np.repeat(np.arange(len(near)), k + 1)
    edge = row != near.ravel()
    n = len(near)
    return sparse.csr_matrix((np.ones(edge.sum(), np.float32), (row[edge], near.ravel()[edge])), shape=(n, n))


def make_adata(coordinates, names=None, uns=None, **columns) -> ad.AnnData:
    names = [f"c{i}" for i in range(len(coordinates))] if names is None else names
    return ad.AnnData(obs=pd.DataFrame(columns, index=names), obsm={"spatial": np.asarray(coordinates)}, uns=uns or {})


def told(adata, graph=None, library_key=None) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_joined_samples(adata, nearest(adata.obsm["spatial"]) if graph is None else graph, "spatial", library_key)
    assert len(caught) <= 1
    return str(caught[0].message) if caught else ""


TWO = np.repeat(["a", "b"], N // 2)


@pytest.mark.parametrize(
    "column",
    [
        *("fov", "FOV", "library_id", "libraryid", "sample", "Sample_ID", "sampleID", "orig.ident", "section", "slide"),
        *("donor", "donor_id", "batch", "Batch", "patient", "bregma", "z", "tissue_section", "brain_section_label"),
    ],
)
def test_columns_of_samples_are_named(column):
    message = told(make_adata(places(), **{column: TWO}))
    assert f"adata.obs[{column!r}] tells 2 of them apart. Pass library_key={column!r}" in message
    share = int(re.match(r"\d+", message)[0])
    assert 45 < share < 55, "of random cells half the neighbors are of the other sample"


@pytest.mark.parametrize(
    "column", ["cell_type", "library_size", "sample_area", "fov_x", "n_samples", "leiden", "niche"]
)
def test_other_columns_are_not(column):
    assert told(make_adata(places(), **{column: TWO})) == ""


def test_numbers_and_categories_tell_samples_but_measurements_do_not():
    number = np.repeat([1.5, 2.5], N // 2)
    for values in (number, number.astype(int), pd.Categorical(TWO)):
        assert "'section'" in told(make_adata(places(), section=values))
    assert told(make_adata(places(), section=np.arange(N))) == "", "a name for each cell"
    assert told(make_adata(places(), section="only")) == ""
    assert told(make_adata(places(), section=np.full(N, np.nan))) == ""


def test_side_by_side_is_silent():
    apart = places() + 101 * (TWO == "b")[:, None]
    assert told(make_adata(apart, sample=TWO)) == ""
    # Fields of one slide, of few cells and turned, touch each other on all sides.
    coordinates = places(2000)
    field = (coordinates // 10).astype(int) @ [10, 1]
    turned = coordinates @ np.array([[0.8, -0.6], [0.6, 0.8]])
    for x in (coordinates, turned):
        assert told(make_adata(x, fov=field)) == ""
    # Any contiguous pieces.
    seeds = places(40, seed=1)
    assert told(make_adata(coordinates, section=cKDTree(seeds).query(coordinates)[1])) == ""
    assert "99 %" in told(make_adata(coordinates % 10, fov=field)), "each from its own corner, as read for one field"


@pytest.mark.parametrize(("number", "spread"), [(30, 100), (60, 20)])
def test_a_small_sample_in_a_large_one_is_found(number, spread):
    coordinates = np.vstack([places(2000), places(number, seed=1) * spread / 100])
    assert told(make_adata(coordinates, donor=np.repeat(["large", "small"], [2000, number])))


def test_a_part_of_the_frame_is_enough():
    coordinates = places(4000)
    half = np.repeat(["a", "b"], 2000)
    for shift, found in ((75, True), (101, False)):
        moved = coordinates + np.array([shift, 0]) * (half == "b")[:, None]
        assert bool(told(make_adata(moved, sample=half))) == found


def test_sections_over_each_other_in_three_dimensions_are_side_by_side():
    height = np.repeat([0.0, 50.0], N // 2)
    assert told(make_adata(np.column_stack([places(), height]), section=TWO)) == ""


def test_a_graph_built_by_sample_is_silent_and_one_of_expression_too():
    coordinates = places()
    blocks = sparse.block_diag([nearest(coordinates[: N // 2]), nearest(coordinates[N // 2 :])])
    assert told(make_adata(coordinates, sample=TWO), blocks.tocsr()) == ""
    expression = nearest(places(seed=5))
    assert told(make_adata(coordinates, sample=TWO), expression) == ""


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_names_of_cells_tell_samples():
    barcode = np.array([f"{'ACGT'[i % 4]}{'ACGT'[i // 4 % 4]}{i % 200}-1" for i in range(N)])
    for names, where in (
        (
            np.char.add(np.char.add(barcode, "-"), np.repeat(["0", "1"], N // 2)),
            "the end of adata.obs_names ('0' or '1')",
        ),
        (np.char.add(np.char.add(TWO, "_"), barcode), "the beginning of adata.obs_names ('a' or 'b')"),
    ):
        adata = make_adata(places(), names=names)
        message = told(adata)
        assert where in message
        line = re.search(r"after (adata\.obs.*)\.$", message)[1]
        exec(line, {"adata": adata})
        np.testing.assert_array_equal(pd.factorize(adata.obs["sample"])[0], TWO == "b")
    assert told(make_adata(places(), names=[f"cell_{i}-1" for i in range(N)])) == ""
    twice = make_adata(places(), names=np.tile(barcode[: N // 2], 2))
    assert 'ad.concat({"a": a, "b": b}, label="sample"' in told(twice)
    twice.obs_names_make_unique()
    assert 'ad.concat({"a": a, "b": b}, label="sample"' in told(twice)


def test_keys_of_images_tell_samples():
    uns = {"spatial": {"a": {}, "b": {}}}
    assert "Pass library_key='origin'" in told(make_adata(places(), uns=uns, origin=TWO))
    assert "holds 2 samples and no column" in told(make_adata(places(), uns=uns))
    # A section taken out keeps the images of both.
    assert told(make_adata(places(), uns=uns, origin="a")) == ""
    assert told(make_adata(places(), uns={"spatial": {"a": {}}})) == ""


def test_many_cells_at_one_place_are_a_sign():
    grid = np.tile(np.argwhere(np.ones((10, 20))).astype(float), (2, 1))
    assert "400 of 400 cells share their place" in told(make_adata(grid))
    assert "adata.obs['sample']" in told(make_adata(grid, sample=TWO))
    assert told(make_adata(grid[:200])) == ""


def test_fields_in_slides_need_both_columns_and_the_line_makes_one():
    rng = np.random.default_rng(0)
    slide, field = rng.integers(0, 2, 2000), rng.integers(0, 9, 2000)
    adata = make_adata(places(2000), slide=slide, fov=field)
    adata.obsm["spatial_fov"] = adata.obsm["spatial"]
    message = told(adata)
    assert "adata.obs['slide'] with adata.obs['fov'] tells 18 of them apart" in message
    assert 'spatial_key="spatial_fov"' in message
    exec(re.search(r"after (adata\.obs.*?)\. Or", message)[1], {"adata": adata})
    np.testing.assert_array_equal(*(pd.factorize(x)[0] for x in (adata.obs["library"], slide * 9 + field)))
    # A donor has several sections: these alone tell all.
    adata = make_adata(places(2000), donor=field // 3, section=field)
    assert "Pass library_key='section'" in told(adata)
    # A sample has fields beside each other: samples alone do.
    x = places(2000)
    adata = make_adata(x, sample=slide, fov=(x[:, 0] // 20).astype(int))
    assert "Pass library_key='sample'" in told(adata)


def by_sample(coordinates, codes) -> sparse.csr_matrix:
    return nearest(np.column_stack([coordinates, 1e6 * codes]))


def test_samples_within_those_that_are_named():
    rng = np.random.default_rng(0)
    section = rng.integers(0, 6, 2000)
    patient = section // 2
    adata = make_adata(places(2000), patient=patient, section=section)
    message = told(adata, by_sample(adata.obsm["spatial"], patient), "patient")
    assert message.startswith("50 % of the edges join different samples within those of library_key='patient'")
    assert "adata.obs['section'] tells 6 of them apart. Pass library_key='section'" in message
    assert told(adata, by_sample(adata.obsm["spatial"], section), "section") == ""
    # Fields have the same numbers in each slide: both columns are needed, and the line makes one of them.
    slide, field = rng.integers(0, 2, 2000), rng.integers(0, 9, 2000)
    adata = make_adata(places(2000), slide=slide, fov=field)
    message = told(adata, by_sample(adata.obsm["spatial"], slide), "slide")
    assert "adata.obs['slide'] with adata.obs['fov'] tells 18 of them apart" in message
    exec(re.search(r"after (adata\.obs.*?)\.$", message)[1], {"adata": adata})
    np.testing.assert_array_equal(*(pd.factorize(x)[0] for x in (adata.obs["library"], slide * 9 + field)))
    # Names of cells tell what no column does.
    names = [f"s{i}_{cell}" for cell, i in enumerate(section)]
    adata = make_adata(places(2000), names=names, patient=patient)
    message = told(adata, by_sample(adata.obsm["spatial"], patient), "patient")
    assert "the beginning of adata.obs_names" in message
    # Beside each other in their patient, or what a coarser column tells.
    x = places(2000)
    beside = make_adata(x + 200 * (section % 2)[:, None], patient=patient, section=section)
    assert told(beside, by_sample(beside.obsm["spatial"], patient), "patient") == ""
    beside = make_adata(x, section=section, patient=patient, fov=(x[:, 0] // 20).astype(int), batch=slide)
    assert told(beside, by_sample(x, section), "section") == ""


@pytest.mark.parametrize("ready", [False, True])
def test_the_graph_function_warns_once_at_the_line_of_the_caller(toy, ready):
    if ready:
        toy.obsp["spatial_connectivities"] = nearest(toy.obsm["spatial"])
    with pytest.warns(UserWarning, match=r"adata\.obs\['section'\] tells 2 of them apart") as record:
        spatial_graph(toy)
    ours = [warning for warning in record if "different samples" in str(warning.message)]
    assert [warning.filename for warning in ours] == [__file__]
    spatial_graph(toy, library_key="section", overwrite=True)
    spatial_graph(toy)  # a graph built by section, found and kept


def test_where_the_warning_is_an_error_nothing_is_written(toy):
    with pytest.raises(UserWarning, match="library_key='section'"):
        spatial_graph(toy)
    assert not toy.obsp


@pytest.mark.parametrize("library_key", [None, "section"])
def test_one_place_for_all_cells_is_an_error(toy, library_key):
    toy.obsm["spatial"][toy.obs["section"] == "section_2"] = 3.0
    if library_key is None:
        toy = toy[toy.obs["section"] == "section_2"].copy()
    with pytest.raises(ValueError, match=r"adata\.obsm\['spatial'\] holds the same place for all cells"):
        spatial_graph(toy, library_key=library_key)


# Real data ------------------------------------------------------------------------------------------------------------


def read(folder, name) -> ad.AnnData:
    adata = ad.read_h5ad(folder / f"{name}.h5ad", backed="r")
    return ad.AnnData(obs=adata.obs, obsm={"spatial": adata.obsm["spatial"]})


@pytest.mark.parametrize("name", ["dlpfc_visium_151673", "dlpfc_visium_151674", "starmap_visual_cortex_1020"])
def test_real_sections_are_silent(shared_data, name):
    assert told(read(shared_data, name)) == ""


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_real_sections_joined(shared_data):
    merfish = read(shared_data, "merfish_hypothalamus_animal1")
    assert told(merfish).startswith("53 % of the edges join different samples")
    for bregma in merfish.obs["bregma"].unique():
        assert told(merfish[merfish.obs["bregma"] == bregma]) == ""
    tumors = read(shared_data, "her2st_patients_A-F")
    assert "Pass library_key='section'" in told(tumors)
    for key, found in (("patient", "Pass library_key='section'"), ("section", "")):
        codes = tumors.obs[key].cat.codes.to_numpy()
        message = told(tumors, by_sample(tumors.obsm["spatial"], codes), key)
        assert found in message
        assert bool(found) == bool(message)
    assert all(told(tumors[tumors.obs["section"] == section]) == "" for section in tumors.obs["section"].unique())
    one, other = (read(shared_data, f"dlpfc_visium_15167{i}") for i in (3, 4))
    del one.obs["sample"], other.obs["sample"]
    for joined in (ad.concat([one, other], index_unique="-"), ad.concat({"x": one, "y": other}, label="batch")):
        assert told(joined).startswith("65 % of the edges join different samples")
    other.obsm["spatial"] = other.obsm["spatial"] + 1.02 * np.ptp(one.obsm["spatial"][:, :1], axis=0)
    assert told(ad.concat({"x": one, "y": other}, label="batch")) == ""


# Every way in ---------------------------------------------------------------------------------------------------------


QUICK = {"max_epochs": 1, "accelerator": "cpu", "verbose": False, "model_kwargs": {"n_latent": 16, "n_heads": 2}}
WAYS = {
    "setup": lambda adata: fimp_sc.model.FIMP.setup_anndata(adata),
    "setup with batches": lambda adata: fimp_sc.model.FIMP.setup_anndata(adata, batch_key="section"),
    "embed": lambda adata: fimp_sc.tl.embed(adata, **QUICK),
    "embed with batches": lambda adata: fimp_sc.tl.embed(adata, batch_key="section", **QUICK),
}


@pytest.mark.parametrize(("way", "ready"), [*((way, True) for way in WAYS), ("embed", False)])
def test_models_and_tools_warn_once(small_toy, way, ready):
    if ready:
        small_toy.obsp["spatial_connectivities"] = nearest(small_toy.obsm["spatial"])
    with pytest.warns(UserWarning, match=r"Pass library_key='section'") as record:
        WAYS[way](small_toy)
    ours = [warning for warning in record if "different samples" in str(warning.message)]
    assert [warning.filename for warning in ours] == [__file__]
