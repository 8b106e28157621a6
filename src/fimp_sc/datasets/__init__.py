"""Data to try the package on."""

from __future__ import annotations

from fimp_sc.datasets._toy import toy_tissue

__all__ = ["toy_tissue"]
