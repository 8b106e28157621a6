"""What a model reads of an object: one modality or several, with some of the nodes and in any order."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from mudata import MuData
from scipy import sparse

from fimp_sc._errors import MissingKeyError
from fimp_sc.data._modality import quiet_mudata
from fimp_sc.data._study import (
    as_modalities,
    expand_rows,
    feature_names,
    is_mudata,
    resolve,
)

KEY = "spatial_connectivities"


def part_of(names, kind=None, *, seed=0, **info) -> ad.AnnData:
    """A modality with the given nodes, whose values, ``x`` and coordinates are the places of names in the alphabet."""
    place = np.array([ord(name) - ord("a") for name in names])
    var = pd.DataFrame(index=[f"{kind}{seed}_{i}" for i in range(3)])
    adata = ad.AnnData(np.repeat(place[:, None], 3, 1).astype(np.float32), pd.DataFrame({"x": place}, list(names)), var)
    adata.obsm["spatial"] = np.column_stack([place, place]).astype(float)
    if kind is not None:
        adata.uns["fimp_modality"] = {"kind": kind, **info}
    return adata


def graph_of(names) -> sparse.csr_matrix:
    """A graph whose weights tell which nodes they join: 10 times the destination, and the source, from 1."""
    place = np.array([ord(name) - ord("a") + 1 for name in names])
    return sparse.csr_matrix((10 * place[:, None] + place) * (place[:, None] != place)).astype(np.float64)


def mdata_of(**modalities) -> MuData:
    with quiet_mudata():
        return MuData(modalities)


def places(mdata: MuData) -> np.ndarray:
    return np.array([ord(name) - ord("a") for name in mdata.obs_names])


# Modalities -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "expected"), [(None, "expression"), ("feature", "feature"), ("signal", "signal")])
def test_an_anndata_object_is_its_own_modality(kind, expected) -> None:
    adata = part_of("abc", kind)
    for modality in (None, "any", ["any"]):
        (part,) = resolve(adata, modality).modalities
        assert (part.name, part.kind, part.rows, part.absent) == ("adata", expected, None, None)
        assert part.adata is adata
        assert resolve(adata, modality).nodes is adata
    assert not is_mudata(adata)


def test_one_modality_is_read_as_it_is() -> None:
    mdata = mdata_of(one=part_of("ab", "signal"), other=part_of("cbd"))
    for modality in ("other", ["other"]):
        (part,) = resolve(mdata, modality).modalities
        assert (part.name, part.kind, part.rows) == ("other", "expression", None)
        assert resolve(mdata, modality).nodes is mdata["other"] is part.adata
    alone = mdata_of(one=part_of("ab", "signal"))
    assert resolve(alone, None).modalities[0].adata is alone["one"]
    assert is_mudata(alone)


def test_rows_of_several_modalities_are_found_by_name() -> None:
    mdata = mdata_of(rna=part_of("abcdef"), image=part_of("fbad", "patch"), bold=part_of("abcdef", "signal", seed=1))
    parts = resolve(mdata, ("image", "rna", "bold")).modalities
    assert [(part.name, part.kind) for part in parts] == [
        ("image", "patch"), ("rna", "expression"), ("bold", "signal"),
    ]  # fmt: skip
    image, *whole = parts
    assert image.rows.dtype == np.int64
    for i, name in enumerate(mdata.obs_names):
        found = image.rows[i]
        assert (found < 0) == (name not in "fbad")
        assert found < 0 or image.adata.obs_names[found] == name
    np.testing.assert_array_equal(image.absent, [name not in "fbad" for name in mdata.obs_names])
    assert list(mdata.obs_names) == list("abcdef")
    assert all(part.rows is None and part.absent is None for part in whole)


def test_all_nodes_in_another_order_are_no_absent_ones() -> None:
    mdata = mdata_of(rna=part_of("abc"), image=part_of("cab", "patch"))
    first, second = resolve(mdata, ["rna", "image"]).modalities
    assert first.rows is None
    assert second.rows.tolist() == [1, 2, 0]
    assert second.absent is None


@pytest.mark.parametrize(("given", "expected"), [(None, None), ("a", ["a"]), (["a", "b"], ["a", "b"]), (("b",), ["b"])])
def test_names_of_modalities(given, expected) -> None:
    assert as_modalities(given) == expected


@pytest.mark.parametrize("names", [[], ["a", "b", "a"]])
def test_names_must_be_there_once(names) -> None:
    with pytest.raises(ValueError, match=r"must name modalities once each, found \["):
        as_modalities(names)


def test_what_cannot_be_read() -> None:
    mdata = mdata_of(rna=part_of("abc"), image=part_of("ab", "patch"), table=part_of("abc", "feature"))
    with pytest.raises(MissingKeyError, match=r"'imag' is not in mdata.mod .*Did you mean 'image'"):
        resolve(mdata, ["rna", "imag"])
    with pytest.raises(MissingKeyError, match=r"'imag' is not in mdata.mod .*Did you mean 'image'"):
        resolve(mdata, "imag")
    with pytest.raises(ValueError, match=r"has 3 modalities: choose one with modality=, of \['rna'"):
        resolve(mdata)
    with pytest.raises(TypeError, match="found dict"):
        resolve({}, "rna")


def test_columns_of_several_tables_have_names_of_their_own() -> None:
    mdata = mdata_of(rna=part_of("abc"), image=part_of("ab", "patch"), table=part_of("abc", "feature"))
    mdata["rna"].var_names, mdata["table"].var_names = ["x", "y", "z"], ["z", "w", "v"]
    tables = resolve(mdata, ["table", "image", "rna"]).tables
    assert [list(names) for names in feature_names(tables)] == [["table:z", "w", "v"], ["x", "y", "rna:z"]]
    assert [list(names) for names in feature_names(tables[1:])] == [["x", "y", "z"]]
    mdata["rna"].var_names = ["x", "table:z", "z"]
    with pytest.raises(ValueError, match="'table:z' would be the name of two columns"):
        feature_names(resolve(mdata, ["table", "rna"]).tables)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:mudata")
@pytest.mark.parametrize("modality", ["rna", "image"])
def test_nodes_without_names_of_their_own_cannot_be_brought_together(modality) -> None:
    parts = {"rna": part_of("abc"), "image": part_of("abd", "patch")}
    parts[modality].obs_names = ["a", "z", "z"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # mudata warns of the same
        mdata = mdata_of(**parts)
    with pytest.raises(ValueError, match=r"obs_names has 'z' more than once.*a name of its own"):
        resolve(mdata, ["rna", "image"])
    assert resolve(mdata, modality).modalities[0].rows is None, "one modality alone needs no names"


# Nodes ----------------------------------------------------------------------------------------------------------------


def two(first="abcdef", second="fbadce") -> MuData:
    return mdata_of(rna=part_of(first), image=part_of(second, "patch"))


@pytest.mark.parametrize("where", ["whole", "rna", "image"])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_a_graph_of_all_nodes_comes_from_where_it_is(where: str, form: str) -> None:
    mdata = two()
    holder = mdata if where == "whole" else mdata[where]
    graph = graph_of(holder.obs_names)
    holder.obsp["mine"] = graph.toarray() if form == "dense" else graph.asformat(form)
    nodes = resolve(mdata, ["rna", "image"]).nodes
    found = nodes.obsp["mine"]
    np.testing.assert_array_equal(
        found.toarray() if sparse.issparse(found) else found, graph_of(mdata.obs_names).toarray()
    )
    assert nodes.obs_names.equals(mdata.obs_names)
    resolve(mdata, ["rna", "image"]).check_graph("mine")


def test_the_whole_object_and_then_the_first_modality_decide() -> None:
    mdata = two()
    mdata["image"].obsp["g"] = 2 * graph_of(mdata["image"].obs_names)
    mdata["rna"].obsp["g"] = 3 * graph_of(mdata["rna"].obs_names)
    mdata["image"].obsm["spatial"] = mdata["image"].obsm["spatial"] + 100
    mdata["image"].obs["x"] += 100

    def found(*names):
        nodes = resolve(mdata, names).nodes
        shift = (nodes.obsm["spatial"][:, 0] - places(mdata), nodes.obs["x"] - places(mdata))
        return nodes.obsp["g"].max() / 65, *(set(values) for values in shift)

    assert found("rna", "image") == (3, {0}, {0})
    assert found("image", "rna") == (2, {100}, {100})
    mdata.obsp["g"] = graph_of(mdata.obs_names)
    mdata.obsm["spatial"] = np.repeat(places(mdata)[:, None] - 5.0, 2, 1)
    mdata.obs["x"] = places(mdata) - 5
    assert found("image", "rna") == (1, {-5}, {-5})


def test_modalities_with_some_of_the_nodes_give_columns_only_and_come_last() -> None:
    mdata = two(first="abcd", second="fbadce")
    some, everything = mdata["rna"], mdata["image"]
    everything.obs["x"] += 100
    some.obs["only"] = pd.Categorical(["u", "v", "u", "v"])
    some.obsp["g"] = graph_of("abcd")
    some.obsm["pca"] = np.ones((4, 2))
    nodes = resolve(mdata, ["rna", "image"]).nodes
    np.testing.assert_array_equal(nodes.obs["x"], places(mdata) + 100)
    assert dict(nodes.obs["only"].dropna()) == {"a": "u", "b": "v", "c": "u", "d": "v"}
    assert nodes.obs["only"].isna().sum() == 2
    assert set(nodes.obsm) == {"spatial"}
    np.testing.assert_array_equal(nodes.obsm["spatial"][:, 0], places(mdata))
    assert "g" not in nodes.obsp
    with pytest.raises(MissingKeyError, match=r"'g' is not in mdata.obsp, nor in a mod.* need one graph of all 6"):
        resolve(mdata, ["rna", "image"]).check_graph("g")


def test_masks_of_the_whole_object_and_pixels_describe_no_nodes() -> None:
    """Pixels would be copied, or read from the disk, whenever nodes are asked for."""
    mdata = two()
    mdata["image"].obsm["pixels"] = np.zeros((6, 4), np.uint8)
    mdata["rna"].obsm["image"] = np.ones((6, 2))  # the name of a modality, but of its own
    mdata["rna"].obsm["counts"] = sparse.csr_matrix(places(mdata)[:, None] + 1)
    mdata.obsm["table"] = pd.DataFrame({"y": places(mdata)}, mdata.obs_names)
    assert {"rna", "image"} <= set(mdata.obsm)
    nodes = resolve(mdata, ["image", "rna"]).nodes
    assert set(nodes.obsm) == {"spatial", "image", "counts", "table"}
    np.testing.assert_array_equal(nodes.obsm["image"], np.ones((6, 2)))
    np.testing.assert_array_equal(nodes.obsm["counts"].toarray()[:, 0], places(mdata) + 1)
    np.testing.assert_array_equal(np.asarray(nodes.obsm["table"])[:, 0], places(mdata))


def test_many_columns_are_put_together_at_once() -> None:
    mdata = two()
    more = pd.DataFrame({f"c{i}": np.arange(6) for i in range(150)}, mdata["rna"].obs_names)
    mdata["rna"].obs = mdata["rna"].obs.join(more)
    # pandas warns where a frame is put together column by column.
    assert resolve(mdata, ["rna", "image"]).nodes.obs.shape == (6, 151)


def test_one_modality_needs_no_graph_of_the_whole() -> None:
    mdata = two()
    for modality in ("rna", ["rna"]):
        resolve(mdata, modality).check_graph("absent")
    with pytest.raises(MissingKeyError, match="need one graph of all"):
        resolve(mdata, ["rna", "image"]).check_graph("absent")


def test_keys_that_modalities_name_for_themselves() -> None:
    none = {"connectivities_key": KEY, "library_key": None}
    adata = part_of("abc", "signal", connectivities_key="mesh", library_key="run")
    own = {"connectivities_key": "mesh", "library_key": "run"}
    assert resolve(adata, None).registered_keys() == own
    assert resolve(part_of("abc")).registered_keys() == none
    mdata = mdata_of(bold=adata, rna=part_of("abc"), image=part_of("abc", "patch", connectivities_key="near"))
    assert resolve(mdata, "rna").registered_keys() == none
    assert resolve(mdata, ["rna", "bold"]).registered_keys() == own
    assert resolve(mdata, ["image", "bold"]).registered_keys() == own | {"connectivities_key": "near"}
    assert resolve(mdata, ["bold", "image"]).registered_keys() == own


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_array, sparse.coo_matrix])
@pytest.mark.parametrize("dtype", [np.float32, np.int64, bool, np.uint8])
def test_rows_of_nodes(form, dtype) -> None:
    dense = (np.random.default_rng(0).poisson(1.0, (4, 5)) - (dtype is np.float32)).astype(dtype)
    rows = np.array([2, -1, 0, 3, -1, 2])
    found = expand_rows(form(dense), rows, "mdata['rna']")
    assert found.format == "csr"
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.toarray(), np.where(rows[:, None] < 0, 0, dense[rows]))
    assert (np.diff(found.indptr)[rows < 0] == 0).all()


def test_rows_of_what_is_not_in_memory() -> None:
    with pytest.raises(ValueError, match=r"^mdata\['rna'\] is not in memory.*to_memory"):
        expand_rows(object(), np.array([0]), "mdata['rna']")
