"""Scores of results against a reference, by scikit-learn."""

from fimp_sc.metrics._imputation_scores import imputation_scores
from fimp_sc.metrics._label_scores import label_scores
from fimp_sc.metrics._niche_scores import niche_scores

__all__ = ["imputation_scores", "label_scores", "niche_scores"]
