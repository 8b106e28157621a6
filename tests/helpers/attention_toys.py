"""Results of attention made by hand, as the tests of figures use them."""

from __future__ import annotations

from copy import deepcopy

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

GROUPS = ["B", "A", "C"]


def heard() -> ad.AnnData:
    """Return six cells on a grid in two samples, with edges, a table of groups, and a table of pairs of genes.

    Cell "c0" hears "c1" and "c3"; "c2" hears nobody. Groups come in the order of their categories; none is joined to C.
    """
    adata = ad.AnnData(
        obs=pd.DataFrame(
            {
                "kind": pd.Categorical(["B", "A", "A", "B", None, "A"], categories=GROUPS),
                "slide": list("xxxxyy"),
            },
            index=[f"c{i}" for i in range(6)],
        ),
        obsm={"spatial": np.array([[0, 0], [1, 0], [0, 9], [0, 2], [1, 1], [0.5, 0.5]], dtype=float)},
    )
    edges = {(0, 1): 3.0, (0, 3): 1.5, (1, 0): 2.0, (3, 0): 0.0, (4, 5): 1.0, (5, 4): 1.0}
    rows, columns = zip(*edges, strict=True)
    values = np.array(list(edges.values()), dtype=np.float32)
    adata.obsp["fimp_attention"] = sparse.csr_matrix((values, (rows, columns)), shape=(6, 6))
    adata.uns["kind_colors"] = ["#ff0000", "#00ff00", "#0000ff"]
    groups, pairs = tables()
    record = {"params": {"groupby": "kind", "library_key": "slide"}, "versions": {"fimp-sc": "1"}}
    adata.uns["fimp_attention"] = deepcopy(record) | {"groups": groups}
    adata.uns["fimp_gene_pairs"] = deepcopy(record) | {"pairs": pairs}
    return adata


def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables of groups and of pairs of genes, three of which have an FDR of at most 0.05."""
    groups = pd.DataFrame(
        {
            "source_group": _groups("BBA"), "destination_group": _groups("BAB"), "influence": [1.5, 2.0, 30.0],
            "n_edges": [1200, 40, 7], "z": [-1.0, 3.5, np.nan], "fdr": [0.9, 0.01, np.nan],
        }
    )  # fmt: skip
    pairs = pd.DataFrame(
        {
            "source_group": _groups("BBAB"), "destination_group": _groups("ABBA"),
            "source_gene": pd.Categorical(list("LLMN")), "destination_gene": pd.Categorical(list("RRLM")),
            "correlation": [0.5, 0.2, 0.9, 0.01], "score": [9.0, 8.0, 7.0, 1.0], "z": [5.0, 4.0, 3.0, 0.5],
            "fdr": [1e-3, 1e-2, 0.05, 0.8], "n_edges": [40, 1200, 7, 40],
        }
    )  # fmt: skip
    return groups, pairs


def _groups(names: str) -> pd.Categorical:
    return pd.Categorical(list(names), categories=GROUPS)
