"""Token sources of signals, images and other sequences: how the values of a modality become tokens of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fimp_sc.data.sequences._kinds import sequence_kind
from fimp_sc.data.sequences._reader import SequenceReader, SequenceShape

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from anndata import AnnData
    from numpy.typing import NDArray

    from fimp_sc.data._study import Modality
    from fimp_sc.data.sequences._reader import SequenceStatistics


def token_shape(kind: str, size: Sequence[int], token_size: int, n_coordinates: int = 0) -> SequenceShape:
    """Return the tokens of a node.

    Parameters
    ----------
    kind, size, token_size
        See :class:`~fimp_sc.data.SequenceKind`.
    n_coordinates
        Coordinates that tokens know of.

    Raises
    ------
    ValueError
        When ``token_size`` does not fit.
    """
    found = sequence_kind(kind)
    return SequenceShape(*found.tokens(size, token_size), n_coordinates, aligned=not found.by_node)


def sequence_reader(
    modality: Modality,
    n_obs: int,
    shape: SequenceShape,
    token_size: int,
    *,
    coordinates: NDArray[np.floating] | None = None,
    statistics: SequenceStatistics | None = None,
    hidden: NDArray[np.bool_] | None = None,
) -> SequenceReader:
    """Return the tokens of a modality; values are read when a block asks for them.

    Parameters
    ----------
    modality
        The modality.
    n_obs
        Number of nodes.
    shape, token_size
        Of tokens, see :func:`token_shape`; of the object at hand.
    coordinates, statistics, hidden
        See :class:`~fimp_sc.data.SequenceReader`.
    """
    kind = sequence_kind(modality.kind)
    return SequenceReader(
        Reader(modality.kind, modality.adata, modality.rows, token_size), shape, n_obs, by_node=kind.by_node,
        words=kind.words, coordinates=coordinates, statistics=statistics, absent=modality.absent, hidden=hidden,
    )  # fmt: skip


@dataclass
class Reader:
    """Reads the tokens of nodes; can be sent to other processes.

    Attributes
    ----------
    kind
        Of the modality.
    adata
        Where values are.
    rows
        Row of each node, or ``None`` where nodes are rows.
    token_size
        Of tokens.
    """

    kind: str
    adata: AnnData
    rows: NDArray[np.int64] | None
    token_size: int

    def __call__(self, nodes: NDArray[np.int64], start: int = 0) -> NDArray[np.float32]:
        """Return ``(n, f, p)`` tokens from ``start`` on."""
        rows = nodes if self.rows is None else self.rows[nodes]
        return sequence_kind(self.kind).read(self.adata, rows, self.token_size, start)
