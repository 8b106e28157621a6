"""Signals and images from a model: tokens that are hidden are predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fimp_sc.data._parts import Part

# Each token is predicted in one of so many passes, in which it is hidden along with a fifth of the others.
_PASSES = 5


def hidden_tokens(hidden: Any, part: Part, n_obs: int, n_tokens: int, token_size: int) -> NDArray[np.bool_]:
    """Return which tokens are hidden from what a user says of tokens, time points or pixels.

    Parameters
    ----------
    hidden
        Boolean, ``(n_obs, n_tokens)``, ``(n_obs, n_times)`` or ``(n_obs, height, width)``; a token with any hidden
        time point or pixel is hidden.
    part
        The modality.
    n_obs, n_tokens, token_size
        Of nodes and their tokens.

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
    values = np.asarray(hidden)
    if values.dtype != bool:
        raise TypeError(f"hidden must be boolean, found {values.dtype}.")
    if values.shape == (n_obs, n_tokens):
        return values
    if part.kind == "signal":
        whole: tuple[int, ...] = (n_obs, part.adata.n_vars)
        if values.shape == whole:
            cut = values[:, : n_tokens * token_size]
            return np.asarray(cut.reshape(n_obs, n_tokens, token_size).any(2))
    else:
        height, width, _ = part.info()["image_shape"]
        whole = (n_obs, height, width)
        if values.shape == whole:
            rows, columns = height // token_size, width // token_size
            cut = values[:, : rows * token_size, : columns * token_size]
            return cut.reshape(n_obs, rows, token_size, columns, token_size).any((2, 4)).reshape(n_obs, -1)
    raise ValueError(f"hidden must have the shape {(n_obs, n_tokens)} (tokens) or {whole}, found {values.shape}.")


def predict_all(
    n_obs: int,
    n_tokens: int,
    hidden: NDArray[np.bool_] | None,
    random_state: int,
    predict: Callable[[NDArray[np.bool_]], NDArray[np.float32]],
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
    """
    always = np.zeros((n_obs, n_tokens), dtype=bool) if hidden is None else hidden
    turn = np.random.default_rng(random_state).permuted(np.tile(np.arange(n_tokens) % _PASSES, (n_obs, 1)), axis=1)
    out = predict(always)
    for i in range(_PASSES):
        now = (turn == i) & ~always
        if now.any():
            out = np.where(np.isnan(out), predict(now | always), out)
    return out
