"""Token embeddings against the formula, gene by gene."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fimp_sc.nn._embedding import FeatureEmbedding


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
        missing = energy.sum(0) / energy[seen].sum(0)
        summary = sum(profile[i, g] * embedding.loading[g] for g in seen) * missing
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


# Vectors of genes -----------------------------------------------------------------------------------------------------

KNOWN = np.array([True, True, False, True, True, True, True, False, True, True])


def test_scores_are_as_large_as_if_all_genes_were_visible() -> None:
    n = 1000
    embedding = FeatureEmbedding(n, 1)
    nn.init.ones_(embedding.loading)
    nn.init.zeros_(embedding.summary)
    counts = [1000, 500, 100, 1, 0]
    visible = torch.arange(n)[None] < torch.tensor(counts)[:, None]
    ids = torch.zeros(len(counts), 1, dtype=torch.int64)
    out = embedding(ids, torch.zeros(len(counts), 1), visible.float(), visible, torch.arange(len(counts)))
    torch.testing.assert_close(out[:, 0, 0].detach() / n, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))


def some_vectors(width: int = 4, seed: int = 0) -> np.ndarray:
    """Vectors far from zero, of which two components are larger than the others; NaN where there is none."""
    vectors = np.random.default_rng(seed).standard_normal((10, width)) * np.linspace(3, 1, width) + 7
    vectors[~KNOWN] = np.nan
    return vectors.astype(np.float32)


def from_vectors(vectors: np.ndarray, d_model: int = 6) -> FeatureEmbedding:
    torch.manual_seed(0)
    embedding = FeatureEmbedding(10, d_model, vector_width=vectors.shape[1])
    embedding.start_from_vectors(vectors, KNOWN)
    return embedding


def gram(embedding: FeatureEmbedding) -> np.ndarray:
    identities = embedding.identities().detach().numpy()[KNOWN]
    return identities @ identities.T


@pytest.mark.parametrize(("width", "d_model"), [(4, 6), (4, 4), (4, 2), (15, 6)])
def test_identities_start_as_principal_components_of_the_vectors(width: int, d_model: int) -> None:
    vectors = some_vectors(width)
    embedding = from_vectors(vectors, d_model)
    identities = embedding.identities().detach().numpy()
    centered = vectors[KNOWN] - vectors[KNOWN].mean(0)
    u, s, _ = np.linalg.svd(centered, full_matrices=False)
    kept = min(d_model, width)
    scores = u[:, :kept] * s[:kept]
    scores *= 0.3 / np.sqrt(np.square(scores).sum() / (KNOWN.sum() * d_model))
    np.testing.assert_allclose(identities[KNOWN] @ identities[KNOWN].T, scores @ scores.T, atol=1e-4)
    assert np.sqrt(np.square(identities[KNOWN]).mean()) == pytest.approx(0.3, rel=1e-5)


def test_genes_without_a_vector_keep_an_identity_of_their_own() -> None:
    vectors = some_vectors()
    torch.manual_seed(0)
    own = FeatureEmbedding(10, 6, vector_width=4).identity.detach().numpy()
    embedding = from_vectors(vectors)
    identities = embedding.identities().detach().numpy()
    np.testing.assert_array_equal(identities[~KNOWN], own[~KNOWN])
    assert (embedding.identity.detach().numpy()[KNOWN] == 0).all()
    assert np.linalg.matrix_rank(identities[KNOWN], tol=1e-4) == 4


def test_rotation_scale_and_origin_of_vectors_do_not_matter() -> None:
    vectors = some_vectors()
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0]
    moved = (25 * vectors @ rotation + np.arange(4)).astype(np.float32)
    for d_model in (6, 2):
        expected = gram(from_vectors(vectors, d_model))
        np.testing.assert_allclose(gram(from_vectors(moved, d_model)), expected, atol=1e-4)
        assert np.abs(gram(from_vectors(some_vectors(seed=1), d_model)) - expected).max() > 0.05


def test_vectors_of_other_genes_give_other_identities() -> None:
    vectors = some_vectors()
    shuffled = vectors.copy()
    shuffled[KNOWN] = np.roll(vectors[KNOWN], 1, axis=0)
    assert np.abs(gram(from_vectors(shuffled)) - gram(from_vectors(vectors))).max() > 0.05


def test_tokens_have_the_identities_of_the_vectors_whose_projection_alone_learns() -> None:
    embedding = from_vectors(some_vectors())
    feature_id, value = torch.tensor([[4, 2, 9]]), torch.zeros(1, 3)
    everything = torch.ones(1, 10, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    tokens = embedding(feature_id, value, torch.zeros(1, 10), *everything)[0, 1:]
    torch.testing.assert_close(tokens, embedding.identities()[feature_id[0]])
    tokens.square().sum().backward()
    assert embedding.project.weight.grad.any()
    assert embedding.identity.grad.any()
    assert "vectors" not in dict(embedding.named_parameters())
    assert "vectors" in embedding.state_dict()


def test_vectors_of_equal_direction_and_of_one_gene_are_finite() -> None:
    one = np.ones((10, 4), dtype=np.float32)
    embedding = from_vectors(one)
    assert torch.isfinite(embedding.identities()).all()
    assert embedding.project.weight.abs().max() < 1e3


def test_embedding_without_room_for_vectors_refuses_them() -> None:
    with pytest.raises(ValueError, match="pass vector_width"):
        FeatureEmbedding(10, 6).start_from_vectors(some_vectors(), KNOWN)


def test_rows_of_features_with_keys_are_the_same_in_any_order_and_company() -> None:
    key = np.random.default_rng(0).integers(2**64, size=30, dtype=np.uint64)
    order = np.random.default_rng(1).permutation(30)[:20]
    made = []
    for keys in (key, key[order]):
        torch.manual_seed(4)
        made.append((FeatureEmbedding(len(keys), 6, gene_key=keys), torch.rand(3)))
    (whole, after), (part, after_part) = made
    assert torch.equal(after, after_part), "what is drawn later does not depend on the number of features"
    assert torch.equal(part.identity, whole.identity[order])
    torch.testing.assert_close(part.loading * 20**0.5, whole.loading[order] * 30**0.5)
    assert not torch.equal(whole.identity, whole.loading)
    for parameter in (whole.identity, whole.loading):
        assert len(parameter.detach().unique()) == 180


def test_vectors_start_alike_in_any_order() -> None:
    vectors = some_vectors()
    order = np.random.default_rng(0).permutation(len(vectors))
    made = []
    for rows in (np.arange(len(vectors)), order):
        torch.manual_seed(0)
        embedding = FeatureEmbedding(10, 6, vector_width=4)
        embedding.start_from_vectors(vectors[rows], KNOWN[rows])
        made.append(embedding.project(embedding.vectors).detach())
    torch.testing.assert_close(made[1], made[0][order], rtol=1e-4, atol=1e-5)
