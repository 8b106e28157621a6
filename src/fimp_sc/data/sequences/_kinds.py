"""Kinds of nodes that are sequences of numbers: what each kind must say of itself, and which there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray


def segments(signal: NDArray[np.number], length: int) -> NDArray[np.float32]:
    """Return ``(n, f, length)`` segments of ``(n, time)``; what does not fill a segment is left out."""
    n_segments = signal.shape[1] // length
    cut = np.ascontiguousarray(signal[:, : n_segments * length], dtype=np.float32)
    return cut.reshape(len(signal), n_segments, length)


def series(tokens: NDArray[np.floating], n_times: int) -> NDArray[np.float32]:
    """Undo :func:`segments`; time points outside of whole segments are NaN."""
    out = np.full((len(tokens), n_times), np.nan, dtype=np.float32)
    flat = tokens.reshape(len(tokens), tokens.shape[1] * tokens.shape[2])
    out[:, : flat.shape[1]] = flat
    return out


def patches(pixels: NDArray[np.number], side: int) -> NDArray[np.float32]:
    """Return ``(n, f, side * side * channels)`` patches of ``(n, height, width, channels)``, row by row.

    Pixels right of and below the last whole patch are left out.
    """
    n, height, width, channels = pixels.shape
    rows, columns = height // side, width // side
    cut = pixels[:, : rows * side, : columns * side].reshape(n, rows, side, columns, side, channels)
    return np.ascontiguousarray(cut.swapaxes(2, 3), dtype=np.float32).reshape(n, rows * columns, side**2 * channels)


def picture(tokens: NDArray[np.floating], shape: tuple[int, int, int], side: int) -> NDArray[np.float32]:
    """Undo :func:`patches`, to ``(n, height, width, channels)``; pixels outside of whole patches are NaN."""
    height, width, channels = shape
    rows, columns = height // side, width // side
    out = np.full((len(tokens), *shape), np.nan, dtype=np.float32)
    cut: Any = tokens.reshape(len(tokens), rows, columns, side, side, channels).swapaxes(2, 3)
    out[:, : rows * side, : columns * side] = cut.reshape(len(tokens), rows * side, columns * side, channels)
    return out


# Kinds that come with the package and their modules, loaded when a kind is asked for.
_OWN = {"signal": "_signal", "patch": "_image", "text": "_text"}
_TABLES = ("expression", "feature")

_kinds: dict[str, SequenceKind] = {}


class SequenceKind(ABC):
    """Kind of nodes whose values become sequences of tokens of numbers, and back.

    Registered with :func:`register_kind`, a modality whose ``uns["fimp_modality"]["kind"]`` is :attr:`name` can be
    embedded, annotated and imputed as any other.

    Attributes
    ----------
    name
        Of the kind.
    size_names
        What the numbers that :meth:`size` returns are, for messages and model cards.
    by_node
        Whether each node is standardized by itself, as those without a common scale must be, rather than by mean and
        standard deviation of the training nodes. Training then also shows its tokens in any order and of either sign.
    located
        Whether tokens know the coordinates of their node.
    words
        Whether numbers stand for words of a vocabulary, negative after the last of a node: they are not standardized,
        and only a foundation model reads them.
    results
        Where reconstructions are written: ``"layers"`` (values are in ``X``) or ``"obsm"``.
    """

    name: ClassVar[str]
    size_names: ClassVar[tuple[str, ...]]
    by_node: ClassVar[bool] = False
    located: ClassVar[bool] = False
    words: ClassVar[bool] = False
    results: ClassVar[Literal["layers", "obsm"]] = "layers"

    @abstractmethod
    def size(self, adata: AnnData, where: str = "adata") -> Sequence[int]:
        """Check the values of a modality and return the size of those of one node, by which models tell what they read.

        Parameters
        ----------
        adata
            The modality.
        where
            Its name, for messages.

        Raises
        ------
        KeyError, TypeError, ValueError
            When values are absent or cannot be used.
        """

    @abstractmethod
    def default_token_size(self, size: Sequence[int]) -> int:
        """Return the usual size of a token."""

    @abstractmethod
    def tokens(self, size: Sequence[int], token_size: int) -> tuple[int, int]:
        """Return the number of tokens of a node, and of numbers in each.

        Raises
        ------
        ValueError
            When ``token_size`` does not fit.
        """

    @abstractmethod
    def read(self, adata: AnnData, nodes: NDArray[np.int64], token_size: int, start: int = 0) -> NDArray[np.float32]:
        """Return ``(n, f, p)`` float32 tokens of some nodes.

        Parameters
        ----------
        adata
            The modality.
        nodes
            ``(n,)`` rows.
        token_size
            Of tokens.
        start
            Where the first token starts; not 0 only in training, of kinds that are standardized by node.
        """

    @abstractmethod
    def restore(self, tokens: NDArray[np.floating], size: Sequence[int], token_size: int) -> NDArray[np.float32]:
        """Return the values that ``(n, f, p)`` tokens are; NaN for those that were in no token."""

    def left_over(self, size: Sequence[int], token_size: int) -> str | None:
        """Say what is in no token, if anything."""
        return None

    def mask(self, hidden: NDArray[np.bool_], size: Sequence[int], token_size: int) -> NDArray[np.bool_] | None:
        """Return which tokens have hidden values, ``(n, f)``; ``None`` if ``hidden`` has another shape than values."""
        return None

    def parts(self, adata: AnnData) -> dict[str, dict[str, Any]]:
        """Return the elements that hold the values, by attribute of ``adata`` (``"X"`` by itself)."""
        return {"X": {"": adata.X}}

    def fits(self, size: Sequence[int], known: Sequence[int]) -> str | None:
        """Say why a model of nodes of size ``known`` cannot read nodes of ``size``, if it cannot."""
        return None if list(size) == list(known) else f"it reads nodes of size {list(known)}, found {list(size)}"


def register_kind(kind: SequenceKind) -> None:
    """Make a kind of nodes known.

    Parameters
    ----------
    kind
        Replaces one of the same name.

    Raises
    ------
    TypeError
        When it is not an instance of a kind.
    ValueError
        When the name is that of expression or features.
    """
    if not isinstance(kind, SequenceKind):
        raise TypeError(f"register_kind takes an instance of a SequenceKind, found {kind!r}.")
    if kind.name in _TABLES:
        raise ValueError(f"{kind.name!r} is the name of a kind of tables: choose another.")
    _kinds[kind.name] = kind


def sequence_kinds() -> dict[str, SequenceKind]:
    """Return all kinds of sequences by name."""
    for name, module in _OWN.items():
        if name not in _kinds:  # else it was replaced
            _kinds[name] = import_module(f"fimp_sc.data.sequences.{module}").KIND
    return _kinds


def sequence_kind(name: str) -> SequenceKind:
    """Return a kind of sequences."""
    return sequence_kinds()[name]
