"""BOLD signals in the forms in which people keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fimp_sc.data._nodes import node_names
from fimp_sc.data.storage._elements import shorten

if TYPE_CHECKING:
    from numpy.typing import NDArray

Orientation = Literal["region_time", "time_region"]


def read_recordings(
    bold: Any, recordings: Sequence[Any] | None, orientation: Orientation | None, expected: Mapping[str, int]
) -> tuple[list[str], NDArray[np.float32]]:
    """Return the names of the recordings and their signals.

    Parameters
    ----------
    bold, recordings, orientation
        As :func:`fimp_sc.pp.fmri` takes them.
    expected
        Numbers of regions that the other arguments speak of, by argument; all the same.

    Returns
    -------
    Names, and a float32 array ``(recording, region, time)`` that shares no memory with ``bold``.

    Raises
    ------
    TypeError
        No arrays of real numbers.
    ValueError
        Arrays of the wrong shape, transposed, or of different lengths.
    """
    names, arrays, single = _split(bold, recordings)
    chosen = orientation or ("region_time" if single else "time_region")
    axis = 0 if chosen == "region_time" else 1
    for name, array in zip(names, arrays, strict=True):
        _check_orientation(array, axis, name, expected, explicit=orientation is not None)
    lengths = [array.shape[1 - axis] for array in arrays]
    if len(set(lengths)) > 1:
        listed = shorten([f"{name!r} {length}" for name, length in zip(names, lengths, strict=True)])
        raise ValueError(
            f"The recordings differ in length (time points: {listed}): crop all to {min(lengths)}, the shortest, so "
            "that one time point means the same in each."
        )
    regions = {array.shape[axis] for array in arrays}
    if len(regions) > 1:
        listed = shorten([f"{name!r} {array.shape[axis]}" for name, array in zip(names, arrays, strict=True)])
        raise ValueError(f"The recordings differ in their number of regions ({listed}): use one atlas for all.")
    signals = np.empty((len(arrays), regions.pop(), lengths[0]), dtype=np.float32)
    for i, array in enumerate(arrays):
        signals[i] = array if axis == 0 else array.T
    return names, signals


def _split(bold: Any, recordings: Sequence[Any] | None) -> tuple[list[str], list[NDArray[Any]], bool]:
    """Return names, one array for each recording, and whether they came as a single array."""
    if isinstance(bold, Mapping):
        if recordings is not None:
            raise ValueError("recordings= is not needed: bold is a dictionary, whose keys name the recordings.")
        recordings, bold = list(bold), list(bold.values())
    if isinstance(bold, list | tuple):
        arrays, single = [np.asarray(array) for array in bold], False
    else:
        array = np.asarray(bold)
        if array.ndim not in {2, 3}:
            raise ValueError(
                f"bold has the shape {array.shape}: it must be (recording, region, time), (region, time), or a list of "
                "arrays (time, region)."
            )
        arrays, single = list(array) if array.ndim == 3 else [array], True
    if not arrays:
        raise ValueError("bold has no recordings.")
    names = node_names(recordings, len(arrays), "recording", "recordings")
    for name, array in zip(names, arrays, strict=True):
        if array.dtype.kind not in "buif":
            raise TypeError(f"bold of recording {name!r} must be an array of real numbers, found dtype {array.dtype}.")
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"bold of recording {name!r} must be (time, region), found the shape {array.shape}.")
    return names, arrays, single


def _check_orientation(
    array: NDArray[Any], axis: int, name: str, expected: Mapping[str, int], *, explicit: bool
) -> None:
    found, other = array.shape[axis], array.shape[1 - axis]
    assumed, opposite = get_args(Orientation)[axis], get_args(Orientation)[1 - axis]
    reading = f"bold of recording {name!r} has the shape {array.shape}, read as {assumed!r}: {found} regions"
    if expected:
        argument, n = next(iter(expected.items()))
        if found == n:
            return
        if other == n:
            raise ValueError(
                f"{reading}, but {argument} has {n}, its other axis. It looks transposed: pass "
                f"orientation={opposite!r}."
            )
        raise ValueError(f"{reading}, but {argument} has {n}: all must describe the same regions in one order.")
    if found > other and not explicit:
        raise ValueError(
            f"{reading} and only {other} time points. It may be transposed, and neither region_names nor coordinates "
            f"tell: pass orientation={opposite!r}, or orientation={assumed!r} if it is right."
        )
