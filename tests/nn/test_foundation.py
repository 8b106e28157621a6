"""The network around a foundation model, against loops over cells, and what of it is trained."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor, nn

from fimp_sc.data import NodeGraph
from fimp_sc.nn import TransformerLayer, TransformerStack
from fimp_sc.nn._foundation import FoundationNetwork
from fimp_sc.pretrained._scgpt import ScGPTDecoder, ScGPTTokens

N, F, GENES, D = 9, 5, 12, 8
LAYERS = 3
# Sources of each cell; cell 5 has none.
EDGES = {0: [1, 2], 1: [0, 4, 8], 2: [7], 3: [0, 1, 6], 4: [5], 5: [], 6: [3], 7: [2, 0], 8: [6, 5]}
GRAPH = sparse.lil_matrix((N, N))
for _i, _sources in EDGES.items():
    GRAPH[_i, _sources] = 1.0
MODES = pytest.mark.parametrize(
    "mode",
    [
        {"neighbor_states": "evolving", "aggregate": "layer"},
        {"neighbor_states": "static", "aggregate": "layer"},
        {"neighbor_states": "evolving", "aggregate": "final"},
        {"neighbor_states": "static", "aggregate": "final", "self_loops": False},
    ],
    ids=lambda mode: "-".join(map(str, mode.values())),
)


def make_network(trained="frozen", *, decoder=True, dropout=0.0, final_norm=False, **mode) -> FoundationNetwork:
    network = FoundationNetwork(
        ScGPTTokens(D, GENES, dropout=dropout),
        TransformerStack(
            D, 2, LAYERS, d_feedforward=12, activation="relu", dropout=dropout, final_norm=final_norm, **mode
        ),
        ScGPTDecoder(D) if decoder else None,
        trained=trained,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():  # biases and norms start at values that hide mistakes
            if not name.endswith((".up", ".down")):
                parameter.normal_(std=0.4)
    return network.double().eval()


def cells() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "feature_id": torch.stack([torch.randperm(GENES, generator=generator)[:F] for _ in range(N)]),
        "value": torch.randint(1, 9, (N, F), generator=generator).double(),
        "padding": torch.rand(N, F, generator=generator) < 0.3,
    }


def make_batch(destinations) -> dict:
    block = NodeGraph(GRAPH.tocsr(), self_loops=False).block(np.array(destinations), 1)
    nodes = torch.from_numpy(block.nodes)
    graph = {"indptr": [torch.from_numpy(block.indptr[0])], "indices": [torch.from_numpy(block.indices[0])]}
    return {name: part[nodes] for name, part in cells().items()} | graph


def run_layer(layer: TransformerLayer, own: Tensor, sources: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One post-norm layer for one cell: ``own`` is ``(f, d)``, each source its tokens and its padding."""
    attention = layer.attention

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(1, (attention.n_heads, -1)).transpose(0, 1)

    messages = []
    for tokens, padding in sources:
        score = heads(attention.query(own)) @ heads(attention.key(tokens)).transpose(1, 2)
        score = (score / (D / attention.n_heads) ** 0.5).masked_fill(padding, -torch.inf)
        messages.append((score.softmax(2) @ heads(attention.value(tokens))).transpose(0, 1).flatten(1))
    added = attention.output(torch.stack(messages).mean(0)) if messages else torch.zeros_like(own)
    own = layer.attention_norm(own + added)
    return layer.feedforward_norm(own + layer.contract(layer.expand(own).relu()))


