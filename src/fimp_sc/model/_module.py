"""Network, heads and losses as one scvi-tools module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy import sparse
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from sklearn.decomposition import PCA
from torch import Tensor, nn

from fimp_sc.nn import FIMPNetwork, LabelHead, ValueHead

if TYPE_CHECKING:
    from fimp_sc.data import Batch, GeneStatistics


_HIDDEN = 0.15


class FIMPModule(BaseModuleClass):
    """FIMP network with a masked-value head and, where there are labels, a label head.

    Parameters
    ----------
    n_features
        Number of genes.
    n_labels
        Number of classes; 0 leaves the label head out.
    n_latent, n_layers, n_heads, layer, reduce, dropout
        See :class:`~fimp_sc.nn.FIMPNetwork`.
    label_weight
        Weight of the label loss beside the masked-value loss.
    random_state
        Seed of the order of equal values.
    """

    def __init__(
        self,
        n_features: int,
        n_labels: int = 0,
        *,
        n_latent: int = 64,
        n_layers: int = 2,
        n_heads: int = 4,
        layer: Literal["practical", "paper"] = "practical",
        reduce: Literal["mean", "sum"] = "mean",
        dropout: float = 0.1,
        label_weight: float = 1.0,
        random_state: int = 0,
    ) -> None:
        super().__init__()
        self.label_weight = label_weight
        self.network = FIMPNetwork(n_features, n_latent, n_layers, n_heads, layer=layer, reduce=reduce, dropout=dropout)
        self.value_head = ValueHead(n_features, n_latent)
        self.label_head = LabelHead(n_latent, n_labels, dropout) if n_labels else None
        order = np.random.default_rng(random_state).permutation(n_features)
        self.register_buffer("gene_rank", torch.from_numpy(order))
        self.register_buffer("gene_mean", torch.zeros(n_features))
        self.register_buffer("gene_fraction", torch.zeros(n_features))
        self.register_buffer("target_sum", torch.zeros((), dtype=torch.float64))
        self.register_buffer("value_variance", torch.ones(()))
        self.register_buffer("class_weight", torch.ones(max(n_labels, 1)))

    def _get_inference_input(self, tensors: Batch, **kwargs: Any) -> dict[str, Any]:
        return {"batch": tensors}

    def _get_generative_input(self, tensors: Batch, inference_outputs: dict[str, Tensor], **kwargs: Any) -> dict:
        return {"embedding": inference_outputs["embedding"]}

    @auto_move_data
    def inference(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"embedding": (n_dst, n_latent)}``."""
        return {"embedding": self.network(batch)}

    @auto_move_data
    def generative(self, embedding: Tensor, features: Tensor | None = None) -> dict[str, Tensor]:
        """Return centred ``"value"`` ``(n, g)`` and, with a label head, ``"logits"`` ``(n, n_labels)``."""
        out = {"value": self.value_head(embedding, features)}
        if self.label_head is not None:
            out["logits"] = self.label_head(embedding)
        return out

    def loss(self, tensors: Batch, inference_outputs: dict, generative_outputs: dict) -> LossOutput:
        """Masked-value loss plus weighted label loss.

        The masked-value loss is the mean squared error over hidden entries divided by the variance of an entry
        around its gene's mean, so that 1 is what predicting gene means achieves. The label loss is the
        cross-entropy over labeled destinations.
        """
        hidden = tensors["target_mask"]
        n_obs = tensors["label"].shape[0]
        error = (generative_outputs["value"] - tensors["target"]).square()
        masked = (error * hidden).sum() / hidden.sum().clamp(min=1) / self.value_variance
        parts = {"masked_loss": masked}
        loss = masked
        if self.label_head is not None:
            labels = tensors["label"]
            labeled = (labels >= 0).sum().clamp(min=1)
            # Validation asks how good predictions are, not how well a weighted loss is minimised.
            weight = self.class_weight if self.training else None
            per_cell = nn.functional.cross_entropy(
                generative_outputs["logits"], labels, weight=weight, ignore_index=-1, reduction="sum"
            )
            parts["label_loss"] = per_cell / labeled
            loss = loss + self.label_weight * parts["label_loss"]
        return LossOutput(loss=loss, n_obs_minibatch=n_obs, extra_metrics=parts)

    def sample(self, *args: Any, **kwargs: Any) -> None:
        """FIMP predicts means and has no generative distribution to sample from."""
        raise TypeError("FIMP has no distribution to sample from; use get_expression for predicted means.")

    @torch.no_grad()
    def start_from_data(
        self,
        train: sparse.csr_matrix,
        validation: sparse.csr_matrix,
        around: sparse.csr_matrix,
        statistics: GeneStatistics,
        *,
        label_counts: np.ndarray | None = None,
        class_balance: float = 0.0,
        random_state: int = 0,
    ) -> None:
        """Set gene statistics, and let training start as the best linear smoother of principal components.

        The gene loadings become the leading principal components of the training cells, so the summary token of a
        cell is its vector of PCA scores, beside which the layers write the scores of its neighbours' mean. How much a
        component of either tells about hidden entries is measured on the validation cells, and sets how strongly the
        value head reads it: components that only memorise the noise of the training cells start at zero.

        Parameters
        ----------
        train, validation
            ``(n_cells, n_features)`` CSR log-normalised expression.
        around
            ``(n_validation, n_features)`` CSR, mean expression around each validation cell.
        statistics
            Of the training cells.
        label_counts
            ``(n_labels,)`` training cells per class.
        class_balance
            0 weighs cells alike, 1 classes alike.
        random_state
            Seed.
        """
        mean = statistics.mean
        self.gene_mean.copy_(torch.from_numpy(mean))
        self.gene_fraction.copy_(torch.from_numpy(statistics.fraction))
        self.target_sum.fill_(statistics.target_sum)
        variance = float(train.power(2).mean()) - float(np.square(mean).mean())
        self.value_variance.fill_(max(variance, 1e-8))
        if label_counts is not None:
            counts = np.maximum(label_counts, 1)
            weight = (counts / counts.mean()) ** -class_balance
            self.class_weight.copy_(torch.from_numpy(weight * counts.sum() / (weight * counts).sum()))

        n_own, n_neighbourhood = self.network.n_own, self.network.n_neighbourhood
        n_components = min(n_own, min(train.shape) - 1)
        if n_components < 1 or variance < 1e-8:
            return
        deviation = np.sqrt(np.maximum(np.asarray(train.power(2).mean(0)).ravel() - mean**2, 0.0))
        # Halfway between covariance, where a few strong genes decide, and correlation, where noise does.
        gene_scale = np.sqrt(np.maximum(deviation, 1e-3 * max(float(deviation.max()), 1e-8)))
        pca = PCA(n_components, svd_solver="arpack", random_state=random_state)
        pca.fit(train @ sparse.diags(1.0 / gene_scale))
        spread = np.sqrt(np.maximum(pca.explained_variance_, 1e-12))
        # Likewise between plain scores and whitened ones.
        scale = np.sqrt(spread)
        scale *= np.mean(spread / scale)
        encode = pca.components_.T / (gene_scale[:, None] * scale)
        decode = pca.components_.T * (gene_scale[:, None] * scale)
        shared = min(n_components, n_neighbourhood)
        columns = np.zeros((len(mean), n_own + shared))
        columns[:, :n_components] = decode
        if validation.shape[0]:
            own, neighbours = linear_smoother(validation, around, mean, encode, decode, shared, random_state)
            columns[:, :n_components] = decode * own
            columns[:, n_own:] = decode[:, :shared] * neighbours
        self.network.embedding.start_from(encode)
        self.value_head.start_from(columns)
        if self.label_head is not None:
            deviations = np.ones(n_own + shared)
            deviations[:n_components] = spread / scale
            deviations[n_own:] = (spread / scale)[:shared]
            self.label_head.start_from(deviations)


