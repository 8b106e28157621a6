"""Nodes as sequences of numbers, against NumPy: how they are standardized, what is hidden, and what leaks of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_toys import ALL, VISIBLE, F, N, P, make_source, numbers, some_nodes, statistics

from fimp_sc.data import SequenceReader, SequenceShape
from fimp_sc.data.sequences._reader import hide_tokens


def some_tokens(share=0.4, seed=2) -> np.ndarray:
    """Tokens, all of node 3 among them."""
    tokens = np.random.default_rng(seed).random((N, F)) < share
    tokens[3] = True
    return tokens


# Standardization ------------------------------------------------------------------------------------------------------


def test_fields_of_signals_as_they_are_seen() -> None:
    absent, hidden = some_nodes(), some_tokens()
    nodes = np.array([8, 3, 0, 11, 2, 13, 5])
    assert absent[nodes].any()
    hidden |= absent[:, None]
    source = make_source(by_node=True, absent=absent, hidden=hidden)
    made = source.fields(nodes, 4, (0.2, 0.6), seed=7)
    for key, shape, dtype in (
        ("value", (7, F, P), torch.float32), ("masked", (7, F), torch.bool), ("padding", (7, F), torch.bool),
        ("coordinates", (7, 0), torch.float32), ("mean", (4, 1, 1), torch.float32), ("std", (4, 1, 1), torch.float32),
        ("target", (4, F, P), torch.float32), ("target_mask", (4, F), torch.bool), ("position", (F,), torch.int64),
    ):  # fmt: skip
        assert made[key].shape == shape, key
        assert made[key].dtype == dtype, key
    assert made["position"].tolist() == list(range(F))
    masked, padding = made["masked"].numpy(), made["padding"].numpy()
    np.testing.assert_array_equal(padding, np.repeat(absent[nodes][:, None], F, 1))
    assert not (masked & padding).any()
    assert masked[hidden[nodes] & ~padding].all()
    n_targets = 0
    for i, node in enumerate(nodes):
        seen = numbers()[node][~masked[i] & ~padding[i]].astype(np.float64)
        if not seen.size:
            assert (made["value"][i] == 0).all()
            assert i >= 4 or not made["target_mask"][i].any()
            continue
        standard = (numbers()[node] - seen.mean()) / seen.std()
        expected = np.where(masked[i][:, None], 0, standard)
        np.testing.assert_allclose(made["value"][i], expected, rtol=1e-3, atol=1e-4)
        if i < 4:
            assert float(made["mean"][i]) == pytest.approx(seen.mean(), rel=1e-5)
            assert float(made["std"][i]) == pytest.approx(seen.std(), rel=1e-3)
            np.testing.assert_allclose(made["target"][i], standard, rtol=1e-3, atol=1e-3)
            np.testing.assert_array_equal(made["target_mask"][i], masked[i] & ~hidden[node])
            n_targets += int(made["target_mask"][i].sum())
    assert n_targets


def test_what_was_taken_off_can_be_put_back() -> None:
    made = make_source(by_node=True).fields(ALL, N, (0.3, 0.6))
    back = made["target"] * made["std"] + made["mean"]
    np.testing.assert_allclose(back, numbers(), rtol=1e-4)


def test_numbers_on_a_common_scale_are_standardized_with_that_of_training_nodes() -> None:
    hidden = some_tokens()
    made = make_source(statistics=statistics(), hidden=hidden).fields(ALL, 5)
    standard = (numbers() - 3.0) / 2.0
    np.testing.assert_allclose(made["value"], np.where(hidden[..., None], 0, standard), rtol=1e-5)
    np.testing.assert_allclose(made["target"], standard[:5], rtol=1e-5)
    assert (made["mean"] == 3.0).all()
    assert (made["std"] == 2.0).all()
    assert not made["target_mask"].any(), "what is hidden from outside is no training target"
    as_they_are = make_source().fields(ALL, 5)["value"]
    np.testing.assert_array_equal(as_they_are, numbers())


@pytest.mark.parametrize("chunk", [3, 1024])
def test_statistics_are_those_of_training_nodes_that_are_there(chunk: int) -> None:
    absent, nodes = some_nodes(), np.array([0, 1, 2, 5, 9, 12])
    assert 0 < absent[nodes].sum() < 6
    places = np.random.default_rng(0).normal(5, 3, (N, 3))
    shape = SequenceShape(F, P, 3)
    values = numbers()
    values[absent] = np.nan

    def source(known=None) -> SequenceReader:
        return SequenceReader(
            lambda nodes: values[nodes], shape, N, absent=absent, coordinates=places, statistics=known
        )

    found, there = source().statistics(nodes, chunk), nodes[~absent[nodes]]
    assert found.mean == pytest.approx(values[there].mean(dtype=np.float64))
    assert found.std == pytest.approx(values[there].std(dtype=np.float64))
    np.testing.assert_allclose(found.center, places[there].mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.spread, places[there].std(0), rtol=1e-5)
    assert found.center.dtype == found.spread.dtype == np.float32
    standard = source(found).fields(there, 1)["coordinates"].numpy()
    np.testing.assert_allclose(standard.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(standard.std(0), 1, rtol=1e-5)
    np.testing.assert_allclose(source().fields(nodes, 1)["coordinates"], places[nodes], rtol=1e-6)


def test_what_is_the_same_in_all_training_nodes_is_not_divided_by_nothing() -> None:
    places = np.column_stack([np.arange(N), np.full(N, 0.1)])
    places[N - 1, 1] = 7.1
    source = SequenceReader(
        lambda nodes: np.full((len(nodes), F, P), 0.3, np.float32), SequenceShape(F, P, 2), N, coordinates=places
    )
    found = source.statistics(np.arange(N - 1))
    assert found.std == 1.0
    assert found.spread.tolist() == [pytest.approx(np.arange(N - 1).std()), 1.0]


def test_coordinates_are_left_out_where_tokens_know_none() -> None:
    assert make_source(coordinates=np.ones((N, 2))).fields(ALL, 2)["coordinates"].shape == (N, 0)


def test_without_training_nodes_there_are_no_statistics() -> None:
    absent = ALL < 4
    with pytest.raises(ValueError, match="No training node has values"):
        make_source(absent=absent).statistics(np.arange(4))


@pytest.mark.parametrize("level", [0.0, 1e4 + 0.1])
def test_a_signal_that_does_not_move_where_it_is_seen_is_no_target(level: float) -> None:
    """As of recordings filled up with zeros: otherwise what is hidden would be divided by next to nothing."""
    values = numbers()
    values[5] += 1e4
    values[5, :3] = level
    targets, moved = [], 0
    for seed in range(40):
        made = make_source(values, by_node=True).fields(np.array([5, 6]), 2, (0.5, 0.5), seed=seed)
        assert torch.isfinite(made["target"]).all()
        still = bool(made["masked"][0, 3:].all())
        assert bool(made["target_mask"][0].any()) != still
        assert made["target_mask"][1].any()
        assert float(made["mean"][0]) == pytest.approx(values[5][~made["masked"][0].numpy()].mean(), abs=0.01)
        if still:
            assert float(made["std"][0]) == 0
            assert (made["value"][0] == 0).all()
        targets.append(float(made["target"][made["target_mask"]].abs().max()))
        moved += not still
    assert 0 < moved < 40, "both cases were seen"
    assert max(targets) < 1e3


@pytest.mark.parametrize("unit", [1e-12, 1e6])
def test_the_unit_of_a_signal_does_not_matter(unit: float) -> None:
    one, other = (make_source(numbers() * np.float32(scale), by_node=True) for scale in (1, unit))
    one, other = one.fields(ALL, N, (0.3, 0.6)), other.fields(ALL, N, (0.3, 0.6))
    np.testing.assert_allclose(other["value"], one["value"], rtol=1e-3, atol=1e-3)
    assert (other["target_mask"] == one["target_mask"]).all()
    assert one["target_mask"].any()


# What is hidden does not leak -----------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    by_node=st.booleans(),
    high=st.floats(0, 1),
    mask_nodes=st.sampled_from([0.0, 0.5, 1.0]),
    size=st.sampled_from([1e-3, 1.0, 1e5]),
)
@settings(max_examples=40, deadline=None)
def test_hidden_and_masked_numbers_change_nothing_but_the_target(seed, by_node, high, mask_nodes, size) -> None:
    absent, hidden = some_nodes(seed=seed), some_tokens(seed=seed)
    known = {"by_node": by_node, "absent": absent, "hidden": hidden, "statistics": statistics()}
    nodes = np.random.default_rng(seed).permutation(N)
    how = {"ratio": (high / 2, high), "mask_nodes": mask_nodes, "seed": seed}
    first = make_source(**known).fields(nodes, 9, **how)
    values = numbers()
    unseen = (first["masked"] | first["padding"]).numpy()
    other = np.random.default_rng(seed).normal(scale=size, size=values.shape).astype(np.float32)
    values[nodes] = np.where(unseen[..., None], other[nodes], values[nodes])
    second = make_source(values, **known).fields(nodes, 9, **how)
    for key in VISIBLE:
        assert torch.equal(first[key], second[key]), key
    # The truth at what was drawn did change, so that this would have been seen.
    drawn = first["target_mask"]
    assert drawn.any() == (first["target"][drawn] != second["target"][drawn]).any()


def test_numbers_of_absent_nodes_are_not_read() -> None:
    absent = some_nodes()

    def read(nodes):
        assert not absent[nodes].any()
        return numbers()[nodes]

    source = SequenceReader(read, SequenceShape(F, P), N, absent=absent, by_node=True)
    made = source.tokens(ALL)
    np.testing.assert_array_equal(made, np.where(absent[:, None, None], 0, numbers()))
    assert made.dtype == np.float32
    gone = np.flatnonzero(absent)
    fields = source.fields(gone, len(gone), (0.5, 0.5))
    assert fields["padding"].all()
    assert not fields["masked"].any()
    assert not fields["target_mask"].any()
    assert all(torch.isfinite(fields[key]).all() for key in ("value", "target", "mean", "std"))


@pytest.mark.parametrize("shape", [(N, F - 1), (N - 1, F), (N, F, P)])
def test_hidden_of_another_shape_is_an_error(shape) -> None:
    with pytest.raises(ValueError, match=r"one entry for each token, \(14, 6\): found"):
        make_source(hidden=np.zeros(shape, dtype=bool))


# Masks ----------------------------------------------------------------------------------------------------------------


def test_masks_come_from_the_seed_whatever_the_values() -> None:
    def masks(seed: int, values=None) -> torch.Tensor:
        return make_source(values, by_node=True).fields(ALL, N, (0.2, 0.7), mask_nodes=0.7, seed=seed)["masked"]

    before = torch.get_rng_state()
    assert torch.equal(masks(4), masks(4, numbers(9) ** 3))
    assert not torch.equal(masks(4), masks(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_ratio_only_hidden_tokens_are_masked() -> None:
    hidden = some_tokens()
    made = make_source(hidden=hidden).fields(ALL, N)
    np.testing.assert_array_equal(made["masked"], hidden)
    assert not make_source().fields(ALL, N)["masked"].any()


def test_a_share_of_the_nodes_is_masked() -> None:
    def masked(share: float) -> np.ndarray:
        nodes = np.zeros(4000, dtype=np.int64)
        fields = make_source(by_node=True).fields(nodes, 10, (0.5, 0.5), mask_nodes=share)
        counts = fields["masked"].sum(1).numpy()
        assert set(counts) <= {0, F // 2}
        assert torch.equal(fields["target_mask"], fields["masked"][:10])
        return counts > 0

    assert not masked(0.0).any()
    assert masked(1.0).all()
    assert abs(masked(0.3).mean() - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5


@given(
    low=st.floats(0, 1), more=st.floats(0, 1), seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1),
    n_tokens=st.integers(1, 12),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_hidden_share_is_within_the_ratio_and_a_token_stays(low, more, seed, share, n_tokens) -> None:
    high = low + more * (1 - low)
    known = torch.from_numpy(np.random.default_rng(seed).random((30, n_tokens)) < share)
    hidden = hide_tokens(known, (low, high), torch.Generator().manual_seed(seed))
    assert hidden.dtype == torch.bool
    assert not (hidden & ~known).any()
    n_known, n_hidden = known.sum(1).numpy(), hidden.sum(1).numpy()
    most = np.maximum(n_known - 1, 0)
    assert (n_hidden <= np.minimum(np.round(n_known * high + 1e-4), most)).all()
    assert (n_hidden >= np.minimum(np.round(n_known * low - 1e-4), most)).all()


def test_every_token_is_hidden_equally_often_and_nodes_draw_their_own_share() -> None:
    known = torch.ones(6000, 10, dtype=torch.bool)
    known[:, 7] = False
    hidden = hide_tokens(known, (0.0, 1.0), torch.Generator().manual_seed(0))
    often = hidden.float().mean(0).numpy()
    assert often[7] == 0
    np.testing.assert_allclose(np.delete(often, 7), often.sum() / 9, atol=4 * 0.5 / 6000**0.5)
    # Shares from nothing to all but one of nine; the middle ones are as likely as each other.
    counts = np.bincount(hidden.sum(1), minlength=9) / 6000
    assert len(counts) == 9
    np.testing.assert_allclose(counts[1:8], 1 / 9, atol=4 * (1 / 9 / 6000) ** 0.5)
