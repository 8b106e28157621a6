"""Data to try the package on."""

from fimp_sc.datasets._communication import toy_communication
from fimp_sc.datasets._toy import toy_tissue

__all__ = ["toy_communication", "toy_tissue"]
