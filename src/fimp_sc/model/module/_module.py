"""Network, heads and losses as one scvi-tools module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scvi.module.base import LossOutput, auto_move_data
from torch import Tensor, nn

from fimp_sc._draws import combined
from fimp_sc._recipe import recipe
from fimp_sc.data import without_neighbors
from fimp_sc.model.module._initialize import StartingModule
from fimp_sc.model.module._labels import LabelingModule
from fimp_sc.nn._heads import LabelHead, ValueHead
from fimp_sc.nn._network import FIMPNetwork

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from fimp_sc.data import Batch, SequenceBatch, SequenceShape
    from fimp_sc.nn._network import Network


# Training cells whose embeddings are kept.
N_REFERENCE = 512


class FIMPModule(LabelingModule, StartingModule):
    """FIMP network with heads for masked values and, where there are labels, a label head.

    Parameters
    ----------
    n_features
        Number of genes, or other features; 0 without.
    n_labels
        Number of classes; 0 leaves the label head out.
    n_latent, n_layers, n_heads, layer, reduce, dropout
        See :class:`~fimp_sc.nn._network.FIMPNetwork`.
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
    alone
        Whether labels are also predicted from each node without its neighbors, by a head of its own.
    gene_key
        ``(n_features,)`` keys of the features, by default their places: what is drawn for a feature depends on its key.
    n_tables
        Number of tables that have the features, each with a total of its own.

    Attributes
    ----------
    neighbor_weight
        ``()``, weight of the prediction with neighbors in predicted labels; the rest is the prediction without.
    smoothing_weight
        ``()``, how much of what is so predicted is smoothed over neighbors.
    mixtures
        ``(2, 2)``, both weights for the cells of training, and for those of other sections.
    batch_name, batch_gain
        ``(n_batches,)`` int64, hashes of the names of batches, and ``(n_batches, n_features)``, see
        ``matched_gains`` of ``_matched_batches``.
    linear_scores, linear_bias, linear_weight
        ``(n_features, n_labels)`` and ``(n_labels,)``, a linear model of labels that reads all centered genes, where
        there are few enough; and ``()``, its weight in predicted labels. 0 of it means that there is none.
    reference, reference_name, n_reference, reference_distance
        Embeddings of some training cells ``(512, n_latent)``, hashes of their names ``(512,)`` int64, their number,
        and the distance that is usual.
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
        vector_width: int | None = None,
        sequences: Mapping[str, SequenceShape] | None = None,
        network: Network | None = None,
        alone: bool = False,
        gene_key: NDArray[np.uint64] | None = None,
        n_tables: int = 1,
    ) -> None:
        super().__init__()
        self.label_weight = label_weight
        self.sequences = dict(sequences or {})
        self.network = network or FIMPNetwork(
            n_features, n_latent, n_layers, n_heads, layer=layer, reduce=reduce, dropout=dropout,
            vector_width=vector_width, sequences=self.sequences, gene_key=gene_key,
        )  # fmt: skip
        self.n_bins = int(self.network.n_bins or 0)
        width = self.network.width
        self.value_head = ValueHead(n_features, width, gene_key) if n_features else None
        self.label_head = LabelHead(width, n_labels, dropout) if n_labels else None
        self.label_head_alone = LabelHead(width, n_labels, dropout) if n_labels and alone else None
        self.register_buffer("neighbor_weight", torch.tensor(1.0 if self.label_head_alone is None else 0.5))
        self.register_buffer("smoothing_weight", torch.zeros(()))
        # Of cells of training, and of other sections.
        self.register_buffer("mixtures", torch.stack([self.neighbor_weight, self.smoothing_weight]).repeat(2, 1))
        n_linear = n_features if network is None and n_features <= recipe().linear_genes else 0
        self.register_buffer("linear_scores", torch.zeros(n_linear, n_labels))
        self.register_buffer("linear_bias", torch.zeros(n_labels))
        self.register_buffer("linear_weight", torch.zeros(()))
        self.register_buffer("embedding_mean", torch.zeros(width))
        self.register_buffer("embedding_std", torch.ones(width))
        # Embeddings of training cells, and how far from them is usual.
        self.register_buffer("reference", torch.zeros(N_REFERENCE, width))
        self.register_buffer("reference_name", torch.zeros(N_REFERENCE, dtype=torch.int64))
        self.register_buffer("n_reference", torch.zeros((), dtype=torch.int64))
        self.register_buffer("reference_distance", torch.zeros(()))
        self.gene_key = np.arange(n_features, dtype=np.uint64) if gene_key is None else gene_key
        order = np.argsort(combined(random_state, self.gene_key))
        self.register_buffer("gene_rank", torch.from_numpy(np.argsort(order)))
        self.register_buffer("gene_mean", torch.zeros(n_features))
        self.register_buffer("gene_fraction", torch.zeros(n_features))
        total = torch.zeros(() if n_tables == 1 else n_tables, dtype=torch.float64)
        self.register_buffer("target_sum", total)
        self.register_buffer("value_variance", torch.ones(()))
        # Empty where batches do not differ, or there is one.
        self.register_buffer("batch_name", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("batch_gain", torch.zeros(0, n_features))
        self.register_buffer("class_weight", torch.ones(max(n_labels, 1)))
        self.statistics = nn.ModuleDict()
        for i, (name, shape) in enumerate(self.sequences.items()):
            self.statistics[str(i)] = _Statistics(shape.n_coordinates)
            own = self.network.sequence_statistics()
            if own is not None:
                self.set_sequence_statistics(name, own)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A model is built before it knows its batches. Where none are named, those that are there stay.
        for name in ("batch_name", "batch_gain"):
            own = getattr(self, name)
            saved = state_dict.setdefault(prefix + name, own.clone())
            setattr(self, name, own.new_zeros(saved.shape[:1] + own.shape[1:]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _get_inference_input(self, tensors: Batch, **kwargs: Any) -> dict[str, Any]:
        return {"batch": tensors, "alone": self.label_head_alone is not None}

    def _get_generative_input(self, tensors: Batch, inference_outputs: dict[str, Tensor], **kwargs: Any) -> dict:
        given: dict[str, Any] = {
            name: inference_outputs[name] for name in ("embedding", "alone") if name in inference_outputs
        }
        # Nothing is hidden from embeddings that are known already.
        return given | {"values": "embedding" not in tensors}

    @auto_move_data
    def inference(
        self, batch: Batch, genes: Tensor | None = None, *, reconstruct: bool = True, alone: bool = False
    ) -> dict[str, Any]:
        """Return what the network makes of the destinations.

        Parameters
        ----------
        batch
            A block.
        genes
            ``(q,)`` int64, genes that a foundation model's decoder is to predict; in training the batch names them.
        reconstruct
            Whether sequences are wanted, too.
        alone
            Whether the embedding of each destination without its neighbors is wanted, too.

        Returns
        -------
        ``"embedding"`` and, without neighbors, ``"alone"``: ``(n_dst, n_latent)``; for genes that a decoder predicts
        their ``"bin"``; and, where there are signals or images, their standardized numbers as ``"sequences"``,
        ``(n_dst, f, p)`` by modality.
        """
        if "embedding" in batch:
            return {"embedding": batch["embedding"]}
        absent = None
        if genes is not None:
            queries = genes.expand(batch["n_nodes"][-1], -1)
        elif "query_id" in batch:
            queries, absent = batch["query_id"], batch["query_padding"]
        else:
            n_queries, tokens = self.network.n_queries(batch, reconstruct=reconstruct), self.network.tokens(batch)
            out = self.outputs(self.network.states(batch, n_queries, tokens), batch, reconstruct=reconstruct)
            if alone:
                own = without_neighbors(batch)
                n_dst = len(own["nodes"])
                own_tokens = tokens[0][:n_dst], tokens[1][:n_dst]
                states = self.network.states(own, self.network.n_queries(own), own_tokens)
                out["alone"] = self.network.read(states, own)
            return out
        embedding, bins = self.network.decode(batch, queries, absent)
        return {"embedding": embedding, "bin": bins}

    def outputs(self, states: Tensor, batch: Batch, *, reconstruct: bool = True) -> dict[str, Any]:
        """Return what is read off the tokens of the destinations after the last layer."""
        out: dict[str, Any] = {"embedding": self.network.read(states, batch)}
        if reconstruct and self.sequences:
            heads = self.network.heads
            out["sequences"] = {name: heads[name](own) for name, own in self.network.split(states, batch).items()}
        return out

    @auto_move_data
    def generative(
        self,
        embedding: Tensor,
        features: Tensor | None = None,
        alone: Tensor | None = None,
        *,
        values: bool = True,
    ) -> dict[str, Tensor]:
        """Return centered ``"value"`` ``(n, g)`` and ``"logits"`` ``(n, n_labels)``, where there are such heads.

        ``"logits_alone"`` come from embeddings without neighbors, where these are given. ``values`` says whether the
        former are wanted.
        """
        embedding = self.standardized(embedding)
        out: dict[str, Tensor] = {}
        if self.value_head is not None and values:
            out["value"] = self.value_head(embedding, features)
        return out | self.labels(embedding, None if alone is None else self.standardized(alone))

    def loss(self, tensors: Batch, inference_outputs: dict, generative_outputs: dict) -> LossOutput:
        """Masked-value loss plus weighted label loss.

        The masked-value loss is the mean squared error over hidden entries divided by the variance of an entry around
        its gene's mean, so that 1 is what predicting gene means achieves. The label loss is the cross-entropy over
        labeled destinations; where labels are predicted with and without neighbors the mean of both and, in
        validation, that of their best mixture. The decoder of a foundation model that is trained has the mean squared
        error of bins, on the scale from 0 to 1. Signals and images add the mean squared error of their hidden tokens;
        as their numbers are standardized, 1 is what predicting the mean achieves here, too.
        """
        n_obs = tensors["label"].shape[0]
        named: dict[str, Tensor] = {}
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
            loss = named["masked_loss"] = torch.stack(losses).sum()
        if "query_id" in tensors:
            named["decoder_loss"] = _bin_loss(
                inference_outputs["bin"], tensors["query_bin"], tensors["query_padding"], self.n_bins - 1
            )
            loss = loss + named["decoder_loss"]
        if self.label_head is not None:
            named["label_loss"] = self.label_loss(generative_outputs, tensors["label"])
            loss = loss + self.label_weight * named["label_loss"]
        return LossOutput(loss=loss, n_obs_minibatch=n_obs, extra_metrics=named)

    def sample(self, *args: Any, **kwargs: Any) -> None:
        """FIMP predicts means and has no generative distribution to sample from."""
        raise TypeError("FIMP has no distribution to sample from; use get_expression for predicted means.")


class _Statistics(nn.Module):
    """Statistics of the training nodes of a modality, kept with the weights."""

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
