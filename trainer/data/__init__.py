"""The training data path: sequences on disk to a rank's masked micro-batches."""
