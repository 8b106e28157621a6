"""Data to try the package on: simulated tissues, and a real one."""

from fimp_sc.datasets._communication import toy_communication
from fimp_sc.datasets._starmap import starmap
from fimp_sc.datasets._toy import toy_tissue

__all__ = ["starmap", "toy_communication", "toy_tissue"]
