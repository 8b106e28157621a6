"""Gene x gene attention over edges, summed for pairs of groups of cells."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.nn.functional import pad

from fimp_sc.data import BlockDataset, Destinations
from fimp_sc.nn._read_attention import edge_attention, edges_at_once, first_projections

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from fimp_sc.data import GraphData
    from fimp_sc.model.module._module import FIMPModule

_CELLS = 512
_EDGES = 1 << 15
# Sums held at once: 32 MB, for as many pairs of groups as that takes.
_SUMS = 1 << 21


class GeneTokens(NamedTuple):
    """Queries, keys and values of the first layer, those of chosen genes first.

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
    value: NDArray[np.float32]
    """``(n, g)`` log-normalized expression."""


def token_genes(data: GraphData, n_tokens: int, genes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return ``(n, g)``, where a gene is expressed and a token; a network need not be trained for that.

    Parameters
    ----------
    data, n_tokens, genes
        As in :func:`gene_tokens`.
    """
    source: Any = data.expression
    dataset = BlockDataset(data, n_layers=0, n_tokens=n_tokens)
    n_obs = data.graph.csr.shape[0]
    out = np.zeros((n_obs, len(genes)), dtype=bool)
    for start in range(0, n_obs, _CELLS):
        nodes = np.arange(start, min(start + _CELLS, n_obs))
        batch = dataset[Destinations(nodes, 0)]
        shown = np.zeros((len(nodes), source.n_genes), dtype=bool)
        there = ~batch["padding"].numpy()
        shown[np.nonzero(there)[0], batch["feature_id"].numpy()[there]] = True
        out[nodes] = shown[:, genes] & (source.rows(nodes)[:, genes] != 0)
    return out


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
    parts: list[tuple[Tensor, ...]] = []
    values = []
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
        parts.append((query.gather(2, rows[:, :, :m]), key.gather(2, rows), padding.gather(1, place), gene[:, :m]))
        values.append(data.expression.rows(nodes)[:, genes])
    m, f = (max(part[i].shape[2] for part in parts) for i in (0, 1))
    query, key, padding, gene = (
        torch.cat([pad(q, (0, 0, 0, m - q.shape[2])) for q, *_ in parts]),
        torch.cat([pad(k, (0, 0, 0, f - k.shape[2])) for _, k, *_ in parts]),
        torch.cat([pad(p, (0, f - p.shape[1]), value=True) for *_, p, _ in parts]),
        torch.cat([pad(g, (0, m - g.shape[1]), value=len(genes)) for *_, g in parts]),
    )
    return GeneTokens(query, key, padding, gene, np.concatenate(values))


class PairSums(NamedTuple):
    """Sums over the edges of pairs of groups."""

    first: NDArray[np.float64]
    """Of attention, times the values of both genes and the weight of the edge where there are such."""
    second: NDArray[np.float64]
    """Of the square of this."""


class Tests(NamedTuple):
    """Which pairs of genes are tested between which groups, ``(n_tests,)`` int64 each, sorted in this order."""

    pair: NDArray[np.int64]
    """Position among the pairs of groups that are looked at."""
    destination_gene: NDArray[np.int64]
    source_gene: NDArray[np.int64]

    def bounds(self, n_pairs: int) -> NDArray[np.int64]:
        """Return ``(n_pairs + 1,)``, where the tests of each pair of groups start, and where the last ones end."""
        return np.searchsorted(self.pair, np.arange(n_pairs + 1))


@torch.inference_mode()
def pair_sums(
    tokens: GeneTokens,
    value: NDArray[np.float32] | None,
    destination: NDArray[np.int64],
    source: NDArray[np.int64],
    pair: NDArray[np.int64],
    n_pairs: int,
    *,
    weight: NDArray[np.float64] | None = None,
    batch_size: int | None = None,
) -> Iterator[tuple[range, PairSums]]:
    """Sum the attention from source gene to destination gene over edges, for some pairs of groups at a time.

    Parameters
    ----------
    tokens
        Of all nodes.
    value
        ``(n, g)`` numbers by which attention is multiplied, for instance centered expression.
    destination, source, pair
        ``(n_edges,)`` nodes, and the pair of groups of each edge, in ascending order.
    n_pairs
        Number of pairs of groups.
    weight
        ``(n_edges,)`` factor of each edge.
    batch_size
        Edges at once; by default what fits into some ten MB. Changes speed and memory, not the result.

    Yields
    ------
    Which pairs of groups, and their sums, ``(len(pairs), g, g)`` float64: destination gene x source gene.
    """
    device, m, g = tokens.query.device, tokens.query.shape[2], tokens.value.shape[1]
    edges = [torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in (destination, source, pair)]
    # What is no token of a chosen gene falls into one more column, which is cut off.
    of_token = None if value is None else pad(torch.from_numpy(value).to(device), (0, 1)).gather(1, tokens.gene)
    factor = None if weight is None else torch.from_numpy(weight.astype(np.float32)).to(device)
    size = batch_size or edges_at_once(tokens.query.shape[1], m, tokens.key.shape[2])
    at_once = max(_SUMS // (g + 1) ** 2, 1)
    for lowest in range(0, n_pairs, at_once):
        pairs = range(lowest, min(lowest + at_once, n_pairs))
        start, stop = np.searchsorted(pair, [pairs.start, pairs.stop]).tolist()
        sums = torch.zeros(2, len(pairs) * (g + 1) ** 2, dtype=torch.float64, device=device)
        for i in range(start, stop, size):
            now = slice(i, min(i + size, stop))
            to, of, group = (part[now] for part in edges)
            carried = edge_attention(tokens.query, tokens.key, tokens.padding, to, of)[:, :, :m]
            if of_token is not None:
                carried = carried * of_token[to][:, :, None] * of_token[of][:, None]
            if factor is not None:
                carried = carried * factor[now, None, None]
            place = ((group - lowest)[:, None, None] * (g + 1) + tokens.gene[to][:, :, None]) * (g + 1)
            place = (place + tokens.gene[of][:, None]).flatten()
            carried = carried.double().flatten()
            sums[0].index_add_(0, place, carried)
            sums[1].index_add_(0, place, carried.square_())
        shaped = sums.view(2, len(pairs), g + 1, g + 1)[:, :, :g, :g].cpu().numpy()
        yield pairs, PairSums(*shaped)


def tested_sums(blocks: Iterable[tuple[range, PairSums]], tests: Tests, n_pairs: int) -> PairSums:
    """Return what :func:`pair_sums` yields for some tests alone, ``(n_tests,)``."""
    bounds, out = tests.bounds(n_pairs), np.zeros((2, len(tests.pair)))
    for pairs, sums in blocks:
        rows = slice(bounds[pairs.start], bounds[pairs.stop])
        pair, to, of = (part[rows] for part in tests)
        out[0, rows], out[1, rows] = (part[pair - pairs.start, to, of] for part in sums)
    return PairSums(*out)


def tested_products(
    value: NDArray[np.float32],
    destination: NDArray[np.int64],
    source: NDArray[np.int64],
    pair: NDArray[np.int64],
    weight: NDArray[np.float64],
    tests: Tests,
    n_pairs: int,
) -> PairSums:
    """Sum the products of values over edges, as :func:`tested_sums` would with attention 1 between all genes.

    Parameters
    ----------
    value, destination, source, pair, weight, n_pairs
        As in :func:`pair_sums`.
    tests
        What is wanted; no other genes are multiplied.

    Returns
    -------
    ``(n_tests,)`` each.
    """
    out = np.zeros((2, len(tests.pair)))
    ends = np.searchsorted(pair, np.arange(n_pairs + 1))
    for (start, stop), (low, high) in zip(
        pairwise(ends.tolist()), pairwise(tests.bounds(n_pairs).tolist()), strict=True
    ):
        if low == high:
            continue
        rows, row = np.unique(tests.destination_gene[low:high], return_inverse=True)
        columns, column = np.unique(tests.source_gene[low:high], return_inverse=True)
        sums = np.zeros((2, len(rows), len(columns)))
        for i in range(start, stop, _EDGES):
            edges = slice(i, min(i + _EDGES, stop))
            to = (value[destination[edges, None], rows] * weight[edges, None]).astype(np.float32)
            of = value[source[edges, None], columns]
            sums[0] += to.T @ of
            sums[1] += np.square(to).T @ np.square(of)
        out[:, low:high] = sums[:, row, column]
    return PairSums(*out)
