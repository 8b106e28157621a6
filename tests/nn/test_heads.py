"""Heads against their formulas."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.decomposition import PCA
from torch import nn

from fimp_sc.nn._heads import MIXTURE_WEIGHTS, LabelHead, ValueHead, mixture_loss


def test_value_head_equals_its_formula_for_all_and_for_some_features() -> None:
    torch.manual_seed(0)
    head = ValueHead(6, 4)
    nn.init.normal_(head.bias)
    nn.init.normal_(head.project.weight)
    embedding = torch.randn(3, 4)
    full = head(embedding)
    for i in range(3):
        for g in range(6):
            expected = head.loading[g] @ head.project.weight @ embedding[i] + head.bias[g]
            torch.testing.assert_close(full[i, g], expected)
    some = torch.tensor([5, 0, 0])
    torch.testing.assert_close(head(embedding, some), full[:, some])


def test_value_head_reconstructs_like_pca_at_the_start() -> None:
    cells = np.random.default_rng(0).standard_normal((30, 6)).astype(np.float32)
    pca = PCA(4).fit(cells)
    head = ValueHead(6, 4)
    head.start_from(pca.components_.T)
    with torch.no_grad():
        value = head(torch.from_numpy(pca.transform(cells)).float()).numpy()
    np.testing.assert_allclose(value + pca.mean_, pca.inverse_transform(pca.transform(cells)), atol=1e-5)


def test_start_from_clears_what_it_does_not_set() -> None:
    head = ValueHead(6, 4)
    head.start_from(np.ones((6, 2)))
    assert (head.loading[:, :2] == 1).all()
    assert (head.loading[:, 2:] == 0).all()


def test_label_head_is_linear_in_the_scaled_embedding() -> None:
    torch.manual_seed(0)
    head = LabelHead(8, 3, dropout=0.5).eval()
    embedding = torch.randn(5, 8) * 3
    assert (head(embedding) == 0).all(), "before training all classes are alike"
    nn.init.normal_(head.score.weight)
    nn.init.normal_(head.score.bias)
    spread = np.array([0.5, 2.0, 4.0])
    head.start_from(spread)
    scaled = embedding / torch.tensor([0.5, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(head(embedding), scaled @ head.score.weight.T + head.score.bias)


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40), sharpness=st.sampled_from([0.3, 1.0, 5.0]))
def test_loss_of_mixtures_and_the_best_of_them(seed: int, n: int, sharpness: float) -> None:
    first, second = np.random.default_rng(seed).beta(sharpness, 1.0, (2, n)).clip(1e-6, 1)
    loss = mixture_loss(torch.from_numpy(first), torch.from_numpy(second)).numpy()

    def expected(share: float) -> float:
        return -np.log(share * first + (1 - share) * second).sum()

    np.testing.assert_allclose(loss, [expected(share) for share in MIXTURE_WEIGHTS.double().numpy()], rtol=1e-6)
    # The loss is convex in the share: the best of the grid is next to the best of all.
    best = minimize_scalar(expected, bounds=(0, 1), method="bounded").x
    assert abs(float(MIXTURE_WEIGHTS[loss.argmin()]) - best) < 0.051 or loss.min() <= expected(best) + 1e-6


def test_loss_of_a_mixture_of_zeros_is_finite() -> None:
    assert torch.isfinite(mixture_loss(torch.zeros(3), torch.zeros(3))).all()