def naive(network: FoundationNetwork, i: int, genes: Tensor, absent: Tensor) -> Tensor:
    """Return the last hidden states of cell ``i`` with tokens of ``genes`` that nobody else sees."""
    stack, parts = network.stack, network.embedding
    tokens, padding = parts(*cells().values())
    sent = [[tokens[j]] for j in range(N)]
    for j in range(N):
        for layer in stack.layers[:-1]:
            evolved = run_layer(layer, sent[j][-1], [(sent[j][-1], padding[j])])
            sent[j].append(evolved if stack.neighbor_states == "evolving" else tokens[j])
    mask = parts.value_contract(parts.value_expand(torch.tensor([parts.mask_value]).double()).relu())
    queries = parts.table_norm(parts.table.weight[genes]) + parts.value_norm(mask)
    first, own_padding = torch.cat([tokens[i], queries]), torch.cat([padding[i], absent])

    def run(edges: list[int | None]) -> Tensor:
        own = first
        for level, layer in enumerate(stack.layers):
            sources = [(own, own_padding) if j is None else (sent[j][level], padding[j]) for j in edges]
            own = run_layer(layer, own, sources)
        return own

    edges = [*EDGES[i], *([None] if stack.self_loops else [])]
    if stack.aggregate == "layer":
        return run(edges)
    return torch.stack([run([j]) for j in edges]).mean(0) if edges else torch.zeros_like(first)


def queries(n: int = N, q: int = 3) -> Tensor:
    return torch.stack([torch.arange(q) * 3 + i for i in range(n)]) % GENES


# Results --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@MODES
def test_forward_equals_a_loop_over_cells(mode) -> None:
    network = make_network(**mode)
    destinations = [3, 0, 5, 1]
    out = network(make_batch(destinations))
    none = torch.zeros(0, dtype=torch.int64)
    expected = [naive(network, i, none, none.bool())[0] for i in destinations]
    torch.testing.assert_close(out, torch.stack(expected))
    assert network.width == out.shape[1] == D


@torch.no_grad()
@MODES
def test_decoded_genes_are_tokens_that_nobody_else_sees(mode) -> None:
    network = make_network(**mode)
    destinations = [3, 0, 5, 1]
    genes = queries()[destinations]
    absent = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 0, 1], [1, 1, 1]]).bool()
    for given in (None, absent):
        embedding, bins = network.decode(make_batch(destinations), genes, given)
        for row, i in enumerate(destinations):
            here = torch.zeros(3, dtype=torch.bool) if given is None else given[row]
            states = naive(network, i, genes[row], here)
            torch.testing.assert_close(embedding[row], states[0])
            torch.testing.assert_close(bins[row], network.decoder.layers(states[-3:])[:, 0])


@torch.no_grad()
def test_absent_queries_leave_the_cell_as_it_is() -> None:
    network, batch = make_network(), make_batch([0, 3])
    embedding, _ = network.decode(batch, queries(2), torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(embedding, network(batch))
    assert (network.decode(batch, queries(2))[0] - embedding).abs().max() > 1e-4


@torch.no_grad()
@MODES
def test_predictions_do_not_depend_on_which_other_cells_are_destinations(mode) -> None:
    network, everybody = make_network(**mode), list(range(N))
    embedding, bins = network.decode(make_batch(everybody), queries())
    for part in ([0], [5], [1, 0], [8, 3, 5]):
        some = network.decode(make_batch(part), queries()[part])
        torch.testing.assert_close(some[0], embedding[part])
        torch.testing.assert_close(some[1], bins[part])


def test_without_a_decoder_there_is_nothing_to_decode() -> None:
    with pytest.raises(ValueError, match="no expression decoder"):
        make_network(decoder=False).decode(make_batch([0]), queries(1))


# What is trained ------------------------------------------------------------------------------------------------------


def trained(network: FoundationNetwork) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def names(network: FoundationNetwork, *prefixes: str) -> set[str]:
    found = {name for name, _ in network.named_parameters() if name.startswith(prefixes)}
    assert all(any(name.startswith(prefix) for name in found) for prefix in prefixes)
    return found


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("frozen", ()),
        ("full", ("embedding.", "stack.", "decoder.")),
        ("last:1", ("stack.layers.2.", "stack.norm.", "decoder.")),
        ("last:2", ("stack.layers.1.", "stack.layers.2.", "stack.norm.", "decoder.")),
        ("last:3", ("stack.", "decoder.")),
    ],
)
def test_parts_that_are_trained(what: str, parts: tuple[str, ...]) -> None:
    network = make_network(what, final_norm=True)
    assert trained(network) == (names(network, *parts) if parts else set())


