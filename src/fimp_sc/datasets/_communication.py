"""A simulated tissue in which one type of cells speaks to another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._options import checked
from fimp_sc.datasets._toy import _positions, _source_cells

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

_SECTIONS = ("section_1", "section_2")
_TYPES = ("CD19+ B", "CD56+ NK", "Dendritic")
_SENDER, _RECEIVER = "Dendritic", "CD19+ B"
_MIN_OBS, _MIN_GENES = 100, 10
_NEIGHBORS = 6  # a cell hears so many nearest cells
_DETECTED = 0.3  # fraction of the molecules of the source cell that is kept
_BURST_SHAPE = 0.6  # gamma shape of what a sender expresses; smaller is more often nothing, and sometimes a lot
_MOLECULES = 60.0  # mean molecules of the ligand in a sender, and of the receptor in a receiver, before detection


@checked
def toy_communication(n_obs: int = 1000, random_state: int = 0, *, planted: bool = True, n_genes: int = 100) -> AnnData:
    """Build a small tissue offline in which a gene of senders raises a gene of the receivers next to them.

    Real cells of three types of :func:`scanpy.datasets.pbmc68k_reduced` are mixed at random in two sections, so that
    types, places and expression have nothing to do with each other, but for one thing put in on purpose: dendritic
    cells ("senders") express a ligand in bursts that differ from cell to cell, and B cells ("receivers") express a
    receptor in proportion to the mean ligand of the senders among their 6 nearest cells. There are no niches. Only
    expression other than of these two genes is real, thinned to a third of its molecules: use it to try and to test
    software, never to draw biological conclusions.

    Parameters
    ----------
    n_obs
        Number of cells, split evenly between the two sections; at least 100.
    random_state
        Seed; the same seed gives the same object.
    planted
        Whether receivers respond. Without, the same numbers of molecules of the receptor are dealt out to the
        receivers of a section at random: each gene by itself looks the same, and nothing is to be found.
    n_genes
        Size of the panel: genes of the source data with most molecules, two of which become ligand and receptor; from
        10 to 765.

    Returns
    -------
    Object with `n_obs` cells × `n_genes` genes:

    - `.X`: CSR matrix of float32, molecule counts (non-negative integers);
    - `.obs["cell_type"]`: categorical, three types;
    - `.obs["section"]`: categorical, two sections (the `library_key`), whose coordinates overlap;
    - `.obs["source_cell"]`: the cell of the source data that was sampled;
    - `.obsm["spatial"]`: float64 array `(n_obs, 2)`, micrometres;
    - `.uns["communication"]`: names of `"sender"` and `"receiver"` (types), `"ligand"` and `"receptor"` (genes), and
      whether the answer was `"planted"`;
    - `.uns["provenance"]`: where everything comes from.

    Raises
    ------
    ValueError
        If `n_obs` or `n_genes` is out of range.

    Examples
    --------
    >>> import fimp_sc as fimp
    >>> adata = fimp.datasets.toy_communication(n_obs=200)
    >>> adata.uns["communication"]["sender"]
    'Dendritic'
    """
    from anndata import AnnData

    if n_obs < _MIN_OBS:
        raise ValueError(f"n_obs={n_obs} is too small for three types in two sections; use at least {_MIN_OBS}.")
    counts, cell_types, barcodes, genes = _source_cells()
    if not _MIN_GENES <= n_genes <= len(genes):
        raise ValueError(f"n_genes must be from {_MIN_GENES} to {len(genes)}, found {n_genes}.")
    rng = np.random.default_rng(random_state)
    panel = np.sort(np.argsort(-counts.mean(0), kind="stable")[:n_genes])
    counts, genes = counts[:, panel], genes[panel]
    # Of the panel those with fewest molecules, so that little that is real gives way to them.
    ligand, receptor = np.argsort(counts.mean(0), kind="stable")[:2]

    section = np.arange(n_obs) * len(_SECTIONS) // n_obs
    spatial = np.empty((n_obs, 2))
    for index in range(len(_SECTIONS)):
        rows = np.flatnonzero(section == index)
        spatial[rows] = _positions(len(rows), rng)
    kind = rng.choice(_TYPES, n_obs)
    source = np.array([rng.choice(np.flatnonzero(cell_types == name)) for name in kind])
    expected = counts[source]
    sender, receiver = kind == _SENDER, kind == _RECEIVER
    expected[:, [ligand, receptor]] = 0.0
    expected[sender, ligand] = _MOLECULES * rng.gamma(_BURST_SHAPE, 1 / _BURST_SHAPE, sender.sum())
    answer = np.zeros(n_obs)
    for index in range(len(_SECTIONS)):
        here = section == index
        answer[here] = _heard(spatial[here], sender[here], expected[here, ligand])
        if not planted:
            answer[here & receiver] = rng.permutation(answer[here & receiver])
    expected[receiver, receptor] = answer[receiver]
    molecules = rng.poisson(_DETECTED * expected).astype(np.float32)

    adata = AnnData(
        X=sparse.csr_matrix(molecules),
        obs=pd.DataFrame(
            {
                "cell_type": pd.Categorical(kind, categories=_TYPES),
                "section": pd.Categorical(np.asarray(_SECTIONS)[section], categories=_SECTIONS),
                "source_cell": barcodes[source],
            },
            index=pd.Index([f"cell_{i}" for i in range(n_obs)]),
        ),
        var=pd.DataFrame(index=genes),
        obsm={"spatial": spatial},
    )
    adata.uns["communication"] = {
        "sender": _SENDER, "receiver": _RECEIVER, "ligand": str(genes[ligand]), "receptor": str(genes[receptor]),
        "planted": planted,
    }  # fmt: skip
    adata.uns["provenance"] = {
        "expression": "scanpy.datasets.pbmc68k_reduced(): 700 peripheral blood cells (10x Genomics); counts recovered "
        "from .raw, resampled and thinned",
        "simulated": "positions, sections, mixture of types, and all molecules of ligand and receptor",
        "n_obs": int(n_obs),
        "random_state": int(random_state),
    }
    return adata


def _heard(spatial: NDArray[np.float64], sender: NDArray[np.bool_], ligand: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean ligand of the senders around each cell, 0 where there are none."""
    from sklearn.neighbors import NearestNeighbors

    near = NearestNeighbors(n_neighbors=_NEIGHBORS).fit(spatial).kneighbors(return_distance=False)
    speaking = sender[near]
    total: NDArray[np.float64] = (ligand[near] * speaking).sum(1)
    return total / np.maximum(speaking.sum(1), 1)
