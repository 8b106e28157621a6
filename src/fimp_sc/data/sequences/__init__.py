"""Nodes that are sequences of numbers: kinds (signals, images), a reader of their values, and their tokenizers."""
