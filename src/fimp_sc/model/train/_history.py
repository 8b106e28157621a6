"""Curves of trainings that follow one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd


def continued(earlier: Mapping[str, pd.DataFrame], later: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return the curves of two trainings as one, its epochs numbered on: scvi-tools would number entries instead."""
    starts: dict[Any, int] = {}
    for frame in (curve for curve in earlier.values() if len(curve)):
        unit = frame.index.name  # epoch or step
        starts[unit] = max(starts.get(unit, 0), int(frame.index.max()) + 1)
    out = dict(earlier)
    for name, frame in later.items():
        frame = frame.set_axis(frame.index + starts.get(frame.index.name, 0))
        out[name] = pd.concat([earlier[name], frame]) if name in earlier else frame
    return out
