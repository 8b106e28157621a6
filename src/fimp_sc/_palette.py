"""Colors of categories."""

from __future__ import annotations

# Okabe and Ito's colors first. Each of the others is the one farthest from all before and from white, in CIELAB, for
# the worst of normal, protanope and deuteranope vision; the closest two are 18 apart (about 2 is just noticeable).
_PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#0000ff", "#691e00", "#4b2d4b",
    "#2d1ea5", "#87e187", "#5a78ff", "#e10f4b", "#2d2d78", "#3c4bf0", "#963c00", "#b4a54b", "#4b96f0", "#4b693c",
)  # fmt: skip


def palette(n: int) -> list[str]:
    """Return ``n`` colors; the first ones are the same whatever the number."""
    if n <= len(_PALETTE):
        return list(_PALETTE[:n])
    from scanpy.plotting.palettes import default_102

    colors = [*_PALETTE, *default_102]
    return [colors[i % len(colors)] for i in range(n)]
