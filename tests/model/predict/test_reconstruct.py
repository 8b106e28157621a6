"""Signals and images predicted while they are hidden: by rules that any weights must obey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

import fimp_sc
from fimp_sc.data._modality import quiet_mudata
from fimp_sc.data.sequences._kinds import patches, segments
from fimp_sc.model import FIMP
from fimp_sc.model.predict._reconstruct import predict_all

TRAIN = {"max_epochs": 1, "accelerator": "cpu", "batch_size": 32, "enable_progress_bar": False}


@dataclass
class Case:
    """A model of one modality, with weights of which all have a say."""

    name: str
    model: FIMP
    mdata: Any
    side: int
    n_tokens: int

    def get(self, mdata: Any) -> np.ndarray:
        """Return the values of an object as tokens, ``(n, f, p)`` float64."""
        adata = mdata[self.name]
        if self.name == "fmri":
            return segments(adata.X, self.side).astype(np.float64)
        return patches(adata.obsm["pixels"].reshape(-1, 8, 9, 3), self.side).astype(np.float64)

    def put(self, mdata: Any, where: np.ndarray, rng: np.random.Generator) -> None:
        """Replace the tokens that are True in ``where`` by others."""
        adata = mdata[self.name]
        if self.name == "fmri":
            width = self.n_tokens * self.side
            places = np.repeat(where, self.side, axis=1)
            values = adata.X.copy()
            values[:, :width][places] = rng.normal(-500, 300, places.sum())
            adata.X = values
            return
        pixels = adata.obsm["pixels"].reshape(-1, 8, 9, 3).copy()
        places = np.zeros(pixels.shape[:3], dtype=bool)
        places[:, :6] = where.reshape(-1, 2, 3).repeat(3, 1).repeat(3, 2)
        pixels[places] = rng.integers(0, 255, (places.sum(), 3), dtype=np.uint8)
        adata.obsm["pixels"] = pixels.reshape(len(pixels), -1)

    def tokens(self, values: np.ndarray) -> np.ndarray:
        """Cut a reconstruction into its tokens."""
        return segments(values, self.side) if self.name == "fmri" else patches(values, self.side)


def make(mdata: Any, name: str, side: int) -> FIMP:
    FIMP.setup_mudata(mdata, modality=name)
    with pytest.warns(UserWarning, match="left out"):
        model = FIMP(mdata, n_latent=16, n_heads=2, token_size=side)
    model.train(**TRAIN)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in model.module.network.parameters():
            weights += 0.2 * torch.randn(weights.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def models(_recordings, _pictures, copied_mudata):
    made = {}
    for name, mdata, side, n_tokens in (("fmri", _recordings, 5, 9), ("image", _pictures, 3, 6)):
        mine = copied_mudata(mdata)
        made[name] = Case(name, make(mine, name, side), mine, side, n_tokens)
    return made


@pytest.fixture(params=["fmri", "image"])
def case(models, request) -> Case:
    return models[request.param]


@pytest.fixture
def signals(models) -> Case:
    return models["fmri"]


@pytest.fixture
def mask(case) -> np.ndarray:
    """Hide about a third of all tokens, but never all of a node."""
    hidden = np.random.default_rng(5).random((case.mdata.n_obs, case.n_tokens)) < 0.35
    hidden[:, 0] &= ~hidden.all(1)
    return hidden


def apply(case: Case, mdata: Any, **how) -> np.ndarray:
    return FIMP.load_query_data(mdata, case.model).get_reconstruction(**how)


def near(case: Case) -> dict:
    # Signals are about 1000, pixels up to 255.
    return {"rtol": 1e-4, "atol": 0.02, "equal_nan": True}


def differ(case: Case, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return which tokens of which nodes are not the same, ``(n, f)``."""
    return (np.abs(case.tokens(a) - case.tokens(b)) > 0.02 + 1e-4 * np.abs(case.tokens(a))).any(2)


def test_hidden_values_have_no_influence_at_all(case, mask, copied_mudata) -> None:
    other = copied_mudata(case.mdata)
    case.put(other, mask, np.random.default_rng(0))
    assert (case.get(other) != case.get(case.mdata)).any(2)[mask].all()
    expected = case.model.get_reconstruction(hidden=mask)
    np.testing.assert_array_equal(apply(case, other, hidden=mask), expected)


