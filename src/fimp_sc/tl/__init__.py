"""Tools: each computes a result and writes it to the object."""

from fimp_sc.tl._annotate import annotate
from fimp_sc.tl._embed import embed
from fimp_sc.tl._impute import impute
from fimp_sc.tl._models import get_model

__all__ = ["annotate", "embed", "get_model", "impute"]
