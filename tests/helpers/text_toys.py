"""A small encoder of texts with its tokenizer, and texts for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fimp_sc

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, *(f"word{i}" for i in range(40)), "cell", "death", "programmed", "##s"]
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
N = 14


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> Path:
    """Write ``tokenizer.json`` of a vocabulary, as BERT has it: lower case, pieces of words, [CLS] and [SEP] around."""
    number = {word: i for i, word in enumerate(words)}
    special = {
        name: {"id": name, "ids": [number[name]], "tokens": [name]} for name in ("[CLS]", "[SEP]") if name in number
    }
    single = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}]
    normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        # As many files come: padded and cut to a length of their own.
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": [{"id": number[word], "content": word, **flags} for word in SPECIAL if word in number],
        "normalizer": normalizer | {"lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special},
        "decoder": None,
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": number,
        },
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def write_encoder(folder: Path, **options):
    """Write a random encoder with its tokenizer, and return the original."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=30, **SIZES, **options)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(write_tokenizer(folder))
    return model


def make_texts(n: int = N) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(f"word{i}" for i in rng.integers(0, 40, rng.integers(1, 9))) for _ in range(n)]


def make_terms(folder: Path, adjacency: np.ndarray):
    """Texts with two kinds of label and a graph."""
    return fimp_sc.pp.text(make_texts(), adjacency=adjacency, tokenizer=folder, labels={"topic": list("ab") * (N // 2)})


@torch.no_grad()
def last_states(model, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What the original makes of tokens, ``(n, f, width)``, and where there are some, ``(n, f)``."""
    there = torch.from_numpy(ids >= 0)
    tokens = torch.from_numpy(ids).long().clamp(min=0)
    return model(tokens, attention_mask=there.long()).last_hidden_state, there
