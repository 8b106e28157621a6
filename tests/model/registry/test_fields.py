"""What `setup_anndata` registers, refuses, and leaves alone."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from graph_toys import data_of
from scipy import sparse

from fimp_sc.model import FIMP
from fimp_sc.model.registry._fields import ExpressionField, match_columns


def snapshot(adata: ad.AnnData) -> dict:
    return {
        "X": (adata.X.data.copy(), adata.X.indices.copy(), adata.X.indptr.copy()),
        "obs": adata.obs.copy(),
        "var": adata.var.copy(),
        "obsm": {k: v.copy() for k, v in adata.obsm.items()},
        "obsp": {k: v.toarray() for k, v in adata.obsp.items()},
        "layers": sorted(adata.layers),
        "uns": sorted(adata.uns),
    }


@pytest.mark.parametrize("setup", [{}, {"labels_key": "label", "library_key": "section", "batch_key": "region"}])
def test_setup_writes_nothing_but_identifiers(tissue, make_model, setup: dict) -> None:
    before = snapshot(tissue)
    make_model(tissue, setup)
    after = snapshot(tissue)
    for a, b in zip(before["X"], after["X"], strict=True):
        np.testing.assert_array_equal(a, b)
    pd.testing.assert_frame_equal(before["obs"], after["obs"])
    pd.testing.assert_frame_equal(before["var"], after["var"])
    for kind in ("obsm", "obsp"):
        assert before[kind].keys() == after[kind].keys()
        for key in before[kind]:
            np.testing.assert_array_equal(before[kind][key], after[kind][key])
    assert before["layers"] == after["layers"]
    assert all(key.startswith("_scvi") for key in set(after["uns"]) - set(before["uns"]))


def test_classes_and_genes(tissue, make_model) -> None:
    model = make_model(tissue, {"labels_key": "label"})
    assert model.classes == sorted(set(tissue.obs["label"].dropna()) - {"Unknown"})
    np.testing.assert_array_equal(model.genes, tissue.var_names)
    assert make_model(tissue).classes == []


def test_labels_may_be_numbers_or_booleans(tissue, make_model) -> None:
    tissue.obs["number"] = np.arange(tissue.n_obs) % 3
    assert make_model(tissue, {"labels_key": "number"}).classes == ["0", "1", "2"]
    tissue.obs["flag"] = np.arange(tissue.n_obs) % 2 == 0
    model = make_model(tissue, {"labels_key": "flag"})
    assert model.classes == ["False", "True"]
    label = data_of(model, tissue).label
    np.testing.assert_array_equal(label, tissue.obs["flag"].astype(int))


def test_label_codes_follow_the_classes_and_unlabeled_cells_have_none(tissue, make_model) -> None:
    model = make_model(tissue, {"labels_key": "label"})
    codes = data_of(model, tissue).label
    text = tissue.obs["label"].astype(object)
    for code, label in zip(codes, text, strict=True):
        assert (code == -1) if (pd.isna(label) or label == "Unknown") else (model.classes[code] == label)
    assert (codes == -1).sum() == (text.isna() | (text == "Unknown")).sum() > 3


def test_batches_are_the_libraries_unless_given(tissue, make_model) -> None:
    setup = {"library_key": "section", "center": "batch"}
    both = data_of(make_model(tissue, setup))
    np.testing.assert_array_equal(both.expression.batch, both.library)
    assert set(both.library) == {0, 1}
    other = data_of(make_model(tissue, {**setup, "batch_key": "region"}))
    assert set(other.expression.batch) == {0, 1, 2, 3}
    training = data_of(make_model(tissue, {"library_key": "section", "batch_key": "region"}))
    assert set(training.expression.batch) == {0}, "the training mean is that of all batches"
    assert set(training.library) == {0, 1}
    none = data_of(make_model(tissue, {"center": "batch"}))
    assert set(none.library) == set(none.expression.batch) == {0}


@pytest.mark.parametrize(
    ("setup", "error", "message"),
    [
        ({"layer": "counts"}, KeyError, "'counts' is not in adata.layers"),
        ({"labels_key": "cell_typ"}, KeyError, "Did you mean 'cell_type'"),
        ({"library_key": "sample"}, KeyError, "library_key="),
        ({"batch_key": "sample"}, KeyError, "batch_key="),
        ({"connectivities_key": "knn"}, KeyError, "pp.spatial_graph"),
        ({"library_key": "region"}, ValueError, "edges that join samples"),
        ({"input_scale": "raw"}, ValueError, "input_scale must be one of .* found 'raw'"),
    ],
)
def test_wrong_keys_are_named(tissue, setup: dict, error, message) -> None:
    with pytest.raises(error, match=message):
        FIMP.setup_anndata(tissue, **setup)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "NaN"), (np.inf, "infinite"), (-1.0, "below zero"), (0.5, "not whole numbers")]
)
@pytest.mark.parametrize("where", ["X", "layer"])
def test_wrong_values_are_found_where_they_are(tissue, value: float, message: str, where: str) -> None:
    matrix = tissue.X.copy()
    matrix.data[7] = value
    layer = None if where == "X" else "raw"
    if where == "X":
        tissue.X = matrix
    else:
        tissue.layers["raw"] = matrix
    with pytest.raises(ValueError, match=message) as caught:
        FIMP.setup_anndata(tissue, layer=layer, input_scale="counts")
    assert ("adata.X" if where == "X" else "adata.layers['raw']") in str(caught.value)


def test_duplicate_genes_are_an_error(tissue) -> None:
    names = tissue.var_names.to_numpy().copy()
    names[3] = names[0]
    tissue.var_names = names
    with pytest.raises(ValueError, match="duplicate gene names"):
        FIMP.setup_anndata(tissue)


def test_columns_are_matched_by_name() -> None:
    adata = ad.AnnData(sparse.csr_matrix((2, 4), dtype=np.float32), var=pd.DataFrame(index=["c", "x", "a", "b"]))
    np.testing.assert_array_equal(match_columns(np.array(["a", "b", "c", "d"], dtype=object), adata), [2, 3, 0, -1])
    with pytest.raises(ValueError, match=r"found names like \['c', 'x', 'a'\].*trained on names like \['C'"):
        match_columns(np.array(["C", "A"], dtype=object), adata)


def test_dropped_and_missing_genes_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    counts = sparse.csr_matrix(np.ones((2, 4), dtype=np.float32))
    adata = ad.AnnData(counts, var=pd.DataFrame(index=["c", "x", "a", "b"]))
    genes = np.array(["a", "b", "d", "e", "f"], dtype=object)
    with caplog.at_level(logging.INFO, logger="fimp_sc"):
        ExpressionField(None, "auto").transfer_field({ExpressionField.NAMES: genes}, adata)
    assert "2 of 4 genes are known to the model (2 are dropped); 3 genes of the model are not measured" in caplog.text


def test_the_scale_is_registered_and_values_are_looked_at_once(tissue, make_model, monkeypatch) -> None:
    from fimp_sc.model.registry import _fields

    calls = []
    check = _fields.inspect_values
    monkeypatch.setattr(_fields, "inspect_values", lambda *a, **k: calls.append(k["input_scale"]) or check(*a, **k))
    model = make_model(tissue, {"input_scale": "auto"})
    assert model.registry["field_registries"]["X"]["state_registry"]["input_scale"] == "counts"
    assert calls == ["auto"]
    other = tissue.copy()
    other.X = other.X * 0.37
    manager = model.adata_manager.transfer_fields(other)
    assert manager.registry["field_registries"]["X"]["state_registry"]["input_scale"] == "normalized"
    assert calls == ["auto", "auto"]
    other.X = other.X.log1p()
    with pytest.warns(UserWarning, match="taken for log-normalized values, and the model was trained on counts"):
        manager = model.adata_manager.transfer_fields(other)
    assert manager.registry["field_registries"]["X"]["state_registry"]["input_scale"] == "log"
    assert manager.registry["field_registries"]["X"]["state_registry"]["trained_scale"] == "counts"


def test_the_resolved_scale_is_logged(tissue, make_model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fimp_sc"):
        make_model(tissue)
    assert "The values of adata.X are taken for counts (input_scale='counts')." in caplog.text
