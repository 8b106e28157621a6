"""Foundation models and gene vectors made by others: read, checked, and mapped onto this package."""

from fimp_sc.pretrained._foundation import Foundation, build_foundation, read_foundation
from fimp_sc.pretrained.files._files import CheckpointError
from fimp_sc.pretrained.genes._vectors import GeneVectors, read_gene_vectors, write_gene_vectors

__all__ = [
    "CheckpointError",
    "Foundation",
    "GeneVectors",
    "build_foundation",
    "read_foundation",
    "read_gene_vectors",
    "write_gene_vectors",
]