def test_visible_values_have(case, mask, copied_mudata) -> None:
    """Of the node itself, and of those that messages can come from."""
    graph = case.mdata[case.name].obsp["spatial_connectivities"].toarray() != 0
    reach = np.eye(len(graph)) + graph
    reach = reach @ reach
    heard = (graph & mask.any(1)[:, None]).sum(0) > 0
    node = int(np.argmin(np.where(heard, (reach > 0).sum(0), 99)))
    where = np.zeros_like(mask)
    where[node] = ~mask[node]
    other = copied_mudata(case.mdata)
    case.put(other, where, np.random.default_rng(0))
    changed = differ(case, case.model.get_reconstruction(hidden=mask), apply(case, other, hidden=mask))
    touched = (changed & mask).any(1)
    near_it = graph[:, node] & mask.any(1)
    assert near_it.any()
    assert touched[near_it].all()
    assert touched[node] == mask[node].any()
    assert not changed[reach[:, node] == 0].any()
    assert (reach[:, node] == 0).any()


def test_no_token_is_seen_in_its_own_prediction(case, copied_mudata) -> None:
    before = case.model.get_reconstruction()
    for node, token in ((3, 0), (11, 4)):
        where = np.zeros((case.mdata.n_obs, case.n_tokens), dtype=bool)
        where[node, token] = True
        other = copied_mudata(case.mdata)
        case.put(other, where, np.random.default_rng(1))
        after = apply(case, other)
        np.testing.assert_array_equal(case.tokens(after)[where], case.tokens(before)[where])
        changed = differ(case, before, after)
        assert changed[node].sum() >= 1


def test_everything_but_the_rest_is_predicted(case) -> None:
    found = case.model.get_reconstruction()
    adata = case.mdata[case.name]
    assert found.dtype == np.float32
    if case.name == "fmri":
        assert found.shape == adata.shape
        assert np.isfinite(found[:, :45]).all()
        assert np.isnan(found[:, 45:]).all()
        return
    assert found.shape == (20, 8, 9, 3)
    assert np.isfinite(found[:, :6]).all()
    assert np.isnan(found[:, 6:]).all()


def test_each_token_is_hidden_in_one_pass_along_with_a_fifth_of_the_others() -> None:
    """What is hidden by the user is so in every pass, and is predicted in the first."""
    rng = np.random.default_rng(0)
    for n_tokens in (1, 3, 5, 12):
        hidden, passes = rng.random((30, n_tokens)) < 0.2, []

        def predict(now, passes=passes):
            passes.append(now.copy())
            values = np.full((*now.shape, 2), np.float32(len(passes)))
            return np.where(now[..., None], values, np.nan)

        for given in (None, hidden):
            passes.clear()
            out = predict_all(30, n_tokens, given, 0, predict)
            assert np.isfinite(out).all()
            always = np.zeros_like(hidden) if given is None else given
            for now in passes:
                assert (now & always == always).all()
                assert ((now & ~always).sum(1) <= np.ceil(n_tokens / 5)).all()
            assert (np.sum([now & ~always for now in passes], axis=0) == ~always).all()
            assert (out[always] == 1).all()
            assert len(passes) == min(n_tokens, 5) + (given is not None)


def test_fifths_come_from_the_seed() -> None:
    def record(seed):
        seen = []
        predict_all(8, 10, None, seed, lambda now: seen.append(now) or np.where(now[..., None], 1.0, np.nan))
        return np.array(seen)

    np.testing.assert_array_equal(record(3), record(3))
    assert (record(3) != record(4)).any()


