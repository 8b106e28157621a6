"""Blocks of neighboring destinations, with tokens, as batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fimp_sc.data.expression._tokenizers import expression_fields
from fimp_sc.data.graph._tiles import curve_rank, spatial_tiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from fimp_sc.data._batch import Batch
    from fimp_sc.data.expression._reader import ExpressionReader, JoinedExpression
    from fimp_sc.data.expression._tokenizers import Tokenizer
    from fimp_sc.data.graph._graph import NodeGraph
    from fimp_sc.data.sequences._reader import SequenceReader


@dataclass
class GraphData:
    """Everything that blocks are made of: where tokens come from, and how nodes are connected.

    Attributes
    ----------
    expression
        Expression, of cells.
    graph
        Neighbors of every node.
    coordinates
        ``(n_obs, n_dims)`` positions, or ranks along the graph where there are none.
    library
        ``(n_obs,)`` int64 sample of each node.
    label
        ``(n_obs,)`` int64 class of each node, -1 where unlabeled.
    tokenizer
        Chooses which genes of a cell become tokens, with which values.
    sequences
        By modality: nodes that are sequences of numbers.
    names
        ``(n_obs,)`` names of the nodes, which order those at one place.
    embedding
        ``(n_obs, width)`` float32, embeddings of a network that does not change, which blocks then hold instead of
        tokens; NaN where they are not known.
    """

    expression: ExpressionReader | JoinedExpression | None
    graph: NodeGraph
    coordinates: NDArray[np.floating]
    library: NDArray[np.int64]
    label: NDArray[np.int64]
    tokenizer: Tokenizer | None = None
    sequences: dict[str, SequenceReader] = field(default_factory=dict)
    names: NDArray[Any] | None = None
    embedding: NDArray[np.float32] | None = None

    @cached_property
    def rank(self) -> NDArray[np.int64]:
        """Place of each node along a space-filling curve."""
        return curve_rank(self.coordinates, self.names)

    def ordered(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return ``nodes`` along the curve. What is drawn for them in turn does not depend on their order in files."""
        return nodes[np.argsort(self.rank[nodes])]


class Destinations(NamedTuple):
    """Destinations of a batch, and the seed of its masks."""

    nodes: NDArray[np.int64]
    seed: int


