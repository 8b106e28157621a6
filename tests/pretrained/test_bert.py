"""Encoders of the BERT kind against transformers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fimp_sc.pretrained import CheckpointError, open_checkpoint
from fimp_sc.pretrained._bert import (
    BertEmbeddings,
    bert_names,
    bert_sizes,
    build_stack,
    check_bert_read,
    load_embeddings,
    load_stack,
)

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
TABLES = {"vocab_size": 60, "max_position_embeddings": 20}


@torch.no_grad()
def random_bert(kind: str = "BertModel", **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**SIZES, **TABLES, **options)).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(1 + 0.2 * noise if "LayerNorm.weight" in name else 0.2 * noise)
    return model


def read(folder, layer: int = -1, rows=None):
    weights, config = open_checkpoint(folder)
    weights = bert_names(weights)
    sizes = bert_sizes(weights, config, layer)
    n_rows = TABLES["vocab_size"] if rows is None else len(rows)
    embeddings = BertEmbeddings(sizes["d_model"], n_rows, sizes["n_positions"], eps=sizes["eps"])
    stack = build_stack(sizes).eval()
    load_embeddings(embeddings, weights, rows)
    load_stack(stack, weights)
    check_bert_read(weights, stack)
    return embeddings, stack


@pytest.fixture
def ids():
    return torch.randint(TABLES["vocab_size"], (5, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(model, embeddings, stack, ids, hidden: int = -1) -> None:
    padding = torch.arange(ids.shape[1]) >= torch.tensor([12, 12, 7, 3, 1])[:, None]
    expected = model(ids, attention_mask=(~padding).long(), output_hidden_states=True).hidden_states[hidden]
    ours = stack.alone(embeddings(ids, torch.arange(ids.shape[1])), padding)
    torch.testing.assert_close(ours[~padding], expected[~padding], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_equals_transformers(tmp_path, ids, kind: str, activation: str) -> None:
    model = random_bert(kind, hidden_act=activation)
    model.save_pretrained(tmp_path)
    assert any(key.startswith("bert.") for key in load_file(tmp_path / "model.safetensors")) == (kind != "BertModel")
    assert_same(model, *read(tmp_path), ids)


def test_norms_add_what_the_configuration_says(tmp_path, ids) -> None:
    model = random_bert(layer_norm_eps=0.1)
    model.save_pretrained(tmp_path)
    assert_same(model, *read(tmp_path), ids)


def test_older_names_of_norms_and_other_files(tmp_path, ids) -> None:
    model = random_bert()
    model.config.save_pretrained(tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {}
    for key, value in model.state_dict().items():
        name = next((key.replace(new, was) for new, was in old.items() if key.endswith(new)), key)
        state[f"bert.{name}"] = value
    torch.save(state | {"bert.embeddings.position_ids": torch.arange(20)[None]}, tmp_path / "pytorch_model.bin")
    assert_same(model, *read(tmp_path), ids)


@pytest.mark.parametrize(("layer", "hidden"), [(-1, 3), (-2, 2), (1, 1), (3, 3)])
def test_layers_are_counted_as_hidden_states(tmp_path, ids, layer: int, hidden: int) -> None:
    model = random_bert()
    model.save_pretrained(tmp_path)
    embeddings, stack = read(tmp_path, layer)
    assert len(stack.layers) == hidden
    assert_same(model, embeddings, stack, ids, hidden)


def test_a_part_of_the_rows(tmp_path, ids) -> None:
    model = random_bert()
    model.save_pretrained(tmp_path)
    rows = torch.tensor([7, -1, 59])
    embeddings, _ = read(tmp_path, rows=rows.numpy())
    table = model.embeddings.word_embeddings.weight
    assert torch.equal(embeddings.table.weight, torch.stack([table[7], torch.zeros(48), table[59]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act.*supported: 'gelu' or 'relu'"),
        ({"model_type": "roberta"}, "model_type.*supported: 'bert'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type.*supported: 'absolute'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_attention_heads": 5}, "does not divide the width 48"),
        ({"num_hidden_layers": 2}, "num_hidden_layers.*weights say 3"),
        ({"hidden_size": 32}, "hidden_size.*weights say 48"),
        ({"intermediate_size": 32}, "intermediate_size.*weights say 96"),
        ({"num_attention_heads": None}, "num_attention_heads"),
    ],
)
def test_configurations_that_are_not_supported(tmp_path, change: dict, message: str) -> None:
    random_bert().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


def test_layers_that_are_not_there(tmp_path) -> None:
    random_bert().save_pretrained(tmp_path)
    for layer in (0, 4, -4, 1.5, True):
        with pytest.raises(ValueError, match="layer must be from 1 to 3, or from -3 to -1"):
            read(tmp_path, layer)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("encoder.layer.1.crossattention.self.query.weight", torch.zeros(48, 48), "no place for.*crossattention"),
        ("encoder.layer.2.output.dense.bias", None, "no tensor 'encoder.layer.2.output.dense.bias'"),
        ("encoder.layer.0.output.dense.bias", torch.zeros(7), r"shape \(7,\), expected \(48,\)"),
        ("embeddings.position_embeddings.weight", torch.zeros(20, 7), r"shape \(20, 7\), expected \(20, 48\)"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, key: str, value, message: str) -> None:
    random_bert().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state.pop(key, None)
    save_file(state | ({} if value is None else {key: value}), path)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)
