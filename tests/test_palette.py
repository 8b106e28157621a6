"""Colors of categories can be told apart by everybody, which library and published matrices judge."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from fimp_sc._palette import palette

# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def rgb(colors: list[str]) -> np.ndarray:
    return np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in colors])


def seen(colors: list[str], vision: str) -> np.ndarray:
    """Return the colors in CIELAB as somebody sees them."""
    values = rgb(colors)
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.transpose(VISION[vision]), 0, 1)
    return rgb2lab(np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055))


def closest(colors: list[str], others: list[str], vision: str) -> float:
    a, b = seen(colors, vision), seen(others, vision)
    return float(np.sort(deltaE_ciede2000(a[:, None], b[None]).ravel())[len(colors) if colors == others else 0])


def test_the_judge_knows_what_is_confused() -> None:
    """Of CIE's own test data one pair, and red and green, which protanopes and deuteranopes confuse."""
    pair = [np.array([50.0, 2.6772, -79.7751]), np.array([50.0, 0.0, -82.7485])]
    assert deltaE_ciede2000(*pair) == pytest.approx(2.0425, abs=1e-4)
    red, green = ["#a05a00"], ["#5a7800"]
    assert closest(red, green, "normal") > 2 * closest(red, green, "deuteranopia")


@pytest.mark.parametrize(("vision", "least"), [("normal", 19), *((name, 10.5) for name in list(VISION)[1:])])
def test_sixteen_colors_stay_apart(vision, least) -> None:
    colors = palette(16)
    assert closest(colors, colors, vision) > least
    assert closest(colors, ["#ffffff", "#d3d3d3"], vision) > least, "from paper, and from cells without label"


def test_few_are_blue_or_violet() -> None:
    lab = seen(palette(16), "normal")
    hue = np.degrees(np.arctan2(lab[:, 2], lab[:, 1])) % 360
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    assert ((hue > 230) & (hue < 325) & (chroma > 15)).sum() <= 4


def test_the_first_colors_are_the_same_whatever_the_number() -> None:
    assert palette(3) == palette(40)[:3]
    assert len(set(palette(100))) == 100
