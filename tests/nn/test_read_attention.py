from __future__ import annotations

import pytest
import torch
from torch import nn

from fimp_sc.nn import TransformerLayer
from fimp_sc.nn._read_attention import edge_attention, edge_messages, recorded_influence


class _OneLayer(nn.Module):
    """As much of a network as influence is read of."""

    pooled_from = None

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = TransformerLayer(8, 2, d_feedforward=12, norm_first=norm_first, dropout=0.0)
        self.layers = nn.ModuleList([layer])

    def message_layers(self) -> list[nn.Module]:
        return list(self.layers)


def _reference(layer: TransformerLayer) -> nn.MultiheadAttention:
    own = layer.attention
    reference = nn.MultiheadAttention(8, 2, batch_first=True)
    reference.in_proj_weight.data = torch.cat([own.query.weight, own.key.weight, own.value.weight]).detach()
    reference.in_proj_bias.data = torch.cat([own.query.bias, own.key.bias, own.value.bias]).detach()
    reference.out_proj.weight.data = own.output.weight.detach()
    reference.out_proj.bias.data = torch.zeros(8)
    return reference


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("n_destinations", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_influence_is_the_length_of_the_message_of_multihead_attention(norm_first, n_destinations, weighted) -> None:
    torch.manual_seed(0)
    network = _OneLayer(norm_first)
    layer = network.layers[0]
    tokens, padding = torch.randn(5, 4, 8), torch.zeros(5, 4, dtype=torch.bool)
    padding[1, 2:] = padding[4, 3:] = True
    # Self-loops of nodes 0 and 2, an isolated node 3.
    indptr, indices = torch.tensor([0, 3, 5, 7, 7]), torch.tensor([0, 1, 4, 0, 2, 2, 3])
    weight = torch.rand(len(indices)) if weighted else None
    with torch.no_grad(), recorded_influence(network, 5, n_destinations) as found:
        layer(tokens, padding, indptr, indices, edge_weight=weight)
    x = layer.attention_norm(tokens) if norm_first else tokens
    edges = [(0, 1), (0, 4), (1, 0), (1, 2), (2, 3)][: 4 if n_destinations == 2 else 5]
    reference = _reference(layer)
    expected = [
        reference(x[i : i + 1, :1], x[j : j + 1], x[j : j + 1], key_padding_mask=padding[j : j + 1])[0].norm()
        for i, j in edges
    ]
    length = torch.stack(expected).detach()
    if weight is not None:
        length = length * weight[[1, 2, 3, 4, 6][: len(length)]]
    torch.testing.assert_close(found[0], length)
    assert not layer.attention._forward_pre_hooks


def test_attention_and_messages_of_edges_are_softmax_by_hand() -> None:
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 2, 3, 4), torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = padding[2] = True
    edges = torch.tensor([0, 0, 2]), torch.tensor([1, 2, 0])
    attention = edge_attention(query, key, padding, *edges)
    messages = edge_messages(query, key, value, padding, *edges)
    assert attention[1].abs().max() == 0
    assert messages[1].abs().max() == 0
    for edge, (i, j) in enumerate(zip(*(part.tolist() for part in edges), strict=True)):
        seen = ~padding[j]
        if not seen.any():
            continue
        weights = [(query[i, h] @ key[j, h, seen].T / 2).softmax(-1) for h in range(2)]
        torch.testing.assert_close(attention[edge][:, seen], torch.stack(weights).mean(0))
        assert attention[edge][:, ~seen].abs().sum() == 0
        torch.testing.assert_close(messages[edge], torch.cat([w @ value[j, h, seen] for h, w in enumerate(weights)], 1))
