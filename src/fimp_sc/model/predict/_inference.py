"""Exact results for any nodes of a graph: block by block or layer by layer, here or on the workers of Dask."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device

from fimp_sc.data import BlockDataset, BlockSampler, Destinations, block_loader
from fimp_sc.model.registry._graph_data import node_indices
from fimp_sc.nn._layers import weight_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from fimp_sc.data import Batch, GraphData
    from fimp_sc.model._fimp import FIMP
    from fimp_sc.model.module._module import FIMPModule

Strategy: TypeAlias = Literal["auto", "blocks", "layers"]
Read: TypeAlias = "Callable[[FIMPModule, dict[str, Any], Batch], Tensor]"

# Numbers that the dense values and the tokens of one block may take: 256 MB on a CPU.
_NUMBERS_CPU, _NUMBERS_ACCELERATOR = 1 << 26, 1 << 29
_SAMPLED_BLOCKS = 8
# Layer by layer stores tokens in between, which must pay.
_GAIN = 1.5
_LARGEST_IN_MEMORY = 1 << 28


def read_embedding(module: FIMPModule, outputs: dict[str, Any], batch: Batch) -> Tensor:
    """Return the embeddings of the destinations."""
    return outputs["embedding"]


class BlockRunner:
    """Compute one block: what is read off the embeddings of its destinations.

    Parameters
    ----------
    module
        Network and heads, in evaluation mode.
    dataset
        Makes the batch of the block.
    read
        From the module, what it returned of a block (see :meth:`FIMPModule.inference`) and the block, to a tensor of as
        many rows as destinations.
    genes
        ``(q,)`` int64, genes whose bins a foundation model's decoder is to predict.
    reconstruct
        Whether the numbers of signals and images are wanted.
    """

    def __init__(
        self,
        module: FIMPModule,
        dataset: BlockDataset,
        read: Read,
        *,
        genes: Tensor | None = None,
        reconstruct: bool = False,
    ) -> None:
        self.module, self.dataset, self.read, self.genes = module, dataset, read, genes
        self.reconstruct = reconstruct

    def __call__(self, item: Destinations) -> NDArray[np.float32]:
        return self.run(self.dataset[item])

    @torch.inference_mode()
    def run(self, batch: Any) -> NDArray[np.float32]:
        """Compute a batch that is made already."""
        outputs = self.module.inference(batch, self.genes, reconstruct=self.reconstruct)
        return self.read(self.module, outputs, batch).float().cpu().numpy()


def infer(
    module: FIMPModule,
    data: GraphData,
    nodes: NDArray[np.int64],
    read: Read,
    *,
    n_layers: int,
    n_tokens: int,
    batch_size: int | None = None,
    strategy: Strategy = "auto",
    distribute: bool = False,
    genes: Tensor | None = None,
    reconstruct: bool = False,
) -> NDArray[np.float32]:
    """Compute ``read`` for ``nodes``.

    Parameters
    ----------
    module
        Network and heads, in evaluation mode.
    data
        Tokens and graph.
    nodes
        Distinct nodes.
    read
        What to return of a block, see :class:`BlockRunner`.
    n_layers, n_tokens
        Of the model.
    batch_size
        Destinations per block; by default what fits into some hundred MB.
    strategy
        ``"blocks"`` computes every block with the halo that all layers read. ``"layers"`` computes one layer for all
        nodes before the next and keeps tokens in a temporary file: less work where halos are larger than blocks, as
        in graphs that are not spatial, or with many layers. ``"auto"`` counts and takes what is less work.
    distribute
        Whether blocks are Dask tasks, computed by its active scheduler, rather than computed here one by one.
    genes, reconstruct
        See :class:`BlockRunner`.

    Returns
    -------
    ``(len(nodes), ...)`` float32, in the order of ``nodes``.

    Raises
    ------
    ValueError
        When ``strategy`` is unknown, or cannot be distributed.
    """
    if strategy not in ("auto", "blocks", "layers"):
        raise ValueError(f"strategy must be 'auto', 'blocks' or 'layers', found {strategy!r}")
    if distribute and strategy == "layers":
        raise ValueError("strategy='layers' cannot be distributed: every layer reads what all blocks have written.")
    on_cpu = module.device.type == "cpu"
    if batch_size is None:
        n_values = 0 if data.expression is None else data.expression.n_genes
        n_values += sum(source.shape.n_tokens * source.shape.token_size for source in data.sequences.values())
        budget = _NUMBERS_CPU if on_cpu else _NUMBERS_ACCELERATOR
        per_node = 4 * n_values + 16 * _most_tokens(data, n_tokens) * module.network.width
        batch_size = int(np.clip(budget // per_node, module.network.least_batch, 1 << 14))
    sampler = BlockSampler(data, nodes, batch_size=batch_size)
    dataset = BlockDataset(data, n_layers=n_layers, n_tokens=n_tokens)
    runner = BlockRunner(module, dataset, read, genes=genes, reconstruct=reconstruct)
    if n_layers == 1:
        strategy = "blocks"
    if strategy == "auto":
        strategy = "layers" if not distribute and _layers_pay(data, sampler, n_layers) else "blocks"
    if strategy == "layers":
        blocks = _by_layer(runner, nodes, batch_size)
    elif distribute:
        blocks = _by_dask(runner, sampler)
    else:
        # Only an accelerator computes a block faster than this process makes the next one.
        loader = block_loader(runner.dataset, sampler, num_workers=0 if on_cpu else 2, pin_memory=not on_cpu)
        blocks = ((batch["nodes"][: batch["n_nodes"][-1]].numpy(), runner.run(batch)) for batch in loader)

    place = np.argsort(nodes)
    out: NDArray[np.float32] | None = None
    for destinations, values in blocks:
        if out is None:
            out = np.empty((len(nodes), *values.shape[1:]), dtype=np.float32)
        out[place[np.searchsorted(nodes, destinations, sorter=place)]] = values
    if out is None:
        raise ValueError("indices is empty: there is nothing to compute.")
    return out


def _layers_pay(data: GraphData, sampler: BlockSampler, n_layers: int) -> bool:
    """Compare the nodes that layers update per destination, in some blocks and layer by layer."""
    n_blocks = len(sampler)
    wanted = set(np.linspace(0, n_blocks - 1, min(_SAMPLED_BLOCKS, n_blocks)).astype(int).tolist())
    blocks = [data.graph.block(item.nodes, n_layers) for i, item in enumerate(sampler) if i in wanted]
    by_block = sum(sum(block.n_nodes[1:]) for block in blocks) / max(sum(block.n_nodes[-1] for block in blocks), 1)
    by_layer = sum(map(len, _needed(data, sampler.indices, n_layers))) / max(len(sampler.indices), 1)
    return by_block > _GAIN * by_layer


def _needed(data: GraphData, nodes: NDArray[np.int64], n_layers: int) -> list[NDArray[np.int64]]:
    """Return the nodes that each layer must update."""
    needed = [np.unique(nodes)]
    while len(needed) < n_layers:
        inner = needed[0]
        everybody = len(inner) == data.graph.csr.shape[0]
        needed.insert(0, inner if everybody else np.union1d(inner, data.graph.csr[inner].indices).astype(np.int64))
    return needed


def _by_layer(
    runner: BlockRunner, nodes: NDArray[np.int64], batch_size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    data, n_tokens, n_layers = runner.dataset.data, runner.dataset.n_tokens, runner.dataset.n_layers
    network: Any = runner.module.network
    device = runner.module.device
    shape = (data.graph.csr.shape[0], _most_tokens(data, n_tokens), network.width)
    first = BlockDataset(data, n_layers=1, n_tokens=n_tokens)
    padded = np.ones(shape[:2], dtype=bool)

    @torch.inference_mode()
    def run(level: int, nodes: NDArray[np.int64], stored: NDArray[np.float32] | None) -> Tensor:
        if stored is None:
            batch = first[Destinations(nodes, 0)]
            indptr, indices, weight = batch["indptr"][0], batch["indices"][0], weight_of(batch, 0)
            tokens, padding = network.tokens(move_data_to_device(batch, device))
            padded[nodes, : padding.shape[1]] = padding[: len(nodes)].cpu().numpy()
        else:
            block = data.graph.block(nodes, 1)
            indptr, indices = torch.from_numpy(block.indptr[0]), torch.from_numpy(block.indices[0])
            weight = None if block.edge_weight is None else torch.from_numpy(block.edge_weight[0])
            tokens, padding = torch.from_numpy(stored[block.nodes]), torch.from_numpy(padded[block.nodes])
        inputs = [x.to(device) for x in (tokens, padding, indptr, indices)]
        edge_weight = None if weight is None else weight.to(device)
        if level < n_layers - 1:
            return network.layers[level](*inputs, edge_weight=edge_weight)
        # The sequences of the destinations alone: what they look like, and on which scale.
        sequences = {name: source.fields(nodes, len(nodes)) for name, source in data.sequences.items()}
        last: Any = {"sequences": sequences}
        n_queries = network.n_queries(last, reconstruct=runner.reconstruct)
        states = network.layers[level](*inputs, n_queries, edge_weight=edge_weight)
        outputs = runner.module.outputs(states, last, reconstruct=runner.reconstruct)
        return runner.read(runner.module, outputs, last)

    with tempfile.TemporaryDirectory() as folder:
        previous = following = None
        for level, update in enumerate(_needed(data, nodes, n_layers)):
            last = level == n_layers - 1
            following = None if last else _storage(shape, Path(folder, f"{level}.npy"))
            for item in BlockSampler(data, update, batch_size=batch_size):
                result = run(level, item.nodes, previous).float().cpu().numpy()
                if following is None:
                    yield item.nodes, result
                else:
                    following[item.nodes, : result.shape[1]] = result
            previous = following


def _most_tokens(data: GraphData, n_tokens: int) -> int:
    """Return the largest number of tokens of a node, its summary included."""
    sequences = sum(source.shape.n_tokens for source in data.sequences.values())
    return 1 + sequences + (n_tokens if data.expression is not None else 0)


def _storage(shape: tuple[int, ...], path: Path) -> NDArray[np.float32]:
    if np.prod(shape) <= _LARGEST_IN_MEMORY:
        return np.zeros(shape, dtype=np.float32)
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)


def _by_dask(runner: BlockRunner, sampler: BlockSampler) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    from dask.base import compute
    from dask.delayed import delayed

    items = list(sampler)
    task = delayed(runner, pure=False, traverse=False)
    results = compute(*(task(item) for item in items))
    return ((item.nodes, result) for item, result in zip(items, results, strict=True))


def collect(
    model: FIMP,
    data: GraphData,
    indices: Sequence[int] | NDArray[np.int64] | None,
    read: Read,
    how: dict[str, Any],
    *,
    untrained: bool = False,
    genes: Tensor | None = None,
    reconstruct: bool = False,
) -> NDArray[np.float32]:
    """Return what ``read`` takes from the outputs of the network, for nodes in the order of ``indices``.

    Parameters
    ----------
    how
        ``batch_size``, ``strategy`` and ``distribute`` of :meth:`FIMP.get_latent_representation`.
    untrained
        Whether a model that was not trained serves.
    genes, reconstruct
        See :meth:`FIMPModule.inference`.
    """
    if not untrained:
        model._check_if_trained(warn=False)
    nodes, inverse = np.unique(node_indices(cast("NDArray[Any]", data.names), indices), return_inverse=True)
    model.module.eval()
    out = infer(
        model.module, data, nodes, read, n_layers=model.n_layers, n_tokens=model.n_tokens, genes=genes,
        reconstruct=reconstruct, **how,
    )  # fmt: skip
    return out if indices is None else out[inverse]
