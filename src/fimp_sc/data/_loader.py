"""Blocks of neighbouring destinations, with tokens, as batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fimp_sc.data._splits import spatial_blocks
from fimp_sc.data._tokens import choose_tokens, hide_entries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from fimp_sc.data._batch import Batch
    from fimp_sc.data._expression import ExpressionSource
    from fimp_sc.data._graph import NodeGraph


@dataclass
class GraphData:
    """Everything that blocks are made of: where tokens come from, and how nodes are connected.

    Attributes
    ----------
    source
        Token source.
    graph
        Neighbours of every node.
    coordinates
        ``(n_obs, n_dims)`` positions, or ranks along the graph where there are none.
    library
        ``(n_obs,)`` int64 sample of each node.
    label
        ``(n_obs,)`` int64 class of each node, -1 where unlabeled.
    gene_rank
        ``(n_genes,)`` int64 permutation that orders equal values.
    """

    source: ExpressionSource
    graph: NodeGraph
    coordinates: NDArray[np.floating]
    library: NDArray[np.int64]
    label: NDArray[np.int64]
    gene_rank: Tensor


class BlockLoader:
    """Iterate over compact blocks of destinations.

    A block holds its destinations and the halo that ``n_layers`` layers read, so its result equals that of the
    whole graph. In training the cuts move and the blocks are shuffled every epoch.

    Parameters
    ----------
    data
        What blocks are made of.
    indices
        Destinations.
    batch_size
        Largest number of destinations in a batch.
    parts
        Compact blocks, from anywhere in the tissue, that make up a batch. One block has the smallest halo, but its
        cells are alike: steps over one domain at a time pull the weights to and fro.
    n_layers
        Number of layers, hence hops of the halo.
    n_tokens
        Token budget per cell.
    mask_ratio
        Smallest and largest share of entries hidden for masked prediction; ``None`` hides nothing.
    gene_mask_ratio
        Largest share of genes hidden in all cells of a block.
    mask_cells
        Probability that a cell is masked at all.
    shuffle
        Whether cuts, order and masks change every epoch. Without it they are the same in every pass.
    random_state
        Seed of cuts, order and masks.
    """

    def __init__(
        self,
        data: GraphData,
        indices: NDArray[np.int64],
        *,
        batch_size: int,
        n_layers: int,
        n_tokens: int,
        parts: int = 1,
        mask_ratio: tuple[float, float] | None = None,
        gene_mask_ratio: float = 0.0,
        mask_cells: float = 1.0,
        shuffle: bool = False,
        random_state: int = 0,
    ) -> None:
        self.data = data
        self.indices = np.asarray(indices, dtype=np.int64)
        self.batch_size = batch_size
        self.parts = parts
        self.n_layers = n_layers
        self.n_tokens = n_tokens
        self.mask_ratio = mask_ratio
        self.gene_mask_ratio = gene_mask_ratio
        self.mask_cells = mask_cells
        self.shuffle = shuffle
        self.random_state = random_state
        self._epoch = 0
        self._n_batches = -(-len(self._cut(None)) // parts)

    def __len__(self) -> int:
        return self._n_batches

    def __iter__(self) -> Iterator[Batch]:
        seed = (self.random_state, self._epoch if self.shuffle else 0)
        rng = np.random.default_rng(seed)
        blocks = self._cut(rng if self.shuffle else None)
        if self.shuffle:
            self._epoch += 1
            rng.shuffle(blocks)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        for i in range(0, len(blocks), self.parts):
            yield self._batch(np.concatenate(blocks[i : i + self.parts]), generator)

    def _cut(self, rng: np.random.Generator | None) -> list[NDArray[np.int64]]:
        if not len(self.indices):
            return []
        block = spatial_blocks(
            self.data.coordinates[self.indices],
            max(self.batch_size // self.parts, 1),
            library=self.data.library[self.indices],
            random_state=rng,
        )
        order = np.argsort(block, kind="stable")
        return np.split(self.indices[order], np.flatnonzero(np.diff(block[order])) + 1)

    def _batch(self, destinations: NDArray[np.int64], generator: torch.Generator) -> Batch:
        data = self.data
        block = data.graph.block(destinations, self.n_layers)
        n_dst = len(destinations)
        expression = torch.from_numpy(data.source.rows(block.nodes))
        observed = torch.from_numpy(data.source.observed(block.nodes))
        visible = observed
        if self.mask_ratio is not None:
            visible = hide_entries(
                observed,
                self.mask_ratio,
                gene_ratio=self.gene_mask_ratio,
                cell_share=self.mask_cells,
                generator=generator,
            )
        feature_id, padding = choose_tokens(expression, visible, self.n_tokens, data.gene_rank)
        centred = expression - torch.from_numpy(data.source.center[data.source.batch[block.nodes]])
        return {
            "nodes": torch.from_numpy(block.nodes),
            "n_nodes": block.n_nodes,
            "indptr": [torch.from_numpy(part) for part in block.indptr],
            "indices": [torch.from_numpy(part) for part in block.indices],
            "feature_id": feature_id,
            "value": centred.gather(1, feature_id).masked_fill_(padding, 0.0),
            "padding": padding,
            "profile": centred * visible,
            "visible": visible,
            "target": centred[:n_dst],
            "target_mask": observed[:n_dst] & ~visible[:n_dst],
            "label": torch.from_numpy(data.label[destinations]),
        }
