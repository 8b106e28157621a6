"""An offline toy tissue: real cells in simulated regions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._options import checked

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

_SECTIONS = ("section_1", "section_2")
_REGIONS = ("bone", "core", "edge", "vessel")
_MIN_OBS = 60
_DETECTED = 0.3  # fraction of the molecules of the source cell that is kept
_MIX = 0.9  # how far a region's cell types depart from the source's (0: not at all)
_MIX_SHAPE = 0.4  # gamma shape of a region's preferences; smaller is more one-sided
_PROGRAM_GENES = 40  # genes raised in each region
_PROGRAM_MOLECULES = 0.05  # fraction of a cell's molecules that the program adds
_RESPONSE_SHAPE = 4.0  # gamma shape of the cells' response to the program, mean 1
_SPACING = 10.0  # mean distance between neighboring cells, micrometres
_SITES_PER_REGION = 2


@checked
def toy_tissue(n_obs: int = 1500, random_state: int = 0) -> AnnData:
    """Build a small tissue offline: real expression in simulated regions.

    Cells are drawn with replacement from the 700 peripheral blood cells × 765 genes of
    :func:`scanpy.datasets.pbmc68k_reduced`, which ships inside scanpy. They are placed in two sections, each divided
    into four contiguous regions. What a neighborhood knows is put in on purpose:

    - each region has its own mix of cell types;
    - each region raises its own set of genes in *all* its cells;
    - only about a third of each cell's molecules is kept (Poisson sampling), so a cell's own evidence is weak.

    The mean over spatial neighbors therefore predicts the region better than the cell itself does, and, added to the
    cell's own expression, predicts molecules that were not seen in it better than the cell alone. The cells'
    expression is real; positions, regions and the raised genes are simulated. Use it to try and to test software,
    never to draw biological conclusions.

    Parameters
    ----------
    n_obs
        Number of cells, split evenly between the two sections; at least 60.
    random_state
        Seed; the same seed gives the same object.

    Returns
    -------
    Object with `n_obs` cells × 765 genes:

    - `.X`: CSR matrix of float32, molecule counts (non-negative integers);
    - `.obs["cell_type"]`: categorical, ten types of the source data;
    - `.obs["region"]`: categorical, four regions;
    - `.obs["section"]`: categorical, two sections (the `library_key`), whose coordinates overlap;
    - `.obs["source_cell"]`: the cell of the source data that was sampled;
    - `.obsm["spatial"]`: float64 array `(n_obs, 2)`, micrometres;
    - `.uns["provenance"]`: where everything comes from.

    Raises
    ------
    ValueError
        If `n_obs` is below 60.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> adata = fimp.datasets.toy_tissue(n_obs=200)
    >>> adata.shape
    (200, 765)
    """
    from anndata import AnnData

    if n_obs < _MIN_OBS:
        message = f"n_obs={n_obs} is too small for two sections with four regions each; use at least {_MIN_OBS}."
        raise ValueError(message)
    rng = np.random.default_rng(random_state)
    counts, cell_types, barcodes, genes = _source_cells()

    section = np.arange(n_obs) * len(_SECTIONS) // n_obs
    spatial = np.empty((n_obs, 2))
    region = np.empty(n_obs, dtype=np.intp)
    for index in range(len(_SECTIONS)):
        rows = np.flatnonzero(section == index)
        spatial[rows] = _positions(len(rows), rng)
        region[rows] = _regions(spatial[rows], rng)

    source = _sample_cells(region, cell_types, rng)
    molecules = rng.poisson(_DETECTED * _expected(counts[source], region, rng)).astype(np.float32)

    adata = AnnData(
        X=sparse.csr_matrix(molecules),
        obs=pd.DataFrame(
            {
                "cell_type": pd.Categorical(cell_types[source], categories=np.unique(cell_types)),
                "region": pd.Categorical(np.asarray(_REGIONS)[region], categories=_REGIONS),
                "section": pd.Categorical(np.asarray(_SECTIONS)[section], categories=_SECTIONS),
                "source_cell": barcodes[source],
            },
            index=pd.Index([f"cell_{i}" for i in range(n_obs)]),
        ),
        var=pd.DataFrame(index=genes),
        obsm={"spatial": spatial},
    )
    adata.uns["provenance"] = {
        "expression": "scanpy.datasets.pbmc68k_reduced(): 700 peripheral blood cells (10x Genomics); "
        "counts recovered from .raw, resampled and thinned",
        "simulated": "positions, sections, regions, and the genes raised in each region",
        "n_obs": int(n_obs),
        "random_state": int(random_state),
    }
    return adata


def _source_cells() -> tuple[NDArray[np.float64], NDArray[np.str_], NDArray[np.str_], pd.Index]:
    import scanpy as sc

    source = sc.datasets.pbmc68k_reduced().raw.to_adata()
    normalized = np.expm1(source.X.toarray().astype(np.float64))
    # The smallest non-zero value of a cell is one molecule; all others are multiples of it.
    unit = np.where(normalized > 0, normalized, np.inf).min(axis=1, keepdims=True)
    counts = np.rint(normalized / unit)
    cell_types = source.obs["bulk_labels"].to_numpy(dtype=str)
    return counts, cell_types, source.obs_names.to_numpy(dtype=str), pd.Index(source.var_names.astype(str), name=None)


def _positions(n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    columns = int(np.ceil(np.sqrt(n)))
    grid = np.stack([np.arange(n) % columns, np.arange(n) // columns], axis=1).astype(np.float64)
    return _SPACING * (grid + rng.uniform(-0.4, 0.4, size=(n, 2)))


def _regions(spatial: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.intp]:
    """Assign each cell to the nearest of a few well-spread sites, on bent coordinates so that borders curve."""
    extent = spatial.max(axis=0)
    scaled = spatial / extent
    bent = scaled + 0.06 * np.sin(2 * np.pi * (1.5 * scaled[:, ::-1] + rng.uniform(size=2)))
    n_sites = _SITES_PER_REGION * len(_REGIONS)
    sites = bent[[rng.integers(len(bent))]]
    while len(sites) < n_sites:
        candidates = bent[rng.integers(len(bent), size=10)]
        gaps = np.linalg.norm(candidates[:, None] - sites[None], axis=-1).min(axis=1)
        sites = np.vstack([sites, candidates[gaps.argmax()]])
    owner = rng.permutation(np.arange(n_sites) % len(_REGIONS))
    nearest: NDArray[np.intp] = np.linalg.norm(bent[:, None] - sites[None], axis=-1).argmin(axis=1)
    return owner[nearest]


def _sample_cells(region: NDArray[np.intp], cell_types: NDArray[np.str_], rng: np.random.Generator) -> NDArray[np.intp]:
    """Draw source cells so that each region prefers its own types; every region contains all types."""
    types, type_of = np.unique(cell_types, return_inverse=True)
    abundance = np.bincount(type_of) / len(type_of)
    # A square root keeps the rare types alive.
    preference = np.sqrt(abundance) * rng.gamma(_MIX_SHAPE, size=(len(_REGIONS), len(types)))
    composition = (1 - _MIX) * abundance + _MIX * preference / preference.sum(axis=1, keepdims=True)
    source = np.empty(len(region), dtype=np.intp)
    for index in range(len(_REGIONS)):
        rows = np.flatnonzero(region == index)
        chance = (composition[index] / np.bincount(type_of))[type_of]
        source[rows] = rng.choice(len(cell_types), size=len(rows), p=chance / chance.sum())
    return source


def _expected(counts: NDArray[np.float64], region: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.float64]:
    """Add each region's program to the molecules of its cells, in proportion to the cell's total."""
    mean = counts.mean(axis=0)
    # Neither silent nor dominant genes, so that a raised gene still overlaps its usual range.
    eligible = np.flatnonzero(mean > 0)[np.argsort(mean[mean > 0])[::-1]][50:450]
    genes = rng.permutation(eligible)[: len(_REGIONS) * _PROGRAM_GENES].reshape(len(_REGIONS), -1)
    program = np.zeros((len(_REGIONS), counts.shape[1]))
    np.put_along_axis(program, genes, rng.gamma(2.0, size=genes.shape), axis=1)
    program *= _PROGRAM_MOLECULES / program.sum(axis=1, keepdims=True)
    strength = rng.gamma(_RESPONSE_SHAPE, 1 / _RESPONSE_SHAPE, size=(len(region), 1))
    expected: NDArray[np.float64] = counts + strength * counts.sum(axis=1, keepdims=True) * program[region]
    return expected
