"""From the object to batches: values, graph, tokens, blocks, splits."""

from fimp_sc.data._batch import Batch, SequenceBatch, without_neighbors
from fimp_sc.data._loader import BlockDataset, BlockSampler, Destinations, GraphData, block_loader
from fimp_sc.data._modality import describe_modality
from fimp_sc.data._splitter import BlockSplitter, split_by_blocks
from fimp_sc.data.expression._reader import ExpressionReader, GeneStatistics
from fimp_sc.data.expression._tokenizers import (
    BinnedTokenizer,
    CenteredTokenizer,
    RankTokenizer,
    Tokenizer,
    choose_tokens,
    hide_genes,
)
from fimp_sc.data.graph._graph import Block, NodeGraph
from fimp_sc.data.graph._tiles import curve_rank, spatial_tiles
from fimp_sc.data.sequences._kinds import SequenceKind, register_kind
from fimp_sc.data.sequences._pixels import read_pixels
from fimp_sc.data.sequences._reader import SequenceReader, SequenceShape, SequenceStatistics
from fimp_sc.data.storage._rows import MatrixRows, open_rows

__all__ = [
    "Batch",
    "BinnedTokenizer",
    "Block",
    "BlockDataset",
    "BlockSampler",
    "BlockSplitter",
    "CenteredTokenizer",
    "Destinations",
    "ExpressionReader",
    "GeneStatistics",
    "GraphData",
    "MatrixRows",
    "NodeGraph",
    "RankTokenizer",
    "SequenceBatch",
    "SequenceKind",
    "SequenceReader",
    "SequenceShape",
    "SequenceStatistics",
    "Tokenizer",
    "block_loader",
    "choose_tokens",
    "curve_rank",
    "describe_modality",
    "hide_genes",
    "open_rows",
    "read_pixels",
    "register_kind",
    "spatial_tiles",
    "split_by_blocks",
    "without_neighbors",
]
