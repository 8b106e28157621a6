"""Tools: each computes a result and writes it to the object."""

from fimp_sc.tl._annotate import annotate
from fimp_sc.tl._attention import attention
from fimp_sc.tl._call._models import get_model
from fimp_sc.tl._embed import embed
from fimp_sc.tl._gene_pairs import gene_pairs
from fimp_sc.tl._impute import impute
from fimp_sc.tl._niches import niches

__all__ = ["annotate", "attention", "embed", "gene_pairs", "get_model", "impute", "niches"]
