"""Figures, with matplotlib only."""

from __future__ import annotations

from fimp_sc.pl._gene_match import gene_match
from fimp_sc.pl._history import history
from fimp_sc.pl._image_graph import image_graph
from fimp_sc.pl._imputation import imputation
from fimp_sc.pl._niche_composition import niche_composition
from fimp_sc.pl._signals import signals
from fimp_sc.pl._spatial import spatial

__all__ = ["gene_match", "history", "image_graph", "imputation", "niche_composition", "signals", "spatial"]
