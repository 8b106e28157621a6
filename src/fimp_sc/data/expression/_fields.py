"""Expression of a block: values, masks and gene tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fimp_sc.data.expression._choice import hide_genes
from fimp_sc.data.expression._tokenizers import BinnedTokens

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy import sparse
    from torch import Tensor

    from fimp_sc.data.expression._joined import JoinedExpression
    from fimp_sc.data.expression._reader import ExpressionSource
    from fimp_sc.data.expression._tokenizers import TokenSource


def expression_fields(
    source: ExpressionSource | JoinedExpression,
    tokens: TokenSource,
    nodes: NDArray[np.int64],
    n_dst: int,
    n_tokens: int,
    *,
    mask_ratio: tuple[float, float] | None,
    gene_mask_ratio: float,
    mask_cells: float,
    seed: int,
) -> dict[str, Any]:
    """Return what a batch holds of the expression of ``nodes``.

    Parameters
    ----------
    source, tokens
        Values, and which of them become tokens.
    nodes
        ``(n,)``, the ``n_dst`` destinations first.
    n_dst
        Number of destinations.
    n_tokens, mask_ratio, gene_mask_ratio, mask_cells
        See :class:`~fimp_sc.data.BlockDataset`.
    seed
        Of the masks.
    """
    rows = source.sparse_rows(nodes)
    masks = mask_ratio, gene_mask_ratio, mask_cells, seed, source.gene_key
    visible, pattern, hidden = _masks(source, nodes, n_dst, *masks)
    profile = _centered(rows if mask_ratio is None else source.as_seen(rows, visible, pattern), source, nodes)
    target = profile[:n_dst].clone() if mask_ratio is None else _centered(rows[:n_dst], source, nodes[:n_dst])
    if mask_ratio is not None or not visible.all():
        profile.mul_(visible.float().index_select(0, pattern))
    feature_id, value, padding = tokens(rows, profile, visible, pattern, n_tokens)
    made: dict[str, Any] = {
        "feature_id": feature_id,
        "value": value,
        "padding": padding,
        "profile": profile,
        "visible": visible,
        "pattern": pattern,
        "target": target,
        "target_mask": hidden,
    }
    if mask_ratio is not None and isinstance(tokens, BinnedTokens) and tokens.n_queries:
        queries = tokens.queries(rows[:n_dst], visible, pattern[:n_dst], hidden, seed)
        made["query_id"], made["query_bin"], made["query_padding"] = queries
    return made


def _centered(rows: sparse.csr_matrix, source: ExpressionSource | JoinedExpression, nodes: NDArray[np.int64]) -> Tensor:
    values, code = rows.toarray(), source.batch[nodes]
    for batch in np.unique(code):
        mine = code == batch
        values[slice(None) if mine.all() else mine] -= source.center[batch]
    return torch.from_numpy(values)


def _masks(
    source: ExpressionSource | JoinedExpression,
    nodes: NDArray[np.int64],
    n_dst: int,
    ratio: tuple[float, float] | None,
    gene_ratio: float,
    cell_share: float,
    seed: int,
    gene_key: NDArray[np.uint64] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return visible genes of each pattern, the pattern of each node, and what is hidden of the destinations."""
    # Copies: with Dask's workers the arrays of a source cannot be written to, which tensors must be.
    observed, pattern = (torch.from_numpy(part.copy()) for part in source.observed(nodes))
    visible = observed
    if ratio is not None:
        visible, drawn = hide_genes(
            observed.any(0),
            len(nodes),
            ratio,
            gene_ratio=gene_ratio,
            cell_share=cell_share,
            seed=seed,
            gene_key=gene_key,
        )
        if len(observed) > 1:
            visible, drawn = observed[pattern] & visible[drawn], torch.arange(len(nodes))
            observed = observed[pattern]
        else:
            observed = observed.expand(len(visible), -1)
        pattern = drawn
    return visible, pattern, (observed & ~visible)[pattern[:n_dst]]
