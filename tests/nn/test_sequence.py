"""Tokens of numbers inside the network: what reaches them, which is which, and where training starts."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from fimp_sc.data import SequenceShape
from fimp_sc.nn._network import FIMPNetwork
from fimp_sc.nn._sequence import SequenceEmbedding, SequenceParts, spread_codes

N, F, P, C = 9, 7, 5, 3
SIGNAL, IMAGE = SequenceShape(F, P, C, aligned=False), SequenceShape(F, P)
SHAPES = {"signal": SIGNAL, "image": IMAGE, "image with a place": SequenceShape(F, P, C)}
ELSEWHERE = {"rtol": 1e-4, "atol": 1e-5}


def make_nodes(shape=SIGNAL, n=N, seed=0, masked=0.0, absent=()) -> dict:
    """Return the part of a batch that holds one modality."""
    generator = torch.Generator().manual_seed(seed)
    nodes = {
        "value": torch.randn(n, shape.n_tokens, shape.token_size, generator=generator),
        "masked": torch.rand(n, shape.n_tokens, generator=generator) < masked,
        "padding": torch.zeros(n, shape.n_tokens, dtype=torch.bool),
        "position": torch.arange(shape.n_tokens),
        "coordinates": torch.randn(n, shape.n_coordinates, generator=generator),
    }
    nodes["padding"][list(absent)] = True
    nodes["masked"] &= ~nodes["padding"]
    return nodes


def graph(n=N) -> tuple[torch.Tensor, torch.Tensor]:
    """Two nodes after and one before each are its neighbors."""
    indices = [(i + step) % n for i in range(n) for step in (1, 2, -1)]
    return torch.arange(0, 3 * n + 1, 3), torch.tensor(indices)


def make_batch(n_layers=2, **sequences) -> dict:
    n = len(next(iter(sequences.values()))["value"])
    indptr, indices = graph(n)
    return {
        "nodes": torch.arange(n), "n_nodes": [n] * (n_layers + 1), "indptr": [indptr] * n_layers,
        "indices": [indices] * n_layers, "sequences": sequences,
    }  # fmt: skip


def make_network(shapes, d_model=24, *, n_heads=4, shake=0.2, n_features=0, **kwargs) -> FIMPNetwork:
    torch.manual_seed(0)
    network = FIMPNetwork(n_features, d_model, 2, n_heads, sequences=shapes, **kwargs).eval()
    with torch.no_grad():  # away from the start, where mistakes could cancel
        for parameter in network.parameters():
            parameter.add_(shake * torch.randn_like(parameter))
    return network


def states(network, **sequences) -> torch.Tensor:
    with torch.no_grad():
        return network.states(make_batch(**sequences))


# What reaches tokens and summaries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_masked_reaches_neither_tokens_nor_summaries(shape: str) -> None:
    torch.manual_seed(0)
    embedding = SequenceEmbedding(SHAPES[shape], 24)
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    nodes = make_nodes(SHAPES[shape], masked=0.5, absent=[2])
    assert nodes["masked"].any()
    unseen = nodes["masked"] | nodes["padding"]
    other = torch.where(unseen[..., None], torch.randn(N, F, P) * 50, nodes["value"])
    with torch.no_grad():
        tokens, whole = embedding(nodes)
        changed, changed_whole = embedding({**nodes, "value": other})
        seen, seen_whole = embedding({**nodes, "value": nodes["value"] + 1})
    assert torch.equal(changed[nodes["masked"]], tokens[nodes["masked"]])
    assert torch.equal(changed_whole, whole)
    assert (seen[~unseen] != tokens[~unseen]).any(1).all()
    assert (seen_whole != whole).any() == (embedding.whole is not None)
    # Of a masked token the mask, its position and the place of its node are all there is.
    expected = embedding.mask + embedding.position.expand(N, -1, -1)
    if embedding.place is not None:
        angle = nodes["coordinates"] @ embedding.frequency.T
        waves = torch.cat([angle.cos(), angle.sin()], 1) / math.sqrt(64)
        expected = expected + embedding.place(waves)[:, None]
    torch.testing.assert_close(tokens[nodes["masked"]], expected[nodes["masked"]], **ELSEWHERE)


@pytest.mark.parametrize("names", [["signal"], ["image"], ["signal", "image"]])
def test_values_of_absent_nodes_are_not_read_by_others(names) -> None:
    shapes = {name: SHAPES[name] for name in names}
    network = make_network(shapes)
    nodes = {name: make_nodes(shape, seed=i, absent=[4]) for i, (name, shape) in enumerate(shapes.items())}
    first = states(network, **nodes)
    for part in nodes.values():
        part["value"][4] = 30 * torch.randn(F, P)
        part["coordinates"] = part["coordinates"].clone()
        part["coordinates"][4] = 7.0
    second = states(network, **nodes)
    others = [i for i in range(N) if i != 4]
    torch.testing.assert_close(second[others], first[others], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second[4, 0], first[4, 0], rtol=1e-5, atol=1e-6)
    for part in nodes.values():
        part["padding"][4] = False
    assert not torch.allclose(states(network, **nodes)[others], first[others], atol=1e-3), "it would have been seen"


def test_summaries_of_images_are_made_of_all_tokens_that_are_seen() -> None:
    torch.manual_seed(0)
    embedding, nodes = SequenceEmbedding(IMAGE, 36), make_nodes(IMAGE, masked=0.4)
    with torch.no_grad():
        _, whole = embedding(nodes)
        value = embedding.value(nodes["value"])[..., embedding.own] / 0.3
        for i in range(N):
            seen = ~nodes["masked"][i]
            numbers = torch.zeros_like(value[i])
            numbers[seen] = value[i][seen] * F / seen.sum()
            torch.testing.assert_close(whole[i], embedding.whole(numbers.flatten()), **ELSEWHERE)
    # At the start they are what layers read as the place, of nodes of which nothing is seen too.
    outside = torch.ones(36, dtype=torch.bool)
    outside[embedding.where] = False
    assert (whole[:, outside] == 0).all()
    nothing = {**nodes, "masked": torch.ones(N, F, dtype=torch.bool)}
    assert torch.isfinite(embedding(nothing)[1]).all()


@pytest.mark.parametrize("shape", ["image", "image with a place"])
def test_nodes_that_are_alike_have_the_same_summary(shape: str) -> None:
    nodes = make_nodes(SHAPES[shape])
    for key in ("value", "coordinates"):
        nodes[key][5] = nodes[key][1]
    network = make_network({"x": SHAPES[shape]})
    with torch.no_grad():
        summary = network.tokens(make_batch(x=nodes))[0][:, 0]
    torch.testing.assert_close(summary[5], summary[1], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(summary[4], summary[1], atol=1e-3)


def test_summaries_of_signals_know_the_place_only() -> None:
    embedding, nodes = SequenceEmbedding(SIGNAL, 24), make_nodes()
    _, whole = embedding(nodes)
    _, other = embedding({**nodes, "value": torch.randn(N, F, P)})
    assert torch.equal(whole, other)
    assert not torch.allclose(whole, embedding({**nodes, "coordinates": torch.randn(N, C)})[1], atol=1e-3)


# Order ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["practical", "paper"])
def test_the_order_in_which_segments_are_stored_does_not_matter(layer: str) -> None:
    """Their position goes with them; with another position they are something else."""
    network, nodes = make_network({"x": SIGNAL}, layer=layer), make_nodes(masked=0.3)
    order = torch.randperm(F, generator=torch.Generator().manual_seed(3))
    moved = {**nodes, "position": nodes["position"][order]}
    for key in ("value", "masked", "padding"):
        moved[key] = nodes[key][:, order]
    first, second = states(network, x=nodes), states(network, x=moved)
    torch.testing.assert_close(second[:, 0], first[:, 0], **ELSEWHERE)
    torch.testing.assert_close(second[:, 1:], first[:, 1:][:, order], **ELSEWHERE)
    embeddings = [network.read(after, make_batch(x=part)) for after, part in ((first, nodes), (second, moved))]
    torch.testing.assert_close(*embeddings, **ELSEWHERE)
    elsewhere = states(network, x={**moved, "position": nodes["position"]})
    assert not torch.allclose(elsewhere[:, 1:], second[:, 1:], atol=1e-2)


def test_fewer_segments_are_embedded_as_those_of_their_position() -> None:
    embedding, nodes = SequenceEmbedding(SIGNAL, 24), make_nodes()
    few = torch.tensor([5, 0, 3])
    part = {**nodes, "position": few} | {key: nodes[key][:, few] for key in ("value", "masked", "padding")}
    torch.testing.assert_close(embedding(part)[0], embedding(nodes)[0][:, few])


def test_tokens_of_several_modalities_are_told_apart() -> None:
    """Summary, then sequences in the order of the model, then features."""
    shapes = {"bold": SIGNAL, "image": SequenceShape(4, 6)}
    network = make_network(shapes, n_features=8)
    nodes = {"bold": make_nodes(absent=[1]), "image": make_nodes(shapes["image"], seed=1, absent=[2, 3])}
    batch = make_batch(**nodes)
    rng = torch.Generator().manual_seed(0)
    batch |= {
        "feature_id": torch.randint(8, (N, 3), generator=rng), "value": torch.randn(N, 3, generator=rng),
        "padding": torch.zeros(N, 3, dtype=torch.bool), "profile": torch.randn(N, 8, generator=rng),
        "visible": torch.ones(1, 8, dtype=torch.bool), "pattern": torch.zeros(N, dtype=torch.int64),
    }  # fmt: skip
    batch["padding"][5, 2] = True
    with torch.no_grad():
        tokens, padding = network.tokens(batch)
        assert tokens.shape == (N, 1 + F + 4 + 3, 24)
        genes = network.embedding(*(batch[k] for k in ("feature_id", "value", "profile", "visible", "pattern")))
        parts = network.sequences
        (bold, of_bold), (image, of_image) = (parts.embeddings[i](nodes[name]) for i, name in enumerate(shapes))
        of_bold[1], of_image[[2, 3]] = 0.0, 0.0
        torch.testing.assert_close(tokens[:, 0], genes[:, 0] + of_bold + of_image)
        torch.testing.assert_close(tokens[:, 1 : 1 + F], bold + parts.modality[0])
        torch.testing.assert_close(tokens[:, 1 + F : 5 + F], image + parts.modality[1])
        torch.testing.assert_close(tokens[:, 5 + F :], genes[:, 1:])
        expected = torch.cat([torch.zeros(N, 1, dtype=torch.bool), *(nodes[k]["padding"] for k in shapes)], 1)
        assert torch.equal(padding, torch.cat([expected, batch["padding"]], 1))
        after = network.states(batch)
    assert network.n_queries(batch) == 1, "embeddings of nodes with genes are read off their summary"
    assert network.n_queries(batch, reconstruct=True) == 1 + F + 4
    split = network.split(after, batch)
    assert list(split) == ["bold", "image"]
    assert torch.equal(split["bold"], after[:, 1 : 1 + F])
    assert torch.equal(split["image"], after[:, 1 + F : 5 + F])
    assert [head.out_features for head in network.heads.values()] == [P, 6]


def test_a_modality_alone_has_no_vector_to_be_told_by() -> None:
    assert SequenceParts({"a": SIGNAL}, 24, apart=False).modality is None
    assert SequenceParts({"a": SIGNAL}, 24, apart=True).modality.shape == (1, 24)
    assert SequenceParts({"a": SIGNAL, "b": IMAGE}, 24, apart=False).modality.shape == (2, 24)


@torch.no_grad()
def test_embeddings_of_signals_are_their_summary_and_the_mean_of_tokens_that_are_there() -> None:
    shapes = {"a": SIGNAL, "b": SequenceShape(4, 6, aligned=False)}
    network = make_network(shapes)
    batch = make_batch(a=make_nodes(absent=[1]), b=make_nodes(shapes["b"], seed=1, absent=[2, 3]))
    assert network.n_queries(batch) == 1 + F + 4
    after = network.states(batch)
    expected = after[:, 0] - network.mark
    for i in range(N):
        expected[i] += 0 if i == 1 else after[i, 1 : 1 + F].mean(0)
        expected[i] += 0 if i in (2, 3) else after[i, 1 + F :].mean(0)
    torch.testing.assert_close(network(batch), expected, **ELSEWHERE)


@torch.no_grad()
@pytest.mark.parametrize("d_model", [36, 96])
def test_embeddings_of_images_are_read_off_values_at_their_places(d_model: int) -> None:
    network, batch = make_network({"x": IMAGE}, d_model), make_batch(x=make_nodes(IMAGE))
    after, embedding = network.states(batch), network.sequences.embeddings[0]
    parts = [embedding.own, embedding.received] + ([embedding.received_later] if d_model == 96 else [])
    for i in range(N):
        numbers = [after[i, 1 + t, part] / 0.3 for t in range(F) for part in parts]
        expected = after[i, 0] - network.mark + embedding.pool(torch.cat(numbers))
        torch.testing.assert_close(network(batch)[i], expected, rtol=1e-4, atol=1e-4)
    # The same patches elsewhere are another image.
    swapped = after[:, [0, 2, 1, *range(3, F + 1)]]
    assert not torch.allclose(network.read(swapped, batch), network(batch), atol=1e-3)


# Sizes and gradients --------------------------------------------------------------------------------------------------

SIZES = [(12, 1, 3), (12, 4, 3), (12, 12, 40), (16, 2, 1), (16, 16, 9), (24, 2, 100), (96, 8, 20), (128, 4, 300)]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("d_model", "n_heads", "token_size"), SIZES)
def test_tokens_may_be_narrow_or_wide(d_model: int, n_heads: int, token_size: int, aligned: bool) -> None:
    shape = SequenceShape(4, token_size, 0 if aligned else 2, aligned=aligned)
    network = make_network({"x": shape}, d_model, n_heads=n_heads, shake=0.0)
    nodes = make_nodes(shape, masked=0.3)
    found = states(network, x=nodes)
    assert found.shape == (N, 5, d_model)
    assert torch.isfinite(found).all()
    embedding = network.sequences.embeddings[0]
    parts = [embedding.own, embedding.received, embedding.at, embedding.where]
    columns = [column for part in parts for column in range(part.start, part.stop)]
    columns += [embedding.masked_flag, embedding.summary_flag]
    assert len(set(columns)) == len(columns), "no column serves twice"
    assert max(columns) == d_model - 1


@pytest.mark.parametrize("layer", ["practical", "paper"])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_reaches_all_parameters(shape: str, layer: str) -> None:
    network = make_network({"x": SHAPES[shape]}, shake=0.0, layer=layer, dropout=0.0).train()
    batch = make_batch(x=make_nodes(SHAPES[shape], masked=0.4))
    target = torch.randn(N, F, P, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.003)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        after = network.states(batch)
        predicted = network.heads["x"](network.split(after, batch)["x"])
        loss = (predicted - target).square().mean() + network.read(after, batch).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    still = [
        name for name, parameter in network.named_parameters()
        # Keys that are all moved alike change no attention.
        if "attention.key.bias" not in name and (parameter.grad is None or not parameter.grad.abs().max() > 0)
    ]  # fmt: skip
    assert still == []
    assert losses[-1] < losses[0]


# Codes of positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "width", "largest"), [(1, 20, 0.0), (10, 20, 0.1), (60, 20, 0.45), (3, 1, 1.0)])
def test_codes_of_positions_are_long_and_far_apart(n: int, width: int, largest: float) -> None:
    torch.manual_seed(0)
    codes = spread_codes(n, width)
    assert codes.shape == (n, width)
    assert not codes.requires_grad
    torch.testing.assert_close(codes.norm(dim=1), torch.full((n,), width**0.5))
    cosines = (codes @ codes.T / width - torch.eye(n)).max()
    assert cosines <= largest + 1e-5
    random_codes = torch.nn.functional.normalize(torch.randn(n, width), dim=1)
    if n > 3:
        assert cosines < 0.7 * (random_codes @ random_codes.T - torch.eye(n)).max()


@torch.no_grad()
def test_codes_come_from_the_seed_of_torch_alone() -> None:
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.manual_seed(4)
    first = spread_codes(6, 4)
    torch.manual_seed(4)
    assert torch.equal(spread_codes(6, 4), first)
    assert not torch.equal(spread_codes(6, 4), first)
    assert not torch.is_grad_enabled()
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1][1])  # noqa: NPY002
