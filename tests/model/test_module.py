"""Losses and the start from principal components, against numpy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.decomposition import PCA
from torch import nn

from fimp_sc.data import GeneStatistics
from fimp_sc.model import FIMPModule

GENES = 12


def make_batch(n=6, n_dst=4, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    profile = torch.randn(n, GENES, generator=generator)
    feature_id = torch.stack([torch.randperm(GENES, generator=generator)[:5] for _ in range(n)])
    return {
        "nodes": torch.arange(n),
        "n_nodes": [n, n_dst],
        "indptr": [torch.arange(n_dst + 1) * 2],
        "indices": [torch.randint(0, n, (2 * n_dst,), generator=generator)],
        "feature_id": feature_id,
        "value": profile.gather(1, feature_id),
        "padding": torch.zeros(n, 5, dtype=torch.bool),
        "profile": profile,
        "visible": torch.ones(n, GENES, dtype=torch.bool),
        "target": torch.randn(n_dst, GENES, generator=generator),
        "target_mask": torch.rand(n_dst, GENES, generator=generator) < 0.4,
        "label": torch.tensor([2, -1, 0, 2]),
    }


def make_module(n_labels=3, **kwargs) -> FIMPModule:
    torch.manual_seed(0)
    return FIMPModule(GENES, n_labels, n_latent=8, n_layers=1, n_heads=2, **kwargs).eval()


def test_loss_equals_numpy() -> None:
    module, batch = make_module(label_weight=0.3), make_batch()
    module.value_variance.fill_(1.7)
    module.class_weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    inference, generative, losses = module(batch)
    assert inference["embedding"].shape == (4, 8)
    value = generative["value"].detach().numpy()
    mask = batch["target_mask"].numpy()
    masked = np.mean((value - batch["target"].numpy())[mask] ** 2) / 1.7
    logits = generative["logits"].detach().numpy().astype(float)
    log_probability = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    label = -(2.0 * log_probability[0, 2] + 0.5 * log_probability[2, 0] + 2.0 * log_probability[3, 2]) / 3
    assert losses.extra_metrics["masked_loss"].item() == pytest.approx(masked, rel=1e-4)
    assert losses.extra_metrics["label_loss"].item() == pytest.approx(label, rel=1e-4)
    assert losses.loss.item() == pytest.approx(masked + 0.3 * label, rel=1e-4)
    assert losses.n_obs_minibatch == 4


def test_batch_without_labels_or_hidden_entries_costs_nothing_and_is_finite() -> None:
    module, batch = make_module(), make_batch()
    batch["label"][:] = -1
    batch["target_mask"][:] = False
    losses = module(batch)[2]
    assert losses.loss.item() == 0
    losses.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_without_classes_there_is_no_label_head() -> None:
    module = make_module(0)
    _, generative, losses = module(make_batch())
    assert "logits" not in generative
    assert set(losses.extra_metrics) == {"masked_loss"}


def test_values_that_are_visible_are_no_part_of_the_loss() -> None:
    module, batch = make_module(), make_batch()
    before = module(batch)[2].extra_metrics["masked_loss"].item()
    batch["target"][~batch["target_mask"]] += 100.0
    assert module(batch)[2].extra_metrics["masked_loss"].item() == before


def cells(n=200, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal((n, 2)) @ np.random.default_rng(9).standard_normal((2, GENES))
    return np.abs(signal + 0.3 * rng.standard_normal((n, GENES))).astype(np.float32)


def start(module: FIMPModule, train, validation=None, **kwargs) -> None:
    statistics = GeneStatistics(train.mean(0), np.full(GENES, 1 / GENES, dtype=np.float32), 100.0)
    validation = train[:0] if validation is None else validation
    module.start_from_data(sparse.csr_matrix(train), sparse.csr_matrix(validation), statistics, **kwargs)


def test_without_validation_the_start_reconstructs_like_pca() -> None:
    module, train = make_module(), cells()
    start(module, train)
    centred = train - train.mean(0)
    scores = torch.from_numpy(centred) @ module.network.embedding.loading
    value = module.value_head(scores).detach().numpy()
    pca = PCA(8).fit(train)
    expected = pca.inverse_transform(pca.transform(train)) - train.mean(0)
    np.testing.assert_allclose(value, expected, atol=1e-3)
    np.testing.assert_allclose(module.gene_mean, train.mean(0), rtol=1e-5)
    assert float(module.target_sum) == 100.0
    assert float(module.value_variance) == pytest.approx(np.mean(centred**2), rel=1e-3)


def test_components_of_noise_start_smaller_than_those_of_signal() -> None:
    plain, shrunk = make_module(), make_module()
    start(plain, cells())
    start(shrunk, cells(), cells(400, seed=1))
    with torch.no_grad():
        factor = shrunk.value_head.loading.norm(dim=0) / plain.value_head.loading.norm(dim=0)
    assert (factor <= 1 + 1e-5).all()
    assert (factor >= 0).all()
    assert factor[0] > 0.6
    assert factor[4:].mean() < 0.5 * factor[0]


def test_wider_than_the_data_leaves_the_rest_zero() -> None:
    module, train = make_module(), cells(5)
    start(module, train)
    assert (module.network.embedding.loading[:, 4:] == 0).all()
    assert (module.network.embedding.loading[:, :4].abs().sum(0) > 0).all()


def test_class_balance() -> None:
    counts = np.array([1, 10, 100])
    alike, balanced = make_module(), make_module()
    start(alike, cells(), label_counts=counts, class_balance=0.0)
    start(balanced, cells(), label_counts=counts, class_balance=1.0)
    assert (alike.class_weight == 1).all()
    weighed = balanced.class_weight.numpy() * counts
    np.testing.assert_allclose(weighed, weighed[0], rtol=1e-4)


def test_order_of_equal_values_is_a_seeded_permutation() -> None:
    a, b, c = (make_module(random_state=seed).gene_rank for seed in (0, 0, 1))
    assert sorted(a.tolist()) == list(range(GENES))
    assert (a == b).all()
    assert (a != c).any()


def test_sampling_is_refused() -> None:
    with pytest.raises(TypeError, match="get_expression"):
        make_module().sample()


def test_heads_read_the_embedding() -> None:
    module, batch = make_module(), make_batch()
    nn.init.normal_(module.value_head.bias)
    z = module.inference(batch)["embedding"]
    some = torch.tensor([3, 1])
    torch.testing.assert_close(module.generative(z, some)["value"], module.generative(z)["value"][:, some])
