"""Network, heads and losses as one scvi-tools module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from sklearn.decomposition import PCA
from torch import Tensor, nn

from fimp_sc.nn import FIMPNetwork, LabelHead, ValueHead

if TYPE_CHECKING:
    from scipy import sparse

    from fimp_sc.data import Batch, GeneStatistics


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
            per_cell = nn.functional.cross_entropy(
                generative_outputs["logits"], labels, weight=self.class_weight, ignore_index=-1, reduction="sum"
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
        statistics: GeneStatistics,
        *,
        label_counts: np.ndarray | None = None,
        class_balance: float = 0.0,
        random_state: int = 0,
    ) -> None:
        """Set gene statistics, and let training start where principal components stand.

        The gene loadings become the leading principal components of the training cells, so the summary token of a
        cell is its vector of PCA scores. The value head reconstructs from them, with each component shrunk by how
        well it predicts hidden entries of the validation cells: components that only memorise the noise of the
        training cells start at zero.

        Parameters
        ----------
        train, validation
            ``(n_cells, n_features)`` CSR log-normalised expression.
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
            frequency = np.maximum(label_counts, 1) / np.maximum(label_counts, 1).mean()
            self.class_weight.copy_(torch.from_numpy(frequency**-class_balance))

        width = self.value_head.loading.shape[1]
        n_components = min(width, min(train.shape) - 1)
        if n_components < 1:
            return
        pca = PCA(n_components, svd_solver="arpack", random_state=random_state).fit(train)
        spread = np.sqrt(np.maximum(pca.explained_variance_, 1e-12))
        # Between plain scores, where few components dominate, and whitened ones, where noise weighs as much as signal.
        scale = np.sqrt(spread)
        scale *= np.mean(spread / scale)
        encode = pca.components_.T / scale
        decode = pca.components_.T * scale
        if validation.shape[0]:
            decode = decode * _shrinkage(validation, mean, encode, decode, random_state)
        self.network.embedding.start_from(encode)
        self.value_head.start_from(decode)
        if self.label_head is not None:
            self.label_head.start_from(spread / scale)


def _shrinkage(
    cells: sparse.csr_matrix, mean: np.ndarray, encode: np.ndarray, decode: np.ndarray, random_state: int
) -> np.ndarray:
    """Best factor in [0, 1] of each component for predicting hidden entries from visible ones."""
    rng = np.random.default_rng(random_state)
    product, square = np.zeros(encode.shape[1]), np.zeros(encode.shape[1])
    for i in range(0, min(cells.shape[0], 4096), 512):
        centred = cells[i : i + 512].toarray() - mean
        hidden = rng.random(centred.shape) < 0.15
        scores = np.where(hidden, 0.0, centred) @ encode / 0.85
        residual = np.where(hidden, centred, 0.0)
        product += np.einsum("nk,nk->k", scores, residual @ decode)
        square += np.einsum("nk,nk->k", scores**2, hidden.astype(np.float32) @ decode**2)
    return np.clip(product / np.maximum(square, 1e-12), 0.0, 1.0)
