"""Predictions as arrays: embeddings, labels, expression, and attention between neighbors."""
