"""Figures, with matplotlib only."""

from __future__ import annotations

from fimp_sc.pl._history import history
from fimp_sc.pl._spatial import spatial

__all__ = ["history", "spatial"]
