from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score

from fimp_sc.metrics import label_scores


def test_by_hand() -> None:
    scores = label_scores(["a", "a", "a", "b", "Unknown", None], ["a", "a", "b", "b", "b", "a"])
    assert scores["accuracy"] == pytest.approx(3 / 4)
    # a: precision 1, recall 2/3; b: precision 1/2, recall 1.
    assert scores["f1"] == pytest.approx({"a": 0.8, "b": 2 / 3})
    assert scores["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert scores["n_obs"] == 4


def test_classes_that_are_only_predicted_do_not_enter_the_mean() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.choice(list("abc"), 200), rng.choice(list("abcd"), 200)
    scores = label_scores(truth, predicted)
    assert scores["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert scores["macro_f1"] == pytest.approx(f1_score(truth, predicted, labels=list("abc"), average="macro"))
    assert list(scores["f1"]) == list("abc")


@pytest.mark.parametrize("absent", [None, np.nan, "Unknown"])
def test_a_missing_prediction_is_wrong(absent) -> None:
    assert label_scores(["a", "b"], ["a", absent])["accuracy"] == 0.5
    assert label_scores(["nan", "b"], ["a", absent])["accuracy"] == 0.0


def test_columns_score_like_arrays(toy) -> None:
    rng = np.random.default_rng(1)
    types = toy.obs["cell_type"]
    toy.obs["guess"] = types.cat.set_categories([*types.cat.categories, "Unknown"]).to_numpy()[
        rng.permutation(toy.n_obs)
    ]
    toy.obs.loc[toy.obs_names[:20], "cell_type"] = np.nan
    scores = label_scores(toy, "cell_type", "guess")
    assert scores == label_scores(toy.obs["cell_type"], toy.obs["guess"])
    assert scores["n_obs"] == toy.n_obs - 20


def test_another_category_is_left_out() -> None:
    assert label_scores(["a", "x"], ["a", "b"], unlabeled_category="x")["n_obs"] == 1
    assert label_scores(["a", "Unknown"], ["a", "b"], unlabeled_category=None)["accuracy"] == 0.5


def test_labels_may_be_numbers_and_categories() -> None:
    assert label_scores(pd.Categorical([1, 2, 2]), np.array(["1", "2", "1"]))["accuracy"] == pytest.approx(2 / 3)


def test_unusable_input(toy) -> None:
    with pytest.raises(KeyError, match="Did you mean 'cell_type'"):
        label_scores(toy, "cell_typ", "region")
    with pytest.raises(ValueError, match="nothing to compare"):
        label_scores(["Unknown"], ["a"])
    with pytest.raises(ValueError, match="3 true labels and 2 others"):
        label_scores(list("abc"), list("ab"))
    with pytest.raises(TypeError, match="two arrays"):
        label_scores("cell_type", "region")
    with pytest.raises(TypeError, match="got AnnData, str"):
        label_scores(toy, "cell_type")
