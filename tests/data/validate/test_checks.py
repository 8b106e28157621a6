"""`fimp_sc.data.validate._checks`: every way an input can be wrong, and that correct input passes without a word."""

from __future__ import annotations

import ast
import pickle
import re
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fimp_sc._errors import MissingKeyError
from fimp_sc.data.validate._checks import (
    check_anndata,
    check_coordinates,
    check_labels,
    check_obs_key,
    check_scaled,
    check_values,
    get_matrix,
    warn_labels,
)


def make_adata(**obs) -> ad.AnnData:
    names = pd.DataFrame({k: pd.Series(v, dtype=object) for k, v in obs.items()}, index=range(12))
    names.index = [f"cell{i}" for i in range(12)]
    rng = np.random.default_rng(0)
    matrix = sparse.csr_matrix(rng.poisson(1.5, (12, 7)).astype(np.float32))
    return ad.AnnData(matrix, obs=names, obsm={"spatial": rng.random((12, 2))})


# Errors ---------------------------------------------------------------------------------------------------------------


def test_missing_key_error_reads_as_text_and_is_a_key_error():
    error = MissingKeyError("'a' is not in adata.obs")
    assert str(error) == "'a' is not in adata.obs"
    assert isinstance(error, KeyError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# The object -----------------------------------------------------------------------------------------------------------


def test_good_object_and_view_pass():
    adata, view = make_adata(), make_adata()[:5, 2:]
    for good in (adata, view):
        before = good.copy()
        check_anndata(good)
        np.testing.assert_array_equal(good.to_df(), before.to_df())
    assert view.is_view, "looking at a view does not copy it"


@pytest.mark.parametrize("thing", [None, pd.DataFrame(), np.ones((2, 2))])
def test_other_types(thing):
    with pytest.raises(TypeError, match=f"Expected an AnnData object, found {type(thing).__name__}"):
        check_anndata(thing)


def test_other_objects_are_told_how_to_become_one(tmp_path):
    from anndata.experimental import AnnCollection

    for table in (pd.DataFrame(np.ones((3, 2))), np.ones((3, 2)), sparse.csr_matrix(np.ones((3, 2)))):
        with pytest.raises(TypeError, match=r"adata = anndata\.AnnData\(values\).*obsm\[.spatial.\]"):
            check_anndata(table)
    with pytest.raises(TypeError, match=r"anndata\.read_h5ad\('a\.h5ad'\)"):
        check_anndata("a.h5ad")
    whole = make_adata()
    whole.raw = whole
    with pytest.raises(TypeError, match=r"found Raw: pass adata\.raw\.to_adata\(\)"):
        check_anndata(whole.raw)
    with pytest.raises(TypeError, match=r"found list: pass one; several are joined with anndata\.concat"):
        check_anndata([whole, whole])
    first, second = make_adata(label=["a"] * 12), make_adata(label=["b"] * 12)
    second.obs_names = [f"other{i}" for i in range(12)]
    collection = AnnCollection([first, second])
    with pytest.raises(TypeError, match=r"found AnnCollection: .*collection\[:\]\.to_adata\(\)"):
        check_anndata(collection)
    check_anndata(collection[:].to_adata())
    with pytest.raises(TypeError, match=r"found AnnCollectionView: .*collection\.to_adata\(\)"):
        check_anndata(collection[:5])
    check_anndata(collection[:5].to_adata())


def test_mudata_is_told_to_pass_a_modality():
    with pytest.raises(TypeError, match=r"pass one modality"):
        check_anndata(SimpleNamespace(mod={}))


def test_no_cells_no_genes():
    with pytest.raises(ValueError, match=r"no cells \(n_obs = 0\)"):
        check_anndata(make_adata()[:0])
    with pytest.raises(ValueError, match=r"no genes \(n_vars = 0\)"):
        check_anndata(make_adata()[:, :0])


def test_duplicate_genes():
    adata = make_adata()
    adata.var_names = ["A", "B", "A", "C", "B", "D", "E"]
    with pytest.raises(ValueError, match=r"2 duplicate gene names: 'A', 'B'.*var_names_make_unique"):
        check_anndata(adata)


def test_backed(tmp_path):
    make_adata().write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    check_anndata(backed)
    assert check_values(get_matrix(backed, None), where="adata.X") == "counts"
    with pytest.raises(ValueError, match=r"view of an object backed by '.*a\.h5ad'.*to_memory\(\)"):
        check_anndata(backed[:5])
    check_anndata(backed[:5].to_memory())
    backed.file.close()


# The matrix -----------------------------------------------------------------------------------------------------------


def test_get_matrix_returns_what_is_stored():
    adata = make_adata()
    adata.layers["counts"] = adata.X.copy()
    assert get_matrix(adata, None) is adata.X
    assert get_matrix(adata, "counts") is adata.layers["counts"]


def test_missing_layer_and_missing_x():
    adata = make_adata()
    with pytest.raises(MissingKeyError, match=r"'counts' is not in adata.layers \(it holds no keys\)"):
        get_matrix(adata, "counts")
    adata.layers["count"] = adata.X
    with pytest.raises(MissingKeyError, match=r"found there: 'count'\). Did you mean 'count'"):
        get_matrix(adata, "counts")
    adata.X = None
    with pytest.raises(ValueError, match=r"adata.X is None: pass layer=.*'count'"):
        get_matrix(adata, None)


# Coordinates and columns ----------------------------------------------------------------------------------------------


def test_coordinates():
    adata = make_adata()
    found = check_coordinates(adata, "spatial")
    np.testing.assert_array_equal(found, adata.obsm["spatial"])
    found[:] = 0
    assert adata.obsm["spatial"].any(), "a copy is returned"
    adata.obsm["words"] = pd.DataFrame({"x": ["a"] * 12, "y": ["b"] * 12}, index=adata.obs_names)
    adata.obsm["sparse"] = sparse.csr_matrix(np.ones((12, 2)))
    adata.obsm["X_pca"] = np.ones((12, 5))
    with pytest.raises(TypeError, match="array of numbers, found DataFrame"):
        check_coordinates(adata, "words")
    with pytest.raises(TypeError, match="array of numbers, found csr_matrix"):
        check_coordinates(adata, "sparse")
    adata.obsm["complex"] = adata.obsm["spatial"] * 1j
    with pytest.raises(TypeError, match="array of numbers, found ndarray"):
        check_coordinates(adata, "complex")
    with pytest.raises(ValueError, match=r"found \(12, 5\)"):
        check_coordinates(adata, "X_pca")
    with pytest.raises(MissingKeyError, match=r"'X_spatial' is not in adata.obsm .*Did you mean 'spatial'"):
        check_coordinates(adata, "X_spatial")


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ("x", "y"), ("X", "Y"), ("x_centroid", "y_centroid"), ("CenterX_global_px", "CenterY_global_px"),
        ("center_x", "center_y"), ("array_col", "array_row"), ("pxl_col_in_fullres", "pxl_row_in_fullres"),
        ("imagecol", "imagerow"), ("array_column", "array_row"), ("Centroid X µm", "Centroid Y µm"),
    ],
)  # fmt: skip
def test_coordinates_in_columns_are_brought_to_obsm_by_the_line_in_the_message(x, y):
    adata = make_adata()
    places = adata.obsm.pop("spatial")
    adata.obs["total_counts"], adata.obs["cell_id"] = 1.0, np.arange(12)
    adata.obs[y], adata.obs[x] = places[:, 1], places[:, 0]
    with pytest.raises(MissingKeyError, match=r"adata\.obs has columns of coordinates: ") as caught:
        check_coordinates(adata, "spatial")
    exec(str(caught.value).split("coordinates: ")[1], {"adata": adata})
    np.testing.assert_array_equal(check_coordinates(adata, "spatial"), places)


