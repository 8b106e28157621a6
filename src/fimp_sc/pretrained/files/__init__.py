"""Files of checkpoints, read within bounds and as data only."""
