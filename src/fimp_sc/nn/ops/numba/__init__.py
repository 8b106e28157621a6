"""Compiled loops for CPUs, behind the contract of the engines."""
