"""Modules of a foundation model: tokens, transformer layers and a decoder, and their weights in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fimp_sc.data import BinnedTokenizer, RankTokenizer, SequenceStatistics
from fimp_sc.data.storage._elements import shorten

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    from fimp_sc.data import SequenceBatch, Tokenizer
    from fimp_sc.nn import TransformerLayer, TransformerStack
    from fimp_sc.pretrained.files._files import Weights


@dataclass
class Backbone:
    """The modules of a foundation model.

    Attributes
    ----------
    config
        Plain numbers and strings from which the same modules can be built without the checkpoint.
    embedding
        Makes the tokens of nodes: a :class:`GeneTokens`, or a :class:`SequenceTokens` of signals or images.
    stack
        The transformer layers, ready to run across nodes.
    decoder
        Reads values off tokens, where the checkpoint has such a part.
    """

    config: dict[str, Any]
    embedding: Any
    stack: TransformerStack
    decoder: nn.Module | None = None


class GeneTokens(nn.Module):
    """Tokens of cells by a foundation model of expression.

    A subclass has ``forward``, from genes ``(n, f)`` int64, values ``(n, f)`` and padding ``(n, f)`` bool to tokens
    ``(n, n_class + f, width)`` and their padding; and, for a model with a decoder, ``query_tokens``, from genes of any
    shape to tokens whose value is hidden.

    Attributes
    ----------
    known
        ``(n_genes,)`` bool buffer, genes that the vocabulary has. The others never become tokens.
    n_class
        Tokens before those of genes, of which the first is the summary of a cell.
    pooling
        What the embedding of a cell is: its summary (``"cls"``), or the mean of the tokens of genes (``"mean"``).
    n_bins
        Bins into which the values of a cell are put, where the model reads bins.
    reads_counts
        Whether it needs raw counts.
    unit_length
        Whether embeddings are divided by their length.
    """

    known: Tensor
    n_class = 1
    pooling: str = "cls"
    n_bins: int | None = None
    reads_counts = False
    unit_length = False

    def tokenizer(
        self, gene_rank: Tensor, random_state: int, n_queries: int, gene_key: NDArray[np.uint64]
    ) -> Tokenizer:
        """Return what chooses the genes and values of tokens; by default the highest values as bins of the cell.

        Parameters
        ----------
        gene_rank, random_state, n_queries, gene_key
            See :class:`fimp_sc.data.BinnedTokenizer`.
        """
        return BinnedTokenizer(gene_rank, self.known.cpu(), self.n_bins or 0, random_state, n_queries, gene_key)


class RankTokens(GeneTokens):
    """Tokens of cells by a foundation model that reads genes in the order of their counts over usual ones.

    A subclass has ``forward``.

    Parameters
    ----------
    n_genes
        Genes of the model.
    n_tokens
        Tokens that they are; the same of several genes whose counts are added.
    n_most
        Largest number of tokens of a cell.

    Attributes
    ----------
    place
        ``(n_genes,)`` int64 buffer, which token each gene is, -1 where it is none.
    usual
        ``(n_tokens,)`` float64 buffer, by which counts are divided.
    """

    reads_counts = True
    place: Tensor
    usual: Tensor

    def __init__(self, n_genes: int, n_tokens: int, n_most: int) -> None:
        super().__init__()
        self.n_tokens, self.n_most = n_tokens, n_most
        self.register_buffer("place", torch.full((n_genes,), -1, dtype=torch.int64))
        self.register_buffer("usual", torch.ones(n_tokens, dtype=torch.float64))

    @property
    def known(self) -> Tensor:  # type: ignore[override]
        """``(n_genes,)`` bool, genes that are tokens."""
        return self.place >= 0

    def tokenizer(
        self, gene_rank: Tensor, random_state: int, n_queries: int, gene_key: NDArray[np.uint64]
    ) -> Tokenizer:
        """Return what puts genes in the order of their counts over usual ones."""
        return RankTokenizer(self.place.cpu().numpy(), self.usual.cpu().numpy(), self.n_most)

    def ranked(self, feature_id: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return token and rank of each gene, from 0, and padding that includes unknown genes, ``(n, f)`` each."""
        place = self.place[feature_id]
        padding = padding | (place < 0)
        return place.clamp(min=0), ((~padding).cumsum(1) - 1).clamp(min=0), padding


