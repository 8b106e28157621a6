"""Tokenizers of texts: read from the folder of a checkpoint, and told apart by their vocabulary."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc.pretrained.files._files import CheckpointError, check_file, checkpoint_folder, read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# More than any vocabulary has.
_MOST_WORDS = 10_000_000
_TOKENIZER, _WORDS = "tokenizer.json", "vocab.txt"


def read_words(folder: Path) -> list[str] | None:
    """Return the words of the vocabulary beside a checkpoint in their order, ``None`` where there is none.

    Raises
    ------
    CheckpointError
        The file cannot be read, or is of another kind.
    """
    path = folder / _TOKENIZER
    if path.is_file():
        content = read_json(path)
        model, added = content.get("model"), content.get("added_tokens") or []
        words = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(words, dict) or not all(isinstance(number, int) for number in words.values()):
            raise CheckpointError(
                f"{str(path)!r} has no vocabulary of words and pieces of words (WordPiece or BPE), and others are not "
                "supported."
            )
        numbers = {number: str(word) for word, number in words.items()}
        numbers |= {_entry(token, "id"): str(_entry(token, "content")) for token in added}
        wrong = [number for number in numbers if type(number) is not int or not 0 <= number < _MOST_WORDS]
        if wrong:
            raise CheckpointError(
                f"{str(path)!r} must number words, and those of 'added_tokens', from 0 to less than {_MOST_WORDS:,}, "
                f"found {wrong[0]!r}: download it again."
            )
        return [numbers.get(i, "") for i in range(max(numbers, default=-1) + 1)]
    path = folder / _WORDS
    if path.is_file():
        check_file(path)
        return path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return None


def _entry(token: Any, key: str) -> Any:
    return token.get(key) if isinstance(token, dict) else None


def words_checksum(words: Sequence[str]) -> int:
    """Return a number by which vocabularies are told apart."""
    return zlib.crc32("\n".join(words).encode())


class TextTokenizer:
    """Turns texts into numbers of tokens, with the special tokens of the model around them.

    Parameters
    ----------
    place
        Folder of a checkpoint with ``tokenizer.json``, that file, or a name on the Hugging Face hub.
    max_tokens
        Tokens of a text, special ones included; the rest of a longer one is left out.

    Raises
    ------
    CheckpointError
        There is no such file, or it cannot be read.
    ImportError
        The package tokenizers is not installed.
    ValueError
        The special tokens alone are as many as ``max_tokens``.
    """

    def __init__(self, place: Any, max_tokens: int) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ImportError(
                "Texts are made tokens by the package tokenizers, which is not installed: pip install tokenizers."
            ) from None
        path = Path(place).expanduser()
        folder = path.parent if path.is_file() else checkpoint_folder(place)
        path = path if path.is_file() else folder / _TOKENIZER
        if not path.is_file():
            raise CheckpointError(
                f"{str(folder)!r} has no {_TOKENIZER!r}. Download it with the checkpoint, or write it: "
                "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
            )
        check_file(path)
        words = read_words(path.parent) if path.name == _TOKENIZER else None
        if words is None:
            raise CheckpointError(
                f"tokenizer must name a folder with {_TOKENIZER!r}, or that file: found {str(path)!r}."
            )
        self.words: list[str] = words
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise CheckpointError(
                f"{str(path)!r} cannot be read as a tokenizer ({error}): download it again."
            ) from None
        n_special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_tokens <= n_special:
            raise ValueError(
                f"max_tokens={max_tokens} has no room for text: {n_special} tokens mark start and end. Pass more."
            )
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], int]:
        """Return ``(n, f)`` numbers of tokens, -1 after the last of a text, and how many texts were cut."""
        found = self._tokenizer.encode_batch(list(texts))
        ids = np.full((len(found), max((len(text.ids) for text in found), default=0)), -1, dtype=np.int32)
        for row, text in zip(ids, found, strict=True):
            row[: len(text.ids)] = text.ids
        return ids, sum(bool(text.overflowing) for text in found)
