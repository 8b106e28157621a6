"""Do numbers stay the same while code moves? Results of every tool before and after a change that should change none.

``golden.py write FILE`` stores the results, ``golden.py compare FILE`` computes them again and fails if a single value
differs (``--tolerance`` allows a relative difference). One CPU thread, two seeds, few epochs: the toy tissue and two
sections of it, images and signals as MuData, a saved and a cropped query, and DLPFC 151673 if the data are there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

QUICK = {"accelerator": "cpu", "verbose": False}


def numbers(value: Any) -> np.ndarray:
    """Return an element of an object as an array that files can hold."""
    if sparse.issparse(value):
        value = value.toarray()
    if isinstance(value, pd.DataFrame):
        value = value.astype(str).to_numpy().astype(str) if value.dtypes.nunique() > 1 else value.to_numpy()
    value = np.asarray(value)
    return value.astype(str) if value.dtype == object else value


def added(adata: Any, before: dict[str, set[str]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the elements of an object that were not there before."""
    for attribute, known in before.items():
        for key in sorted(set(getattr(adata, attribute).keys()) - known):
            element = getattr(adata, attribute)[key]
            if attribute == "uns":
                if isinstance(element, pd.DataFrame):
                    yield f"uns/{key}", numbers(element)
                elif isinstance(element, dict):
                    for name, item in element.items():
                        if isinstance(item, pd.DataFrame | np.ndarray):
                            yield f"uns/{key}/{name}", numbers(item)
            else:
                yield f"{attribute}/{key}", numbers(element)


def held(adata: Any) -> dict[str, set[str]]:
    """Return the keys of each attribute of an object."""
    return {name: set(getattr(adata, name).keys()) for name in ("obs", "obsm", "layers", "obsp", "uns")}


def run(tool: Callable[..., Any], adata: Any, *args: Any, part: Any = None, **kwargs: Any) -> dict[str, np.ndarray]:
    """Return what a tool adds to a copy of an object, or to one modality of it."""
    adata = adata.copy()
    target = adata if part is None else adata.mod[part]
    before = held(target)
    quick = {name: value for name, value in QUICK.items() if name in signature(tool).parameters}
    model = tool(adata, *args, **quick, **kwargs)
    out = dict(added(target, before))
    history = getattr(model, "history", None)
    for name, curve in (history or {}).items():
        if "time" not in name:
            out[f"history/{name}"] = np.asarray(curve, dtype=float)
    return out


def tissue(adata: Any, seed: int, epochs: int, label: str, genes: list[str], **keys: Any) -> Iterator[tuple[str, dict]]:
    """Yield the results of every tool on cells."""
    import fimp_sc

    options = {"max_epochs": epochs, "random_state": seed}
    yield "embed", run(fimp_sc.tl.embed, adata, **options, **keys)
    yield "annotate", run(fimp_sc.tl.annotate, adata, label, key_added="predicted", **options, **keys)
    yield "impute", run(fimp_sc.tl.impute, adata, genes=genes, **options, **keys)
    yield "attention", run(fimp_sc.tl.attention, adata, label, n_permutations=10, **options, **keys)
    keys = {name: key for name, key in keys.items() if name != "batch_key"}
    keys["random_state"] = seed
    yield "gene pairs", run(fimp_sc.tl.gene_pairs, adata, label, n_genes=10, n_permutations=10, **keys)


