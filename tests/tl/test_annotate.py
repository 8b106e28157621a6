"""`tl.annotate`: labels for every cell, learned here or brought along by a model."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import fimp_sc

WRITTEN = {
    "obs": {"fimp_label", "fimp_label_confidence"},
    "obsm": {"fimp_label_probabilities"},
    "obsp": {"spatial_connectivities", "spatial_distances"},
    "uns": {"fimp_label", "spatial_neighbors"},
}
CLASSES = ["B", "C", "T cell / naïve"]


def test_writes_labels_confidence_and_probabilities_and_nothing_else(tissue, quick, unchanged) -> None:
    with unchanged(tissue, **WRITTEN):
        assert fimp_sc.tl.annotate(tissue, "label", library_key="section", **quick) is None
    labels, confidence = tissue.obs["fimp_label"], tissue.obs["fimp_label_confidence"]
    probabilities = tissue.obsm["fimp_label_probabilities"]
    assert isinstance(labels.dtype, pd.CategoricalDtype)
    assert list(labels.cat.categories) == CLASSES
    assert not labels.isna().any(), "cells without label are predicted like all others"
    assert confidence.dtype == probabilities.dtype == np.float32
    assert probabilities.shape == (100, 3)
    assert isinstance(probabilities, np.ndarray)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(probabilities.max(1), confidence)
    np.testing.assert_array_equal(np.array(CLASSES)[probabilities.argmax(1)], labels.astype(str))
    record = tissue.uns["fimp_label"]
    assert list(record["classes"]) == CLASSES
    model = fimp_sc.tl.get_model(tissue)
    assert (record["neighbor_weight"], record["smoothing_weight"]) == (model.neighbor_weight, model.smoothing_weight)
    assert record["linear_weight"] == model.linear_weight
    assert record["params"]["labels_key"] == "label"


def test_survives_a_file_with_slashes_and_accents_in_class_names(tissue, quick, tmp_path) -> None:
    fimp_sc.tl.annotate(tissue, "label", **quick)
    tissue.write_h5ad(tmp_path / "tissue.h5ad")
    again = ad.read_h5ad(tmp_path / "tissue.h5ad")
    pd.testing.assert_series_equal(again.obs["fimp_label"], tissue.obs["fimp_label"])
    pd.testing.assert_series_equal(again.obs["fimp_label_confidence"], tissue.obs["fimp_label_confidence"])
    np.testing.assert_array_equal(again.obsm["fimp_label_probabilities"], tissue.obsm["fimp_label_probabilities"])
    assert list(again.uns["fimp_label"]["classes"]) == CLASSES


def test_learns_the_labels_it_is_given(quick) -> None:
    """Two kinds of cells with genes of their own: a third of them labeled, the others are found."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, 140)
    rate = np.where(np.arange(20)[None] // 10 == kind[:, None], 6.0, 1.0)
    adata = ad.AnnData(rng.poisson(rate).astype(np.float32), obsm={"spatial": rng.random((140, 2))})
    adata.var_names = [f"g{i}" for i in range(20)]
    adata.obs_names = [f"c{i}" for i in range(140)]
    truth = np.array(["one", "two"])[kind]
    hidden = rng.random(140) < 0.66
    adata.obs["kind"] = pd.Categorical(np.where(hidden, "Unknown", truth))
    fimp_sc.tl.annotate(adata, "kind", **{**quick, "max_epochs": 30})
    right = (adata.obs["fimp_kind"].astype(str) == truth)[hidden].mean()
    assert right > 0.9, f"{right:.2f} of the hidden labels were found"
    assert list(adata.obs["fimp_kind"].cat.categories) == ["one", "two"]


@pytest.mark.parametrize("unlabeled", ["Unknown", "not sure"])
def test_unlabeled_category_is_no_class(tissue, quick, unlabeled: str) -> None:
    tissue.obs["label"] = tissue.obs["label"].fillna(unlabeled).astype("category")
    fimp_sc.tl.annotate(tissue, "label", unlabeled_category=unlabeled, **quick)
    assert list(tissue.obs["fimp_label"].cat.categories) == CLASSES


def test_nan_and_unlabeled_category_mean_the_same(tissue, quick) -> None:
    named = tissue.copy()
    named.obs["label"] = named.obs["label"].fillna("Unknown").astype("category")
    for adata in (tissue, named):
        fimp_sc.tl.annotate(adata, "label", **quick)
    np.testing.assert_array_equal(tissue.obsm["fimp_label_probabilities"], named.obsm["fimp_label_probabilities"])


def test_own_key(tissue, quick, unchanged) -> None:
    written = {
        "obs": {"mine", "mine_confidence"}, "obsm": {"mine_probabilities"}, "obsp": WRITTEN["obsp"],
        "uns": {"mine", "spatial_neighbors"},
    }  # fmt: skip
    with unchanged(tissue, **written):
        fimp_sc.tl.annotate(tissue, "label", key_added="mine", **quick)
    classes = tissue.uns["mine"]["classes"][tissue.obsm["mine_probabilities"].argmax(1)]
    np.testing.assert_array_equal(tissue.obs["mine"].astype(str), classes.astype(str))


def test_copy_and_view(tissue, quick, unchanged) -> None:
    with unchanged(tissue):
        result = fimp_sc.tl.annotate(tissue, "label", copy=True, **quick)
        view = tissue[5:95]
        fimp_sc.tl.annotate(view, "label", **quick)
    assert not result.obs["fimp_label"].isna().any()
    assert list(view.obs_names) == list(tissue.obs_names[5:95])
    assert not view.obs["fimp_label"].isna().any()


def test_trained_model_on_another_gene_list_without_labels(reference, section, unchanged) -> None:
    assert "label" not in section.obs
    with unchanged(section, **WRITTEN):
        fimp_sc.tl.annotate(section, "label", model=reference, accelerator="cpu", verbose=False)
    assert list(section.obs["fimp_label"].cat.categories) == CLASSES
    np.testing.assert_allclose(section.obsm["fimp_label_probabilities"].sum(1), 1, rtol=1e-5)


def test_labels_of_the_section_do_not_influence_a_trained_model(reference, section) -> None:
    plain = section.copy()
    section.obs["label"] = ["B", "something new"] * (section.n_obs // 2) + ["B"] * (section.n_obs % 2)
    for adata in (plain, section):
        fimp_sc.tl.annotate(adata, "label", model=reference, accelerator="cpu", verbose=False)
    np.testing.assert_array_equal(plain.obsm["fimp_label_probabilities"], section.obsm["fimp_label_probabilities"])


def test_saved_model_gives_the_same(reference, section, tmp_path) -> None:
    reference.save(str(tmp_path / "model"))
    other = section.copy()
    fimp_sc.tl.annotate(section, "label", model=reference, accelerator="cpu", verbose=False)
    fimp_sc.tl.annotate(other, "label", model=tmp_path / "model", accelerator="cpu", verbose=False)
    np.testing.assert_array_equal(section.obsm["fimp_label_probabilities"], other.obsm["fimp_label_probabilities"])


def test_a_column_that_nobody_knows_is_told_of(reference, section, unchanged) -> None:
    """Neither the model nor the object has it: a misspelled name, whose results would lie unseen under that name."""
    section.obs["labels"] = "B"
    expected = section.copy()
    fimp_sc.tl.annotate(expected, "label", model=reference, accelerator="cpu", verbose=False)
    with pytest.warns(
        UserWarning, match=r"'labl' is no column of adata\.obs, .* with 'label'\. Did you mean 'label'\?.*'mine'"
    ):
        fimp_sc.tl.annotate(section, "labl", key_added="mine", model=reference, accelerator="cpu", verbose=False)
    pd.testing.assert_series_equal(section.obs["mine"], expected.obs["fimp_label"], check_names=False)
    fimp_sc.tl.annotate(section, "labels", model=reference, accelerator="cpu", verbose=False)


def test_model_without_labels_is_an_error(tissue, section, quick, unchanged) -> None:
    fimp_sc.tl.embed(tissue, **quick)
    model = fimp_sc.tl.get_model(tissue)
    with unchanged(section), pytest.raises(ValueError, match="trained without labels"):
        fimp_sc.tl.annotate(section, "label", model=model, accelerator="cpu", verbose=False)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (None, KeyError, "'label' is not in adata.obs"),
        (np.nan, ValueError, "no labeled cell"),
        ("Unknown", ValueError, "no labeled cell"),
        ("B", ValueError, "only one class, 'B'"),
        (0.5, TypeError, "holds real numbers"),
    ],
)
def test_unusable_labels_leave_the_object_as_it_was(tissue, quick, unchanged, labels, error, message) -> None:
    if labels is None:
        del tissue.obs["label"]
    else:
        tissue.obs["label"] = labels
    with unchanged(tissue), pytest.raises(error, match=message):
        fimp_sc.tl.annotate(tissue, "label", **quick)


