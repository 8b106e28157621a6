"""Signals with hidden segments: how they are hidden and scored, and the baselines that fill them in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import scipy.sparse as sp
import torch

import _graph_networks as networks

SEGMENT, WINDOW = 20, 4  # time points; segments that graph networks see at a time
ALPHAS = np.logspace(0, 5, 11)
Tries = list[tuple[np.ndarray, np.ndarray]]


def standardise(bold: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
    """Signals (…, time) less their mean over their standard deviation, both of values that are not hidden."""
    hidden = np.zeros(bold.shape, bool) if hidden is None else hidden
    seen = np.ma.array(bold, mask=hidden)
    mean, std = seen.mean(-1, keepdims=True).filled(0), seen.std(-1, keepdims=True).filled(1)
    return ((bold - mean) / std).astype(np.float32)


def hide(shape: tuple[int, ...], ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Hidden segments, boolean of `shape` (…, segments): the same number in each row."""
    return rng.random(shape).argsort(-1) < round(ratio * shape[-1])


def points(segments: np.ndarray) -> np.ndarray:
    """Hidden time points (…, time) of hidden segments."""
    return np.repeat(segments, SEGMENT, axis=-1)


def interpolate(signals: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Signals (…, time) with hidden values on the line between the nearest values that are not."""
    n = signals.shape[-1]
    t = np.arange(n)
    before = np.maximum.accumulate(np.where(hidden, -1, t), axis=-1)
    after = np.minimum.accumulate(np.where(hidden, n, t)[..., ::-1], axis=-1)[..., ::-1]
    before, after = np.where(before < 0, after, before), np.where(after == n, before, after)
    low, high = np.take_along_axis(signals, before, -1), np.take_along_axis(signals, after, -1)
    return low + (high - low) * ((t - before) / np.maximum(after - before, 1)).astype(signals.dtype)


def neighbour_mean(signals: np.ndarray, hidden: np.ndarray, graph: sp.csr_matrix) -> np.ndarray:
    """Mean (region, time) over the neighbours that show the time point, 0 where none does."""
    return graph @ np.where(hidden, 0, signals) / np.maximum(graph @ (~hidden).astype(float), 1)


def score(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """R² around the mean of `truth`, and MSE."""
    error = ((truth.astype(np.float64) - predicted) ** 2).mean()
    return {"r2": float(1 - error / truth.astype(np.float64).var()), "mse": float(error)}


def ridge(
    train: np.ndarray,
    tries: Tries,
    graph: sp.csr_matrix,
    ratio: float,
    seed: int,
    own: bool,
) -> np.ndarray:
    """Hidden values of the second of `tries` from ridge regressions, one for each region, on its neighbours there.

    Neighbours that do not show the time point get the mean of those that do (0 if none does), in training as in the
    test; `own` adds the region's own interpolated signal. `tries` are the signals and hidden time points, (region,
    time), of the validation recording, on which the strength is chosen, and of the test recording.
    """
    rng = np.random.default_rng(seed)
    drawn = [(x, points(hide((x.shape[0], x.shape[1] // SEGMENT), ratio, rng))) for x in np.concatenate([train, train])]
    lines = [[interpolate(x, gap) if own else None for x, gap in part] for part in (drawn, tries)]

    def rows(r: int, x: np.ndarray, gap: np.ndarray, line: np.ndarray | None) -> np.ndarray:
        wanted = np.ix_(graph.indices[graph.indptr[r] : graph.indptr[r + 1]], gap[r])
        seen = ~gap[wanted]
        mean = np.where(seen, x[wanted], 0).sum(0) / np.maximum(seen.sum(0), 1)
        near = np.where(seen, x[wanted], mean)
        return (near if line is None else np.vstack([near, line[r, gap[r]]])).T

    predicted = np.zeros((2, len(ALPHAS), *tries[0][0].shape), np.float32)
    for r in range(train.shape[1]):
        a = np.concatenate([rows(r, *shown, line) for shown, line in zip(drawn, lines[0], strict=True)])
        b = np.concatenate([x[r, gap[r]] for x, gap in drawn])
        for alpha in range(len(ALPHAS)):
            weights = np.linalg.solve(a.T @ a + ALPHAS[alpha] * np.eye(a.shape[1]), a.T @ b)
            for i, (x, gap) in enumerate(tries):
                predicted[i, alpha, r, gap[r]] = rows(r, x, gap, lines[1][i]) @ weights
    truth, gap = tries[0]
    errors = ((predicted[0] - truth)[:, gap] ** 2).mean(1)
    return predicted[1, errors.argmin()]


def network(
    kind: str, fill: str, train: np.ndarray, tries: Tries, graph: sp.csr_matrix, ratio: float, seed: int, quick: bool
) -> np.ndarray:
    """Signals (region, time) of the second of `tries` from a graph network; see `ridge`."""
    n_regions, n_times = train.shape[1:]
    n_windows = n_times // (WINDOW * SEGMENT)
    rng = np.random.default_rng(seed)

    def cut(values: np.ndarray) -> torch.Tensor:
        """(window × region, …) of values (region, time or segments)."""
        windows = values.reshape(n_regions, n_windows, -1).swapaxes(0, 1)
        return torch.from_numpy(windows.reshape(n_regions * n_windows, -1))

    def batch(signals: np.ndarray, gap: np.ndarray) -> networks.Batch:
        filled = interpolate(signals, gap) if fill == "interpolation" else np.where(gap, 0, signals)
        shown = torch.cat([cut(filled), cut(gap[:, ::SEGMENT]).float()], dim=1)
        return shown, cut(signals), cut(gap)

    def draw() -> Iterator[networks.Batch]:
        for signals in train[rng.permutation(len(train))]:
            # Windows that start elsewhere each time; the one place where the end meets the beginning does little harm.
            moved = np.roll(signals, rng.integers(n_times), axis=1)
            yield batch(moved, points(hide((n_regions, n_times // SEGMENT), ratio, rng)))

    validation, test = (batch(*one) for one in tries)
    edges = networks.edge_index(graph, n_windows)
    parts = torch.arange(n_windows).repeat_interleave(n_regions)
    predicted = networks.regress(kind, edges, parts, draw, validation, test[0], seed, 2 if quick else None)
    return predicted.reshape(n_windows, n_regions, -1).swapaxes(0, 1).reshape(n_regions, n_times)


def baselines(train: np.ndarray, tries: Tries, graph: sp.csr_matrix, ratio: float, seed: int, quick: bool) -> Iterator:
    """Yield (method, function that predicts the signals of the second of `tries`).

    `train` is (recording, region, time).
    """
    signals, gap = tries[1]
    yield "mean fill", partial(np.zeros_like, signals)
    yield "linear interpolation", partial(interpolate, signals, gap)
    yield "neighbours' mean", partial(neighbour_mean, signals, gap, graph)
    everyone = sp.csr_matrix(1 - np.eye(len(signals)))
    yield "ridge, neighbours", partial(ridge, train, tries, graph, ratio, seed, own=False)
    yield "ridge, neighbours + own interpolation", partial(ridge, train, tries, graph, ratio, seed, own=True)
    yield "ridge, all regions", partial(ridge, train, tries, everyone, ratio, seed, own=False)
    for fill in ("mean", "interpolation"):
        for kind in networks.KINDS:
            yield f"{kind}, {fill}", partial(network, kind, fill, train, tries, graph, ratio, seed, quick)
