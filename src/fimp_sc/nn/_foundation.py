"""The network around a foundation model, and which of its weights are trained."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fimp_sc.nn._layers import weight_of
from fimp_sc.nn._network import Network

if TYPE_CHECKING:
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    from fimp_sc.data import Tokenizer
    from fimp_sc.data._batch import Batch
    from fimp_sc.data.sequences._reader import SequenceStatistics
    from fimp_sc.nn._stack import TransformerStack

# Hidden genes of a cell that a decoder learns from: a fraction of its tokens.
_QUERIES = 32
_RANK = 8
_PROJECTIONS = ("query", "value")


class FoundationNetwork(Network):
    """Tokens of a block in, embeddings of its destinations out: a foundation model run across one hop of the graph.

    Parameters
    ----------
    embedding
        Makes tokens: of genes ``(feature_id, value, padding) -> (tokens, padding)``, of a sequence from its part of the
        batch. The first token of a node is its summary; of a sequence with ``embedding.n_class`` 0, and of genes with
        ``embedding.pooling`` ``"mean"``, that is the mean of their tokens.
    stack
        The layers.
    decoder
        Reads values off tokens, where the foundation model can.
    trained
        What is trained, see :func:`choose_trained`.
    n_bins
        Bins into which the values of tokens are put, where the foundation model reads bins.
    sequence
        Modality of signals or images that it reads instead of genes, and numbers in a token of it.

    Raises
    ------
    ValueError
        When ``trained`` is unknown.
    """

    n_hops = 1
    pretrained = True
    adds_self_loops = True  # those of the stack
    least_batch = 128  # the neighbors of a block are computed too: small blocks would mostly be halo
    embedding: Any
    decoder: Any

    def __init__(
        self,
        embedding: nn.Module,
        stack: TransformerStack,
        decoder: nn.Module | None = None,
        *,
        trained: str = "frozen",
        n_bins: int | None = None,
        sequence: tuple[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.embedding, self.stack, self.decoder, self.n_bins = embedding, stack, decoder, n_bins
        self.pooling: str = "cls" if sequence is None else self.embedding.pooling
        self.width = stack.d_model * (2 if self.pooling == "cls+mean" else 1)
        choose_trained(self, trained)
        self.frozen = trained == "frozen"
        self.sequence = None if sequence is None else sequence[0]
        self.unit_length = bool(embedding.unit_length)
        self.pooled_from = None if self._has_summary else self.embedding.n_class
        self.head: nn.Linear | None = None
        if sequence is not None and not self.embedding.misaligned:
            self.head = nn.Linear(stack.d_model, sequence[1])
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def n_queries(self, batch: Batch, *, reconstruct: bool = False) -> int | None:
        """Return how many tokens of a destination the last layer must update, ``None`` for all."""
        summary_alone = self._has_summary and self.pooling == "cls"
        return 1 if summary_alone and not (reconstruct and self.head is not None) else None

    @property
    def _has_summary(self) -> bool:
        return self.embedding.pooling == "cls" if self.sequence is None else self.embedding.n_class > 0

    def states(self, batch: Batch, n_queries: int | None = None, tokens: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the first ``n_queries`` tokens of the destinations (all by default) after the last layer.

        ``tokens`` are those of :meth:`tokens`, where they are there already.
        """
        graph = batch["indptr"][0], batch["indices"][0]
        return self.stack(*(tokens or self.tokens(batch)), *graph, n_queries, edge_weight=weight_of(batch, 0))

    def read(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Return the embedding of each node from its tokens after the last layer."""
        if self.pooling == "cls+mean":
            return torch.cat([tokens[:, 0], tokens[:, self.embedding.n_class :].mean(1)], dim=1)
        if self._has_summary:
            return tokens[:, 0]
        if self.sequence is not None:
            padding = self.embedding.padding(batch["sequences"][self.sequence])
            if padding is None:
                return tokens.mean(1)
        else:
            tokens, padding = tokens[:, self.embedding.n_class :], batch["padding"]
        # Of a node without any token: zeros.
        there = ~padding[: len(tokens), :, None]
        return tokens.masked_fill(~there, 0.0).sum(1) / there.sum(1).clamp(min=1)

    def split(self, tokens: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the tokens of a sequence, ``(n_dst, f, width)`` by modality, from the last layer's tokens."""
        if self.sequence is None or self.head is None:
            return {}
        return {self.sequence: tokens[:, self.embedding.n_class :]}

    @property
    def heads(self) -> dict[str, nn.Module]:
        """By modality, what reads standardized numbers off the tokens of a sequence."""
        return {} if self.sequence is None or self.head is None else {self.sequence: self.head}

    def decode(self, batch: Batch, genes: Tensor, absent: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict hidden values with the decoder of the foundation model.

        A hidden gene is a token of its cell whose value is the foundation model's mask. It reads the cell and its
        neighbors, and is not sent to them.

        Parameters
        ----------
        batch
            A block.
        genes
            ``(n_dst, q)`` int64, the genes to predict in each destination.
        absent
            ``(n_dst, q)`` bool, True where there is no gene to predict: such tokens are padding.

        Returns
        -------
        Embeddings as from :meth:`forward`, now of cells that have these tokens too, and ``(n_dst, q)`` predicted bins.

        Raises
        ------
        ValueError
            When the checkpoint has no decoder.
        """
        if self.decoder is None:
            raise ValueError("This checkpoint has no expression decoder: use the head that training fits.")
        tokens, padding = self.tokens(batch)
        n_dst, n_genes = genes.shape
        absent = torch.zeros_like(genes, dtype=torch.bool) if absent is None else absent
        own = torch.cat([tokens[:n_dst], self.embedding.query_tokens(genes)], dim=1)
        own_padding = torch.cat([padding[:n_dst], absent], dim=1)
        graph = batch["indptr"][0], batch["indices"][0]
        states = self.stack(tokens, padding, *graph, own=own, own_padding=own_padding, edge_weight=weight_of(batch, 0))
        return states[:, 0], self.decoder(states[:, -n_genes:])

    def tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the tokens of all nodes of a block, ``(n, 1 + f, width)``, and their padding, ``(n, 1 + f)``."""
        if self.sequence is None:
            return self.embedding(batch["feature_id"], batch["value"], batch["padding"])
        nodes = batch["sequences"][self.sequence]
        tokens, padding = self.embedding(nodes), self.embedding.padding(nodes)
        if padding is None:
            padding = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return tokens, padding

    def message_layers(self) -> list[Any]:
        """Return the layers of the stack.

        Raises
        ------
        ValueError
            Every edge runs a stack of its own, ``aggregate="final"``: layers have no messages.
        """
        if self.stack.aggregate == "final":
            raise ValueError(
                "With aggregate='final' every edge runs the whole stack and layers pass no messages that could be "
                "read: use a model with aggregate='layer'."
            )
        return list(self.stack.layers)

    def tokenizer(self, gene_rank: Tensor, gene_key: NDArray[np.uint64], random_state: int) -> Tokenizer:
        """Return what makes tokens of genes that the foundation model knows."""
        n_queries = 0 if self.frozen or self.decoder is None else _QUERIES
        return self.embedding.tokenizer(gene_rank, random_state, n_queries, gene_key)

    def places(self, coordinates: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return coordinates of nodes as the foundation model reads them."""
        return coordinates if self.sequence is None else self.embedding.places(coordinates)

    def sequence_statistics(self) -> SequenceStatistics | None:
        """Return those of pretraining."""
        return None if self.sequence is None else self.embedding.statistics()

    def block_memory(self, *, training: bool) -> tuple[int, int]:
        """Return nodes of a block and copies of their tokens; of each layer two are kept to compute it again."""
        if not training or self.frozen:
            return 2 * 128, 12
        return 2 * 256, 24 + 2 * len(self.stack.layers)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; a frozen foundation model stays in evaluation."""
        return super().train(mode and not self.frozen)


def choose_trained(network: FoundationNetwork, what: str) -> None:
    """Choose the weights of a foundation model that training changes.

    Parameters
    ----------
    network
        Whose parameters are marked.
    what
        ``"frozen"``: none. ``"full"``: all. ``"last:2"``: the last two layers (any number) and the final norm.
        ``"lora"`` or ``"lora:8"``: of each layer's queries and values only a low-rank change (of rank 8), as in
        arXiv 2106.09685. Where anything is trained, a decoder is trained too.

    Raises
    ------
    ValueError
        When ``what`` is none of these.
    """
    match = re.fullmatch(r"frozen|full|last:(\d+)|lora(?::(\d+))?", what)
    layers = network.stack.layers
    n_last, rank = (int(match[i] or default) for i, default in ((1, 1), (2, _RANK))) if match else (0, 0)
    if not (1 <= n_last <= len(layers) and rank >= 1):
        raise ValueError(
            f"train must be 'frozen', 'full', 'last:N' with N from 1 to {len(layers)}, 'lora' or "
            f"'lora:RANK'; found {what!r}"
        )
    for parameter in network.parameters():
        parameter.requires_grad_(what == "full")
    if network.decoder is not None:
        network.decoder.requires_grad_(what != "frozen")
    if what.startswith("last"):
        for module in (*layers[-n_last:], network.stack.norm):
            module.requires_grad_(True)
    if what.startswith("lora"):
        for layer in layers:
            for name in _PROJECTIONS:
                attention = layer.get_submodule("attention")
                setattr(attention, name, LowRankLinear(attention.get_submodule(name), rank))


class LowRankLinear(nn.Module):
    """Linear map plus a trained change of low rank, which starts at zero.

    Parameters
    ----------
    linear
        The map, whose weight and bias are taken over.
    rank
        Rank of the change.
    """

    def __init__(self, linear: Any, rank: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        n_out, n_in = linear.weight.shape
        self.down = nn.Parameter(torch.randn(rank, n_in) * n_in**-0.5)
        self.up = nn.Parameter(torch.zeros(n_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the changed map."""
        return nn.functional.linear(x, self.weight + self.up @ self.down, self.bias)
