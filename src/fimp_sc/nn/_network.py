"""The contract of networks, and FIMP-base: tokens, layers, and one embedding per node."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fimp_sc._recipe import recipe
from fimp_sc.data.expression._tokenizers import CenteredTokenizer
from fimp_sc.nn._embedding import FeatureEmbedding
from fimp_sc.nn._initialize import start_as_gated_mean
from fimp_sc.nn._layers import PaperLayer, TransformerLayer, run_layers
from fimp_sc.nn._sequence import SequenceParts

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from fimp_sc.data import Tokenizer
    from fimp_sc.data._batch import Batch
    from fimp_sc.data.sequences._reader import SequenceShape, SequenceStatistics

# The norm before attention divides summary tokens by about this length, because of the vector that marks them.
_NORM = 2**0.5


class Network(nn.Module, ABC):
    """From the tokens of a block to embeddings of its destinations.

    A new kind of network answers these questions for itself; nothing outside asks which class it is.

    Attributes
    ----------
    width
        Width of tokens and embedding.
    n_hops
        Hops of the graph that one pass reads.
    pretrained
        Whether the weights come from a checkpoint: they are trained in steps of their own size, and heads start from
        standardized embeddings rather than from components of the data.
    frozen
        Whether training changes nothing in it.
    adds_self_loops
        Whether the network makes nodes their own neighbors, so that graphs need no self-loops.
    unit_length
        Whether embeddings are handed out at unit length.
    least_batch
        Fewest destinations of a block in inference.
    n_bins
        Bins into which the values of tokens are put, where the network reads bins.
    pooled_from
        First of the tokens whose mean is the embedding of a node; ``None`` where that is its first token alone.
    n_own, n_neighborhood
        Columns of the embedding where training starts: the cell's own components, then those of its neighbors' mean;
        0 where it does not start from components.
    """

    width: int
    n_hops: int
    pretrained: bool = False
    frozen: bool = False
    adds_self_loops: bool = False
    unit_length: bool = False
    least_batch: int = 64
    n_bins: int | None = None
    pooled_from: int | None = None
    n_own: int = 0
    n_neighborhood: int = 0

    def forward(self, batch: Batch) -> Tensor:
        """Return ``(n_dst, width)``: the embedding of each destination."""
        return self.read(self.states(batch, self.n_queries(batch)), batch)

    @abstractmethod
    def tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the tokens of all nodes of a block, ``(n, f, width)``, and their padding, ``(n, f)``."""

    @abstractmethod
    def n_queries(self, batch: Batch, *, reconstruct: bool = False) -> int | None:
        """Return how many tokens of a destination the last layer must update, ``None`` for all."""

    @abstractmethod
    def states(self, batch: Batch, n_queries: int | None = None, tokens: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the first ``n_queries`` tokens of the destinations (all by default) after the last layer.

        ``tokens`` are those of :meth:`tokens`, where they are there already.
        """

    @abstractmethod
    def read(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Return the embedding of each node from its tokens after the last layer."""

    @abstractmethod
    def split(self, tokens: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the tokens of sequences, ``(n_dst, f, width)`` by modality, from the last layer's tokens."""

    @property
    @abstractmethod
    def heads(self) -> dict[str, nn.Module]:
        """By modality, the map from tokens of sequences to their standardized values."""

    @abstractmethod
    def message_layers(self) -> list[Any]:
        """Return the layers that pass messages; raise a ValueError where these cannot be read layer by layer."""

    @abstractmethod
    def tokenizer(self, gene_rank: Tensor, gene_key: NDArray[np.uint64], random_state: int) -> Tokenizer:
        """Return what chooses the gene tokens of a cell.

        Parameters
        ----------
        gene_rank, gene_key
            ``(n_genes,)`` order of genes of equal value, and keys of the genes.
        random_state
            Seed.
        """

    @property
    def gene_table(self) -> FeatureEmbedding | None:
        """Embeddings of genes that start from the data, where there are such."""
        return None

    def decode(self, batch: Batch, genes: Tensor, absent: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict bins of hidden genes, see :meth:`FoundationNetwork.decode`."""
        raise TypeError(f"{type(self).__name__} has no decoder of bins.")

    def places(self, coordinates: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return coordinates of nodes, ``(n_nodes, k)``, as the network reads them."""
        return coordinates

    def sequence_statistics(self) -> SequenceStatistics | None:
        """Return the statistics that values of sequences are standardized with, ``None`` for those of the data."""
        return None

    def block_memory(self, *, training: bool) -> tuple[int, int]:
        """Return the usual number of nodes of a block with its halo, and of copies of their tokens held at once."""
        return 2 * 256, 40


class FIMPNetwork(Network):
    """Tokens of a block in, embeddings of its destinations out.

    A node is its summary token, its gene (or feature) tokens if it has any, and the tokens of its sequences. Where
    there are several modalities, a learned vector tells the tokens of one from those of another.

    Parameters
    ----------
    n_features
        Number of features (genes); 0 without expression.
    d_model
        Width of tokens and embedding.
    n_layers, n_heads
        Message-passing layers, and attention heads in each.
    layer
        ``"practical"``: pre-norm transformer layers with residuals and feed-forward part. ``"paper"``: the layer as
        the paper writes it.
    reduce
        ``"mean"`` or ``"sum"`` over neighbors.
    dropout
        Rate in practical layers.
    vector_width
        Width of pretrained vectors of the features, see :class:`FeatureEmbedding`.
    sequences
        By modality: the tokens of signals and images.
    gene_key
        ``(n_features,)`` keys of the features, see :class:`FeatureEmbedding`.
    """

    def __init__(
        self,
        n_features: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        *,
        layer: Literal["practical", "paper"] = "practical",
        reduce: str = "mean",
        dropout: float = 0.1,
        vector_width: int | None = None,
        sequences: Mapping[str, SequenceShape] | None = None,
        gene_key: NDArray[np.uint64] | None = None,
    ) -> None:
        super().__init__()
        self.width, self.n_hops = d_model, n_layers
        # Columns of the embedding where training starts: the cell's own components, then those of its neighbors'
        # mean; the rest is free. Kept apart, neither blurs the other.
        self.n_own, self.n_neighborhood = d_model * 5 // 8, d_model // 4
        neighborhood = slice(self.n_own, self.n_own + self.n_neighborhood)
        self.embedding: FeatureEmbedding | None = None
        if n_features:
            self.embedding = FeatureEmbedding(n_features, d_model, vector_width, gene_key)
            self.embedding.mark_summary_outside(slice(self.n_neighborhood), neighborhood)
        self.sequences: SequenceParts | None = None
        if sequences:
            self.sequences = SequenceParts(sequences, d_model, apart=bool(n_features), dropout=dropout)
        self.mark: nn.Parameter | None = None
        first: Any = None
        if self.sequences is not None and not n_features:
            first = self.sequences.embeddings[0]
            self.mark = nn.Parameter(torch.zeros(d_model))
            # As long as the mark of a position.
            self.mark.data[first.summary_flag] = (first.at.stop - first.at.start) ** 0.5
        layers: list[nn.Module] = []
        size = recipe().first_message
        for _ in range(n_layers):
            if layer == "paper":
                layers.append(PaperLayer(d_model, n_heads, reduce=reduce))
                continue
            practical = TransformerLayer(d_model, n_heads, d_feedforward=2 * d_model, dropout=dropout, reduce=reduce)
            if first is not None:
                start_as_gated_mean(practical, first, later=bool(layers))
            elif not layers and recipe().layers:
                practical.start_as_neighbor_mean(
                    slice(self.n_neighborhood), neighborhood, _NORM * (size if n_layers > 1 else 1)
                )
            elif recipe().layers:
                practical.start_as_neighbor_mean(neighborhood, neighborhood, _NORM * size ** (-1 / (n_layers - 1)))
            layers.append(practical)
        self.layers = nn.ModuleList(layers)

    def n_queries(self, batch: Batch, *, reconstruct: bool = False) -> int:
        """Return how many tokens of a destination the last layer must update."""
        wanted = self.sequences is not None and (reconstruct or self.embedding is None)
        sequences = batch["sequences"].values() if wanted else ()
        return 1 + sum(nodes["value"].shape[1] for nodes in sequences)

    def states(self, batch: Batch, n_queries: int | None = None, tokens: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the first ``n_queries`` tokens of the destinations (all by default) after the last layer.

        ``tokens`` are those of :meth:`tokens`, where they are there already.
        """
        return run_layers(self.layers, *(tokens or self.tokens(batch)), batch, n_queries=n_queries)

    def tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the tokens of all nodes of a block, ``(n, f, d_model)``, and their padding, ``(n, f)``.

        The summary comes first, then the tokens of sequences, then those of features.
        """
        summary = self.summary_mark.expand(len(batch["nodes"]), 1, -1)
        features: Tensor | None = None
        if self.embedding is not None:
            made = self.embedding(
                batch["feature_id"], batch["value"], batch["profile"], batch["visible"], batch["pattern"]
            )
            summary, features = made[:, :1], made[:, 1:]
        padding = [torch.zeros(summary.shape[:2], dtype=torch.bool, device=summary.device)]
        tokens = []
        if self.sequences is not None:
            of_sequences, whole, absent = self.sequences(batch["sequences"])
            summary = summary + whole[:, None]
            tokens, padding = of_sequences, [*padding, *absent]
        if features is not None:
            tokens, padding = [*tokens, features], [*padding, batch["padding"]]
        return torch.cat([summary, *tokens], dim=1), torch.cat(padding, dim=1)

    def message_layers(self) -> list[Any]:
        """Return the layers, each of which passes messages."""
        return list(self.layers)

    def tokenizer(self, gene_rank: Tensor, gene_key: NDArray[np.uint64], random_state: int) -> Tokenizer:
        """Return what makes tokens of the values that differ most from their genes' means."""
        return CenteredTokenizer(gene_rank)

    @property
    def gene_table(self) -> FeatureEmbedding | None:
        """Embeddings of genes, which start from the data."""
        return self.embedding

    @property
    def summary_mark(self) -> Tensor:
        """``(d_model,)``, what marks summary tokens."""
        return self.mark if self.embedding is None else self.embedding.summary  # type: ignore[return-value]

    def read(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Return the embedding of each node from its tokens after the last layer.

        The vector that marks summary tokens is taken off again, so that an embedding is centered like the values. Of
        signals and images alone, what their tokens say is added: these are what training asks for.
        """
        summary = tokens[:, 0] - self.summary_mark
        if self.embedding is not None or self.sequences is None:
            return summary
        return summary + self.sequences.pooled(tokens, batch["sequences"])

    def split(self, tokens: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the tokens of sequences, ``(n_dst, f, d_model)`` by modality, from the last layer's tokens."""
        return {} if self.sequences is None else self.sequences.split(tokens, batch["sequences"])

    @property
    def heads(self) -> dict[str, nn.Module]:
        """By modality, what reads standardized numbers off the tokens of sequences."""
        return {} if self.sequences is None else dict(zip(self.sequences.names, self.sequences.heads, strict=True))
