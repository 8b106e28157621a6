"""Nodes that are sequences of numbers: time segments of a signal, patches of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from fimp_sc.data._batch import SequenceBatch

# Of the mean. In float32 there is rounding below, and what hardly moves is not blown up.
_LEAST_SPREAD = 1e-6
# Segments of a signal that are shown at once in training.
_VARIED = 20


@dataclass(frozen=True)
class SequenceShape:
    """Shape of the tokens of a node.

    Attributes
    ----------
    n_tokens
        Tokens of a node, ``f``.
    token_size
        Numbers in a token, ``p``: time points of a segment, or color values of a patch.
    n_coordinates
        Coordinates of a node that its tokens know of, ``c``; 0 for none.
    aligned
        Whether the same token of all nodes shows the same part of them, as patches of images do, and segments of
        signals, which start anywhere, do not.
    """

    n_tokens: int
    token_size: int
    n_coordinates: int = 0
    aligned: bool = True


@dataclass(frozen=True)
class SequenceStatistics:
    """Statistics of the numbers in tokens over the training nodes.

    Attributes
    ----------
    mean, std
        Of all numbers, where nodes are not standardized one by one.
    center, spread
        ``(c,)`` float32, mean and standard deviation of the coordinates.
    """

    mean: float
    std: float
    center: NDArray[np.float32]
    spread: NDArray[np.float32]


class SequenceReader:
    """Tokens of nodes as standardized numbers.

    Numbers are standardized with mean and standard deviation of the training nodes or, ``by_node``, of what is seen of
    each node: signals of regions have no common scale. A node that does not move where it is seen has none: its
    numbers are 0 then, and nothing of it is predicted.

    Parameters
    ----------
    read
        From ``(n,)`` nodes to their ``(n, f, p)`` float32 tokens; where the first token starts can be passed too, of
        signals.
    shape
        Of the tokens of a node.
    n_obs
        Number of nodes.
    by_node
        Whether each node is standardized by itself.
    coordinates
        ``(n_obs, c)`` that tokens know of.
    statistics
        Of the training nodes; ``None`` while they are not known, which leaves numbers as they are.
    absent
        ``(n_obs,)`` bool, nodes that lack this modality.
    hidden
        ``(n_obs, f)`` bool, tokens that are not to be seen.
    words
        Whether negative numbers stand for no token.

    Raises
    ------
    ValueError
        When ``hidden`` has another shape.
    """

    def __init__(
        self,
        read: Callable[..., NDArray[np.float32]],
        shape: SequenceShape,
        n_obs: int,
        *,
        by_node: bool = False,
        coordinates: NDArray[np.floating] | None = None,
        statistics: SequenceStatistics | None = None,
        absent: NDArray[np.bool_] | None = None,
        hidden: NDArray[np.bool_] | None = None,
        words: bool = False,
    ) -> None:
        self.read, self.shape, self.by_node, self.words = read, shape, by_node, words
        self.absent = np.zeros(n_obs, dtype=bool) if absent is None else absent
        if hidden is not None and hidden.shape != (n_obs, shape.n_tokens):
            raise ValueError(
                f"hidden must have one entry for each token, {(n_obs, shape.n_tokens)}: found {hidden.shape}"
            )
        self.hidden = hidden
        self.mean, self.std = (0.0, 1.0) if statistics is None else (statistics.mean, statistics.std)
        self.coordinates = np.zeros((n_obs, 0), dtype=np.float32)
        if shape.n_coordinates and coordinates is not None:
            self.coordinates = np.asarray(coordinates, dtype=np.float32)
            if statistics is not None:
                self.coordinates = (self.coordinates - statistics.center) / statistics.spread

    def fields(
        self,
        nodes: NDArray[np.int64],
        n_dst: int,
        ratio: tuple[float, float] | None = None,
        *,
        mask_nodes: float = 1.0,
        vary: bool = False,
        seed: int = 0,
    ) -> SequenceBatch:
        """Return the tokens of ``nodes``.

        Parameters
        ----------
        nodes
            ``(n,)``, the ``n_dst`` destinations first.
        n_dst
            Number of destinations.
        ratio
            Smallest and largest fraction of tokens of a node hidden for masked prediction; ``None`` hides nothing.
        mask_nodes
            Probability that a node is masked at all.
        vary
            Whether to show signals differently every time: some of their segments, cut anywhere, in any order and of
            either sign. What was measured when must not be learned, and fewer segments cost less.
        seed
            Of masks, which do not depend on values, and of how signals are shown.
        """
        generator = torch.Generator().manual_seed(seed)
        vary = vary and self.by_node
        # What is hidden is known for segments from the first time point on.
        cut = vary and self.hidden is None
        start = int(torch.randint(0, self.shape.token_size, (1,), generator=generator)) if cut else 0
        values = torch.from_numpy(self.tokens(nodes, start))
        if vary and float(torch.rand(1, generator=generator)) < 0.5:
            values = -values
        padding = torch.from_numpy(self.absent[nodes])[:, None].expand(-1, values.shape[1]).contiguous()
        if self.words:
            padding |= values[..., 0] < 0
        kept = torch.zeros_like(padding)
        if self.hidden is not None:
            kept = torch.from_numpy(self.hidden[nodes]) & ~padding
        # Numbers are standardized by all that is seen, tokens that stay out of the block included.
        position, shown = torch.arange(values.shape[1]), torch.ones(values.shape[1], dtype=torch.bool)
        if vary:
            chosen = torch.randperm(values.shape[1], generator=generator)[:_VARIED]
            position = torch.randperm(self.shape.n_tokens, generator=generator)[: len(chosen)]
            shown = torch.zeros_like(shown).index_fill_(0, chosen, True)
        drawn = torch.zeros_like(padding)
        if ratio is not None:
            drawn = hide_tokens(~(padding | kept) & shown, ratio, generator)
            drawn &= torch.rand(len(nodes), 1, generator=generator) < mask_nodes
        masked = kept | drawn
        mean, std = self._standard(values, ~(padding | masked))
        moves = std > 0
        values = torch.where(moves, (values - mean) / std, 0.0)[:, shown]
        masked, padding, drawn = masked[:, shown], padding[:, shown], drawn[:, shown]
        return {
            "value": values.masked_fill((masked | padding)[..., None], 0.0),
            "masked": masked,
            "padding": padding,
            "position": position,
            "coordinates": torch.from_numpy(self.coordinates[nodes]),
            "mean": mean[:n_dst],
            "std": std[:n_dst],
            "target": values[:n_dst],
            "target_mask": (drawn & moves[..., 0])[:n_dst],
        }

    def tokens(self, nodes: NDArray[np.int64], start: int = 0) -> NDArray[np.float32]:
        """Return ``(n, f, p)`` numbers as they are, 0 for nodes that lack them.

        Parameters
        ----------
        nodes
            ``(n,)``.
        start
            Time point where the first segment of signals starts.
        """
        there, how = ~self.absent[nodes], {"start": start} if start else {}
        if there.all():
            return self.read(nodes, **how)
        made = self.read(nodes[there], **how) if there.any() else None
        n_tokens = self.shape.n_tokens if made is None else made.shape[1]
        out = np.zeros((len(nodes), n_tokens, self.shape.token_size), dtype=np.float32)
        if made is not None:
            out[there] = made
        return out

    def statistics(self, nodes: NDArray[np.int64], chunk: int = 1024) -> SequenceStatistics:
        """Compute what training nodes tell; of a source that has no statistics yet.

        Parameters
        ----------
        nodes
            ``(n,)``, of training.
        chunk
            Nodes that are read at once.

        Raises
        ------
        ValueError
            When none of them has this modality.
        """
        nodes = nodes[~self.absent[nodes]]
        if not len(nodes):
            raise ValueError("No training node has values of this modality.")
        count, total, square = 0, 0.0, 0.0
        for i in range(0, len(nodes), chunk):
            values = self.read(nodes[i : i + chunk]).astype(np.float64)
            if self.hidden is not None:
                values = values[~self.hidden[nodes[i : i + chunk]]]
            count, total = count + values.size, total + float(values.sum())
            square += float(np.square(values).sum())
        mean = total / max(count, 1)
        std = max(square / max(count, 1) - mean**2, 0.0) ** 0.5
        center, spread = self.coordinates[nodes].mean(0), self.coordinates[nodes].std(0)
        # What is the same in all training nodes is divided by nothing, as it may differ in others.
        spread = np.where(spread > _LEAST_SPREAD * np.abs(center), spread, np.float32(1.0))
        return SequenceStatistics(mean, std if std > _LEAST_SPREAD * abs(mean) else 1.0, center, spread)

    def _standard(self, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(n, 1, 1)`` mean and standard deviation, the latter 0 for nodes that do not move.

        Nodes of which nothing is seen have those of the training nodes.
        """
        if not self.by_node:
            whole = values.new_ones(len(values), 1, 1)
            return self.mean * whole, self.std * whole
        count = (seen.sum(1) * values.shape[2]).clamp(min=1)[:, None, None]
        seen = seen[..., None]
        mean = values.masked_fill(~seen, 0.0).sum((1, 2), keepdim=True) / count
        variance = (values - mean).square().masked_fill(~seen, 0.0).sum((1, 2), keepdim=True) / count
        std = variance.sqrt()
        std = std.masked_fill(std <= _LEAST_SPREAD * mean.abs(), 0.0)
        nothing = ~seen.any(1, keepdim=True)
        return mean.masked_fill(nothing, self.mean), std.masked_fill(nothing, self.std)


def hide_tokens(known: Tensor, ratio: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Hide tokens of each node at random; at least one stays.

    Parameters
    ----------
    known
        ``(n, f)`` bool, tokens that can be hidden.
    ratio
        Smallest and largest fraction; each node draws its own.
    generator
        Source of randomness.

    Returns
    -------
    ``(n, f)`` bool.
    """
    low, high = ratio
    fraction = low + (high - low) * torch.rand(len(known), 1, generator=generator)
    place = torch.rand(known.shape, generator=generator).masked_fill_(~known, 2.0).argsort(1).argsort(1)
    n_known = known.sum(1, keepdim=True)
    return known & (place < torch.minimum((fraction * n_known).round(), n_known - 1))
