"""Expression from the decoder of a foundation model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fimp_sc.data import BinnedTokens
from fimp_sc.data.expression._binning import unbin

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fimp_sc.data import GraphData

# Genes that are tokens of a cell at once, and cells whose bins are turned into values at once.
_GENES, _CELLS = 200, 1024


def decoded_expression(
    data: GraphData,
    nodes: NDArray[np.int64],
    genes: NDArray[np.int64],
    predict: Callable[[torch.Tensor], NDArray[np.float32]],
) -> NDArray[np.float32]:
    """Predict genes some hundred at a time, and turn bins into values by what the cell's visible genes say of them.

    Parameters
    ----------
    data
        Cells and how they become tokens.
    nodes
        ``(n,)`` cells to predict.
    genes
        ``(g,)`` genes of the model.
    predict
        From ``(q,)`` genes to their ``(n, q)`` bins.

    Returns
    -------
    ``(n, g)`` float32 log-normalized expression, NaN for genes that the vocabulary does not know.
    """
    source = data.tokens
    if not isinstance(source, BinnedTokens) or data.source is None:
        raise ValueError("decoder=True needs a foundation model with a decoder: FIMP-base has none.")
    out = np.full((len(nodes), len(genes)), np.nan, dtype=np.float32)
    known = np.flatnonzero(source.known.numpy()[genes])
    for i in range(0, len(known), _GENES):
        part = known[i : i + _GENES]
        out[:, part] = predict(torch.from_numpy(genes[part]))
    for i in range(0, len(nodes), _CELLS):
        cells = slice(i, i + _CELLS)
        observed, pattern = (torch.from_numpy(part.copy()) for part in data.source.observed(nodes[cells]))
        edges = torch.from_numpy(source.edges(data.source.sparse_rows(nodes[cells]), observed, pattern))
        out[cells, known] = unbin(torch.from_numpy(out[cells][:, known]), edges).numpy()
    return out
