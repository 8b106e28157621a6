"""Signals with hidden segments: the problem, how it is scored, and the baselines and networks that fill them in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

import _graph_networks as networks
from _harness import Fit, Method, Run

SEGMENT, WINDOW = 20, 4  # time points; segments that graph networks see at a time
ALPHAS = np.logspace(0, 5, 11)
Shown = tuple[np.ndarray, np.ndarray]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Signals:
    """Hidden segments of a recording.

    Attributes
    ----------
    train
        (recording, region, time) standardized.
    whole
        (region, time), the validation recording, standardized.
    validation, test
        The signals (region, time) of a recording, standardized by what is shown, and which time points are hidden,
        boolean (region, time). What the test hides is 0.
    graph
        (region, region) CSR, entry [i, j] is an edge from j to i.
    options, interval
        Arguments of ``pp.fmri`` that make that graph; seconds per time point.
    ratio
        Share of the segments that are hidden.
    recording
        Number of the test recording, which is the seed of its methods.
    """

    train: np.ndarray
    whole: np.ndarray
    validation: Shown
    test: Shown
    graph: sp.csr_matrix
    options: dict[str, Any]
    interval: float
    ratio: float
    recording: int


def standardize(bold: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
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


def neighbor_mean(signals: np.ndarray, hidden: np.ndarray, graph: sp.csr_matrix) -> np.ndarray:
    """Mean (region, time) over the neighbors that show the time point, 0 where none does."""
    return graph @ np.where(hidden, 0, signals) / np.maximum(graph @ (~hidden).astype(float), 1)


def score(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """R² around the mean of `truth`, and MSE."""
    error = ((truth.astype(np.float64) - predicted) ** 2).mean()
    return {"r2": float(1 - error / truth.astype(np.float64).var()), "mse": float(error)}


def fill(problem: Signals, run: Run, how: str) -> Fit:
    """The signals with hidden values from a line between those beside them, from neighbors, or 0, their mean."""
    signals, gap = problem.test
    if how == "line":
        return Fit(interpolate(signals, gap))
    return Fit(neighbor_mean(signals, gap, problem.graph) if how == "neighbors" else np.zeros_like(signals))


def ridge(problem: Signals, run: Run, *, everyone: bool = False, own: bool = False) -> Fit:
    """Hidden values from ridge regressions, one for each region, on its neighbors (or `everyone`) at that moment.

    Neighbors that do not show the time point get the mean of those that do (0 if none does), in training as in the
    test; `own` adds the region's own interpolated signal. The strength is that of least error on the validation
    recording.
    """
    train, graph, tries = problem.train, problem.graph, (problem.validation, problem.test)
    if everyone:
        graph = sp.csr_matrix(1 - np.eye(graph.shape[0]))
    rng = np.random.default_rng(problem.recording)
    shape = train.shape[1], train.shape[2] // SEGMENT
    drawn = [(x, points(hide(shape, problem.ratio, rng))) for x in np.concatenate([train, train])]
    lines = [[interpolate(x, gap) if own else None for x, gap in part] for part in (drawn, tries)]

    def rows(r: int, x: np.ndarray, gap: np.ndarray, line: np.ndarray | None) -> np.ndarray:
        wanted = np.ix_(graph.indices[graph.indptr[r] : graph.indptr[r + 1]], gap[r])
        seen = ~gap[wanted]
        mean = np.where(seen, x[wanted], 0).sum(0) / np.maximum(seen.sum(0), 1)
        near = np.where(seen, x[wanted], mean)
        return (near if line is None else np.vstack([near, line[r, gap[r]]])).T

    predicted = np.zeros((2, len(ALPHAS), *problem.whole.shape), np.float32)
    for r in range(train.shape[1]):
        a = np.concatenate([rows(r, *shown, line) for shown, line in zip(drawn, lines[0], strict=True)])
        b = np.concatenate([x[r, gap[r]] for x, gap in drawn])
        for alpha in range(len(ALPHAS)):
            weights = np.linalg.solve(a.T @ a + ALPHAS[alpha] * np.eye(a.shape[1]), a.T @ b)
            for i, (x, gap) in enumerate(tries):
                predicted[i, alpha, r, gap[r]] = rows(r, x, gap, lines[1][i]) @ weights
    truth, gap = problem.validation
    errors = ((predicted[0] - truth)[:, gap] ** 2).mean(1)
    return Fit(predicted[1, errors.argmin()])


def network(problem: Signals, run: Run, kind: str, filled: str) -> Fit:
    """Signals from a graph network that sees windows with hidden values filled in, and which these are."""
    n_regions, n_times = problem.whole.shape
    n_windows = n_times // (WINDOW * SEGMENT)
    rng = np.random.default_rng(problem.recording)

    def cut(values: np.ndarray) -> torch.Tensor:
        """(window × region, …) of values (region, time or segments)."""
        windows = values.reshape(n_regions, n_windows, -1).swapaxes(0, 1)
        return torch.from_numpy(windows.reshape(n_regions * n_windows, -1))

    def batch(signals: np.ndarray, gap: np.ndarray) -> Batch:
        """Features, true values and where these are hidden."""
        whole = interpolate(signals, gap) if filled == "interpolation" else np.where(gap, 0, signals)
        return torch.cat([cut(whole), cut(gap[:, ::SEGMENT]).float()], dim=1), cut(signals), cut(gap)

    def draw() -> Iterator[Batch]:
        for signals in problem.train[rng.permutation(len(problem.train))]:
            # Windows that start elsewhere each time; the one place where the end meets the beginning does little harm.
            moved = np.roll(signals, rng.integers(n_times), axis=1)
            yield batch(moved, points(hide((n_regions, n_times // SEGMENT), problem.ratio, rng)))

    validation, test = batch(*problem.validation), batch(*problem.test)
    edges = networks.edge_index(problem.graph, n_windows)
    parts = torch.arange(n_windows).repeat_interleave(n_regions)
    torch.manual_seed(problem.recording)
    model, started = networks.GraphNetwork(kind, test[0].shape[1], test[1].shape[1]), time.process_time()

    def loss(batch: Batch) -> torch.Tensor:
        inputs, truth, hidden = batch
        return ((model(inputs, edges, parts) - truth)[hidden] ** 2).mean()

    how = {"lr": 2e-3, "epochs": 2 if run.quick else None, "patience": 10}
    training = networks.fit(model, lambda: map(loss, draw()), lambda: loss(validation).item(), **how)
    fit = networks.chosen([training], training, started)
    with torch.no_grad():
        made = model(test[0], edges, parts).numpy()
    return replace(fit, values=made.reshape(n_windows, n_regions, -1).swapaxes(0, 1).reshape(n_regions, n_times))


BASELINES: dict[str, Method] = {
    "mean fill": partial(fill, how="mean"),
    "linear interpolation": partial(fill, how="line"),
    "neighbors' mean": partial(fill, how="neighbors"),
    "ridge, neighbors": ridge,
    "ridge, neighbors + own interpolation": partial(ridge, own=True),
    "ridge, all regions": partial(ridge, everyone=True),
}
NETWORKS: dict[str, Method] = {
    f"{kind}, {filled}": partial(network, kind=kind, filled=filled)
    for filled in ("mean", "interpolation")
    for kind in networks.KINDS
}
