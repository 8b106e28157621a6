"""Where layers over tokens of numbers start: at a mean, with gates, over the same position of neighbors."""

from __future__ import annotations

import pytest
import torch

from fimp_sc.data import SequenceShape
from fimp_sc.nn._initialize import start_as_gated_mean
from fimp_sc.nn._layers import TransformerLayer
from fimp_sc.nn._network import FIMPNetwork
from fimp_sc.nn._sequence import SequenceEmbedding

N, F, P, HIDDEN = 9, 10, 20, 3
SHAPES = {"signal": SequenceShape(F, P, 3, aligned=False), "image": SequenceShape(F, P)}
OTHERS = [t for t in range(F) if t != HIDDEN]
CASES = [(name, d_model) for name in SHAPES for d_model in (64, 128)]


def make_network(name: str, d_model: int) -> FIMPNetwork:
    torch.manual_seed(0)
    return FIMPNetwork(0, d_model, 2, 4, sequences={"x": SHAPES[name]}, dropout=0.0).eval()


@pytest.fixture(params=CASES, ids=[f"{name} {d_model}" for name, d_model in CASES])
def started(request):
    return request.param[0], make_network(*request.param)


def make_batch(shape: SequenceShape, *, masked=(), seed=0) -> dict:
    """Nodes in a ring; tokens ``masked`` of all of them are hidden."""
    generator = torch.Generator().manual_seed(seed)
    nodes = {
        "value": torch.randn(N, F, P, generator=generator),
        "masked": torch.zeros(N, F, dtype=torch.bool),
        "padding": torch.zeros(N, F, dtype=torch.bool),
        "position": torch.arange(F),
        "coordinates": torch.randn(N, shape.n_coordinates, generator=generator),
    }
    nodes["masked"][:, list(masked)] = True
    indices = torch.tensor([(i + step) % N for i in range(N) for step in (1, -1, 3)])
    return {
        "nodes": torch.arange(N), "n_nodes": [N] * 3, "indptr": [torch.arange(0, 3 * N + 1, 3)] * 2,
        "indices": [indices] * 2, "sequences": {"x": nodes},
    }  # fmt: skip


@torch.no_grad()
def received(network: FIMPNetwork, batch: dict, level: int = 0) -> torch.Tensor:
    """Return what a layer adds to the columns that hold what is received, ``(n, f, width)``."""
    tokens, padding = network.tokens(batch)
    after = network.layers[level](tokens, padding, batch["indptr"][level], batch["indices"][level])
    embedding = network.sequences.embeddings[0]
    columns = embedding.received_later if level else embedding.received
    return (after - tokens)[:, 1:, columns]


@torch.no_grad()
def attention_weights(network: FIMPNetwork, batch: dict, level: int = 0) -> torch.Tensor:
    """Return what tokens attend to, of any pair of nodes: ``(n, n, heads, 1 + f, 1 + f)``."""
    layer = network.layers[level]
    tokens = layer.attention_norm(network.tokens(batch)[0])
    query, key = (part(tokens).unflatten(2, (4, -1)) for part in (layer.attention.query, layer.attention.key))
    return (torch.einsum("iqhc,jkhc->ijhqk", query, key) / query.shape[3] ** 0.5).softmax(-1)


def without(batch: dict, tokens: list[int]) -> dict:
    nodes = batch["sequences"]["x"]
    value = nodes["value"].clone()
    value[:, tokens] = 0
    return batch | {"sequences": {"x": {**nodes, "value": value}}}


def test_a_token_receives_the_same_position_of_its_neighbors(started) -> None:
    name, network = started
    batch = make_batch(SHAPES[name])
    base = received(network, batch)[:, HIDDEN]
    same = received(network, without(batch, [HIDDEN]))[:, HIDDEN] - base
    others = received(network, without(batch, OTHERS))[:, HIDDEN] - base
    assert others.norm() < 0.02 * same.norm()
    assert same.norm() > 0.5 * base.norm()


def test_tokens_attend_to_their_position_and_to_gates(started) -> None:
    name, network = started
    weights = attention_weights(network, make_batch(SHAPES[name]))
    tokens = torch.arange(1, F + 1)
    same, summary = weights[..., tokens, tokens], weights[..., tokens, 0]
    assert (same + summary).min() > 0.99
    if name == "image":
        assert summary.max() < 0.05, "summaries of images hold what is seen, and are no gates"
        return
    assert 0.25 < summary.mean() < 0.75
    # Pairs of places and heads have gates of their own.
    gates = summary.mean(3)
    assert gates.std((0, 1)).min() > 0.02
    assert gates.std(2).mean() > 0.02


def test_masked_tokens_are_passed_over(started) -> None:
    name, network = started
    seen, hidden = make_batch(SHAPES[name]), make_batch(SHAPES[name], masked=[HIDDEN])
    at = HIDDEN + 1
    first = attention_weights(network, hidden)[..., at, at]
    before = attention_weights(network, seen)[..., at, at]
    assert (first < 0.12).all()
    assert first.mean() < 0.1 * before.mean()
    # Later layers read what such tokens received, in half of their heads.
    later = attention_weights(network, hidden, level=1)[..., at, at].mean((0, 1))
    assert later[:2].max() < 0.12
    assert later[2:].min() > 5 * later[:2].max()


@pytest.mark.parametrize("d_model", [64, 128])
def test_where_signals_are_masked_nothing_of_neighbors_is_received(d_model: int) -> None:
    """Neither what is shown at other positions, as if those took the place of the masked one."""
    network = make_network("signal", d_model)
    seen, hidden = make_batch(SHAPES["signal"]), make_batch(SHAPES["signal"], masked=[HIDDEN])
    usual = received(network, seen)[:, HIDDEN] - received(network, without(seen, [HIDDEN]))[:, HIDDEN]
    found = received(network, hidden)[:, HIDDEN] - received(network, without(hidden, OTHERS))[:, HIDDEN]
    assert found.norm() < 0.02 * usual.norm()


@pytest.mark.parametrize("d_model", [12, 96])
@pytest.mark.parametrize("later", [False, True])
def test_heads_of_one_column_keep_the_usual_start(d_model: int, later: bool) -> None:
    torch.manual_seed(0)
    embedding = SequenceEmbedding(SHAPES["signal"], d_model)
    layer = TransformerLayer(d_model, d_model, d_feedforward=2 * d_model)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    start_as_gated_mean(layer, embedding, later=later)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_tokens_start_as_components() -> None:
    embedding = SequenceEmbedding(SHAPES["image"], 60)
    basis = torch.linalg.qr(torch.randn(P, P, generator=torch.Generator().manual_seed(0)))[0]
    embedding.start_from(basis)
    nodes = make_batch(SHAPES["image"])["sequences"]["x"]
    with torch.no_grad():
        tokens, _ = embedding(nodes)
    torch.testing.assert_close(tokens[..., :10], 0.3 * nodes["value"] @ basis[:, :10], rtol=1e-4, atol=1e-5)
    assert embedding.own == slice(0, 10)
    # Of fewer components than there are columns the others are empty.
    embedding.start_from(basis[:, :4])
    with torch.no_grad():
        tokens, _ = embedding(nodes)
    assert (tokens[..., 4:10] == 0).all()
    assert (tokens[..., :4] != 0).any()