def test_niches_are_not_replaced(tissue, quick, unchanged, trainings) -> None:
    tissue.obsm["X_fimp"] = np.random.default_rng(0).normal(size=(tissue.n_obs, 4))
    tissue.obs["niche"] = tissue.obs["region"]
    fimp_sc.tl.niches(tissue, 3, smooth=0, n_seeds=2)
    for copy in (False, True):
        with unchanged(tissue), pytest.raises(ValueError, match=r"key_added='fimp_niche'.*fimp_sc\.tl\.niches"):
            fimp_sc.tl.annotate(tissue, "niche", copy=copy, **quick)
    assert not trainings
    for _ in range(2):  # its own results are replaced
        fimp_sc.tl.annotate(tissue, "niche", key_added="predicted", **quick)
    with pytest.raises(ValueError, match=r"'predicted'.*fimp_sc\.tl\.annotate"):
        fimp_sc.tl.niches(tissue, 3, smooth=0, n_seeds=2, key_added="predicted")


def test_class_with_one_cell_is_announced(tissue, quick) -> None:
    labels = tissue.obs["label"].astype(object)
    labels.iloc[0] = "rare"
    tissue.obs["label"] = labels
    with pytest.warns(UserWarning, match="labels with a single cell.*'rare'"):
        fimp_sc.tl.annotate(tissue, "label", **quick)
    assert "rare" in tissue.obs["fimp_label"].cat.categories


