"""What can go wrong in training, as errors whose message is one clear line."""


class TrainingError(Exception):
    """Training cannot go on; the message says why, what was kept and what to do."""


class CheckpointError(TrainingError):
    """A checkpoint could not be written or read; what was committed before is untouched."""


class CheckpointRefused(CheckpointError):
    """The disk refused a checkpoint: it is full, perhaps, and a later one may be written."""
