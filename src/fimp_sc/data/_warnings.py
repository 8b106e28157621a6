"""Warnings about a user's object that hold for every way into the package."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from fimp_sc._logging import warn
from fimp_sc.data._samples import warn_joined_samples
from fimp_sc.data.storage._elements import in_memory, shorten

if TYPE_CHECKING:
    from anndata import AnnData

    from fimp_sc.data._study import Study

_TYPES, _GENE = "feature_types", "Gene Expression"
# Probes that measure background, as Xenium, CosMx and MERSCOPE name them.
_CONTROL = re.compile(
    r"(NegControl|NegPrb|Negative\d|antisense_|BLANK|Blank-|UnassignedCodeword|DeprecatedCodeword|SystemControl"
    r"|FalseCode|Intergenic_Region_)"
)


def warn_inputs(
    study: Study,
    graph: Any,
    *,
    library_key: str | None,
    spatial_key: str,
) -> None:
    """Warn of what a model would read from an object in silence: control probes, and a graph that joins samples.

    Parameters
    ----------
    study
        What the user passed.
    graph
        ``(n_obs, n_obs)``, in memory or not. Of several modalities that some nodes lack, it need not have these nodes.
    library_key
        Samples that the graph was built by; ``None`` if none were named.
    spatial_key
        Key of the coordinates.

    Warns
    -----
    UserWarning
        See :func:`warn_control_features` and :func:`~fimp_sc.data._samples.warn_joined_samples`.
    """
    for modality in study.modalities:
        if modality.kind == "expression":
            warn_control_features(modality.adata)
    nodes = study.nodes
    if graph.shape[0] == nodes.n_obs:
        warn_joined_samples(nodes, sparse.csr_matrix(in_memory(graph, "The graph")), spatial_key, library_key)


def warn_control_features(adata: AnnData) -> None:
    """Warn where control probes and other features are among the genes.

    Warns
    -----
    UserWarning
        ``adata.var["feature_types"]`` names genes and others, or names of genes are those of control probes.
    """
    if _TYPES in adata.var:
        column = adata.var[_TYPES]
        kinds = column if isinstance(column, pd.Series) else adata.var[[_TYPES]].to_memory()[_TYPES]
        counts = kinds.astype(str).value_counts()
        others = counts.drop(_GENE, errors="ignore")
        others = others[others > 0]
        if _GENE in counts and len(others):
            found = shorten([f"{number:,} {kind!r}" for kind, number in others.items()])
            warn(
                f"adata.var[{_TYPES!r}] tells {found} from {counts[_GENE]:,} genes, and all are read as expression: "
                f"leave them out with adata = adata[:, adata.var[{_TYPES!r}] == {_GENE!r}].copy()."
            )
        return
    control = adata.var_names[[_CONTROL.match(name) is not None for name in adata.var_names.astype(str)]]
    if 0 < len(control) < adata.n_vars:
        warn(
            f"{len(control):,} of {adata.n_vars:,} genes have names of control probes "
            f"({shorten([repr(name) for name in control], 3)}), and all are read as expression: leave them out with "
            f'adata = adata[:, ~adata.var_names.str.match("{_common(control)}")].copy().'
        )


def _common(names: pd.Index) -> str:
    """Return a pattern for the beginnings of control probes that are there."""
    return "|".join(np.unique([str(_CONTROL.match(str(name))[1]) for name in names]))  # type: ignore[index]
