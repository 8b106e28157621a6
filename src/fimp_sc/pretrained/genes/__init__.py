"""Gene names matched with vocabularies of foundation models, orthologs, and tables of gene vectors."""