class SequenceTokens(nn.Module):
    """Tokens of signals or images by a foundation model.

    A subclass has ``forward``, from the nodes of a block (:class:`fimp_sc.data.SequenceBatch`) to tokens
    ``(n, n_class + f, width)``.

    Attributes
    ----------
    token_size
        Time points, or pixels of the side of a patch, of a token.
    n_class
        Tokens before those of the sequence, of which the first is the summary of a node; if 0, that is their mean.
    pooling
        What the embedding of a node is: its summary (``"cls"``), or the summary followed by the mean of the tokens of
        the sequence (``"cls+mean"``).
    misaligned
        Why the other tokens are not those that the values of a node are cut into, and these cannot be reconstructed.
    """

    token_size: int
    n_class = 1
    pooling: str = "cls"
    misaligned = ""
    unit_length = False

    def padding(self, nodes: SequenceBatch) -> Tensor | None:
        """Return where there is no token, ``(n, n_class + f)`` bool; by default all nodes have as many."""
        return None

    def check(self, size: Sequence[int], n_coordinates: int) -> None:
        """Check that nodes can be read, before any is; by default any can.

        Parameters
        ----------
        size
            Of the values of a node: time points, or height, width and channels.
        n_coordinates
            Of a node.

        Raises
        ------
        ValueError
            When they cannot; the message says what to do.
        """

    def statistics(self) -> SequenceStatistics:
        """Return how values are scaled, and coordinates; by default neither."""
        return SequenceStatistics(0.0, 1.0, np.zeros(0, np.float32), np.ones(0, np.float32))

    def places(self, coordinates: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return what tokens know of where nodes are, ``(n_obs, c)``, by default nothing."""
        return coordinates[:, :0]


def without_weights(build: Callable[..., Backbone], config: Mapping[str, Any], **stack: Any) -> Backbone:
    """Build modules whose weights a file replaces, all of them: no memory is filled with random numbers for nothing.

    Parameters
    ----------
    build, config, **stack
        See :meth:`FoundationReader.build`.
    """
    with torch.device("meta"):
        backbone = build(config, **stack)
    for module in (backbone.embedding, backbone.stack, backbone.decoder):
        if module is not None:
            module.to_empty(device="cpu")
    return backbone


def distinct_tokens(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tokens that genes are, in their order, and the place among these of each gene; -1 stands for none."""
    used = np.unique(ids[ids >= 0])
    return used, np.where(ids >= 0, np.searchsorted(used, ids), -1)


def chosen_rows(
    vocabulary: Collection[str], rows: ArrayLike | None, path: Path, names: str = "names"
) -> NDArray[np.int64]:
    """Return the row in a vocabulary of each gene of a model, -1 where it has none, after checking that it can be so.

    Parameters
    ----------
    vocabulary
        Names, one for each row.
    rows
        What was asked for; ``None`` for all of them.
    path, names
        File of the vocabulary, and what its names are, for messages.

    Raises
    ------
    ValueError
        These are not rows of the vocabulary, or no gene has one.
    """
    if rows is None:
        return np.arange(len(vocabulary))
    chosen = np.asarray(rows)
    if chosen.ndim != 1 or (chosen.dtype.kind not in "iu" and chosen.size):
        raise ValueError(f"rows must be a list of whole numbers, found shape {chosen.shape} of {chosen.dtype}")
    chosen = chosen.astype(np.int64)
    if chosen.size and not -1 <= chosen.min() <= chosen.max() < len(vocabulary):
        raise ValueError(
            f"rows must be -1 or ids of the vocabulary, 0 to {len(vocabulary) - 1:,}, found {chosen.min()} to "
            f"{chosen.max()}"
        )
    if not (chosen >= 0).any():
        raise ValueError(
            f"None of the {len(chosen):,} genes is in the vocabulary {str(path)!r}, which has {names} such as "
            f"{shorten([repr(name) for name in vocabulary])}."
        )
    return chosen


@torch.no_grad()
def copy_weights(module: nn.Module, weights: Weights, name: str) -> None:
    """Copy the tensors ``{name}.{parameter}`` of a file into the parameters and buffers of ``module``.

    Parameters
    ----------
    module
        Where to.
    weights
        Where from, see :func:`open_checkpoint`.
    name
        What the names of the tensors start with.

    Raises
    ------
    CheckpointError
        When a tensor is missing or has another shape.
    """
    for parameter, value in module.state_dict(keep_vars=True).items():
        value.data.copy_(weights.take(f"{name}.{parameter}", tuple(value.shape)))


@torch.no_grad()
def copy_layer(layer: TransformerLayer, weights: Weights, prefix: str, names: Mapping[str, str]) -> None:
    """Copy the weights of one layer.

    Parameters
    ----------
    layer
        Where to.
    weights, prefix
        Where from; all names in the file start with ``prefix``.
    names
        Name in the file of each part of the layer, without ``.weight`` and ``.bias``. A projection that makes queries,
        keys and values at once is named under ``"attention.qkv"``; its rows are theirs, in this order.

    Raises
    ------
    CheckpointError
        When a tensor is missing or has another shape.
    """
    for part, name in names.items():
        if part != "attention.qkv":
            copy_weights(layer.get_submodule(part), weights, prefix + name)
            continue
        width = layer.attention.query.in_features
        # torch's own attention joins with an underscore: in_proj_weight.
        joint = "_" if f"{prefix}{name}_weight" in weights else "."
        for kind, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
            rows = weights.take(f"{prefix}{name}{joint}{kind}", shape).split(width)
            for projection, value in zip(("query", "key", "value"), rows, strict=True):
                getattr(layer.attention.get_submodule(projection), kind).copy_(value)