@pytest.mark.parametrize(("what", "rank"), [("lora", 8), ("lora:1", 1), ("lora:3", 3)])
def test_low_rank_changes_of_queries_and_values_are_trained(what: str, rank: int) -> None:
    network = make_network(what)
    changes = {
        f"stack.layers.{i}.attention.{projection}.{part}": (D, rank) if part == "up" else (rank, D)
        for i in range(LAYERS) for projection in ("query", "value") for part in ("up", "down")
    }  # fmt: skip
    assert trained(network) == set(changes) | names(network, "decoder.")
    assert {name: tuple(network.get_parameter(name).shape) for name in changes} == changes
    assert trained(make_network(what, decoder=False)) == set(changes)


def test_all_other_weights_keep_their_names_and_values() -> None:
    """What a checkpoint gave stays where it was: a change comes beside it."""
    plain, changed = make_network().state_dict(), make_network("lora").state_dict()
    assert {name for name in changed if not name.endswith((".up", ".down"))} == set(plain)
    assert all(torch.equal(changed[name], value) for name, value in plain.items())


@torch.no_grad()
def test_low_rank_change_starts_as_none_and_is_a_product() -> None:
    plain, network, batch = make_network(), make_network("lora:2"), make_batch([0, 3, 5])
    torch.testing.assert_close(network(batch), plain(batch), rtol=0, atol=1e-12)
    for i, layer in enumerate(network.stack.layers):
        for name in ("query", "value"):
            linear = layer.attention.get_submodule(name)
            assert not linear.up.any()
            assert linear.down.any()
            linear.up.normal_()
            weight = plain.get_parameter(f"stack.layers.{i}.attention.{name}.weight")
            weight += torch.einsum("or,ri->oi", linear.up, linear.down)
    torch.testing.assert_close(network(batch), plain(batch))
    assert (network(batch) - make_network()(batch)).abs().max() > 1e-2


def test_both_factors_learn_and_the_original_does_not() -> None:
    network = make_network("lora:2")
    query = network.stack.layers[1].attention.query
    nn.init.normal_(query.up)
    network(make_batch([0, 3])).square().sum().backward()
    assert query.up.grad.any()
    assert query.down.grad.any()
    assert query.weight.grad is None
    assert query.bias.grad is None


@pytest.mark.parametrize("what", ["frozen", "full", "last:1", "lora"])
def test_network_can_be_sent_to_other_processes(what: str) -> None:
    network, batch = make_network(what), make_batch([0, 3])
    again = pickle.loads(pickle.dumps(network))
    torch.testing.assert_close(again(batch), network(batch))


@pytest.mark.parametrize(
    "what",
    ["", "Frozen", "none", "last", "last:0", "last:4", "last:-1", "last:x", "lora:0", "lora:00", "lora:x", "lor"],
)
def test_other_choices_are_refused(what: str) -> None:
    with pytest.raises(ValueError, match=r"'last:N' with N from 1 to 3, 'lora' or 'lora:RANK'; found") as error:
        make_network(what)
    assert repr(what) in str(error.value)


@torch.no_grad()
def test_frozen_network_stays_in_evaluation() -> None:
    batch = make_batch([0, 3])
    frozen, full = make_network(dropout=0.5), make_network("full", dropout=0.5)
    expected = frozen(batch)
    torch.testing.assert_close(full(batch), expected)
    parent = nn.Sequential(frozen).train()
    assert parent.training
    assert not any(module.training for module in frozen.modules())
    torch.testing.assert_close(frozen(batch), expected, rtol=0, atol=0)
    full.train()
    assert all(module.training for module in full.modules())
    assert (full(batch) - expected).abs().max() > 1e-2
    torch.testing.assert_close(full.eval()(batch), expected)
