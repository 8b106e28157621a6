"""A stack across nodes, against loops over nodes, edges and neighbors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fimp_sc.nn import TransformerLayer, TransformerStack
from fimp_sc.nn import _stack as stack_module

N, F, D = 9, 7, 16
DEGREES = (2, 0, 3, 1, 2)
N_DST = len(DEGREES)


def make_stack(**kwargs) -> TransformerStack:
    torch.manual_seed(0)
    stack = TransformerStack(D, 4, 3, **{"d_feedforward": 24, **kwargs}).double().eval()
    for parameter in stack.parameters():  # biases and norms start at values that hide mistakes
        nn.init.normal_(parameter, std=0.3)
    return stack


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(N, F, D, generator=generator, dtype=torch.float64)
    padding = torch.rand(N, F, generator=generator) < 0.3
    padding[:, 0] = False
    indptr = torch.tensor([0, *DEGREES]).cumsum(0)
    indices = torch.cat([torch.randperm(N, generator=generator)[:degree] for degree in DEGREES])
    return tokens, padding, indptr, indices


def run_layer(
    layer: TransformerLayer, own: Tensor, sources: list[tuple[Tensor, Tensor]], factors: list[Tensor] | None = None
) -> Tensor:
    """One layer for one node: ``own`` is ``(f, d)``, each source its tokens and its padding."""
    attention, pre = layer.attention, layer.norm_first

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(1, (attention.n_heads, -1)).transpose(0, 1)

    def sent(x: Tensor) -> Tensor:
        return layer.attention_norm(x) if pre else x

    messages = []
    for tokens, padding in sources:
        value = heads(attention.value(sent(tokens)))
        score = heads(attention.query(sent(own))) @ heads(attention.key(sent(tokens))).transpose(1, 2)
        weight = (score / score.new_tensor(D / attention.n_heads).sqrt()).masked_fill(padding, -torch.inf).softmax(2)
        message = weight @ value
        if attention.value_convolution is not None:
            kernel = attention.value_convolution.weight
            shown = value.masked_fill(padding[:, None], 0.0)[None]
            message = message + nn.functional.conv2d(shown, kernel, padding=(kernel.shape[2] // 2, 0), groups=4)[0]
        messages.append(message.transpose(0, 1).flatten(1))
    if factors is not None:
        messages = [factor * message for factor, message in zip(factors, messages, strict=True)]
    added = attention.output(torch.stack(messages).mean(0)) if messages else torch.zeros_like(own)

    def feedforward(x: Tensor) -> Tensor:
        return layer.contract(layer.activation(layer.expand(x)))

    if pre:
        own = own + added
        return own + feedforward(layer.feedforward_norm(own))
    own = layer.attention_norm(own + added)
    return layer.feedforward_norm(own + feedforward(own))


def naive(
    stack: TransformerStack,
    tokens: Tensor,
    padding: Tensor,
    indptr: Tensor,
    indices: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    weight = torch.ones(len(indices), dtype=torch.float64) if weight is None else weight
    sent = [[tokens[j]] for j in range(N)]
    for j in range(N):
        for layer in stack.layers[:-1]:
            evolved = run_layer(layer, sent[j][-1], [(sent[j][-1], padding[j])])
            sent[j].append(evolved if stack.neighbor_states == "evolving" else tokens[j])
    results = []
    for i in range(N_DST):
        neighbors = indices[indptr[i] : indptr[i + 1]].tolist()
        factors = [*weight[indptr[i] : indptr[i + 1]], *([torch.tensor(1.0)] if stack.self_loops else [])]
        if stack.aggregate == "layer":
            own = tokens[i]
            for level, layer in enumerate(stack.layers):
                mine = [(own, padding[i])] if stack.self_loops else []
                own = run_layer(layer, own, [(sent[j][level], padding[j]) for j in neighbors] + mine, factors)
            results.append(stack.norm(own))
            continue
        messages = []
        for j in neighbors + ([None] if stack.self_loops else []):
            own = tokens[i]
            for level, layer in enumerate(stack.layers):
                source = (own, padding[i]) if j is None else (sent[j][level], padding[j])
                own = run_layer(layer, own, [source])
            messages.append(factors[len(messages)] * stack.norm(own))
        results.append(torch.stack(messages).mean(0) if messages else torch.zeros_like(tokens[i]))
    return torch.stack(results)


MODES = pytest.mark.parametrize(
    "mode",
    [
        {"neighbor_states": states, "aggregate": aggregate, "self_loops": loops}
        for states in ("evolving", "static")
        for aggregate in ("layer", "final")
        for loops in (True, False)
    ],
    ids=lambda mode: "-".join(map(str, mode.values())),
)
KINDS = pytest.mark.parametrize(
    "kind",
    [
        {"norm_first": True, "final_norm": True, "activation": "gelu"},
        {"norm_first": False, "activation": "relu"},
        {"norm_first": False, "value_kernel": 5},
    ],
    ids=["pre-norm", "post-norm", "convolution"],
)


@MODES
@KINDS
def test_equals_loops(mode: dict, kind: dict) -> None:
    stack, inputs = make_stack(**mode, **kind), make_inputs()
    expected = naive(stack, *inputs)
    torch.testing.assert_close(stack(*inputs), expected)
    torch.testing.assert_close(stack(*inputs, n_queries=2), expected[:, :2])


@MODES
@KINDS
def test_weights_are_factors_of_messages(mode: dict, kind: dict) -> None:
    stack, inputs = make_stack(**mode, **kind), make_inputs()
    weight = torch.rand(len(inputs[3]), generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    weight.requires_grad_()
    found, expected = stack(*inputs, edge_weight=weight), naive(stack, *inputs, weight)
    torch.testing.assert_close(found, expected)
    up = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = [torch.autograd.grad(out, weight, up)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().min() > 0


@MODES
def test_modes_differ(mode: dict) -> None:
    """Each switch changes the result, so that the test above tells them apart."""
    inputs, result = make_inputs(), make_stack(**mode)(*make_inputs())
    for name, other in (("neighbor_states", ("evolving", "static")), ("aggregate", ("layer", "final"))):
        changed = {**mode, name: other[mode[name] == other[0]]}
        assert (make_stack(**changed)(*inputs) - result).abs().max() > 1e-3
    assert (make_stack(**{**mode, "self_loops": not mode["self_loops"]})(*inputs) - result).abs().max() > 1e-3


@pytest.mark.parametrize("neighbor_states", ["evolving", "static"])
@pytest.mark.parametrize("aggregate", ["layer", "final"])
@KINDS
def test_without_neighbors_it_is_the_model_itself(neighbor_states: str, aggregate: str, kind: dict) -> None:
    stack = make_stack(neighbor_states=neighbor_states, aggregate=aggregate, **kind)
    tokens, padding, indptr, indices = make_inputs()
    result = stack(tokens, padding, torch.zeros_like(indptr), indices[:0])
    torch.testing.assert_close(result, stack.alone(tokens, padding)[:N_DST], rtol=0, atol=1e-13)


def test_alone_equals_torch() -> None:
    """The layers of torch, with the same weights."""
    stack = make_stack(activation="relu", eps=1e-5, final_norm=True)
    tokens, padding, *_ = make_inputs()
    reference = nn.TransformerEncoderLayer(D, 4, 24, dropout=0.0, batch_first=True, norm_first=False).double().eval()
    expected = tokens
    for layer in stack.layers:
        attention = layer.attention
        projections = (attention.query, attention.key, attention.value)
        reference.load_state_dict(
            {
                "self_attn.in_proj_weight": torch.cat([p.weight for p in projections]),
                "self_attn.in_proj_bias": torch.cat([p.bias for p in projections]),
                **{f"self_attn.out_proj.{k}": v for k, v in attention.output.state_dict().items()},
                **{f"linear1.{k}": v for k, v in layer.expand.state_dict().items()},
                **{f"linear2.{k}": v for k, v in layer.contract.state_dict().items()},
                **{f"norm1.{k}": v for k, v in layer.attention_norm.state_dict().items()},
                **{f"norm2.{k}": v for k, v in layer.feedforward_norm.state_dict().items()},
            }
        )
        expected = reference(expected, src_key_padding_mask=padding)
    result = stack.alone(tokens, padding)
    torch.testing.assert_close(result[~padding], stack.norm(expected)[~padding])


@MODES
def test_gradients_equal_those_of_loops(mode: dict) -> None:
    stack = make_stack(**mode)
    tokens, padding, indptr, indices = make_inputs()
    gradients = []
    for function in (stack, lambda *inputs: naive(stack, *inputs)):
        leaf = tokens.clone().requires_grad_()
        function(leaf, padding, indptr, indices).square().sum().backward()
        gradients.append([leaf.grad, *(p.grad.clone() for p in stack.parameters())])
        stack.zero_grad()
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("edges", [1, 3])
def test_edges_at_once_do_not_matter(edges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, inputs = make_stack(aggregate="final"), make_inputs()
    whole = stack(*inputs)
    monkeypatch.setattr(stack_module, "_EDGES", edges)
    torch.testing.assert_close(stack(*inputs), whole)


@pytest.mark.parametrize("aggregate", ["layer", "final"])
def test_order_of_neighbors_does_not_matter(aggregate: str) -> None:
    stack, (tokens, padding, indptr, indices) = make_stack(aggregate=aggregate), make_inputs()
    turned = torch.cat([part.flip(0) for part in indices.split(DEGREES)])
    assert not torch.equal(turned, indices)
    torch.testing.assert_close(stack(tokens, padding, indptr, turned), stack(tokens, padding, indptr, indices))


@pytest.mark.parametrize("aggregate", ["layer", "final"])
def test_half_precision(aggregate: str) -> None:
    stack, (tokens, padding, *graph) = make_stack(aggregate=aggregate), make_inputs()
    exact = stack(tokens, padding, *graph)
    half = stack.bfloat16()(tokens.bfloat16(), padding, *graph)
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).abs().max() < 5e-2 * exact.abs().max()


@pytest.mark.parametrize(("name", "value"), [("neighbor_states", "moving"), ("aggregate", "edge")])
def test_unknown_mode(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .* found '{value}'"):
        make_stack(**{name: value})


@MODES
def test_training_computes_layers_again(mode: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients in training equal those without recomputation, with the same dropout."""
    gradients = []
    for again in (True, False):
        stack = make_stack(dropout=0.2, **mode).train()
        if not again:
            monkeypatch.setattr(stack_module, "checkpoint", lambda run, *args, use_reentrant, **kw: run(*args, **kw))
        tokens, padding, indptr, indices = make_inputs()
        torch.manual_seed(5)
        stack(tokens.requires_grad_(), padding, indptr, indices).square().sum().backward()
        gradients.append([tokens.grad, *(parameter.grad for parameter in stack.parameters())])
    for recomputed, kept in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept)
