"""Tokens of nodes that are sequences of numbers: time segments of a signal, patches of an image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fimp_sc.data._batch import SequenceBatch
    from fimp_sc.data.sequences._reader import SequenceShape

# Cosines and sines of a place: their inner products fall off over this distance (in standard deviations of the
# coordinates), which tells a hundred regions apart, and gives places never seen the code of their surroundings.
_PLACE_FEATURES, _PLACE_LENGTH = 128, 0.4
# Sizes of value and place columns beside those of the position, which have unit size: small, so that the norm before
# attention hardly depends on them and layers start nearly linear.
_VALUE, _PLACE = 0.3, 0.4
# Components of each token that enter the start of a summary.
_SUMMARIZED = 16
# Of masked tokens, in their column.
MARK = 2.0


class SequenceEmbedding(nn.Module):
    """Embed tokens of numbers: ``linear(value) + position[i] + linear(place)``, or a mask where hidden.

    Columns are shared out at the start: the value, two blocks that layers write to, the position, the place, one that
    marks masked tokens and one that marks summaries. Training is free to use them otherwise. Where the tokens of nodes
    are aligned, all of them together make the start of the summary: a small network of the components of each token.

    Parameters
    ----------
    shape
        Of the tokens of a node.
    d_model
        Width of a token.
    dropout
        Rate inside what reads aligned tokens after the last layer.
    """

    frequency: Tensor

    def __init__(self, shape: SequenceShape, d_model: int, dropout: float = 0.0) -> None:
        super().__init__()
        width = max(min(shape.token_size, d_model // 6), 1)
        n_position = max(min(20, d_model // 6), 1)
        blocks = 2 if d_model >= 96 else 1  # in narrow tokens all layers write to one
        self.own, self.received = slice(0, width), slice(width, 2 * width)
        self.received_later = slice(blocks * width, (blocks + 1) * width)
        end = self.received_later.stop
        self.at, self.where = slice(end, end + n_position), slice(end + n_position, d_model - 2)
        self.masked_flag, self.summary_flag = d_model - 2, d_model - 1
        self.value = nn.Linear(shape.token_size, d_model)
        self.position = nn.Parameter(torch.zeros(shape.n_tokens, d_model))
        self.mask = nn.Parameter(torch.zeros(d_model))
        self.whole: nn.Sequential | None = None
        self.pool: nn.Sequential | None = None
        if shape.aligned:
            n_inputs = shape.n_tokens * min(width, _SUMMARIZED)
            self.whole = nn.Sequential(nn.Linear(n_inputs, 2 * d_model), nn.GELU(), nn.Linear(2 * d_model, d_model))
            self.pool = nn.Sequential(
                nn.Linear((1 + blocks) * n_inputs, 2 * d_model), nn.GELU(), nn.Dropout(dropout),
                nn.Linear(2 * d_model, d_model),
            )  # fmt: skip
        self.place: nn.Linear | None = None
        self.place_of_summary: nn.Linear | None = None
        if shape.n_coordinates:
            waves = torch.randn(_PLACE_FEATURES // 2, shape.n_coordinates) / _PLACE_LENGTH
            self.register_buffer("frequency", waves)
            self.place = nn.Linear(_PLACE_FEATURES, d_model, bias=False)
            self.place_of_summary = nn.Linear(_PLACE_FEATURES, d_model, bias=False)
        self._start()

    def forward(self, nodes: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Return the tokens ``(n, f, d_model)`` and what they add to the summaries of their nodes, ``(n, d_model)``."""
        seen = ~(nodes["masked"] | nodes["padding"])
        value = self.value(nodes["value"])
        tokens = torch.where(nodes["masked"][..., None], self.mask, value) + self.position[nodes["position"]]
        whole = tokens.new_zeros(len(tokens), tokens.shape[2])
        if self.whole is not None:
            # As large as if all tokens were seen.
            scale = seen.shape[1] / seen.sum(1, keepdim=True).clamp(min=1)
            own = value[..., self.own][..., :_SUMMARIZED] / _VALUE * seen[..., None]
            whole = self.whole((own * scale[..., None]).flatten(1))
        if self.place is not None and self.place_of_summary is not None:
            angle = nodes["coordinates"] @ self.frequency.T
            waves = torch.cat([angle.cos(), angle.sin()], dim=1) / math.sqrt(angle.shape[1])
            tokens, whole = tokens + self.place(waves)[:, None], whole + self.place_of_summary(waves)
        return tokens, whole

    def pooled(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """Return what tokens after the last layer say of their nodes, ``(n, d_model)``.

        Of aligned tokens it is read from the columns of values, their own and received ones, each at its place; of
        others it is their mean.

        Parameters
        ----------
        tokens, padding
            ``(n, f, d_model)`` and ``(n, f)``.
        """
        tokens = tokens.masked_fill(padding[..., None], 0.0)
        if self.pool is None:
            return tokens.sum(1) / (~padding).sum(1, keepdim=True).clamp(min=1)
        blocks = [tokens[..., start : start + min(self.own.stop, _SUMMARIZED)] for start in self._blocks()]
        return self.pool((torch.cat(blocks, dim=2) / _VALUE).flatten(1))

    def _blocks(self) -> list[int]:
        """Return the first columns of values: own, received, and received later."""
        return sorted({self.own.start, self.received.start, self.received_later.start})

    @property
    def spread(self) -> float:
        """Typical standard deviation of a token's entries at the start, by which norms divide."""
        square = (self.at.stop - self.at.start) + _VALUE**2 * self.own.stop
        if self.place is not None:
            square += _PLACE**2 * (self.where.stop - self.where.start)
        return math.sqrt(square / len(self.mask))

    @torch.no_grad()
    def start_from(self, basis: Tensor) -> None:
        """Let value columns start as components of tokens.

        Parameters
        ----------
        basis
            ``(token_size, m)`` orthonormal columns, leading components first.
        """
        width = min(self.own.stop, basis.shape[1])
        self.value.weight[self.own] = 0.0
        self.value.weight[:width] = _VALUE * basis[:, :width].T

    @torch.no_grad()
    def _start(self) -> None:
        p, d_model = self.value.in_features, self.value.out_features
        self.value.weight.zero_()
        self.value.bias.zero_()
        self.start_from(torch.linalg.qr(torch.randn(p, min(p, d_model)))[0])
        self.position[:, self.at] = spread_codes(len(self.position), self.at.stop - self.at.start)
        self.mask[self.masked_flag] = MARK
        if self.whole is not None:
            # Into the columns of the place, from where layers read it.
            first: Any = self.whole[0]
            last: Any = self.whole[-1]
            nn.init.normal_(first.weight, std=first.in_features**-0.5)
            last.bias.zero_()
            other = torch.ones(d_model, dtype=torch.bool)
            other[self.where] = False
            last.weight[other] = 0.0
        for linear in (self.place, self.place_of_summary):
            if linear is not None:
                linear.weight.zero_()
                linear.weight[self.where] = _PLACE * torch.randn_like(linear.weight[self.where])


def spread_codes(n: int, width: int, steps: int = 200) -> Tensor:
    """Return ``(n, width)`` vectors of length ``sqrt(width)`` with small inner products, found by gradient descent."""
    with torch.enable_grad():
        codes = torch.randn(n, width).requires_grad_()
        optimizer = torch.optim.Adam([codes], lr=0.02 * math.sqrt(width))
        for _ in range(steps):
            unit = nn.functional.normalize(codes, dim=1)
            loss = torch.logsumexp(20 * (unit @ unit.T - torch.eye(n)).flatten(), 0)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return nn.functional.normalize(codes.detach(), dim=1) * math.sqrt(width)


class SequenceParts(nn.Module):
    """Tokens of all sequences of a node, and heads that read their numbers off again.

    Parameters
    ----------
    shapes
        By modality.
    d_model
        Width of tokens.
    apart
        Whether nodes have other tokens too, to tell them from.
    dropout
        See :class:`SequenceEmbedding`.
    """

    def __init__(self, shapes: Mapping[str, SequenceShape], d_model: int, *, apart: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.names = list(shapes)
        self.embeddings = nn.ModuleList(SequenceEmbedding(shape, d_model, dropout) for shape in shapes.values())
        self.heads = nn.ModuleList(nn.Linear(d_model, shape.token_size) for shape in shapes.values())
        self.modality = nn.Parameter(torch.randn(len(shapes), d_model) * 0.3) if len(shapes) + apart > 1 else None

    def forward(self, nodes: Mapping[str, SequenceBatch]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Return tokens ``(n, f, d_model)`` by modality, what they add to summaries ``(n, d_model)``, and padding."""
        tokens, wholes, padding = [], [], []
        for i, (name, embedding) in enumerate(zip(self.names, self.embeddings, strict=True)):
            made, whole = embedding(nodes[name])
            absent = nodes[name]["padding"]
            tokens.append(made if self.modality is None else made + self.modality[i])
            wholes.append(whole.masked_fill(absent.all(1)[:, None], 0.0))
            padding.append(absent)
        return tokens, torch.stack(wholes).sum(0), padding

    def pooled(self, tokens: Tensor, nodes: Mapping[str, SequenceBatch]) -> Tensor:
        """Return what all tokens after the last layer say of their nodes, ``(n_dst, d_model)``."""
        by_modality = self.split(tokens, nodes)
        made = []
        for name, module in zip(self.names, self.embeddings, strict=True):
            embedding: Any = module
            made.append(embedding.pooled(by_modality[name], nodes[name]["padding"][: len(tokens)]))
        return torch.stack(made).sum(0)

    def split(self, tokens: Tensor, nodes: Mapping[str, SequenceBatch]) -> dict[str, Tensor]:
        """Return the tokens of each modality, ``(n_dst, f, d_model)``, from all after the last layer."""
        counts = [nodes[name]["value"].shape[1] for name in self.names]
        return dict(zip(self.names, tokens[:, 1 : 1 + sum(counts)].split(counts, dim=1), strict=True))
