"""From the object to batches: values, graph, tokens, blocks, splits."""

from fimp_sc.data._batch import Batch
from fimp_sc.data._expression import ExpressionSource, GeneStatistics
from fimp_sc.data._graph import Block, NodeGraph
from fimp_sc.data._loader import BlockLoader, GraphData
from fimp_sc.data._splits import spatial_blocks
from fimp_sc.data._splitter import BlockSplitter, split_by_blocks
from fimp_sc.data._tokens import choose_tokens, hide_entries

__all__ = [
    "Batch",
    "Block",
    "BlockLoader",
    "BlockSplitter",
    "ExpressionSource",
    "GeneStatistics",
    "GraphData",
    "NodeGraph",
    "choose_tokens",
    "hide_entries",
    "spatial_blocks",
    "split_by_blocks",
]
