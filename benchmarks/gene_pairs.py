"""Pairs of genes between neighboring groups in real tissue: how many survive, and what it takes.

Ligands and receptors of LIANA's table (consensus, for mouse its mouse consensus; the package is only read, not
imported), and all pairs of a panel (of DLPFC of its 500 most variable genes), between layers or cell types. Nothing is
known of which pairs are right. ``tests``, and the ``pairs`` of genes among them; ``found`` tests and ``found_pairs`` at
a false discovery rate of .05; ``itself``: how many of these are a gene with itself, as molecules that leak into the
next cell make it. The column ``note`` of the CSV names the most significant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import _harness
from _common import DATA, load
from _harness import Fit, MissingError, Run

FIGURES = ("tests", "pairs", "found", "found_pairs", "itself")


def problem(data: str, args: Any, seed: int) -> tuple[Any, Callable[[np.ndarray], dict[str, float]]]:
    adata = load(data, args.data)
    adata.uns["library_key"], adata.obs["all"] = DATA[data].library_key, "all"
    return adata, lambda values: dict(zip(FIGURES, map(int, values), strict=True))


def liana(adata: Any) -> pd.DataFrame:
    """LIANA's ligands and receptors, of the species that the names of genes are of."""
    spec = find_spec("liana")
    if spec is None or spec.origin is None:
        raise MissingError("liana is not installed, whose table of ligands and receptors is read")
    table = pd.read_csv(Path(spec.origin).parent / "resource" / "omni_resource.csv", index_col=0)
    human = np.mean([name.isupper() for name in adata.var_names]) > 0.5
    return table[table["resource"] == ("consensus" if human else "mouseconsensus")]


def run(adata: Any, run: Run, *, known: bool, domain_key: str | None = None) -> Fit:
    import fimp_sc

    how: dict[str, Any] = {"n_genes": None if adata.n_vars <= 2000 else 500}
    if known:
        how = {"pairs": liana(adata)}
    fimp_sc.tl.gene_pairs(
        adata, "label", library_key=adata.uns["library_key"], domain_key=domain_key, random_state=run.seed,
        n_permutations=10 if run.quick else 100, verbose=False, **how,
    )  # fmt: skip
    table = adata.uns["fimp_gene_pairs"]["pairs"]
    genes = ["source_gene", "destination_gene"]
    found = table[table["fdr"] <= 0.05]
    first = found.head(8).astype(str)
    names = first["source_gene"] + " (" + first["source_group"] + ") - " + first["destination_gene"]
    return Fit(
        np.array(
            [
                len(table),
                len(table[genes].drop_duplicates()),
                len(found),
                len(found[genes].drop_duplicates()),
                (found["source_gene"].astype(str) == found["destination_gene"].astype(str)).sum(),
            ]
        ),
        note="; ".join(names + " (" + first["destination_group"] + ")"),
    )


METHODS = {
    "tests": {
        "ligands and receptors": partial(run, known=True),
        "ligands and receptors, swapped among all cells of a group": partial(run, known=True, domain_key="all"),
        "all pairs": partial(run, known=False),
        "all pairs, swapped among all cells of a group": partial(run, known=False, domain_key="all"),
    }
}

if __name__ == "__main__":
    _harness.main(
        "gene_pairs", __doc__, ("dlpfc", "starmap", "merfish"), problem, METHODS, default=("tests",), more=("toy",)
    )
