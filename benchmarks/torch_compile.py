"""Does `torch.compile` make a training step faster? Forward and backward of one block, eager against compiled.

Compiled twice: the feed-forward parts of the layers, and the whole network, where attention across edges is one
operation that the compiler leaves as it is. `first_s` is the first pass over the blocks, which includes
compilation.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from _common import Results, parse, parser


def block(n_cells: int, n_genes: int, n_tokens: int):
    """Return a batch of random cells on a 2-D grid with all of its tokens, and its number of genes."""
    from scipy import sparse
    from sklearn.neighbors import kneighbors_graph

    from fimp_sc.data import BlockDataset, BlockSampler, CenteredTokenizer, ExpressionReader, GraphData, NodeGraph

    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(0.3, (n_cells, n_genes)).astype(np.float32))
    xy = rng.random((n_cells, 2))
    genes, nodes = np.arange(n_genes), np.arange(n_cells)
    statistics = ExpressionReader(counts, genes, "counts", None).gene_statistics(nodes)
    source = ExpressionReader(counts, genes, "counts", statistics)
    graph = NodeGraph(kneighbors_graph(xy, 6), self_loops=True)
    zeros = np.zeros(n_cells, dtype=np.int64)
    data = GraphData(source, graph, xy, zeros, zeros, CenteredTokenizer(torch.arange(n_genes)))
    dataset = BlockDataset(data, n_layers=2, n_tokens=n_tokens)
    return [dataset[item] for item in BlockSampler(data, nodes, batch_size=256)]


def main() -> None:
    """Time steps of each variant and write the table."""
    p = parser(__doc__)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    args = parse(p)
    torch.set_num_threads(args.threads)
    from fimp_sc.nn._network import FIMPNetwork

    n_genes, n_tokens = (50, 8) if args.quick else (2000, 32)
    device = "cuda" if args.accelerator in ("gpu", "cuda") else "cpu"
    batches = [
        {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
        | {k: [part.to(device) for part in batch[k]] for k in ("indptr", "indices")}
        for batch in block(600 if args.quick else 3000, n_genes, n_tokens)
    ]
    results = Results("torch_compile", args, group="device")
    for variant in ("eager", "feed-forward compiled", "network compiled"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        network = FIMPNetwork(n_genes, 64, 2, 4).to(device)
        if variant == "network compiled":
            network.compile(dynamic=True)
        elif variant != "eager":
            for layer in network.layers:
                layer._feedforward = torch.compile(layer._feedforward, dynamic=True)

        def epoch(network=network) -> float:
            start = time.perf_counter()
            for batch in batches:
                network(batch).square().mean().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / len(batches)

        try:
            first = epoch() * len(batches)
        except (AssertionError, RuntimeError) as error:  # of torch's compiler, where it does not cope
            print(f"{variant}: not possible with torch {torch.__version__}: {type(error).__name__}: {error}")
            continue
        seconds = float(np.median([epoch() for _ in range(1 if args.quick else args.rounds)]))
        results.add(device, variant, 0, {"step_ms": 1e3 * seconds, "first_s": first})
    results.finish()


if __name__ == "__main__":
    main()
