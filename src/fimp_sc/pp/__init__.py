"""Preparation: things done once to the object, before a model sees it."""

from fimp_sc.pp._features import features
from fimp_sc.pp._fmri import fmri
from fimp_sc.pp._gene_match import GeneMatch
from fimp_sc.pp._images import images
from fimp_sc.pp._match_genes import match_genes
from fimp_sc.pp._pyg import from_pyg, to_pyg
from fimp_sc.pp._spatial_graph import spatial_graph
from fimp_sc.pp._spot_images import spot_images
from fimp_sc.pp._text import text

__all__ = [
    "GeneMatch",
    "features",
    "fmri",
    "from_pyg",
    "images",
    "match_genes",
    "spatial_graph",
    "spot_images",
    "text",
    "to_pyg",
]
