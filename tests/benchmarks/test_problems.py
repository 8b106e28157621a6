"""Problems hold nothing that must not be seen, and their scores are those of the truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest


@pytest.fixture
def common(load_script):
    return load_script("_common")


@pytest.fixture
def problems(common, load_script):
    return load_script("_problems")


@pytest.fixture
def toy(common):
    return common.load("toy", None)


def hidden_labels(problem, toy) -> np.ndarray:
    """Cells whose label was taken away."""
    labels = problem.query.obs["label"].to_numpy()
    assert ((labels == "Unknown") | (labels == toy.obs["label"].to_numpy())).all()
    return labels == "Unknown"


def test_few_counts_are_a_share_of_each(common, toy, monkeypatch):
    monkeypatch.setitem(common.DATA, "toy", replace(common.DATA["toy"], kept=0.3))
    thinned = common.load("toy", None)
    assert thinned.X.sum() / toy.X.sum() == pytest.approx(0.3, abs=0.01)
    assert (thinned.X.toarray() <= toy.X.toarray()).all()
    assert (thinned.X.toarray() == np.rint(thinned.X.toarray())).all()
    np.testing.assert_array_equal(thinned.X.toarray(), common.load("toy", None).X.toarray())


@pytest.mark.parametrize("inductive", [False, True])
def test_labels_of_held_out_blocks_are_hidden(problems, toy, inductive):
    problem, score = problems.held_out_blocks("toy", None, 1, inductive=inductive)
    held_out = hidden_labels(problem, toy)
    assert 0.15 < held_out.mean() < 0.3
    assert "cell_type" not in problem.query.obs
    assert (problem.query is problem.reference) != inductive
    if inductive:
        assert not set(problem.reference.obs_names) & set(toy.obs_names[held_out])
    assert len(problem.blocks) == problem.reference.n_obs
    truth = toy.obs["label"].to_numpy().astype(str)
    assert score(truth) == {"accuracy": 1.0, "macro_f1": 1.0}
    wrong = np.where(held_out, "no type", truth)
    assert score(wrong)["accuracy"] == 0
    known_only = np.where(held_out, truth, "no type")  # what is not scored cannot matter
    assert score(known_only)["accuracy"] == 1


def test_scattered_cells_are_held_out_among_their_neighbors(problems, common, toy):
    near = common.neighbors(np.asarray(toy.obsm["spatial"], float), 6, toy.obs["section"].to_numpy())
    alike = {}
    for scattered in (False, True):
        problem, _ = problems.held_out_blocks("toy", None, 1, scattered=scattered)
        held_out = hidden_labels(problem, toy)
        assert held_out.mean() == pytest.approx(0.2, abs=0.05)
        row, col = near.nonzero()
        alike[scattered] = (held_out[col] == held_out[row])[held_out[row]].mean()
    assert alike[False] > 0.6
    assert alike[True] == pytest.approx(0.2, abs=0.05)


def test_hidden_entries_are_gone_and_scored(problems, common, toy):
    problem, score = problems.hidden_expression("toy", None, 0)
    hidden = problem.hidden.toarray()
    assert not hidden[~problem.test].any()
    assert hidden[problem.test].mean() == pytest.approx(0.15, abs=0.01)
    x = problem.adata.X.toarray()
    assert (x[hidden] == 0).all()
    assert not {"label", "cell_type"} & set(problem.adata.obs)
    genes = problem.adata.var_names
    target = float(np.median(common.totals(toy[~problem.test, genes].X)))
    full = common.log_normalize(toy[:, genes].X, target).toarray()
    counts = np.where(hidden, 0, toy[:, genes].X.toarray())
    np.testing.assert_array_equal(problem.adata.layers["linear"].toarray(), counts)
    share = counts[~problem.test].sum(0) / counts[~problem.test].sum()
    seen = counts / counts.sum(1, keepdims=True) * target * (~hidden @ share)[:, None]
    np.testing.assert_allclose(x, np.log1p(seen), rtol=1e-5)
    np.testing.assert_allclose(x[~problem.test], full[~problem.test], rtol=1e-5)
    assert score(full[problem.test])["r2_gene"] == pytest.approx(1)
    noise = full[problem.test] + 5 * ~hidden[problem.test]  # visible entries are not scored
    assert score(noise)["r2_gene"] == pytest.approx(1)


def test_nothing_of_the_labels_is_left_without_them(problems):
    problem, whole = problems.without_labels("toy", None)
    assert list(problem.adata.obs) == ["section"]
    assert "cell_type" in whole.obs


def test_the_section_to_annotate_has_no_labels(problems, shared_data):
    problem, score = problems.held_out_section(shared_data)
    assert set(problem.query.obs["label"]) == {"Unknown"}
    assert not {"cell_type"} & (set(problem.query.obs) | set(problem.reference.obs))
    assert score(np.full(problem.query.n_obs, "Unknown"))["accuracy"] == 0


def test_values_of_fetched_sets_are_brought_to_a_linear_scale(common, monkeypatch):
    import squidpy

    import fimp_sc

    counts = fimp_sc.datasets.toy_tissue(200)
    counts.obs["cluster"] = counts.obs.pop("cell_type")

    def logged():
        adata = counts.copy()
        adata.X = common.log_normalize(adata.X, 1e4)
        return adata

    monkeypatch.setattr(squidpy.datasets, "slideseqv2", logged)
    adata = common.load("slideseqv2", None)
    assert common.totals(adata.X) == pytest.approx(1e4, rel=1e-4)
    assert (adata.obs["label"] == counts.obs["cluster"].astype(str)).all()
