"""Tokens of brain regions as BrainLM makes them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence


class SegmentTokens(nn.Module):
    r"""Tokens of the first BrainLM format (13M): one for each segment of a region's time course.

    .. math:: h_{it} = W_s s_{it} + b_s + W_x x_i + b_x + p_t

    with the segment :math:`s_{it}` of region :math:`i`, its coordinates :math:`x_i`, and sines and cosines
    :math:`p_t` of the segment's number.

    Parameters
    ----------
    d_model
        Width of a token.
    n_points
        Time points of a segment.
    """

    def __init__(self, d_model: int, n_points: int) -> None:
        super().__init__()
        self.signal = nn.Linear(n_points, d_model)
        self.xyz = nn.Linear(3, d_model)

    def forward(self, signal: Tensor, xyz: Tensor) -> Tensor:
        """Return ``(n, segments, d_model)``.

        Parameters
        ----------
        signal
            ``(n, segments, n_points)``, normalized as in pretraining.
        xyz
            ``(n, 3)`` coordinates of the regions.

        Raises
        ------
        ValueError
            Signal or coordinates have another shape.
        """
        n_points = self.signal.in_features
        if signal.ndim != 3 or signal.shape[2] != n_points:
            raise ValueError(f"signal must have the shape (n, segments, {n_points}), found {tuple(signal.shape)}")
        if tuple(xyz.shape) != (len(signal), 3):
            raise ValueError(f"xyz must have the shape ({len(signal)}, 3), found {tuple(xyz.shape)}")
        tokens = self.signal(signal) + self.xyz(xyz)[:, None]
        return tokens + sinusoids(signal.shape[1], tokens.shape[2], device=tokens.device).to(tokens.dtype)

    def places(self, xyz: Tensor) -> Tensor:
        """Return what ``forward`` takes besides the signal, from the coordinates of all regions: themselves."""
        return xyz


class PictureTokens(nn.Module):
    """Tokens of the second BrainLM format (111M, 650M), whose input is a picture: regions by time points.

    The original sorts regions by their y coordinate, one row each, pads 424 x 200 values on all sides with -1 to a
    square, repeats them in three channels, and cuts the square into patches of 16 x 16 or 14 x 14: a token there is a
    stretch of time of 14 to 16 regions. Here each region has its own tokens: those of a picture whose patches, where
    the region's row runs through them, show this region in all their rows. In time, patches lie as in the original:
    200 points touch 13 patches of 16 or 15 of 14, the first and the last partly padding. The class token comes
    first. Patches of padding alone are left out, as pretraining leaves out most patches of every picture.

    With patches one row high this is what the original makes of a region. Otherwise it is not: there a token also
    holds the region's neighbors in the order by y, and padding in the first and last rows.

    Parameters
    ----------
    d_model
        Width of a token.
    image_size, patch_size
        Rows and time points of the padded picture, and of a patch.
    n_regions
        Rows that are no padding.
    """

    def __init__(
        self, d_model: int, image_size: Sequence[int], patch_size: Sequence[int], *, n_regions: int = 424
    ) -> None:
        super().__init__()
        (self.height, self.width), (self.patch_height, self.patch_width) = image_size, patch_size
        self.n_regions = n_regions
        self.grid = (self.height // self.patch_height, self.width // self.patch_width)
        self.signal = nn.Linear(self.patch_width, d_model)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, d_model))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + self.grid[0] * self.grid[1], d_model))

    def forward(self, signal: Tensor, rows: Tensor) -> Tensor:
        """Return ``(n, 1 + patches, d_model)``.

        Parameters
        ----------
        signal
            ``(n, points)`` or ``(n, segments, points)``, 200 time points in all, scaled as in pretraining (the
            original divides its normalized recordings by 5.6430855). Other numbers of points, up to the width of the
            padded picture, are put into its middle as well.
        rows
            ``(n,)`` int, row of each region in the picture without padding, see :meth:`places`.

        Raises
        ------
        ValueError
            The signal is longer than the picture is wide, or rows are outside of it.
        """
        series = signal.flatten(1)
        n, n_points = series.shape
        if not 0 < n_points <= self.width:
            raise ValueError(f"signal must have between 1 and {self.width} time points, found {n_points}")
        if tuple(rows.shape) != (n,) or rows.is_floating_point():
            raise ValueError(f"rows must be ({n},) whole numbers, found {tuple(rows.shape)} {rows.dtype}")
        if n and not 0 <= int(rows.min()) <= int(rows.max()) < self.n_regions:
            raise ValueError(f"rows must lie between 0 and {self.n_regions - 1}")
        before = (self.width - n_points) // 2
        first, last = before // self.patch_width, -(-(before + n_points) // self.patch_width)
        margins = (before - first * self.patch_width, last * self.patch_width - before - n_points)
        patches = F.pad(series, margins, value=-1.0).unflatten(1, (last - first, self.patch_width))
        place = (rows.long() + (self.height - self.n_regions) // 2) // self.patch_height
        tokens = self.signal(patches) + self.positions[0, 1:].unflatten(0, self.grid)[place, first:last]
        return torch.cat([(self.class_token + self.positions[:, :1]).expand(n, -1, -1), tokens], dim=1)

    def places(self, xyz: Tensor) -> Tensor:
        """Return the row of each region in the picture, ``(n,)``, from the coordinates ``(n, 3)`` of all regions.

        Regions are sorted by y; of another atlas than the original's they are spread over its rows.
        """
        rank = torch.argsort(torch.argsort(xyz[:, 1], stable=True), stable=True)
        return rank * self.n_regions // max(len(rank), 1)


def sinusoids(n: int, d_model: int, device: torch.device | None = None) -> Tensor:
    """Return sines (even columns) and cosines (odd columns) of the positions ``0 .. n - 1``, ``(n, d_model)`` float32.

    Notes
    -----
    Source: arXiv 1706.03762, section 3.5.
    """
    rate = torch.exp(torch.arange(0, d_model, 2, device=device) * (-math.log(10000.0) / d_model))
    angle = torch.arange(n, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)
