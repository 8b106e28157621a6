"""Checks of labels."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pandas as pd

from fimp_sc._logging import warn
from fimp_sc.data.storage._elements import get_obs, label_text, missing_key, shorten

if TYPE_CHECKING:
    from anndata import AnnData

# Words for no label, in lower case and without what stands between and around them.
_NO_LABEL = frozenset(
    {"", "nan", "na", "n a", "none", "null", "nil", "missing", "blank", "unk", "n d"}
    | {"unknown", "unlabeled", "unlabelled", "unassigned", "unannotated", "unclassified", "unidentified"}
    | {"undefined", "undetermined", "unspecified", "unresolved", "no label", "no annotation"}
    | {"not available", "not applicable"}
    | {f"not {word}" for word in ("assigned", "annotated", "classified", "determined")}
    | {"not labeled", "not labelled"}  # codespell:ignore labelled
    | {f"not {word}" for word in ("identified", "known", "defined", "specified")}
)
# Of numbers those that files hold in place of a missing one.
_NO_NUMBER = frozenset({"-1", "-1.0", "-99", "-999", "-9999"})
# What a word for no label may be followed by.
_OF = re.compile(r"(?<=.)( (cell|spot|bead|bin|nucleus|nuclei|region|area|layer|type|class|cluster|label)s?)+$")


def reads_unlabeled(label: str) -> bool:
    """Tell whether a label reads as if a cell had none, as ``"Unknown"``, ``"nan"`` or ``"not_assigned"`` do."""
    if label.strip() in _NO_NUMBER:
        return True
    words = " ".join(re.findall(r"[^\W_]+|\+", label.casefold()))
    return words in _NO_LABEL or _OF.sub("", words) in _NO_LABEL


def check_labels(adata: AnnData, labels_key: str, unlabeled_category: str = "Unknown") -> None:
    """Check that ``adata.obs[labels_key]`` can be learned: NaN and ``unlabeled_category`` mean unlabeled.

    Raises
    ------
    MissingKeyError
        ``labels_key`` is absent.
    TypeError
        The column holds real numbers that are not categories.
    ValueError
        No cell is labeled, or all labeled cells have the same label.
    """
    where = f"adata.obs[{labels_key!r}]"
    if labels_key not in adata.obs:
        raise missing_key(labels_key, "adata.obs", adata.obs, "Name the column of labels with labels_key=.")
    labels = labeled(adata, labels_key, unlabeled_category)
    if pd.api.types.is_float_dtype(labels.dtype) and (labels % 1 != 0).any():
        raise TypeError(f"{where} holds real numbers (dtype {labels.dtype}), not classes: name a column of labels.")
    if labels.empty:
        raise ValueError(
            f"{where} has no labeled cell: all {adata.n_obs:,} are NaN or {unlabeled_category!r}. Label some cells of "
            "every class, or use a model trained on labeled data with model=."
        )
    counts = label_text(labels).value_counts()
    if len(counts) == 1:
        raise ValueError(
            f"{where} has only one class, {counts.index[0]!r} ({counts.iloc[0]:,} cells): two or more are needed "
            f"besides {unlabeled_category!r}."
        )


def warn_labels(adata: AnnData, labels_key: str, unlabeled_category: str = "Unknown") -> None:
    """Warn of labels that will hardly be learned as meant; :func:`check_labels` comes first.

    Warns
    -----
    UserWarning
        Labels that a single cell has, and labels that read as if a cell had none.
    """
    where = f"adata.obs[{labels_key!r}]"
    values = labeled(adata, labels_key, unlabeled_category)
    counts = label_text(values).value_counts()
    single = sorted(counts.index[counts == 1])
    if single:
        warn(
            f"{where} has labels with a single cell, which can hardly be learned or validated: "
            f"{shorten([repr(s) for s in single])}. Merge them, or set them to {unlabeled_category!r}."
        )
    warn_words(adata, labels_key, unlabeled_category, "each is learned as a class")


def warn_words(adata: AnnData, key: str, unlabeled_category: str, consequence: str) -> None:
    """Warn of labels that read as if a cell had none.

    Parameters
    ----------
    adata, key, unlabeled_category
        Object, column of ``obs``, and what cells without label are called.
    consequence
        What becomes of them, for the message.

    Warns
    -----
    UserWarning
        There are such labels; the message says how to leave them out.
    """
    where, values = f"adata.obs[{key!r}]", labeled(adata, key, unlabeled_category)
    counts = label_text(values).value_counts()
    words = [word for word in counts.index if reads_unlabeled(word)]
    if not words:
        return
    cells = shorten([f"{word!r} for {counts[word]:,}" for word in words])
    advice = f"pass unlabeled_category={words[0]!r}"
    if len(words) > 1 or len(values) < get_obs(adata, [key])[key].notna().sum():
        raw = values[label_text(values).isin(words)].astype(object).unique().tolist()
        advice = f"make their labels missing: {where} = {where}.where(~{where}.isin({raw!r}))"
    warn(
        f"{where} has labels that read like no label, and {consequence}: {cells} of {adata.n_obs:,} cells. If these "
        f"cells are not labeled, {advice}."
    )


def labeled(adata: AnnData, labels_key: str, unlabeled_category: str) -> pd.Series:
    """Return the labels of labeled cells, as they are."""
    column = get_obs(adata, [labels_key])[labels_key]
    return column[column.notna().to_numpy() & (label_text(column) != str(unlabeled_category)).to_numpy()]
