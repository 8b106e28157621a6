"""The model class and its parts."""

from fimp_sc.model._fimp import FIMP
from fimp_sc.model.module._module import FIMPModule
from fimp_sc.model.train._plan import FIMPTrainingPlan

__all__ = ["FIMP", "FIMPModule", "FIMPTrainingPlan"]