def test_object_is_unchanged_when_training_diverges(tissue, quick, unchanged, monkeypatch) -> None:
    def nan(self, soft):
        return pd.DataFrame(np.nan, index=range(100), columns=CLASSES)

    monkeypatch.setattr(fimp_sc.model.FIMP, "predict", nan)
    with unchanged(tissue), pytest.raises(FloatingPointError):
        fimp_sc.tl.annotate(tissue, "label", **quick)


@pytest.mark.parametrize(
    ("values", "categories"),
    [
        (lambda code: code, [0, 1, 2]),
        (lambda code: pd.Series(code).where(code != 2).to_numpy(), [0.0, 1.0]),
        (lambda code: pd.Categorical(code), [0, 1, 2]),
        (lambda code: pd.Series(code).astype(object).where(code != 2, "Unknown").to_numpy(), [0, 1]),
        (lambda code: code == 1, [False, True]),
        (lambda code: np.array(["0", "1", "2"])[code], ["0", "1", "2"]),
    ],
)
def test_predictions_are_of_the_type_of_labels(tissue, quick, tmp_path, values, categories) -> None:
    code = np.arange(tissue.n_obs) % 3
    tissue.obs["code"] = values(code)
    fimp_sc.tl.annotate(tissue, "code", **quick)
    found = tissue.obs["fimp_code"].cat.categories
    assert list(found) == list(tissue.uns["fimp_code"]["classes"]) == categories
    assert {type(value) for value in found.tolist()} == {type(value) for value in categories}
    # Comparison, as a user counts right predictions, agrees with the one of texts.
    known = tissue.obs["code"].notna() & (tissue.obs["code"].astype(object) != "Unknown")
    truth, guess = tissue.obs["code"][known], tissue.obs["fimp_code"][known]
    right = (guess.astype(object) == truth.astype(object)).mean()
    column = tissue.obsm["fimp_code_probabilities"][known.to_numpy()].argmax(1)
    assert right == np.mean(np.asarray(categories, dtype=object)[column] == truth.to_numpy(dtype=object)) > 0
    tissue.obs["code"] = tissue.obs["code"].astype(str)  # whose first kind may be none that a file holds
    tissue.write_h5ad(tmp_path / "tissue.h5ad")
    again = ad.read_h5ad(tmp_path / "tissue.h5ad").obs["fimp_code"]
    pd.testing.assert_series_equal(again, tissue.obs["fimp_code"])


def test_a_model_of_other_classes_than_the_labels_of_a_section_keeps_its_own(reference, section) -> None:
    section.obs["label"] = np.arange(section.n_obs) % 2
    fimp_sc.tl.annotate(section, "label", model=reference, accelerator="cpu", verbose=False)
    assert list(section.obs["fimp_label"].cat.categories) == CLASSES


def test_colors_go_with_the_classes(tissue, quick) -> None:
    """Scanpy takes the colors in ``uns`` by position: those of other classes would be wrong, or too few."""
    colors = ["#ff0000", "#00ff00", "#0000ff"]
    tissue.uns["fimp_label_colors"] = list(colors)
    fimp_sc.tl.annotate(tissue, "label", **quick)
    assert list(tissue.uns["fimp_label_colors"]) == colors, "as many as there are classes, chosen before"
    fimp_sc.tl.annotate(tissue, "label", **quick)
    assert list(tissue.uns["fimp_label_colors"]) == colors
    tissue.obs["label"] = tissue.obs["label"].replace("B", "another")
    fimp_sc.tl.annotate(tissue, "label", **quick)
    assert "fimp_label_colors" not in tissue.uns
    tissue.uns["fimp_other_colors"] = colors[:2]
    fimp_sc.tl.annotate(tissue, "label", key_added="fimp_other", **quick)
    assert "fimp_other_colors" not in tissue.uns
