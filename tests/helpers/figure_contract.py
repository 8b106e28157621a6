"""The contract of figures: the arguments ``ax``, ``show``, ``save`` and ``return_fig`` mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def check_figure(draw: Any, *given: Any, shape: tuple[int, ...] = ()) -> None:
    """Draw a figure in all ways in which it can be shown, written and returned.

    Parameters
    ----------
    draw
        Function of :mod:`fimp_sc.pl`.
    *given
        Its other arguments.
    shape
        Shape of its axes.
    """
    shown: list[int] = []
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(plt, "show", lambda: shown.append(1))
        file = Path(folder) / "figure.png"
        assert draw(*given) is None
        assert shown == [1]
        assert np.shape(draw(*given, save=file)) == shape
        assert plt.imread(file).ndim == 3
        assert isinstance(draw(*given, return_fig=True), Figure)
        n = int(np.prod(shape, dtype=int))
        own = plt.subplots(n, squeeze=False)[1].ravel()
        ax = own if shape else own[0]
        assert list(np.ravel(draw(*given, ax=ax))) == list(own)
        assert shown == [1], "neither a file, nor a figure or axes asked for, is shown"
        assert all(panel.has_data() for panel in own)
        assert draw(*given, ax=ax, show=True) is None
        assert shown == [1, 1]
        with pytest.raises(ValueError, match="A figure that is shown is not returned"):
            draw(*given, show=True, return_fig=True)
        if shape:
            with pytest.raises(ValueError, match=f"ax holds {n + 1} axes, but the figure has {n} panels"):
                draw(*given, ax=plt.subplots(n + 1)[1])
