"""Encoders of texts: what their files say of pooling and vocabulary."""

from __future__ import annotations

import json

import pytest
import torch
from text_toys import WORDS, write_encoder

from fimp_sc.pretrained import CheckpointError, load
from fimp_sc.pretrained._registry import foundation_reader
from fimp_sc.pretrained.files._tokenizer import read_words, words_checksum

POOLING = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"}


@pytest.fixture
def folder(tmp_path):
    write_encoder(tmp_path)
    return tmp_path


def write_pooling(folder, *modes: str) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    content = {"word_embedding_dimension": 24} | {key: mode in modes for mode, key in POOLING.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(content))


def test_files_of_sentence_transformers_say_how_tokens_are_pooled(folder) -> None:
    assert load("bert", folder).read().config["pooling"] == "mean"
    for mode, n_class in (("cls", 1), ("mean", 0)):
        write_pooling(folder, mode)
        found = load("bert", folder).read()
        assert (found.config["pooling"], found.embedding.n_class) == (mode, n_class)
    for modes in (("max",), ("cls", "mean"), ()):
        write_pooling(folder, *modes)
        with pytest.raises(CheckpointError, match=r"asks for .*pooling='mean' or 'cls'"):
            load("bert", folder).read()
        assert load("bert", folder, pooling="cls").read().config["pooling"] == "cls"
    with pytest.raises(ValueError, match="pooling must be 'mean' or 'cls', found 'max'"):
        load("bert", folder, pooling="max").read()


def test_files_of_sentence_transformers_say_whether_embeddings_have_unit_length(folder) -> None:
    assert not load("bert", folder).read().embedding.unit_length
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Normalize")]
    (folder / "modules.json").write_text(json.dumps(modules))
    assert load("bert", folder).read().embedding.unit_length


def test_vocabularies_are_read_from_either_file(folder) -> None:
    assert read_words(folder) == WORDS
    (folder / "tokenizer.json").unlink()
    assert read_words(folder) is None
    assert load("bert", folder).read().config["vocabulary"] is None
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    assert read_words(folder) == WORDS
    assert load("bert", folder).read().config["vocabulary"] == words_checksum(WORDS)
    assert words_checksum(WORDS) != words_checksum(WORDS[::-1])


def test_is_built_again_from_its_configuration(folder) -> None:
    found = load("bert", folder).read(dropout=0.3)
    again = foundation_reader("bert").build(json.loads(json.dumps(found.config)))
    again.embedding.load_state_dict(found.embedding.state_dict())
    again.stack.load_state_dict(found.stack.state_dict())
    ids = torch.randint(len(WORDS), (3, 7, 1), generator=torch.Generator().manual_seed(0)).float()
    padding = torch.arange(7).expand(3, -1) >= torch.tensor([7, 4, 1])[:, None]
    nodes = {"value": ids, "padding": padding, "masked": torch.zeros_like(padding)}
    ours, theirs = (part.stack.eval().alone(part.embedding(nodes), padding) for part in (found, again))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_tokens_that_no_text_has_cost_nothing(folder) -> None:
    embedding = load("bert", folder).read().embedding
    padding = torch.arange(9).expand(2, -1) >= torch.tensor([2, 5])[:, None]
    nodes = {"value": torch.ones(2, 9, 1), "padding": padding, "masked": torch.zeros_like(padding)}
    assert embedding(nodes).shape[:2] == embedding.padding(nodes).shape == (2, 5)
    assert embedding.padding(nodes).tolist() == padding[:, :5].tolist()
    nothing = nodes | {"padding": torch.ones_like(padding)}
    assert embedding(nothing).shape[:2] == (2, 1)


def test_a_layer_below_the_last_can_be_read(folder) -> None:
    assert len(load("bert", folder, layer=-2).read().stack.layers) == 1
    with pytest.raises(ValueError, match="layer must be from 1 to 2"):
        load("bert", folder, layer=3).read()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content["added_tokens"].append({"content": "x"}),
        lambda content: content["added_tokens"].append(5),
        lambda content: content["model"]["vocab"].update(x=-1),
        lambda content: content["model"]["vocab"].update(x=10**12),
    ],
)
def test_numbers_of_words_that_make_no_sense(folder, tmp_path, spoil) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    spoil(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"must number words, and those of 'added_tokens', from 0"):
        read_words(tmp_path)


def test_a_list_of_modules_of_any_encoding_is_searched(folder) -> None:
    (folder / "modules.json").write_bytes(b"\xff\xfe sentence_transformers.models.Normalize")
    assert foundation_reader("bert").read(folder).config["unit_length"]