class BlockSampler(Sampler[Destinations]):
    """Cut destinations into compact blocks; in training the cuts move and the blocks are shuffled every epoch.

    Parameters
    ----------
    data
        What blocks are made of.
    indices
        Destinations.
    batch_size
        Largest number of destinations in a batch.
    tiles_per_batch
        Compact blocks, from anywhere in the tissue, that make up a batch. One block has the smallest halo, but its
        cells are alike: steps over one domain at a time pull the weights to and fro.
    shuffle
        Whether cuts, order and masks change every epoch. Without it they are the same in every pass.
    random_state
        Seed of cuts, order and masks.
    epoch
        Number of the first epoch.
    """

    def __init__(
        self,
        data: GraphData,
        indices: NDArray[np.int64],
        *,
        batch_size: int,
        tiles_per_batch: int = 1,
        shuffle: bool = False,
        random_state: int = 0,
        epoch: int = 0,
    ) -> None:
        self.data = data
        self.indices = data.ordered(np.asarray(indices, dtype=np.int64))
        self.block_size = max(batch_size // tiles_per_batch, 1)
        self.tiles_per_batch = tiles_per_batch
        self.shuffle = shuffle
        self.random_state = random_state
        self._epoch = epoch
        counts = np.unique(data.library[self.indices], return_counts=True)[1]
        self._n_batches = -(-int((-(-counts // self.block_size)).sum()) // tiles_per_batch)

    def __len__(self) -> int:
        return self._n_batches

    def __iter__(self) -> Iterator[Destinations]:
        rng = np.random.default_rng((self.random_state, self._epoch if self.shuffle else 0))
        blocks = self._cut(rng if self.shuffle else None)
        if self.shuffle:
            self._epoch += 1
            rng.shuffle(blocks)
        for i in range(0, len(blocks), self.tiles_per_batch):
            yield Destinations(np.concatenate(blocks[i : i + self.tiles_per_batch]), int(rng.integers(2**62)))

    def _cut(self, rng: np.random.Generator | None) -> list[NDArray[np.int64]]:
        if not len(self.indices):
            return []
        data, nodes = self.data, self.indices
        block = spatial_tiles(data.coordinates[nodes], self.block_size, library=data.library[nodes], random_state=rng)
        # Along the curve within a block: consecutive destinations share neighbors, whose keys and values then stay
        # in the cache.
        order = np.argsort(block, kind="stable")
        return np.split(nodes[order], np.flatnonzero(np.diff(block[order])) + 1)


class BlockDataset(Dataset["Batch"]):
    """Make the batch of any destinations: their halo, values, masks and tokens.

    A batch holds its destinations and the halo that ``n_layers`` layers read, so its result equals that of the whole
    graph; or, where they are known already, the embeddings of the destinations alone.

    Parameters
    ----------
    data
        What blocks are made of.
    n_layers
        Number of layers, hence hops of the halo.
    n_tokens
        Token budget per cell.
    mask_ratio
        Smallest and largest fraction of genes, or of other tokens, hidden for masked prediction; ``None`` hides none.
    gene_mask_ratio
        Largest fraction of genes hidden in all cells of a batch.
    mask_cells
        Probability that a cell is masked at all.
    vary
        Whether signals are shown differently every time, see :meth:`SequenceReader.fields`.
    """

    def __init__(
        self,
        data: GraphData,
        *,
        n_layers: int,
        n_tokens: int,
        mask_ratio: tuple[float, float] | None = None,
        gene_mask_ratio: float = 0.0,
        mask_cells: float = 1.0,
        vary: bool = False,
    ) -> None:
        self.data = data
        self.n_layers = n_layers
        self.n_tokens = n_tokens
        self.mask_ratio = mask_ratio
        self.gene_mask_ratio = gene_mask_ratio
        self.mask_cells = mask_cells
        self.vary = vary

    def __getitem__(self, item: Destinations) -> Batch:
        data, (destinations, seed) = self.data, item
        if data.embedding is not None:
            return {
                "nodes": torch.from_numpy(destinations),
                "n_nodes": [len(destinations)],
                "indptr": [],
                "indices": [],
                "label": torch.from_numpy(data.label[destinations]),
                "embedding": torch.from_numpy(data.embedding[destinations]),
            }
        block = data.graph.block(destinations, self.n_layers, data.rank)
        nodes, n_dst = block.nodes, len(destinations)
        made: Batch = {
            "nodes": torch.from_numpy(nodes),
            "n_nodes": block.n_nodes,
            "indptr": [torch.from_numpy(hop) for hop in block.indptr],
            "indices": [torch.from_numpy(hop) for hop in block.indices],
            "label": torch.from_numpy(data.label[destinations]),
        }
        if block.edge_weight is not None:
            made["edge_weight"] = [torch.from_numpy(hop) for hop in block.edge_weight]
        if data.expression is not None and data.tokenizer is not None:
            expression = expression_fields(
                data.expression, data.tokenizer, nodes, n_dst, self.n_tokens, mask_ratio=self.mask_ratio,
                gene_mask_ratio=self.gene_mask_ratio, mask_cells=self.mask_cells, seed=seed,
            )  # fmt: skip
            made |= cast("Batch", expression)
        if data.sequences:
            made["sequences"] = {
                name: source.fields(
                    nodes, n_dst, self.mask_ratio, mask_nodes=self.mask_cells, vary=self.vary, seed=seed + i
                )
                for i, (name, source) in enumerate(data.sequences.items())
            }
        return made


def block_loader(
    dataset: BlockDataset, sampler: BlockSampler, *, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader[Batch]:
    """Return a loader of the sampler's blocks.

    Parameters
    ----------
    dataset, sampler
        Where batches come from, and which.
    num_workers
        Processes that make batches ahead of their use. 0 makes them in this process.
    pin_memory
        Whether batches are put into page-locked memory, from where they reach a GPU faster.
    """
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        collate_fn=_as_made,
        # Of its own: the loader draws a seed whenever it is iterated, and would take it from the global state.
        generator=torch.Generator(),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )


def _as_made(batch: Any) -> Any:
    return batch
