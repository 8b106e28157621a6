"""Cross-node attention, layers, token embeddings, heads and the network made of them."""

from fimp_sc.nn._embedding import FeatureEmbedding
from fimp_sc.nn._foundation import FoundationNetwork
from fimp_sc.nn._heads import LabelHead, ValueHead
from fimp_sc.nn._layers import CrossNodeAttention, PaperLayer, TransformerLayer, run_layers
from fimp_sc.nn._network import FIMPNetwork
from fimp_sc.nn._stack import TransformerStack
from fimp_sc.nn.ops._api import attention_backend, cross_node_attention

__all__ = [
    "CrossNodeAttention",
    "FIMPNetwork",
    "FeatureEmbedding",
    "FoundationNetwork",
    "LabelHead",
    "PaperLayer",
    "TransformerLayer",
    "TransformerStack",
    "ValueHead",
    "attention_backend",
    "cross_node_attention",
    "run_layers",
]
