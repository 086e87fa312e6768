"""Data, training loop, checkpoints, metrics, evaluation and the run report."""
