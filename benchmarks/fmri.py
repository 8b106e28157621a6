"""Hidden segments of fMRI signals in a subject, or a stretch of time, that no method was trained on.

`hcp`: 7 subjects × 94 regions × 1200 time points, one subject left out at a time, another one for validation (early
stopping, strength of the ridge). `lemon`: one recording of 424 patches, cut into four of 160 time points: two to train
on, one for validation, the last one for the test. Segments of 20 time points are hidden, a share (0.2, 0.5) of those of
each region, region by region, alike for all methods.

Signals are standardised by region and recording, in the test by mean and standard deviation of the values that are not
hidden. Scores are over the hidden values of the test recording in these units; R² is measured around their mean.

--graph structural: the 6 regions of strongest connectivity, mean over training subjects, as unweighted edges (`lemon`:
the edges of the surface mesh). --graph coordinates: the 6 nearest regions.

Graph networks get windows of 4 segments of a node: the signal with hidden values filled in, by the mean or by
interpolation, and which segments are hidden; they return the window, and the loss is that of hidden values. Each step
has windows that start elsewhere in a training recording, and new segments hidden. "ridge, all regions" sees more than
the graph offers: what all the other regions of the subject show at that moment.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from _common import Results, parse, parser
from _signals import SEGMENT, baselines, hide, points, score, standardise

N_NEIGHBOURS = 6
TITLES = {"fimp": "FIMP", "shuffled": "FIMP, shuffled graph"}
RATIOS = (0.2, 0.5)
FILES = {"hcp": "fmri_hcp_aal2_7subjects.npz", "lemon": "fmri_lemon_fsa5_424patches.npz"}
STARTS = (0, 160, 320, 492)  # of the recordings that the one of `lemon` is cut into


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
    return (mean >= np.sort(mean, axis=1)[:, [-N_NEIGHBOURS]]).astype(np.float32)


def graph_options(name: str, connectivity: np.ndarray, xyz: np.ndarray, args: argparse.Namespace) -> dict:
    """Arguments of pp.fmri that make the graph; `connectivity` is that of the training recordings."""
    if args.graph == "coordinates":
        return {"coordinates": xyz, "method": "coordinates", "n_neighbors": N_NEIGHBOURS}
    return {"coordinates": xyz, "method": "structural", "connectivity": join(connectivity, name == "lemon")}


def pieces(values: np.ndarray, n: int) -> np.ndarray:
    """(n, region, …): values (region, time or segments) in `n` pieces of equal length, one after another."""
    return values.reshape(len(values), n, -1).swapaxes(0, 1)


def modality(signals: dict[str, np.ndarray], n: int, options: dict, interval: float):
    """MuData of the recordings of `signals` (region, time), each in `n` pieces that count as recordings."""
    import fimp_sc

    names = [f"{name}/{i}" for name in signals for i in range(n)]
    bold = np.concatenate([pieces(one, n) for one in signals.values()])
    return fimp_sc.pp.fmri(bold, recordings=names, sampling_interval=interval, **options)


def fimp(mdata, args: argparse.Namespace, seed: int):
    """FIMP trained on `mdata`, of which the recordings "validation/…" are those to stop by."""
    from fimp_sc.model import FIMP

    FIMP.setup_mudata(mdata, modality="fmri")
    model = FIMP(mdata, token_size=SEGMENT, random_state=seed)
    held_out = mdata["fmri"].obs["recording"].str.startswith("validation").to_numpy(bool)
    model.train(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        train_indices=np.flatnonzero(~held_out),
        validation_indices=np.flatnonzero(held_out),
        mask_ratio=(min(RATIOS), max(RATIOS)),
        enable_progress_bar=False,
    )
    return model


def reconstruct(model, signals: np.ndarray, segments: np.ndarray, n: int, options: dict, interval: float) -> np.ndarray:
    """Signals (region, time) that FIMP makes, in `n` pieces, of those in which `segments` are hidden (and 0)."""
    from fimp_sc.model import FIMP

    mdata = modality({"test": np.where(points(segments), 0, signals)}, n, options, interval)
    hidden = np.concatenate(pieces(segments, n))
    made = np.asarray(FIMP.load_query_data(mdata, model).get_reconstruction(hidden=hidden))
    return made.reshape(n, *pieces(signals, n).shape[1:]).swapaxes(0, 1).reshape(signals.shape)


def shuffled(options: dict, graph: sp.csr_matrix, seed: int) -> dict:
    """Options of pp.fmri for the same graph between random regions."""
    order = np.random.default_rng(seed).permutation(graph.shape[0])
    return {"coordinates": options["coordinates"], "connectivity": graph[order][:, order]}


def main() -> None:
    """Run the methods and write the table; the seed of a row is the recording left out."""
    p = parser(__doc__, tuple(FILES))
    p.add_argument("--graph", default="structural", choices=["structural", "coordinates"])
    p.add_argument("--folds", type=int, nargs="+", default=list(range(7)), help="subjects of hcp to leave out: 0, 1, …")
    p.add_argument("--window", type=int, help="segments that FIMP sees at a time (default: the whole recording)")
    args = parse(p)
    results = Results("fmri", args)
    for name in args.datasets:
        bold, connectivity, xyz, interval = read(name, args.data)
        for test in (args.folds[:1] if args.quick else args.folds) if name == "hcp" else [len(bold) - 1]:
            run(name, bold, connectivity, xyz, interval, test, args, results)
            results.finish()  # after each, so that a run cut short keeps its rows


def run(name, bold, connectivity, xyz, interval, test: int, args: argparse.Namespace, results: Results) -> None:
    """All methods on one test recording; the one before it is for validation."""
    import fimp_sc

    validation = (test - 1) % len(bold)
    train = [r for r in range(len(bold)) if r not in (test, validation)]
    options = graph_options(name, connectivity[train], xyz, args)
    whole = standardise(bold)
    made = fimp_sc.pp.fmri(whole[train[:1]], **options)["fmri"]
    graph = sp.csr_matrix(made.obsp["spatial_connectivities"])
    shape, models = (bold.shape[1], bold.shape[2] // SEGMENT), {}
    n_pieces = 1 if args.window is None else max(1, shape[1] // args.window)
    for ratio in RATIOS:
        rng = np.random.default_rng([test, round(100 * ratio)])
        segments = [hide(shape, ratio, rng) for _ in range(2)]
        tries = [
            (standardise(bold[r], points(s)), points(s)) for r, s in zip((validation, test), segments, strict=True)
        ]
        truth, gap = tries[1]
        data = f"{name}, {args.graph}, {ratio}"
        if "baselines" in args.methods:
            for method, predict in baselines(whole[train], tries, graph, ratio, test, args.quick):
                if results.wants(data, method, test):
                    started = time.perf_counter()
                    results.add(data, method, test, score(truth[gap], predict()[gap]), started)
        for method in [m for m in TITLES if m in args.methods and results.wants(data, TITLES[m], test)]:
            started = time.perf_counter()
            used = options if method == "fimp" else shuffled(options, graph, test)
            if method not in models:  # one model for all shares of hidden segments
                signals = {f"training {r}": whole[r] for r in train} | {"validation": whole[validation]}
                models[method] = fimp(modality(signals, n_pieces, used, interval), args, test)
            predicted = reconstruct(models[method], truth, segments[1], n_pieces, used, interval)
            results.add(data, TITLES[method], test, score(truth[gap], predicted[gap]), started)


if __name__ == "__main__":
    main()
