"""Texts: tokens are words and pieces of words, as numbers in the vocabulary of a foundation model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc.data.sequences._kinds import SequenceKind
from fimp_sc.data.storage._elements import missing_key
from fimp_sc.data.storage._rows import open_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

TOKENS_KEY = "token_ids"


class TextKind(SequenceKind):
    """Texts in ``obsm["token_ids"]``, see :func:`fimp_sc.pp.text`: numbers of tokens, -1 after the last of a text."""

    name, size_names = "text", ("tokens", "words in the vocabulary", "checksum of the vocabulary")
    words, results = True, "obsm"

    def size(self, adata: AnnData, where: str = "adata") -> list[int]:
        """See :class:`SequenceKind`."""
        if TOKENS_KEY not in adata.obsm:
            raise missing_key(TOKENS_KEY, f"{where}.obsm", adata.obsm, "fimp_sc.pp.text makes tokens of texts.")
        ids, info = adata.obsm[TOKENS_KEY], adata.uns.get("fimp_modality", {})
        found = f"{where}.obsm[{TOKENS_KEY!r}]"
        if getattr(ids, "dtype", np.dtype(object)).kind not in "iu":
            raise TypeError(f"{found} must hold whole numbers, found {getattr(ids, 'dtype', type(ids).__name__)}.")
        if len(ids.shape) != 2 or ids.shape[1] == 0:
            raise ValueError(f"{found} must have the shape (n_obs, n_tokens), found {tuple(ids.shape)}.")
        place = f"{where}.uns['fimp_modality']"
        for key in ("n_words", "vocabulary"):
            if key not in info:
                raise missing_key(key, place, info, "Make the modality with fimp_sc.pp.text, which says it.")
        n_words, values = int(info["n_words"]), np.asarray(ids)
        if values.min() < -1 or values.max() >= n_words:
            raise ValueError(
                f"{found} must lie between -1 (no token) and {n_words - 1:,}, as the vocabulary has {n_words:,} words: "
                f"found {values.min()} to {values.max()}."
            )
        if (values[:, 0] < 0).any():
            empty = adata.obs_names[int((values[:, 0] < 0).argmax())]
            raise ValueError(f"{found} has no token for {empty!r}: tokens stand first in a row. Leave such nodes out.")
        if ((values[:, :-1] < 0) & (values[:, 1:] >= 0)).any():
            raise ValueError(f"{found} has tokens after a -1, which ends a text: put all -1 last.")
        return [int(ids.shape[1]), n_words, int(info["vocabulary"])]

    def default_token_size(self, size: Sequence[int]) -> int:
        """See :class:`SequenceKind`."""
        return 1

    def tokens(self, size: Sequence[int], token_size: int) -> tuple[int, int]:
        """See :class:`SequenceKind`."""
        if token_size != 1:
            raise ValueError(f"token_size must be 1, as a token is a number: found {token_size}.")
        return size[0], 1

    def read(self, adata: AnnData, nodes: NDArray[np.int64], token_size: int, start: int = 0) -> NDArray[np.float32]:
        """See :class:`SequenceKind`."""
        ids = open_rows(adata.obsm[TOKENS_KEY], f"adata.obsm[{TOKENS_KEY!r}]").read(nodes)
        return np.asarray(ids, dtype=np.float32)[:, :, None]

    def restore(self, tokens: NDArray[np.floating], size: Sequence[int], token_size: int) -> NDArray[np.float32]:
        """See :class:`SequenceKind`."""
        return np.asarray(tokens[:, :, 0], dtype=np.float32)

    def parts(self, adata: AnnData) -> dict[str, dict[str, Any]]:
        """See :class:`SequenceKind`."""
        return {"obsm": {TOKENS_KEY: adata.obsm[TOKENS_KEY]}}

    def fits(self, size: Sequence[int], known: Sequence[int]) -> str | None:
        """See :class:`SequenceKind`; texts may be longer or shorter."""
        if list(size[1:]) == list(known[1:]):
            return None
        return "its texts were made tokens by another vocabulary: pass its own tokenizer to fimp_sc.pp.text"


KIND = TextKind()
