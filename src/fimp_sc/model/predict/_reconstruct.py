"""Signals and images from a model: tokens that are hidden are predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fimp_sc._draws import uniform

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from fimp_sc.data import SequenceKind

# Each token is predicted in one of so many passes, in which it is hidden along with a fifth of the others.
_PASSES = 5


def hidden_tokens(
    hidden: Any, kind: SequenceKind, n_obs: int, size: Sequence[int], token_size: int
) -> NDArray[np.bool_]:
    """Return which tokens are hidden from what a user says of tokens, or of values: time points, pixels.

    Parameters
    ----------
    hidden
        Boolean, ``(n_obs, n_tokens)`` or as the kind of the modality takes it (:meth:`SequenceKind.mask`); a token
        with any hidden value is hidden.
    kind
        Of the modality.
    n_obs
        Number of nodes.
    size, token_size
        Of the values of a node, and of its tokens; see :class:`~fimp_sc.data.SequenceKind`.

    Returns
    -------
    ``(n_obs, n_tokens)`` bool.

    Raises
    ------
    TypeError
        It is not boolean.
    ValueError
        It has another shape.
    """
    values, n_tokens = np.asarray(hidden), kind.tokens(size, token_size)[0]
    if values.dtype != bool:
        raise TypeError(f"hidden must be boolean, found {values.dtype}.")
    if values.shape == (n_obs, n_tokens):
        return values
    found = kind.mask(values, size, token_size) if len(values) == n_obs else None
    if found is None:
        what = ", ".join(kind.size_names)
        raise ValueError(
            f"hidden must have the shape {(n_obs, n_tokens)} (tokens) or {(n_obs, *size)} ({what}), found "
            f"{values.shape}."
        )
    return found


def predict_all(
    n_obs: int,
    n_tokens: int,
    hidden: NDArray[np.bool_] | None,
    random_state: int,
    predict: Callable[[NDArray[np.bool_]], NDArray[np.float32]],
    node_key: NDArray[np.uint64] | None = None,
) -> NDArray[np.float32]:
    """Predict every token while it is hidden: those of ``hidden`` at once, the others a fifth at a time.

    Parameters
    ----------
    n_obs, n_tokens
        Number of nodes and of their tokens.
    hidden
        ``(n_obs, n_tokens)`` bool, tokens that are never seen.
    random_state
        Seed of the fifths.
    predict
        From hidden tokens to what is predicted of all tokens of the wanted nodes, ``(n, n_tokens, p)``, NaN where
        nothing was hidden.
    node_key
        ``(n_obs,)`` keys of the nodes, by default their places, on which their fifths depend.
    """
    always = np.zeros((n_obs, n_tokens), dtype=bool) if hidden is None else hidden
    keys = np.arange(n_obs) if node_key is None else node_key
    turn = uniform(random_state, keys, np.arange(n_tokens)).argsort(axis=1, kind="stable") % _PASSES
    # Without tokens that are hidden in any case the five passes are enough.
    passes = [always] if always.any() else []
    passes += [now | always for now in ((turn == i) & ~always for i in range(_PASSES)) if now.any()]
    out = predict(passes[0])
    for now in passes[1:]:
        out = np.where(np.isnan(out), predict(now), out)
    return out
