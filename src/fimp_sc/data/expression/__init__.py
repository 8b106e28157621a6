"""Expression of cells: a reader of log-normalized, centered rows, and tokenizers that choose genes and values."""
