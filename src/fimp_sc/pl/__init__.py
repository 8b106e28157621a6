"""Figures of results, drawn by matplotlib and squidpy."""

from fimp_sc.pl._attention import attention
from fimp_sc.pl._attention_arrows import attention_arrows
from fimp_sc.pl._gene_match import gene_match
from fimp_sc.pl._gene_pairs import gene_pairs
from fimp_sc.pl._history import history
from fimp_sc.pl._image_graph import image_graph
from fimp_sc.pl._imputation import imputation
from fimp_sc.pl._niche_composition import niche_composition
from fimp_sc.pl._report import report
from fimp_sc.pl._signals import signals
from fimp_sc.pl._spatial import spatial

__all__ = [
    "attention",
    "attention_arrows",
    "gene_match",
    "gene_pairs",
    "history",
    "image_graph",
    "imputation",
    "niche_composition",
    "report",
    "signals",
    "spatial",
]