def linear_smoother(
    cells: sparse.csr_matrix,
    around: sparse.csr_matrix,
    mean: np.ndarray,
    encode: np.ndarray,
    decode: np.ndarray,
    n_neighbourhood: int,
    random_state: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Fit hidden entries by each component of the cell's visible entries and of its neighbours' mean.

    Parameters
    ----------
    cells, around
        ``(n_cells, n_features)`` expression of cells and mean expression of their neighbours.
    mean
        ``(n_features,)``.
    encode, decode
        ``(n_features, k)`` loadings to scores, and from scores back.
    n_neighbourhood
        Number of leading components of which the neighbours' mean is used.
    random_state
        Seed of the hidden entries.

    Returns
    -------
    Two non-negative vectors, ``(k,)`` and ``(n_neighbourhood,)``: factors of the cell's and of the neighbours'
    scores, fitted component by component with least squares.
    """
    rng = np.random.default_rng(random_state)
    square = np.zeros((encode.shape[1], 2, 2))
    product = np.zeros((encode.shape[1], 2))
    for i in range(0, cells.shape[0], 512):
        centred = cells[i : i + 512].toarray() - mean
        hidden = rng.random(centred.shape) < _HIDDEN
        own = np.where(hidden, 0.0, centred) @ encode / (1.0 - _HIDDEN)
        scores = np.stack([own, (around[i : i + 512].toarray() - mean) @ encode], axis=2)
        weight = hidden.astype(np.float32) @ decode**2
        square += np.einsum("nk,nka,nkb->kab", weight, scores, scores)
        product += np.einsum("nka,nk->ka", scores, np.where(hidden, centred, 0.0) @ decode)
    single = np.maximum(product, 0.0) / np.maximum(np.diagonal(square, axis1=1, axis2=2), 1e-12)
    ridge = 1e-6 * np.trace(square, axis1=1, axis2=2)[:, None, None] + 1e-12
    both = np.linalg.solve(square + ridge * np.eye(2), product[..., None])[..., 0]
    # Where the joint fit is negative, the one that explains more on its own is the non-negative solution.
    better = (single * product).argmax(1)[:, None] == np.arange(2)
    fitted = np.where(both.min(1, keepdims=True) >= 0, both, np.where(better, single, 0.0))
    fitted[n_neighbourhood:, 0] = single[n_neighbourhood:, 0]
    return fitted[:, 0], fitted[:n_neighbourhood, 1]