def test_what_is_hidden_may_be_given_as_time_points_or_pixels(case, mask) -> None:
    expected = case.model.get_reconstruction(hidden=mask)
    rng = np.random.default_rng(0)
    if case.name == "fmri":
        fine = np.zeros((24, 47), dtype=bool)
        # One point of a segment hides it; points that belong to no segment hide nothing.
        node, token = mask.nonzero()
        fine[node, token * 5 + rng.integers(0, 5, len(node))] = True
        fine[:, 46] = True
    else:
        fine = np.zeros((20, 8, 9), dtype=bool)
        node, token = mask.nonzero()
        row, column = rng.integers(0, 3, (2, len(node)))
        fine[node, token // 3 * 3 + row, token % 3 * 3 + column] = True
        fine[:, 7] = True
    np.testing.assert_array_equal(case.model.get_reconstruction(hidden=fine), expected)


def test_signals_keep_their_own_scale(signals, copied_mudata) -> None:
    other = copied_mudata(signals.mdata)
    values = other["fmri"].X.astype(np.float64)
    values[7] = values[7] * 3 + 200
    values[15] = values[15] * 0.5 - 4000
    other["fmri"].X = values.astype(np.float32)
    expected = signals.model.get_reconstruction().astype(np.float64)
    expected[7] = expected[7] * 3 + 200
    expected[15] = expected[15] * 0.5 - 4000
    np.testing.assert_allclose(apply(signals, other), expected, rtol=1e-3, atol=0.3)


def test_images_are_predicted_as_colors(models) -> None:
    """With an untrained head of zeros the mean of the training images is predicted."""
    case = models["image"]
    twin = FIMP.load_query_data(case.mdata, case.model)
    with torch.no_grad():
        for head in twin.module.network.sequences.heads:
            for weights in head.parameters():
                weights.zero_()
    found = case.tokens(twin.get_reconstruction())
    train = np.asarray(case.model.train_indices)
    np.testing.assert_allclose(found, case.get(case.mdata)[train].mean(), rtol=1e-4)


def test_indices(case, mask) -> None:
    whole = case.model.get_reconstruction(hidden=mask)
    nodes = [13, 2, 2, 0]
    np.testing.assert_allclose(case.model.get_reconstruction(indices=nodes, hidden=mask), whole[nodes], **near(case))
    chosen = np.arange(case.mdata.n_obs) % 3 == 1
    np.testing.assert_allclose(case.model.get_reconstruction(indices=chosen, hidden=mask), whole[chosen], **near(case))
    np.testing.assert_allclose(
        case.model.get_reconstruction(indices=nodes), case.model.get_reconstruction()[nodes], **near(case)
    )


@pytest.mark.parametrize(
    "how",
    [
        {"strategy": "layers"}, {"strategy": "blocks", "batch_size": 3}, {"strategy": "layers", "batch_size": 7},
        {"distribute": True, "batch_size": 9},
    ],
)  # fmt: skip
def test_ways_to_compute_do_not_matter(case, mask, how) -> None:
    expected = case.model.get_reconstruction(hidden=mask, strategy="blocks", batch_size=1000)
    np.testing.assert_allclose(case.model.get_reconstruction(hidden=mask, **how), expected, **near(case))


def test_the_order_of_nodes_does_not_matter(case, mask) -> None:
    order = np.random.default_rng(3).permutation(case.mdata.n_obs)
    adata = case.mdata[case.name][order].copy()
    expected = case.model.get_reconstruction(hidden=mask)[order]
    twin = FIMP.load_query_data(adata, case.model)
    found = twin.get_reconstruction(hidden=mask[order])
    hidden = mask[order]
    np.testing.assert_allclose(case.tokens(found)[hidden], case.tokens(expected)[hidden], **near(case))


@pytest.mark.filterwarnings("ignore:.*have no neighbors")
def test_nodes_without_neighbors_are_predicted_from_themselves(case, mask, copied_mudata) -> None:
    lonely = copied_mudata(case.mdata)
    graph = lonely[case.name].obsp["spatial_connectivities"].tolil()
    graph[4], graph[:, 4] = 0, 0
    lonely[case.name].obsp["spatial_connectivities"] = sparse.csr_matrix(graph)
    before = apply(case, lonely, hidden=mask)
    assert np.isfinite(case.tokens(before)).all()
    where = np.zeros_like(mask)
    where[np.arange(case.mdata.n_obs) != 4] = True
    case.put(lonely, where, np.random.default_rng(0))
    after = apply(case, lonely, hidden=mask)
    changed = differ(case, before, after)
    assert not changed[4].any()
    assert changed[[0, 7, 12]].any(1).all()


@pytest.mark.parametrize("which", ["all tokens", "one left"])
def test_nodes_of_which_nothing_is_seen_are_finite(case, which) -> None:
    hidden = np.zeros((case.mdata.n_obs, case.n_tokens), dtype=bool)
    hidden[6, 0 if which == "all tokens" else 1 :] = True
    assert np.isfinite(case.tokens(case.model.get_reconstruction(hidden=hidden))).all()


def test_shorter_recordings(signals, copied_mudata) -> None:
    adata = signals.mdata["fmri"][:, :33].copy()
    found = apply(signals, adata)
    assert found.shape == (24, 33)
    assert np.isfinite(found[:, :30]).all()
    assert np.isnan(found[:, 30:]).all()
    hidden = np.zeros((24, 6), dtype=bool)
    hidden[:, 2] = True
    assert np.isfinite(apply(signals, adata, hidden=hidden)[:, :30]).all()


def test_longer_recordings_are_refused(signals) -> None:
    bold = np.random.default_rng(0).normal(size=(1, 12, 60))
    longer = fimp_sc.pp.fmri(bold, coordinates=np.random.default_rng(0).normal(size=(12, 3)), n_neighbors=2)
    with pytest.raises(ValueError, match="up to 47 time points, found 60"):
        FIMP.load_query_data(longer, signals.model)


def test_recordings_shorter_than_a_token_are_refused(signals) -> None:
    adata = signals.mdata["fmri"][:, :4].copy()
    with pytest.raises(ValueError, match="4"):
        apply(signals, adata)


def test_images_of_another_size_are_refused(models) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 8, 8, 3), dtype=np.uint8)
    other = fimp_sc.pp.images(pixels, coordinates=np.random.default_rng(0).random((9, 2)), n_neighbors=2)
    with pytest.raises(ValueError, match=r"images of \[8, 9, 3\] \(height, width, channels\), found \[8, 8, 3\]"):
        FIMP.load_query_data(other, models["image"].model)


