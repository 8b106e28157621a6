"""Small Geneformers, written by transformers, with dictionaries as their authors publish them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
SPECIAL = {1: ("<pad>", "<mask>"), 2: ("<pad>", "<mask>", "<cls>", "<eos>")}


@torch.no_grad()
def write_bert(folder: Path, n_tokens: int, *, n_positions: int = 64, kind: str = "BertForMaskedLM", **options):
    """Save a random encoder with the settings of Geneformer, and return it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, vocab_size=n_tokens, max_position_embeddings=n_positions, hidden_act="relu", pad_token_id=0, **options
    )
    model = getattr(transformers, kind)(config).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(1 + 0.2 * noise if "LayerNorm.weight" in name else 0.3 * noise)
    folder.mkdir(exist_ok=True, parents=True)
    model.save_pretrained(folder)
    return model


def dictionaries(genes, version: int = 2, *, names=None, seed: int = 0) -> dict[str, dict]:
    """Tokens and medians of genes by Ensembl id, and names of these; numbers are numpy's, as in the real files."""
    rng = np.random.default_rng(seed)
    tokens = {name: i for i, name in enumerate(SPECIAL[version])}
    ids = rng.permutation(len(genes)) + len(tokens)
    tokens |= {gene: np.int16(token) for gene, token in zip(genes, ids, strict=True)}
    # Few different ones: equal values are frequent.
    medians = {gene: np.float64(rng.choice([0.5, 1.0, 1.7, 2.0])) for gene in genes}
    found = {"token_dictionary_gc1M": tokens, "gene_median_dictionary_gc1M": medians}
    return found | ({} if names is None else {"ensembl_mapping_dict_gc1M": dict(names)})


def write_dictionaries(folder: Path, content: dict[str, dict], ending: str = "pkl") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for name, values in content.items():
        path = folder / f"{name}.{ending}"
        if ending == "json":
            path.write_text(
                json.dumps({key: getattr(value, "item", lambda v=value: v)() for key, value in values.items()})
            )
        else:
            path.write_bytes(pickle.dumps(values))
    return folder


def write_geneformer(folder: Path, genes, version: int = 2, *, names=None, n_positions: int = 64, **options):
    """Write a whole checkpoint; return the encoder and its tokens by Ensembl id."""
    content = dictionaries(genes, version, names=names)
    write_dictionaries(folder, content)
    tokens = content["token_dictionary_gc1M"]
    return write_bert(folder, len(tokens), n_positions=n_positions, **options), content


def ranked(counts, gene_ids, content: dict[str, dict], n: int) -> tuple[list[int], list[float]]:
    """Tokens of a cell and their values by the description in Geneformer's paper, without this package."""
    tokens, medians = content["token_dictionary_gc1M"], content["gene_median_dictionary_gc1M"]
    total, values = float(np.sum(counts)), {}
    for count, gene in zip(counts, gene_ids, strict=True):
        if gene in tokens:
            values[gene] = values.get(gene, 0.0) + float(count)
    values = {gene: value / total * 10_000 / float(medians[gene]) for gene, value in values.items() if value > 0}
    best = sorted(values, key=lambda gene: (-round(values[gene], 9), int(tokens[gene])))[:n]
    return [int(tokens[gene]) for gene in best], [values[gene] for gene in best]
