from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from fimp_sc import pp
from fimp_sc.metrics import niche_scores


def test_like_scikit_learn_on_the_cells_that_have_both() -> None:
    rng = np.random.default_rng(0)
    truth = rng.choice(list("abc"), 120).astype(object)
    found = np.where(rng.random(120) < 0.6, truth, rng.choice(list("abc"), 120)).astype(object)
    expected = truth[20:110].astype(str), found[20:110].astype(str)
    truth[:10], truth[10:20], found[110:] = "Unknown", None, np.nan
    scores = niche_scores(truth, found)
    assert scores == {
        "ari": pytest.approx(adjusted_rand_score(*expected)),
        "nmi": pytest.approx(normalized_mutual_info_score(*expected)),
        "n_obs": 90,
    }


def test_names_of_niches_do_not_matter() -> None:
    assert niche_scores(list("aabbc"), [3, 3, 0, 0, 9])["ari"] == 1


def test_continuity_by_hand() -> None:
    # A path 0-1-2-3 and a cell 4 alone; cell 3 has no niche; the weight of an edge and self-loops do not matter.
    graph = sparse.lil_matrix((5, 5))
    for i, j in ((0, 1), (1, 2), (2, 3)):
        graph[i, j] = graph[j, i] = 0.1 + i
    graph[0, 0] = 1
    scores = niche_scores(["r"] * 5, ["a", "a", "b", None, "b"], connectivities=graph.tocsr())
    assert scores["continuity"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert scores["n_obs"] == 4


def test_continuity_in_an_object_needs_no_reference(toy) -> None:
    pp.spatial_graph(toy, library_key="section")
    smooth = niche_scores(toy, "region", "region", connectivities="spatial_connectivities")["continuity"]
    near = toy.obsp["spatial_connectivities"].toarray() > 0
    codes = toy.obs["region"].cat.codes.to_numpy()
    same = codes[:, None] == codes
    assert smooth == pytest.approx(((near & same).sum(1) / near.sum(1)).mean())
    toy.obs["partly"] = toy.obs["region"].where(np.arange(toy.n_obs) < 5)
    again = niche_scores(toy, "partly", "region", connectivities="spatial_connectivities")
    assert again["continuity"] == pytest.approx(smooth)
    assert again["n_obs"] == 5


def test_unusable_input(toy) -> None:
    with pytest.raises(KeyError, match=r"adata\.obsp.*fimp_sc\.pp\.spatial_graph"):
        niche_scores(toy, "region", "region", connectivities="spatial_connectivities")
    with pytest.raises(KeyError, match=r"'fimp_niche' is not in adata\.obs"):
        niche_scores(toy, "region", "fimp_niche")
    with pytest.raises(ValueError, match="nothing to compare"):
        niche_scores(["Unknown", "a"], ["a", None])
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        niche_scores(list("abc"), list("abc"), connectivities=sparse.identity(2, format="csr"))
