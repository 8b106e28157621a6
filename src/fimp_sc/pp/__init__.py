"""Preparation: things done once to the object, before a model sees it."""

from __future__ import annotations

from fimp_sc.pp._gene_match import GeneMatch
from fimp_sc.pp._match_genes import match_genes
from fimp_sc.pp._spatial_graph import spatial_graph

__all__ = ["GeneMatch", "match_genes", "spatial_graph"]
