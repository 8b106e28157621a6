"""Colors of categories."""

from __future__ import annotations

# Okabe and Ito's colors first. The others were chosen so that of the first 16 the closest two are as far apart as can
# be: a CIEDE2000 of 19 for normal vision, and of 10 for protanopes, deuteranopes and tritanopes.
_PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#780f78", "#a5e196", "#870f00",
    "#8778ff", "#1e4b3c", "#87694b", "#001ee1", "#697878", "#4b4b5a", "#96a596", "#c31e96", "#b4a569", "#c3d2ff",
)  # fmt: skip


def palette(n: int) -> list[str]:
    """Return ``n`` colors; the first ones are the same whatever the number."""
    if n <= len(_PALETTE):
        return list(_PALETTE[:n])
    from scanpy.plotting.palettes import default_102

    colors = [*_PALETTE, *default_102]
    return [colors[i % len(colors)] for i in range(n)]
