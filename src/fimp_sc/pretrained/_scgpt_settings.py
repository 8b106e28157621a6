"""Settings and vocabulary of a checkpoint of scGPT, checked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc.data.storage._elements import shorten
from fimp_sc.pretrained.files._files import CheckpointError, read_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

SPECIAL = re.compile(r"<\w+>")
# Settings that change what the layers compute, and the only value with which they compute what is built here.
_FIXED = {
    "input_emb_style": "continuous",
    "input_style": "binned",
    "pad_token": "<pad>",
    "norm_scheme": "post",
    "pre_norm": False,
}


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings that the modules are built from."""
    args = read_json(path)

    def number(key: str, kind: type, low: float, high: float) -> Any:
        if key not in args:
            raise CheckpointError(
                f"{str(path)!r} has no {key!r}; it has {shorten([repr(k) for k in sorted(args)], 30) or 'nothing'}. "
                "Use the args.json that was released with the weights."
            )
        value = args[key]
        fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not (fits and low <= value <= high):
            wanted = "a whole number" if kind is int else "a number"
            raise CheckpointError(
                f"{key!r} in {str(path)!r} must be {wanted} from {low:,} to {high:,}, found {value!r}."
            )
        return kind(value)

    for key, known in _FIXED.items():
        if args.get(key, known) != known:
            raise CheckpointError(
                f"{key!r} in {str(path)!r} is {args[key]!r}; only scGPT models with {known!r} can be used."
            )
    config = {key: number(key, int, 1, 100_000) for key in ("embsize", "nheads", "d_hid", "nlayers")}
    config |= {"n_bins": number("n_bins", int, 3, 100_000), "dropout": number("dropout", float, 0, 1)}
    config |= {key: number(key, float, -1_000_000, 1_000_000) for key in ("pad_value", "mask_value")}
    if config["embsize"] % config["nheads"]:
        raise CheckpointError(
            f"'nheads' in {str(path)!r} must divide 'embsize': {config['embsize']} is not a multiple of "
            f"{config['nheads']}."
        )
    return config


def read_vocabulary(path: Path) -> dict[str, int]:
    """Return the id of every token, special ones included; ids are 0, 1, 2, ..."""
    vocabulary = read_json(path)
    bad = [name for name, row in vocabulary.items() if type(row) is not int]
    if bad:
        raise CheckpointError(
            f"{str(path)!r} must give a whole number for every token, found {vocabulary[bad[0]]!r} for {bad[0]!r}."
        )
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise CheckpointError(
            f"The ids of the {len(vocabulary):,} tokens in {str(path)!r} must be 0 to {len(vocabulary) - 1:,}, each "
            "once: some are missing or given twice. Use the vocab.json that was released with the weights."
        )
    for token in ("<cls>", "<pad>"):
        if token not in vocabulary:
            raise CheckpointError(f"{str(path)!r} has no {token!r}: it is not a vocabulary of scGPT.")
    return vocabulary


def chosen_rows(
    vocabulary: dict[str, int], genes: Sequence[str] | None, rows: ArrayLike | None, path: Path
) -> NDArray[np.int64]:
    """Return the id of each gene of the model, -1 where it has none."""
    if genes is not None and rows is not None:
        raise ValueError("pass either genes or rows, not both")
    if genes is not None:
        rows = [-1 if SPECIAL.fullmatch(gene) else vocabulary.get(gene, -1) for gene in genes]
    if rows is None:
        return np.arange(len(vocabulary))
    chosen = np.asarray(rows)
    if chosen.ndim != 1 or (chosen.dtype.kind not in "iu" and chosen.size):
        raise ValueError(f"rows must be a list of whole numbers, found shape {chosen.shape} of {chosen.dtype}")
    chosen = chosen.astype(np.int64)
    if chosen.size and not -1 <= chosen.min() <= chosen.max() < len(vocabulary):
        raise ValueError(
            f"rows must be -1 or ids of the vocabulary, 0 to {len(vocabulary) - 1:,}, found {chosen.min()} to "
            f"{chosen.max()}"
        )
    if not (chosen >= 0).any():
        examples = f", such as {shorten([repr(gene) for gene in genes])}," if genes else ""
        raise ValueError(
            f"None of the {len(chosen):,} genes{examples} is in the vocabulary {str(path)!r}, which has human gene "
            f"symbols such as {shorten([repr(name) for name in vocabulary])}."
        )
    return chosen
