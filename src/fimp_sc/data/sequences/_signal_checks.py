"""Checks of signals in time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable


def check_signals(values: Any, describe: Callable[[int], str]) -> None:
    """Check that signals are finite and vary in time.

    Parameters
    ----------
    values
        ``(n, n_times)`` array.
    describe
        Returns what the signal of a row is called, for messages.

    Raises
    ------
    TypeError
        No array of real numbers.
    ValueError
        NaN or infinite values, or a signal that is the same at all times.
    """
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "buif":
        raise TypeError(f"Signals must be a dense array of real numbers, found {type(values).__name__}.")
    low, high = values.min(axis=1), values.max(axis=1)  # NaN and infinity show in them, without an array of flags
    unusable = ~(np.isfinite(low) & np.isfinite(high))
    for name, bad in (("NaN or infinite", unusable), ("constant", ~unusable & (low == high))):
        if bad.any():
            raise ValueError(
                f"{int(bad.sum()):,} of {len(values):,} signals are {name}, first that of "
                f"{describe(int(bad.argmax()))}: leave "
                "this region out in all recordings, or this recording, or repair the signal before."
            )
