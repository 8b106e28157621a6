"""Tasks × data × methods × seeds: run what is missing, measure it, score it and keep it.

A method gets a problem (`_problems.py`), which holds nothing that it must not see, and returns a `Fit`. Each method
runs in a process of its own with the given number of threads, so that peak memory and CPU time are its own; rows that
are in the CSV already are not computed again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from _common import ONLINE, Results, parser


@dataclass
class Fit:
    """What a method returns.

    Attributes
    ----------
    values
        Of `Annotation`: labels (n_query,); of `Masked`: expression (n_test, n_vars); of `Embedding`: features
        (n_obs, d); of `Nodes`: classes (n,); of `Signals`: signals (region, time).
    parameters
        Trained numbers.
    epochs
        Epochs that were run.
    training_s
        CPU seconds of training alone.
    validation
        Least validation loss.
    note
        The configuration that validation chose.
    """

    values: np.ndarray
    parameters: int | None = None
    epochs: int | None = None
    training_s: float | None = None
    validation: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Run:
    """How a method is to run: seed, one epoch and one configuration only (`quick`), folder of the data, device.

    `checkpoint` is the folder of a foundation model, where there is one.
    """

    seed: int
    quick: bool
    data: Path
    accelerator: str = "auto"
    checkpoint: Path | None = None


class MissingError(ImportError):
    """A package or file of a method is not there: its rows are left out."""


Method = Callable[[Any, Run], Fit]
Problem = Callable[[str, argparse.Namespace, int], tuple[Any, Callable[[np.ndarray], dict[str, float]]]]


def main(
    name: str,
    doc: str | None,
    datasets: tuple[str, ...],
    problem: Problem,
    groups: dict[str, dict[str, Method]],
    *,
    default: tuple[str, ...],
    options: Callable[[argparse.ArgumentParser], None] | None = None,
    rename: Callable[[argparse.Namespace], str] | None = None,
    more: tuple[str, ...] = ("dlpfc_few_counts", "toy", *ONLINE),
    n_folds: Callable[[str], int] | None = None,
) -> None:
    """Run a task from the command line.

    Parameters
    ----------
    name
        Of the CSV.
    datasets
        Default of ``--datasets``.
    problem
        Makes the problem of a data set and seed, and the function that scores a method's values.
    groups
        Methods by group and name.
    default
        Groups that are run when none is named.
    options, rename
        Adds arguments of the task; gives the CSV another name for some of them.
    more
        What ``--datasets`` takes besides; of tissue one with few counts, a toy, and the sets that squidpy downloads.
    n_folds
        How many seeds a data set has, where a seed stands for what is left out; all of them by default.
    """
    p = parser(doc, datasets, more)
    p.add_argument("--methods", nargs="+", default=list(default), choices=tuple(groups), help="groups of methods")
    p.add_argument("--only", nargs="+", help="names of methods, instead of all of their groups")
    p.add_argument("--threads", type=int, default=1, help="CPU threads of each method")
    p.add_argument("--checkpoint", type=Path, help="folder of a foundation model, for the methods that use one")
    if options is not None:
        options(p)
    p.set_defaults(seeds=5 if n_folds is None else sys.maxsize)
    args = p.parse_args()
    # Threads of numba would set those of torch back to all cores.
    os.environ["NUMBA_NUM_THREADS"] = str(args.threads)
    if args.quick:
        args.seeds = 1
    wanted = {title: m for group in args.methods for title, m in groups[group].items()}
    if args.only:
        every = {title: m for group in groups.values() for title, m in group.items()}
        unknown = [title for title in args.only if title not in every]
        if unknown:
            raise SystemExit(f"no method {unknown}; there are {', '.join(every)}")
        wanted = {title: every[title] for title in args.only}
    results = Results(rename(args) if rename else name, args)
    failed = False
    for data in args.datasets:
        for seed in range(args.seeds if n_folds is None else min(args.seeds, n_folds(data))):
            missing = {t: m for t, m in wanted.items() if results.wants(data, t, seed)}
            if not missing:
                continue
            posed, score = problem(data, args, seed)
            run = Run(seed, args.quick, Path(args.data), args.accelerator, args.checkpoint)
            for title, method in missing.items():
                try:
                    fit, costs = apart(partial(method, posed, run), args.threads)
                except ImportError as error:
                    print(f"{title}: skipped, {error}", flush=True)
                except RuntimeError as error:
                    failed = True
                    print(f"{title} failed on {data}, seed {seed}:\n{error}", file=sys.stderr, flush=True)
                else:
                    results.add(data, title, seed, {**score(fit.values), **costs, **_costs(fit)}, note=fit.note)
    results.finish()
    if failed:
        raise SystemExit(1)


def _costs(fit: Fit) -> dict[str, float]:
    costs: dict[str, float] = {}
    if fit.training_s is not None and fit.epochs:
        costs["epoch_s"] = fit.training_s / fit.epochs
    if fit.epochs is not None:
        costs["epochs"] = fit.epochs
    if fit.parameters is not None:
        costs["parameters"] = fit.parameters
    if fit.validation is not None:
        costs["validation"] = fit.validation
    return costs


def apart(method: Callable[[], Fit], threads: int) -> tuple[Fit, dict[str, float]]:
    """Run `method` in a forked process; return its result, CPU seconds and the memory that it added at its peak.

    Where processes cannot be forked (Windows, macOS) it runs here, and its memory is not measured.

    Raises
    ------
    ImportError
        A package of the method is not installed.
    RuntimeError
        It failed; the message is the traceback.
    """
    if not sys.platform.startswith("linux"):
        started = time.process_time()
        return method(), {"cpu_s": time.process_time() - started}
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(method, threads, send))
    child.start()
    send.close()
    try:
        kind, result = receive.recv()
    except EOFError:
        kind, result = "error", "its process ended without a result (out of memory?)"
    child.join()
    if kind == "missing":
        raise ImportError(result)
    if kind == "error":
        raise RuntimeError(result)
    return result


def _child(method: Callable[[], Fit], threads: int, send: Any) -> None:
    import logging

    import torch
    from threadpoolctl import threadpool_limits

    warnings.simplefilter("ignore")
    for noisy in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "scvi", "fimp_sc"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    before, started = _resident(), time.process_time()
    try:
        with threadpool_limits(threads):
            fit = method()
        # ru_maxrss is in KiB on Linux.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before
        send.send(("done", (fit, {"cpu_s": time.process_time() - started, "peak_mb": peak})))
    except ImportError as error:
        send.send(("missing", str(error)))
    except BaseException:
        send.send(("error", traceback.format_exc()))
    finally:
        send.close()


def _resident() -> float:
    """Memory of this process now, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
