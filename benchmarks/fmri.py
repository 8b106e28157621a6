"""Hidden segments of fMRI signals in a subject, or a stretch of time, that no method was trained on.

`hcp`: 7 subjects × 94 regions × 1200 time points, one subject left out at a time, another one for validation (early
stopping, strength of the ridge). `lemon`: one recording of 424 patches, cut into four of 160 time points: two to train
on, one for validation, the last one for the test. Segments of 20 time points are hidden, a share (0.2, 0.5) of those of
each region, region by region, alike for all methods.

Signals are standardized by region and recording, in the test by mean and standard deviation of the values that are not
hidden. Scores are over the hidden values of the test recording in these units; R² is measured around their mean.

Data sets are named by recordings, graph and hidden share. "structural" joins the 6 regions of strongest connectivity,
mean over training subjects, by unweighted edges (`lemon`: by those of the surface mesh), "coordinates" the 6 nearest
regions. FIMP learns with all shares.

Graph networks get windows of 4 segments of a node: the signal with hidden values filled in, by the mean or by
interpolation, and which segments are hidden; they return the window, and the loss is that of hidden values. Each step
has windows that start elsewhere in a training recording, and new segments hidden. "ridge, all regions" sees more than
the graph offers: what all the other regions of the subject show at that moment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

import _fimp
import _harness
from _harness import Fit, Run
from _signals import BASELINES, NETWORKS, SEGMENT, Signals, hide, points, score, standardize

if TYPE_CHECKING:
    from mudata import MuData

N_NEIGHBORS = 6
RATIOS = (0.2, 0.5)
FILES = {"hcp": "fmri_hcp_aal2_7subjects.npz", "lemon": "fmri_lemon_fsa5_424patches.npz"}
STARTS = (0, 160, 320, 492)  # of the recordings that the one of `lemon` is cut into
SETS = tuple(f"{name}, structural, {ratio}" for name in FILES for ratio in RATIOS)
NEAREST = tuple(f"{name}, coordinates, {ratio}" for name in FILES for ratio in RATIOS)


def read(name: str, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """BOLD (recording, region, time), connectivity (recording, region, region), coordinates, seconds per time point."""
    stored = np.load(Path(folder) / FILES[name])
    interval = float(stored["tr_seconds"])
    if name == "hcp":
        return stored["bold"].astype(np.float64), stored["sc"], stored["roi_xyz"], interval
    bold = np.stack([stored["bold"][:, start : start + 160] for start in STARTS]).astype(np.float64)
    row, col = stored["edges"].T
    mesh = sp.coo_matrix((np.ones(len(row)), (row, col)), shape=(bold.shape[1],) * 2).toarray()
    return bold, np.broadcast_to(mesh + mesh.T, (len(bold), *mesh.shape)), stored["xyz"], interval


def join(connectivity: np.ndarray, sparse: bool) -> np.ndarray:
    """Unweighted graph (region, region) of mean connectivity (recording, region, region): the strongest of each row."""
    mean = connectivity.mean(0) * (1 - np.eye(connectivity.shape[1]))
    if sparse:
        return (mean > 0).astype(np.float32)
    return (mean >= np.sort(mean, axis=1)[:, [-N_NEIGHBORS]]).astype(np.float32)


def problem(data: str, args: Any, seed: int) -> tuple[Signals, Callable[[np.ndarray], dict[str, float]]]:
    """A recording with hidden segments, the one before it for validation, and the scores of what was hidden."""
    import fimp_sc

    name, graph, ratio = data.split(", ")
    bold, connectivity, xyz, interval = read(name, args.data)
    test = seed if name == "hcp" else len(bold) - 1
    validation = (test - 1) % len(bold)
    train = [r for r in range(len(bold)) if r not in (test, validation)]
    options: dict[str, Any] = {"coordinates": xyz, "method": graph}
    if graph == "coordinates":
        options["n_neighbors"] = N_NEIGHBORS
    else:
        options["connectivity"] = join(connectivity[train], name == "lemon")
    whole = standardize(bold)
    made = fimp_sc.pp.fmri(whole[train[:1]], **options)["fmri"]
    rng = np.random.default_rng([test, round(100 * float(ratio))])
    gaps = [points(hide((bold.shape[1], bold.shape[2] // SEGMENT), float(ratio), rng)) for _ in range(2)]
    known, truth = (standardize(bold[r], gap) for r, gap in zip((validation, test), gaps, strict=True))
    gap = gaps[1]
    shown = np.where(gap, 0, truth)
    graph = sp.csr_matrix(made.obsp["spatial_connectivities"])
    given = (whole[train], whole[validation], (known, gaps[0]), (shown, gap))
    posed = Signals(*given, graph, options, interval, float(ratio), test)
    return posed, lambda signals: score(truth[gap], signals[gap])


def recordings(signals: dict[str, np.ndarray], problem: Signals, options: dict[str, Any]) -> MuData:
    """MuData of recordings (region, time)."""
    import fimp_sc

    bold = np.stack(list(signals.values()))
    return fimp_sc.pp.fmri(bold, recordings=list(signals), sampling_interval=problem.interval, **options)


def fimp(problem: Signals, run: Run, variant: _fimp.Variant) -> Fit:
    """Signals that FIMP makes; it stops by the validation recording."""
    from fimp_sc.model import FIMP

    options = shuffled(problem) if variant.shuffled else problem.options
    names = [f"training {i}" for i in range(len(problem.train))]
    signals = {**dict(zip(names, problem.train, strict=True)), "validation": problem.whole}
    mdata = recordings(signals, problem, options)
    held_out = (mdata["fmri"].obs["recording"] == "validation").to_numpy(bool)
    train = {
        "train_indices": np.flatnonzero(~held_out),
        "validation_indices": np.flatnonzero(held_out),
        "mask_ratio": (min(RATIOS), max(RATIOS)),
    }
    variant = replace(variant, model={"token_size": SEGMENT}, train=train)
    model, fit = _fimp.train(mdata, replace(run, seed=problem.recording), variant, modality="fmri")
    shown, gap = problem.test
    query = FIMP.load_query_data(recordings({"test": shown}, problem, options), model)
    return replace(fit, values=np.asarray(query.get_reconstruction(hidden=gap[:, ::SEGMENT])))


def shuffled(problem: Signals) -> dict[str, Any]:
    """Options of pp.fmri for the same graph between random regions."""
    order = np.random.default_rng(problem.recording).permutation(problem.graph.shape[0])
    return {"coordinates": problem.options["coordinates"], "connectivity": problem.graph[order][:, order]}


GROUPS = {
    "baselines": BASELINES,
    "networks": NETWORKS,
    "fimp": {"FIMP": partial(fimp, variant=_fimp.Variant())},
    "controls": {"FIMP, shuffled graph": partial(fimp, variant=_fimp.Variant(shuffled=True))},
}

if __name__ == "__main__":
    _harness.main(
        "fmri",
        __doc__,
        SETS,
        problem,
        GROUPS,
        default=("baselines", "networks", "fimp"),
        more=NEAREST,
        n_folds=lambda data: 7 if data.startswith("hcp") else 1,
    )
