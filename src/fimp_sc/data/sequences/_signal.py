"""Signals: tokens are segments of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc.data.sequences._kinds import SequenceKind, segments, series
from fimp_sc.data.storage._elements import in_memory
from fimp_sc.data.storage._rows import open_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray


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


# As in BrainLM.
_SEGMENT = 20


class SignalKind(SequenceKind):
    """Signals of brain regions (or anything that is measured in time): ``X`` is ``(n_obs, n_times)``."""

    name, size_names = "signal", ("time points",)
    by_node, located, results = True, True, "layers"

    def size(self, adata: AnnData, where: str = "adata") -> list[int]:
        """See :class:`SequenceKind`."""
        if adata.X is None:
            raise ValueError(f"{where}.X is None: store the values of the nodes there, one row each.")
        if adata.n_vars == 0:
            raise ValueError(f"{where} has no time points (n_vars = 0).")
        names = adata.obs_names
        check_signals(in_memory(adata.X, f"{where}.X"), lambda node: f"node {names[node]!r} of {where}")
        return [adata.n_vars]

    def default_token_size(self, size: Sequence[int]) -> int:
        """See :class:`SequenceKind`."""
        # Of a short recording a quarter, so that there is something to hide and something to see.
        return min(_SEGMENT, max(size[0] // 4, 1))

    def tokens(self, size: Sequence[int], token_size: int) -> tuple[int, int]:
        """See :class:`SequenceKind`."""
        if not 1 <= token_size <= size[0]:
            raise ValueError(
                f"token_size must be between 1 and {size[0]}, the time points of the signals: found {token_size}."
            )
        return size[0] // token_size, token_size

    def left_over(self, size: Sequence[int], token_size: int) -> str | None:
        """See :class:`SequenceKind`."""
        rest = size[0] % token_size
        what = f"the last {rest} of {size[0]:,} time points, which do not fill a segment of {token_size}"
        return what if rest else None

    def read(self, adata: AnnData, nodes: NDArray[np.int64], token_size: int, start: int = 0) -> NDArray[np.float32]:
        """See :class:`SequenceKind`."""
        values: Any = open_rows(adata.X, "adata.X").read(nodes)
        values = values if isinstance(values, np.ndarray) else values.toarray()
        # At least one segment must be left.
        return segments(values[:, min(start, values.shape[1] - token_size) :], token_size)

    def restore(self, tokens: NDArray[np.floating], size: Sequence[int], token_size: int) -> NDArray[np.float32]:
        """See :class:`SequenceKind`."""
        return series(tokens, size[0])

    def mask(self, hidden: NDArray[np.bool_], size: Sequence[int], token_size: int) -> NDArray[np.bool_] | None:
        """See :class:`SequenceKind`; ``hidden`` is ``(n, n_times)``."""
        if hidden.shape[1:] != (size[0],):
            return None
        n_tokens = size[0] // token_size
        cut = hidden[:, : n_tokens * token_size].reshape(len(hidden), n_tokens, token_size)
        return np.asarray(cut.any(2))

    def fits(self, size: Sequence[int], known: Sequence[int]) -> str | None:
        """See :class:`SequenceKind`; signals may be shorter."""
        if size[0] <= known[0]:
            return None
        return (
            f"it reads up to {known[0]:,} time points, found {size[0]:,}: cut the recordings into parts, each a "
            "recording of its own"
        )


KIND = SignalKind()
