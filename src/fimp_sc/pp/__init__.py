"""Preparation: things done once to the object, before a model sees it."""

from __future__ import annotations

from fimp_sc.pp._spatial_graph import spatial_graph

__all__ = ["spatial_graph"]
