"""Clusterings and permutation tests behind the tools."""
