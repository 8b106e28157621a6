"""Training: the schedule, the optimizer, checkpoints, and what happens when a run is interrupted."""
