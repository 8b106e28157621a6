"""Network, heads and losses as one scvi-tools module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy import sparse
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from sklearn.decomposition import PCA
from torch import Tensor, nn

from fimp_sc.model._smoother import linear_smoother
from fimp_sc.nn import FIMPNetwork, FoundationNetwork, LabelHead, ValueHead

if TYPE_CHECKING:
    from fimp_sc.data import Batch, GeneStatistics


_LEAST_VARIANCE = 1e-8


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
    vector_width
        Width of pretrained vectors of the genes, if there are any.
    network
        A foundation model instead of FIMP-base, which makes the parameters of the network above meaningless.
    """

    embedding_mean: Tensor
    embedding_std: Tensor

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
        vector_width: int | None = None,
        network: FoundationNetwork | None = None,
    ) -> None:
        super().__init__()
        self.label_weight = label_weight
        self.network: FIMPNetwork | FoundationNetwork = network or FIMPNetwork(
            n_features, n_latent, n_layers, n_heads, layer=layer, reduce=reduce, dropout=dropout,
            vector_width=vector_width,
        )  # fmt: skip
        self.n_bins = 0 if network is None else int(network.n_bins or 0)
        width = self.network.width
        self.value_head = ValueHead(n_features, width)
        self.label_head = LabelHead(width, n_labels, dropout) if n_labels else None
        self.register_buffer("embedding_mean", torch.zeros(width))
        self.register_buffer("embedding_std", torch.ones(width))
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
    def inference(self, batch: Batch, genes: Tensor | None = None) -> dict[str, Tensor]:
        """Return ``"embedding"`` ``(n_dst, n_latent)`` and, for genes that a decoder predicts, their ``"bin"``.

        These are ``genes``, ``(q,)`` int64, or in training those that the batch names.
        """
        absent = None
        if genes is not None:
            queries = genes.expand(batch["n_nodes"][-1], -1)
        elif "query_id" in batch:
            queries, absent = batch["query_id"], batch["query_padding"]
        else:
            return {"embedding": self.network(batch)}
        if not isinstance(self.network, FoundationNetwork):
            raise TypeError("FIMP-base has no decoder of bins.")
        embedding, bins = self.network.decode(batch, queries, absent)
        return {"embedding": embedding, "bin": bins}

    @auto_move_data
    def generative(self, embedding: Tensor, features: Tensor | None = None) -> dict[str, Tensor]:
        """Return centred ``"value"`` ``(n, g)`` and, with a label head, ``"logits"`` ``(n, n_labels)``."""
        embedding = (embedding - self.embedding_mean) / self.embedding_std
        out = {"value": self.value_head(embedding, features)}
        if self.label_head is not None:
            out["logits"] = self.label_head(embedding)
        return out

    def loss(self, tensors: Batch, inference_outputs: dict, generative_outputs: dict) -> LossOutput:
        """Masked-value loss plus weighted label loss.

        The masked-value loss is the mean squared error over hidden entries divided by the variance of an entry
        around its gene's mean, so that 1 is what predicting gene means achieves. The label loss is the
        cross-entropy over labeled destinations. The decoder of a foundation model that is trained has the mean squared
        error of bins, on the scale from 0 to 1.
        """
        hidden = tensors["target_mask"]
        n_obs = tensors["label"].shape[0]
        error = (generative_outputs["value"] - tensors["target"]).square()
        masked = (error * hidden).sum() / hidden.sum().clamp(min=1) / self.value_variance
        parts = {"masked_loss": masked}
        loss = masked
        if "query_id" in tensors:
            parts["decoder_loss"] = _bin_loss(
                inference_outputs["bin"], tensors["query_bin"], tensors["query_padding"], self.n_bins - 1
            )
            loss = loss + parts["decoder_loss"]
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
    def set_statistics(
        self,
        statistics: GeneStatistics,
        train: sparse.csr_matrix,
        label_counts: np.ndarray | None = None,
        class_balance: float = 0.0,
    ) -> None:
        """Set what the training cells tell about genes and classes.

        Parameters
        ----------
        statistics
            Of the training cells.
        train
            ``(n_cells, n_features)`` CSR log-normalised expression of training cells.
        label_counts
            ``(n_labels,)`` training cells per class.
        class_balance
            0 weighs cells alike, 1 classes alike.
        """
        self.gene_mean.copy_(torch.from_numpy(statistics.mean))
        self.gene_fraction.copy_(torch.from_numpy(statistics.fraction))
        self.target_sum.fill_(statistics.target_sum)
        variance = float(train.power(2).mean()) - float(np.square(statistics.mean).mean())
        self.value_variance.fill_(max(variance, _LEAST_VARIANCE))
        if label_counts is not None:
            counts = np.maximum(label_counts, 1)
            weight = (counts / counts.mean()) ** -class_balance
            self.class_weight.copy_(torch.from_numpy(weight * counts.sum() / (weight * counts).sum()))

    def start_from_vectors(self, vectors: np.ndarray, known: np.ndarray) -> None:
        """Use pretrained vectors of genes, see :meth:`~fimp_sc.nn.FeatureEmbedding.start_from_vectors`."""
        if not isinstance(self.network, FIMPNetwork):
            raise TypeError("A foundation model has vectors of its own.")
        self.network.embedding.start_from_vectors(vectors, known)

    @torch.no_grad()
    def start_from_embeddings(self, embedding: np.ndarray) -> None:
        """Let the heads of a foundation model see standardised embeddings, and start by predicting gene means.

        Embeddings of one tissue differ little from each other beside their common mean, which would hide from a
        linear map what they say about a cell.

        Parameters
        ----------
        embedding
            ``(n_cells, width)`` of some training cells.
        """
        std = embedding.std(0)
        self.embedding_mean.copy_(torch.from_numpy(embedding.mean(0)))
        self.embedding_std.copy_(torch.from_numpy(np.maximum(std, 1e-3 * max(float(std.max()), 1e-6))))
        nn.init.zeros_(self.value_head.loading)

    @torch.no_grad()
    def start_as_smoother(
        self,
        train: sparse.csr_matrix,
        validation: sparse.csr_matrix,
        around: sparse.csr_matrix,
        mean: np.ndarray,
        *,
        random_state: int = 0,
    ) -> None:
        """Let training start as the best linear smoother of principal components.

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
        mean
            ``(n_features,)`` mean expression of the training cells.
        random_state
            Seed.
        """
        if not isinstance(self.network, FIMPNetwork):
            raise TypeError("A foundation model does not start from principal components.")
        n_own, n_neighbourhood = self.network.n_own, self.network.n_neighbourhood
        n_components = min(n_own, min(train.shape) - 1)
        if n_components < 1 or float(self.value_variance) <= _LEAST_VARIANCE:
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


def _bin_loss(predicted: Tensor, bins: Tensor, padding: Tensor, largest: int) -> Tensor:
    error = ((predicted - bins) / largest).square().masked_fill(padding, 0.0)
    return error.sum() / (~padding).sum().clamp(min=1)
