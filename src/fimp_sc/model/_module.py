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
    from collections.abc import Iterable, Mapping

    from fimp_sc.data import Batch, GeneStatistics, SequenceBatch, SequenceShape, SequenceStatistics


_LEAST_VARIANCE = 1e-8


class FIMPModule(BaseModuleClass):
    """FIMP network with heads for masked values and, where there are labels, a label head.

    Parameters
    ----------
    n_features
        Number of genes, or other features; 0 without.
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
    sequences
        By modality: tokens of signals and images.
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
        sequences: Mapping[str, SequenceShape] | None = None,
        network: FoundationNetwork | None = None,
    ) -> None:
        super().__init__()
        self.label_weight = label_weight
        self.sequences = dict(sequences or {})
        self.network: FIMPNetwork | FoundationNetwork = network or FIMPNetwork(
            n_features, n_latent, n_layers, n_heads, layer=layer, reduce=reduce, dropout=dropout,
            vector_width=vector_width, sequences=self.sequences,
        )  # fmt: skip
        self.n_bins = 0 if network is None else int(network.n_bins or 0)
        width = self.network.width
        self.value_head = ValueHead(n_features, width) if n_features else None
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
        self.statistics = nn.ModuleDict()
        for i, (name, shape) in enumerate(self.sequences.items()):
            self.statistics[str(i)] = _Statistics(shape.n_coordinates)
            if network is not None:
                self.set_sequence_statistics(name, network.embedding.statistics())

    def _get_inference_input(self, tensors: Batch, **kwargs: Any) -> dict[str, Any]:
        return {"batch": tensors}

    def _get_generative_input(self, tensors: Batch, inference_outputs: dict[str, Tensor], **kwargs: Any) -> dict:
        return {"embedding": inference_outputs["embedding"]}

    @auto_move_data
    def inference(self, batch: Batch, genes: Tensor | None = None, *, reconstruct: bool = True) -> dict[str, Any]:
        """Return what the network makes of the destinations.

        Parameters
        ----------
        batch
            A block.
        genes
            ``(q,)`` int64, genes that a foundation model's decoder is to predict; in training the batch names them.
        reconstruct
            Whether sequences are wanted, too.

        Returns
        -------
        ``"embedding"`` ``(n_dst, n_latent)``; for genes that a decoder predicts their ``"bin"``; and, where there are
        signals or images, their standardised numbers as ``"sequences"``, ``(n_dst, f, p)`` by modality.
        """
        absent = None
        if genes is not None:
            queries = genes.expand(batch["n_nodes"][-1], -1)
        elif "query_id" in batch:
            queries, absent = batch["query_id"], batch["query_padding"]
        else:
            n_queries = self.network.n_queries(batch, reconstruct=reconstruct)
            return self.outputs(self.network.states(batch, n_queries), batch, reconstruct=reconstruct)
        if not isinstance(self.network, FoundationNetwork):
            raise TypeError("FIMP-base has no decoder of bins.")
        embedding, bins = self.network.decode(batch, queries, absent)
        return {"embedding": embedding, "bin": bins}

    def outputs(self, states: Tensor, batch: Batch, *, reconstruct: bool = True) -> dict[str, Any]:
        """Return what is read off the tokens of the destinations after the last layer."""
        out: dict[str, Any] = {"embedding": self.network.read(states)}
        if reconstruct and self.sequences:
            heads = self.network.heads
            out["sequences"] = {name: heads[name](part) for name, part in self.network.split(states, batch).items()}
        return out

    @auto_move_data
    def generative(self, embedding: Tensor, features: Tensor | None = None) -> dict[str, Tensor]:
        """Return centred ``"value"`` ``(n, g)`` and ``"logits"`` ``(n, n_labels)``, where there are such heads."""
        embedding = (embedding - self.embedding_mean) / self.embedding_std
        out = {}
        if self.value_head is not None:
            out["value"] = self.value_head(embedding, features)
        if self.label_head is not None:
            out["logits"] = self.label_head(embedding)
        return out

    def loss(self, tensors: Batch, inference_outputs: dict, generative_outputs: dict) -> LossOutput:
        """Masked-value loss plus weighted label loss.

        The masked-value loss is the mean squared error over hidden entries divided by the variance of an entry
        around its gene's mean, so that 1 is what predicting gene means achieves. The label loss is the
        cross-entropy over labeled destinations. The decoder of a foundation model that is trained has the mean squared
        error of bins, on the scale from 0 to 1. Signals and images add the mean squared error of their hidden tokens;
        as their numbers are standardised, 1 is what predicting the mean achieves here, too.
        """
        n_obs = tensors["label"].shape[0]
        parts: dict[str, Tensor] = {}
        losses = [
            masked_loss(predicted, tensors["sequences"][name])
            for name, predicted in inference_outputs.get("sequences", {}).items()
        ]
        if "value" in generative_outputs:
            hidden = tensors["target_mask"]
            error = (generative_outputs["value"] - tensors["target"]).square()
            losses.append((error * hidden).sum() / hidden.sum().clamp(min=1) / self.value_variance)
        loss = inference_outputs["embedding"].new_zeros(())
        if losses:
            loss = parts["masked_loss"] = torch.stack(losses).sum()
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
    def set_statistics(self, statistics: GeneStatistics, train: sparse.csr_matrix) -> None:
        """Set what the training cells tell about genes.

        Parameters
        ----------
        statistics
            Of the training cells.
        train
            ``(n_cells, n_features)`` CSR log-normalised expression of training cells.
        """
        self.gene_mean.copy_(torch.from_numpy(statistics.mean))
        self.gene_fraction.copy_(torch.from_numpy(statistics.fraction))
        self.target_sum.fill_(statistics.target_sum)
        variance = float(train.power(2).mean()) - float(np.square(statistics.mean).mean())
        self.value_variance.fill_(max(variance, _LEAST_VARIANCE))

    def set_class_weight(self, counts: np.ndarray, balance: float = 0.0) -> None:
        """Set what an error in each class costs.

        Parameters
        ----------
        counts
            ``(n_labels,)`` training cells per class.
        balance
            0 weighs cells alike, 1 classes alike.
        """
        counts = np.maximum(counts, 1)
        weight = (counts / counts.mean()) ** -balance
        self.class_weight.copy_(torch.from_numpy(weight * counts.sum() / (weight * counts).sum()))

    def set_sequence_statistics(self, name: str, statistics: SequenceStatistics) -> None:
        """Set what the training nodes tell about a modality of signals or images."""
        buffers: Any = self.statistics[str(list(self.sequences).index(name))]
        buffers.mean.fill_(statistics.mean)
        buffers.std.fill_(statistics.std)
        buffers.center.copy_(torch.from_numpy(statistics.center))
        buffers.spread.copy_(torch.from_numpy(statistics.spread))

    def start_from_components(self, name: str, tokens: Tensor) -> None:
        """Let the tokens of a modality start as their principal components.

        Parameters
        ----------
        name
            Of the modality.
        tokens
            ``(n, f, p)`` standardised numbers of training nodes.
        """
        numbers = tokens.flatten(0, 1).double()
        basis = torch.linalg.eigh(numbers.T @ numbers).eigenvectors.flip(1)
        parts: Any = self.network.sequences
        parts.embeddings[parts.names.index(name)].start_from(basis.float().to(self.device))

    @torch.no_grad()
    def fit_heads(self, batches: Iterable[Batch], ridge: float) -> None:
        """Set the heads that read signals and images to least squares over the hidden tokens of some blocks.

        Parameters
        ----------
        batches
            Blocks with hidden tokens.
        ridge
            Added to the diagonal of the normal equations.
        """
        square: dict[str, Tensor] = {}
        product: dict[str, Tensor] = {}
        for batch in batches:
            states = self.network.states(batch, self.network.n_queries(batch, reconstruct=True))
            for name, part in self.network.split(states, batch).items():
                nodes = batch["sequences"][name]
                hidden = nodes["target_mask"]
                x = torch.nn.functional.pad(part[hidden], (0, 1), value=1.0).double()
                square[name] = square.get(name, 0) + x.T @ x
                product[name] = product.get(name, 0) + x.T @ nodes["target"][hidden].double()
        for name, head in self.network.heads.items():
            if name in square:
                eye = torch.eye(len(square[name]), dtype=torch.float64, device=self.device)
                weight = torch.linalg.solve(square[name] + ridge * eye, product[name]).float()
                linear: Any = head
                linear.weight.copy_(weight[:-1].T)
                linear.bias.copy_(weight[-1])

    def start_from_vectors(self, vectors: np.ndarray, known: np.ndarray) -> None:
        """Use pretrained vectors of genes, see :meth:`~fimp_sc.nn.FeatureEmbedding.start_from_vectors`."""
        if not isinstance(self.network, FIMPNetwork) or self.network.embedding is None:
            raise TypeError("Only FIMP-base of genes starts from their vectors.")
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
        if self.value_head is not None:
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
        if not isinstance(self.network, FIMPNetwork) or self.network.embedding is None or self.value_head is None:
            raise TypeError("Only FIMP-base of genes starts from principal components.")
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


class _Statistics(nn.Module):
    """What training nodes tell about a modality, kept with the weights."""

    mean: Tensor
    std: Tensor
    center: Tensor
    spread: Tensor

    def __init__(self, n_coordinates: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.register_buffer("center", torch.zeros(n_coordinates))
        self.register_buffer("spread", torch.ones(n_coordinates))


def masked_loss(predicted: Tensor, nodes: SequenceBatch) -> Tensor:
    """Return the mean squared error over the hidden tokens of destinations."""
    hidden = nodes["target_mask"]
    error = (predicted - nodes["target"]).square().mean(2)
    return (error * hidden).sum() / hidden.sum().clamp(min=1)


def _bin_loss(predicted: Tensor, bins: Tensor, padding: Tensor, largest: int) -> Tensor:
    error = ((predicted - bins) / largest).square().masked_fill(padding, 0.0)
    return error.sum() / (~padding).sum().clamp(min=1)