def test_another_kind_is_refused(models) -> None:
    with quiet_mudata(), pytest.raises(ValueError, match="reads a 'signal' modality, and this one is 'patch'"):
        FIMP.load_query_data(models["image"].mdata["image"].copy(), models["fmri"].model)


def test_places_are_needed_where_the_model_knows_them(signals, copied_mudata) -> None:
    adata = signals.mdata["fmri"].copy()
    del adata.obsm["spatial"]
    with pytest.raises(ValueError, match="3 coordinates"):
        FIMP.load_query_data(adata, signals.model)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (
            {"modality": "eeg"},
            ValueError,
            r"one of the signals and images that the model reads, \['\w+'\]: found 'eeg'",
        ),
        ({"hidden": "floats"}, TypeError, "must be boolean, found float64"),
        ({"hidden": "short"}, ValueError, r"must have the shape \(\d+, \d\) \(tokens\) or \(\d+, \d.*found \(5, 2\)"),
        ({"indices": []}, ValueError, "indices is empty"),
        ({"indices": [99]}, IndexError, "99"),
    ],
)
def test_errors(case, mask, how, error, message) -> None:
    if "hidden" in how:
        how = {"hidden": mask.astype(float) if how["hidden"] == "floats" else mask[:5, :2]}
    with pytest.raises(error, match=message):
        case.model.get_reconstruction(**how)


def test_models_of_expression_have_none(trained) -> None:
    with pytest.raises(ValueError, match="reads no signals or images: call get_expression"):
        trained.get_reconstruction()


def test_models_of_signals_have_no_expression(case) -> None:
    with pytest.raises(ValueError, match="get_reconstruction"):
        case.model.get_expression()


def test_untrained_models_predict_nothing(recordings) -> None:
    FIMP.setup_mudata(recordings)
    model = FIMP(recordings, n_latent=16, n_heads=2, token_size=1)
    with pytest.raises(Exception, match="train"):
        model.get_reconstruction()
