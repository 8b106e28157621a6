"""Attention between the tokens of neighboring nodes: the operation, layers, and stacks of layers."""

from fimp_sc.nn._layers import CrossNodeAttention, PaperLayer, TransformerLayer
from fimp_sc.nn._stack import TransformerStack
from fimp_sc.nn.ops._api import attention_backend, cross_node_attention

__all__ = [
    "CrossNodeAttention",
    "PaperLayer",
    "TransformerLayer",
    "TransformerStack",
    "attention_backend",
    "cross_node_attention",
]
