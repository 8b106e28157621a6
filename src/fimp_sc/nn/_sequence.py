"""Embedding of nodes that are sequences of numbers: time segments of a signal, patches of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fimp_sc.data._batch import SequenceBatch
    from fimp_sc.data._sequences import SequenceShape


class SequenceEmbedding(nn.Module):
    """Embed tokens of numbers: ``linear(value) + position[i] + linear(coordinates)``, or a mask where hidden.

    Parameters
    ----------
    shape
        Of the tokens of a node.
    d_model
        Width of a token.
    """

    def __init__(self, shape: SequenceShape, d_model: int) -> None:
        super().__init__()
        self.value = nn.Linear(shape.token_size, d_model)
        self.place = nn.Linear(shape.n_coordinates, d_model, bias=False) if shape.n_coordinates else None
        self.position = nn.Parameter(torch.randn(shape.n_tokens, d_model) * 0.5)
        self.mask = nn.Parameter(torch.randn(d_model) * 0.1)

    def forward(self, nodes: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Return the tokens ``(n, f, d_model)`` and what nodes as a whole are, ``(n, d_model)``."""
        tokens = torch.where(nodes["masked"][..., None], self.mask, self.value(nodes["value"]))
        tokens = tokens + self.position[: tokens.shape[1]]
        whole = tokens.new_zeros(len(tokens), tokens.shape[2])
        if self.place is not None:
            place = self.place(nodes["coordinates"])
            tokens, whole = tokens + place[:, None], whole + place
        return tokens, whole


class SequenceParts(nn.Module):
    """Tokens of all sequences of a node, and their numbers read off again.

    Parameters
    ----------
    shapes
        By modality.
    d_model
        Width of tokens.
    apart
        Whether nodes have other tokens too, to tell them from.
    """

    def __init__(self, shapes: Mapping[str, SequenceShape], d_model: int, *, apart: bool) -> None:
        super().__init__()
        self.names = list(shapes)
        self.embeddings = nn.ModuleList(SequenceEmbedding(shape, d_model) for shape in shapes.values())
        self.heads = nn.ModuleList(nn.Linear(d_model, shape.token_size) for shape in shapes.values())
        self.modality = nn.Parameter(torch.randn(len(shapes), d_model) * 0.3) if len(shapes) + apart > 1 else None

    def forward(self, nodes: Mapping[str, SequenceBatch]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Return tokens ``(n, f, d_model)`` by modality, what they say of whole nodes ``(n, d_model)``, and padding."""
        tokens, wholes, padding = [], [], []
        for i, (name, embedding) in enumerate(zip(self.names, self.embeddings, strict=True)):
            made, whole = embedding(nodes[name])
            absent = nodes[name]["padding"]
            tokens.append(made if self.modality is None else made + self.modality[i])
            wholes.append(whole.masked_fill(absent.all(1)[:, None], 0.0))
            padding.append(absent)
        return tokens, torch.stack(wholes).sum(0), padding

    def reconstruct(self, tokens: Tensor, nodes: Mapping[str, SequenceBatch]) -> dict[str, Tensor]:
        """Return ``(n_dst, f, p)`` standardised numbers by modality, from the tokens after the last layer."""
        counts = [nodes[name]["value"].shape[1] for name in self.names]
        parts = tokens[:, 1 : 1 + sum(counts)].split(counts, dim=1)
        return {name: head(part) for name, head, part in zip(self.names, self.heads, parts, strict=True)}
