"""Gene x gene attention over edges, summed for pairs of groups of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.nn.functional import pad

from fimp_sc.data import BlockDataset, Destinations
from fimp_sc.nn._read_attention import edge_attention, edges_at_once, first_projections

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from fimp_sc.data import GraphData
    from fimp_sc.model.module._module import FIMPModule

_CELLS = 512
# Sums held at once: 32 MB, for as many pairs of groups as that takes.
_SUMS = 1 << 21


class GeneTokens(NamedTuple):
    """Queries and keys of the first layer, those of chosen genes first.

    ``n`` nodes have up to ``m`` tokens of the ``g`` chosen genes, and up to ``f`` tokens in all.
    """

    query: Tensor
    """``(n, heads, m, head_dim)``."""
    key: Tensor
    """``(n, heads, f, head_dim)``."""
    padding: Tensor
    """``(n, f)`` bool."""
    gene: Tensor
    """``(n, m)`` int64, which of the chosen genes a token is; ``g`` where there is none."""
    n_genes: int
    """``g``."""


@torch.inference_mode()
def gene_tokens(module: FIMPModule, data: GraphData, n_tokens: int, genes: NDArray[np.int64]) -> GeneTokens:
    """Make the tokens of all nodes, some at a time.

    Parameters
    ----------
    module
        Network, in evaluation mode.
    data
        Tokens and graph.
    n_tokens
        Token budget.
    genes
        ``(g,)`` positions of the chosen genes among those of the model.
    """
    if data.expression is None:
        raise ValueError("This model reads no expression: attention between genes needs genes.")
    lookup = torch.full((data.expression.n_genes,), len(genes), dtype=torch.int64)
    lookup[torch.from_numpy(genes)] = torch.arange(len(genes))
    lookup = lookup.to(module.device)
    dataset = BlockDataset(data, n_layers=0, n_tokens=n_tokens)
    chunks: list[tuple[Tensor, ...]] = []
    n_obs = data.graph.csr.shape[0]
    for start in range(0, n_obs, _CELLS):
        nodes = np.arange(start, min(start + _CELLS, n_obs))
        batch = move_data_to_device(dataset[Destinations(nodes, 0)], module.device)
        tokens, padding = module.network.tokens(batch)
        query, key = first_projections(module.network, tokens)
        gene = lookup[batch["feature_id"]].masked_fill(batch["padding"], len(genes))
        first = tokens.shape[1] - gene.shape[1]
        gene, order = gene.sort(dim=1, stable=True)
        m = int((gene < len(genes)).sum(1).max())
        others = torch.arange(first, device=order.device).expand(len(order), -1)
        place = torch.cat([order + first, others], 1)
        rows = place[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        chunks.append((query.gather(2, rows[:, :, :m]), key.gather(2, rows), padding.gather(1, place), gene[:, :m]))
    m, f = (max(chunk[i].shape[2] for chunk in chunks) for i in (0, 1))
    query, key, padding, gene = (
        torch.cat([pad(q, (0, 0, 0, m - q.shape[2])) for q, *_ in chunks]),
        torch.cat([pad(k, (0, 0, 0, f - k.shape[2])) for _, k, *_ in chunks]),
        torch.cat([pad(p, (0, f - p.shape[1]), value=True) for *_, p, _ in chunks]),
        torch.cat([pad(g, (0, m - g.shape[1]), value=len(genes)) for *_, g in chunks]),
    )
    return GeneTokens(query, key, padding, gene, len(genes))


@torch.inference_mode()
def pair_sums(
    tokens: GeneTokens,
    destination: NDArray[np.int64],
    source: NDArray[np.int64],
    pair: NDArray[np.int64],
    n_pairs: int,
    *,
    batch_size: int | None = None,
) -> Iterator[tuple[range, NDArray[np.float64]]]:
    """Sum the attention from source gene to destination gene over edges, for some pairs of groups at a time.

    Parameters
    ----------
    tokens
        Of all nodes.
    destination, source, pair
        ``(n_edges,)`` nodes, and the pair of groups of each edge, in ascending order.
    n_pairs
        Number of pairs of groups.
    batch_size
        Edges at once; by default as many as fit into some ten MB. Changes speed and memory, not the result.

    Yields
    ------
    Some pairs of groups, and their sums, ``(len(pairs), g, g)`` float64: destination gene x source gene.
    """
    device, m, g = tokens.query.device, tokens.query.shape[2], tokens.n_genes
    edges = [torch.from_numpy(np.ascontiguousarray(ends)).to(device) for ends in (destination, source, pair)]
    size = batch_size or edges_at_once(tokens.query.shape[1], m, tokens.key.shape[2])
    at_once = max(_SUMS // (g + 1) ** 2, 1)
    for lowest in range(0, n_pairs, at_once):
        pairs = range(lowest, min(lowest + at_once, n_pairs))
        start, stop = np.searchsorted(pair, [pairs.start, pairs.stop]).tolist()
        # Tokens of other genes fall into one more column, which is cut off.
        sums = torch.zeros(len(pairs) * (g + 1) ** 2, dtype=torch.float64, device=device)
        for i in range(start, stop, size):
            now = slice(i, min(i + size, stop))
            to, of, group = (ends[now] for ends in edges)
            carried = edge_attention(tokens.query, tokens.key, tokens.padding, to, of)[:, :, :m]
            place = ((group - lowest)[:, None, None] * (g + 1) + tokens.gene[to][:, :, None]) * (g + 1)
            place = (place + tokens.gene[of][:, None]).flatten()
            sums.index_add_(0, place, carried.double().flatten())
        yield pairs, sums.view(len(pairs), g + 1, g + 1)[:, :g, :g].cpu().numpy()
