from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np

from fimp_sc.metrics._common import labels

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import ArrayLike


@overload
def label_scores(
    truth: ArrayLike, predicted: ArrayLike, /, *, unlabeled_category: str | None = ...
) -> dict[str, Any]: ...
@overload
def label_scores(
    adata: AnnData, truth: str, predicted: str, /, *, unlabeled_category: str | None = ...
) -> dict[str, Any]: ...
def label_scores(*given: Any, unlabeled_category: str | None = "Unknown") -> dict[str, Any]:
    """Compare predicted labels with true ones.

    ``label_scores(truth, predicted)`` takes arrays, ``label_scores(adata, "cell_type", "fimp_cell_type")`` columns.

    Parameters
    ----------
    *given
        True and predicted labels, ``(n_obs,)`` each; or an object and the names of two columns of its ``obs``. To score
        cells that were held out, pass these alone: ``adata[test]``.
    unlabeled_category
        True label of cells whose class is not known. They are left out, as are those where it is missing. A prediction
        that is missing counts as wrong.

    Returns
    -------
    ``accuracy``; ``macro_f1``, the mean of F1 over the classes that occur among the true labels; ``f1``, the F1 of each
    of them, a mapping; ``n_obs``, the number of cells that were scored.

    Raises
    ------
    KeyError
        When a column is missing.
    ValueError
        When arrays differ in length, or no cell has a true label.

    Examples
    --------
    >>> from fimp_sc.metrics import label_scores
    >>> label_scores(["T", "T", "B", "Unknown"], ["T", "B", "B", "B"])["accuracy"]
    0.6666666666666666
    """
    from sklearn.metrics import accuracy_score, f1_score

    _, truth, predicted = labels(given, unlabeled_category)
    known = np.array([value is not None for value in truth], dtype=bool)
    if not known.any():
        raise ValueError("No cell has a true label, so that there is nothing to compare.")
    true = truth[known].astype(str)
    # A text that no class has, as it differs from all of them in length.
    none = "-" * (max(map(len, true)) + 1)
    guess = np.array([none if value is None else value for value in predicted[known]], dtype=str)
    classes = np.unique(true)
    f1 = f1_score(true, guess, labels=classes, average=None, zero_division=0)
    return {
        "accuracy": float(accuracy_score(true, guess)),
        "macro_f1": float(np.mean(f1)),
        "f1": {str(name): float(value) for name, value in zip(classes, f1, strict=True)},
        "n_obs": int(known.sum()),
    }