def models(adata: Any, seed: int, label: str) -> Iterator[tuple[str, dict]]:
    """Yield arrays of a model, of the same model read back, and of a cropped query."""
    import fimp_sc

    fimp_sc.pp.spatial_graph(adata, library_key="section")
    for center in ("training", "batch"):
        fimp_sc.model.FIMP.setup_anndata(adata, labels_key=label, batch_key="section", center=center)
        model = fimp_sc.model.FIMP(adata, random_state=seed)
        model.train(max_epochs=3, accelerator="cpu", enable_progress_bar=False)
        yield (
            f"model, {center}",
            {"state": np.concatenate([v.numpy().ravel() for v in model.module.state_dict().values()])},
        )
        with tempfile.TemporaryDirectory() as folder:
            model.save(Path(folder) / "model")
            crop = adata[: adata.n_obs // 3].copy()
            del crop.obsp["spatial_connectivities"], crop.obsp["spatial_distances"]
            yield (
                f"query, {center}",
                run(
                    fimp_sc.tl.annotate, crop, label, key_added="p", model=Path(folder) / "model", library_key="section"
                ),
            )


def digits(seed: int) -> Iterator[tuple[str, dict]]:
    """Yield the results on images at random places."""
    from sklearn.datasets import load_digits

    import fimp_sc

    data, rng = load_digits(), np.random.default_rng(0)
    images = data.images[:200, :, :, None] / 16
    places = np.c_[55 + 0.02 * rng.random(200), 13 + 0.04 * rng.random(200)]
    mdata = fimp_sc.pp.images(images, coordinates=places, labels=data.target[:200].astype(str))
    options = {"max_epochs": 3, "random_state": seed, "model_kwargs": {"token_size": 4}}
    yield "embed", run(fimp_sc.tl.embed, mdata, modality="image", part="image", **options)
    yield "annotate", run(fimp_sc.tl.annotate, mdata, "label", modality="image", part="image", key_added="p", **options)


def cases() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield the name and the arrays of each case."""
    import fimp_sc

    toy = fimp_sc.datasets.toy_tissue()
    first = toy[toy.obs["section"] == toy.obs["section"].iloc[0]].copy()
    genes = list(toy.var_names[:5])
    for seed in (0, 1):
        for name, arrays in tissue(first, seed, 3, "cell_type", genes):
            yield f"toy, {name}, {seed}", arrays
        for name, arrays in tissue(toy, seed, 2, "cell_type", genes, library_key="section", batch_key="section"):
            yield f"toy sections, {name}, {seed}", arrays
        for name, arrays in models(toy.copy(), seed, "cell_type"):
            yield f"{name}, {seed}", arrays
        for name, arrays in digits(seed):
            yield f"digits, {name}, {seed}", arrays
    folder = os.environ.get("FIMP_SC_DATA")
    if folder:
        import anndata

        adata = anndata.read_h5ad(Path(folder) / "dlpfc_visium_151673.h5ad")
        for seed in (0, 1):
            yield f"dlpfc, embed, {seed}", run(fimp_sc.tl.embed, adata, max_epochs=2, random_state=seed)
            yield (
                f"dlpfc, annotate, {seed}",
                run(fimp_sc.tl.annotate, adata, "cell_type", key_added="p", max_epochs=2, random_state=seed),
            )


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference in units of the largest value; infinite where shapes or words differ."""
    if a.shape != b.shape or a.dtype.kind != b.dtype.kind:
        return np.inf
    if a.dtype.kind not in "fiu":
        return 0.0 if np.array_equal(a, b) else np.inf
    if np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
        return 0.0
    return float(np.nanmax(np.abs(a - b)) / max(np.nanmax(np.abs(a)), 1e-30))


def main() -> int:
    """Write or compare."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("action", choices=("write", "compare"))
    p.add_argument("file", type=Path)
    p.add_argument("--tolerance", type=float, default=0.0)
    args = p.parse_args()
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    stored = dict(np.load(args.file, allow_pickle=False)) if args.action == "compare" else {}
    found: dict[str, np.ndarray] = {}
    worst = 0.0
    for name, arrays in cases():
        assert arrays, name
        gaps = []
        for key, value in arrays.items():
            found[f"{name}: {key}"] = value
            if stored:
                known = stored.get(f"{name}: {key}")
                gap = np.inf if known is None else difference(known, value)
                gaps.append(gap)
                if gap > args.tolerance:
                    print(f"  differs by {gap:.1e}: {name}: {key}")
        worst = max([worst, *gaps])
        print(f"{name}: {len(arrays)} arrays", f"largest difference {max(gaps):.1e}" if gaps else "", flush=True)
    if args.action == "write":
        np.savez_compressed(args.file, **found)
        return 0
    missing = sorted(stored.keys() - found.keys())
    print(f"largest difference {worst:.1e}; {len(missing)} arrays missing", *missing, sep="\n  ")
    return int(worst > args.tolerance or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
