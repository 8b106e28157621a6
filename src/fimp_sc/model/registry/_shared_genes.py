"""Genes that a trained model and another object share: how much of the model they carry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from fimp_sc._logging import warn
from fimp_sc.data.validate._gene_names import naming_hint

if TYPE_CHECKING:
    import numpy as np
    from anndata import AnnData
    from numpy.typing import NDArray

# Measured with models of two tissues (7,319 and 1,020 genes, accuracy .85 and .96) on random, the most expressed and
# the least expressed of their genes: above half of the weight at most .08 is lost (.04 of .85 at .41, .09 to .22 of
# .96 at .39 to .48); with less than a hundredth accuracy is about that of guessing.
_LITTLE = 0.5
_NEXT_TO_NOTHING, FEW_GENES = 0.01, 0.002


def check_shared_genes(genes: NDArray[Any], weight: NDArray[np.floating], adata: AnnData) -> None:
    """Check that an object has enough of the genes that a model was trained on.

    Parameters
    ----------
    genes
        ``(n_genes,)`` names in the model.
    weight
        ``(n_genes,)`` fraction of each gene in the counts of training; zeros where it is not known, as for features,
        and then genes count alike.
    adata
        Object with the names of genes, and other names in ``adata.var``.

    Raises
    ------
    ValueError
        Next to nothing is shared.

    Warns
    -----
    UserWarning
        The shared genes carry less than half of the weight.
    """
    names = adata.var_names.astype(str)
    shared = pd.Index(genes).isin(names)
    number, total = int(shared.sum()), float(weight.sum())
    fraction = float(weight[shared].sum()) / total if total else number / max(len(genes), 1)
    if fraction >= _LITTLE:
        return
    what = "" if not total else f", with {_percent(fraction)} of the counts of training"
    found = f"{number:,} of the {len(genes):,} genes of the model are in adata.var_names{what}"
    table = adata.var if isinstance(adata.var, pd.DataFrame) else None
    hint = naming_hint(genes, names, table)
    if number <= FEW_GENES * len(genes) or (total and fraction < _NEXT_TO_NOTHING):
        hint = hint or "Use the same kind of gene names (symbols or Ensembl ids, same species and case) as in training."
        raise ValueError(
            f"Only {found}, too few to apply it: names here are like {names[:3].tolist()}, those of the model like "
            f"{list(genes[:3])}. {hint}"
        )
    hint = hint or "Expect less than where all are measured, or train a model on the genes that both have."
    warn(f"Only {found}. {hint}")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %" if fraction >= 0.001 or not fraction else "<0.1 %"