def test_coordinates_of_the_slide_come_before_those_of_an_array_or_a_field():
    adata = make_adata()
    del adata.obsm["spatial"]
    for name in ("array_row", "array_col", "CenterX_local_px", "CenterY_local_px", "umap_x", "umap_y"):
        adata.obs[name] = 1.0
    with pytest.raises(MissingKeyError, match=r"\['array_col', 'array_row'\]"):
        check_coordinates(adata, "spatial")
    adata.obs["CenterX_global_px"] = adata.obs["CenterY_global_px"] = 1.0
    with pytest.raises(MissingKeyError, match=r"\['CenterX_global_px', 'CenterY_global_px'\]"):
        check_coordinates(adata, "spatial")
    adata.obs = adata.obs[["umap_x", "umap_y"]]
    with pytest.raises(MissingKeyError, match=r"Name the cell coordinates with spatial_key="):
        check_coordinates(adata, "spatial")


def test_scaled_expression_beside_raw():
    adata = make_adata()
    check_scaled(adata, None, "auto")
    adata.raw = adata.copy()
    check_scaled(adata, None, "auto")
    counts = adata.X.copy()
    adata.X = adata.X.toarray() - 1.0
    for input_scale in ("auto", "log"):
        with pytest.raises(ValueError, match=r"adata\.raw holds 7 genes .*pass adata\.raw\.to_adata\(\)\.$"):
            check_scaled(adata, None, input_scale)
    check_scaled(adata, None, "real")
    adata.layers["counts"] = counts
    check_scaled(adata, "counts", "auto")
    with pytest.raises(ValueError, match=r"or pass layer= \(layers found: 'counts'\)"):
        check_scaled(adata, None, "auto")
    check_scaled(adata.raw.to_adata(), None, "auto")


