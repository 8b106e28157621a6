"""Token embeddings against the formula, gene by gene."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fimp_sc.nn import FeatureEmbedding


def make_embedding(n_features=7, d_model=4) -> FeatureEmbedding:
    torch.manual_seed(0)
    embedding = FeatureEmbedding(n_features, d_model)
    nn.init.normal_(embedding.value_code[2].weight)
    nn.init.normal_(embedding.value_code[2].bias)
    return embedding


@pytest.mark.parametrize("pattern", [[0, 1, 2], [2, 0, 2], [3, 1, 1]])
def test_equals_the_formula_gene_by_gene(pattern: list[int]) -> None:
    embedding = make_embedding()
    n, f, g = 3, 4, 7
    feature_id = torch.tensor([[0, 3, 6, 2], [1, 0, 5, 4], [6, 5, 4, 3]])
    patterns, pattern = torch.ones(4, g, dtype=torch.bool), torch.tensor(pattern)
    patterns[0, 1], patterns[2, :3], patterns[3, 4:] = False, False, False
    visible = patterns[pattern]
    profile = torch.randn(n, g) * visible
    value = profile.gather(1, feature_id)
    out = embedding(feature_id, value, profile, patterns, pattern)
    assert out.shape == (n, 1 + f, 4)
    energy = embedding.loading.square()
    for i in range(n):
        seen = [g for g in range(7) if visible[i, g]]
        summary = sum(profile[i, g] * embedding.loading[g] for g in seen) * energy.sum(0) / energy[seen].sum(0)
        torch.testing.assert_close(out[i, 0], summary + embedding.summary)
        for t in range(f):
            gene, x = feature_id[i, t], value[i, t]
            token = x * embedding.loading[gene] + embedding.identity[gene] + embedding.value_code(x.view(1, 1))[0]
            torch.testing.assert_close(out[i, 1 + t], token)


def test_starts_at_principal_component_scores() -> None:
    embedding = FeatureEmbedding(7, 4)
    loading = np.linalg.qr(np.random.default_rng(0).standard_normal((7, 3)))[0]
    embedding.start_from(loading)
    nn.init.zeros_(embedding.summary)
    profile = torch.randn(5, 7)
    everything = torch.ones(1, 7, dtype=torch.bool), torch.zeros(5, dtype=torch.int64)
    summary = embedding(torch.zeros(5, 1, dtype=torch.int64), torch.zeros(5, 1), profile, *everything)[:, 0]
    torch.testing.assert_close(summary[:, :3], profile @ torch.from_numpy(loading).float())
    assert (summary[:, 3:] == 0).all()


def test_cell_of_which_nothing_is_visible_is_finite_also_in_its_gradient() -> None:
    embedding = make_embedding()
    ids, zeros = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)
    out = embedding(ids, zeros, torch.zeros(1, 7), torch.zeros(1, 7, dtype=torch.bool), ids[:, 0])
    torch.testing.assert_close(out[0, 0], embedding.summary)
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in embedding.parameters())


def test_hiding_a_random_half_of_the_genes_keeps_the_size_of_the_summary() -> None:
    torch.manual_seed(0)
    embedding = FeatureEmbedding(400, 4)
    nn.init.zeros_(embedding.summary)
    profile = embedding.loading.detach().sum(1).expand(50, 400) + 0.01
    visible = torch.rand(50, 400) < 0.5
    ids, zeros = torch.zeros(50, 1, dtype=torch.int64), torch.zeros(50, 1)
    whole = embedding(ids, zeros, profile, torch.ones_like(visible), torch.arange(50))[0, 0]
    half = embedding(ids, zeros, profile * visible, visible, torch.arange(50))[:, 0].mean(0)
    torch.testing.assert_close(half, whole, rtol=0.1, atol=0.05)
