"""What went wrong that the person at the keyboard can put right. Other exceptions are bugs and keep their traceback."""


class TrainingError(RuntimeError):
    """One message: what, where, what was expected, what to do."""


class NotFinite(TrainingError):
    """The loss or its gradient became infinite or NaN. The message names the step, the samples and what to do."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: incomplete, damaged, or of another model."""