def test_obs_key():
    adata = make_adata(batch=["a"] * 6 + ["b"] * 6, hole=["a"] * 5 + [np.nan] * 2 + ["b"] * 5)
    assert list(check_obs_key(adata, "batch", "batch")) == list(adata.obs["batch"])
    assert list(check_obs_key(adata[:6], "batch", "batch").categories) == ["a"]
    with pytest.raises(MissingKeyError, match=r"'bach' is not in adata.obs .*Did you mean 'batch'.*batch_key="):
        check_obs_key(adata, "bach", "batch")
    with pytest.raises(ValueError, match=r"\(library_key\) is missing \(NaN\) for 2 of 12 cells, first 'cell5'"):
        check_obs_key(adata, "hole", "library")


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["object", "category"])
def test_good_labels_may_have_gaps(kind):
    adata = make_adata(label=["a"] * 4 + ["b"] * 4 + ["Unknown"] + [np.nan] * 3)
    adata.obs["label"] = adata.obs["label"].astype(kind)
    before = adata.obs.copy()
    check_labels(adata, "label", "Unknown")
    pd.testing.assert_frame_equal(adata.obs, before)


def test_number_labels():
    adata = make_adata()
    adata.obs["cluster"] = np.repeat([0, 1, 2], 4)
    adata.obs["cluster_with_gaps"] = np.repeat([0, 1, np.nan], 4)
    adata.obs["depth"] = np.linspace(0, 1, 12)
    check_labels(adata, "cluster", "Unknown")
    check_labels(adata, "cluster_with_gaps", "Unknown")
    with pytest.raises(TypeError, match=r"adata.obs\['depth'\] holds real numbers"):
        check_labels(adata, "depth", "Unknown")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([np.nan] * 12, "no labeled cell: all 12 are NaN or 'Unknown'"),
        (["Unknown"] * 12, "no labeled cell"),
        (["Unknown"] * 6 + ["T"] * 6, r"only one class, 'T' \(6 cells\)"),
    ],
)
def test_labels_that_cannot_be_learned(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(make_adata(label=labels), "label", "Unknown")


def test_missing_labels_key():
    with pytest.raises(MissingKeyError, match=r"'label' is not in adata.obs \(found there: 'labels'\)"):
        check_labels(make_adata(labels=["a"] * 12), "label", "Unknown")


def test_class_with_one_cell_warns_and_names_it():
    with pytest.warns(UserWarning, match=r"single cell.*: 'rare'\. Merge them, or set them to 'Unknown'"):
        warn_labels(make_adata(label=["a"] * 6 + ["b"] * 5 + ["rare"]), "label", "Unknown")


NO_LABEL = [
    *("nan", "", "NA", "N/A", "None", "null", "unknown", "Unlabelled", "Unlabeled", "Unassigned", "undefined", "-1"),
    *("UNKNOWN", " Unknown ", "NaN", "<NA>", -1, "unlabelled\t", "#N/A", "n.a.", "-", "?", "-1.0", -999),
    *("not_annotated", "Not assigned", "no-label", "Unknown cells", "unassigned cell type", "Ambiguous", "unk"),
]


@pytest.mark.parametrize("word", NO_LABEL)
@pytest.mark.parametrize("kind", ["object", "category"])
def test_a_word_for_no_label_warns_with_the_argument_that_mends_it(word, kind):
    adata = make_adata(label=["a"] * 4 + ["b"] * 3 + [word] * 3 + [np.nan] * 2)
    adata.obs["label"] = adata.obs["label"].astype(kind)
    with pytest.warns(UserWarning, match=r"each is learned as a class: .* for 3 of 12 cells") as record:
        warn_labels(adata, "label")
    assert len(record) == 1
    advice = re.search(r"unlabeled_category=('.*')", str(record[0].message))
    warn_labels(adata, "label", ast.literal_eval(advice[1]))  # silent


@pytest.mark.parametrize(
    "labels",
    [
        ["a"] * 4 + ["b"] * 3 + ["nan"] * 3 + ["NA"] * 2,
        ["a"] * 4 + ["b"] * 3 + ["Unknown"] * 3 + ["NA"] * 2,
        [0] * 4 + [1] * 3 + [-1] * 3 + ["Unknown"] * 2,
    ],
)
@pytest.mark.parametrize("kind", ["object", "category"])
def test_several_words_for_no_label_are_to_be_made_missing(labels, kind):
    adata = make_adata(label=labels)
    adata.obs["label"] = adata.obs["label"].astype(kind)
    with pytest.warns(UserWarning, match=r"make their labels missing: adata\.obs\['label'\] = ") as record:
        warn_labels(adata, "label")
    exec(str(record[0].message).split("missing: ")[1].rstrip("."), {"adata": adata})
    warn_labels(adata, "label")  # silent
    assert adata.obs["label"].isna().sum() == sum(label in {"nan", "NA", -1} for label in labels)
    check_labels(adata, "label")


def test_classes_that_are_no_words_for_no_label_are_silent():
    warn_labels(make_adata(label=["Nanog+"] * 4 + ["Unknown"] * 2 + ["NK"] * 3 + ["None-like"] * 3), "label")
    warn_labels(make_adata(label=["+"] * 4 + ["Unknown_1"] * 2 + ["NA neuron"] * 3 + ["Cell type"] * 3), "label")
    warn_labels(make_adata(label=[0] * 6 + [1] * 6), "label")


# Real data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scale", "empty"),
    [
        ("dlpfc_visium_151673", "counts", 39),
        ("merfish_hypothalamus_animal1", "normalized", 1),
        ("starmap_visual_cortex_1020", "counts", 0),
    ],
)
@pytest.mark.filterwarnings("ignore:.*genes are zero for every cell:UserWarning")
def test_real_data(shared_data, name, scale, empty):
    adata = ad.read_h5ad(shared_data / f"{name}.h5ad")
    check_anndata(adata)
    check_labels(adata, "cell_type", "Unlabelled")
    if "merfish" in name:
        with pytest.warns(UserWarning, match="'Ambiguous' for 1,543 of 11,162 cells"):
            warn_labels(adata, "cell_type")
        adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"Ambiguous": "Unlabelled"})
    warn_labels(adata, "cell_type", "Unlabelled")
    check_coordinates(adata, "spatial")
    assert check_values(get_matrix(adata, None), where="adata.X") == scale
    assert (np.asarray(adata.X.sum(axis=0)) == 0).sum() == empty
    logged = adata.X.copy()
    logged.data = np.log1p(logged.data / 7)
    if scale == "counts":
        assert check_values(logged, where="adata.X") == "log"
    else:  # neither whole multiples of something nor of equal totals
        with pytest.warns(
            UserWarning, match="do not tell whether logarithms were taken: they are taken for logarithms"
        ):
            assert check_values(logged, where="adata.X") == "log"
