"""Tools: each computes a result and writes it to the object."""

from fimp_sc.tl._annotate import annotate
from fimp_sc.tl._common import get_model
from fimp_sc.tl._embed import embed
from fimp_sc.tl._impute import impute

__all__ = ["annotate", "embed", "get_model", "impute"]
