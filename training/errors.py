"""Errors for the person at the graph: what came, what was expected, what to do."""


class TrainingError(Exception):
    """Root of what can go wrong in a run besides bad arguments, which are ValueError."""


class NonFiniteLoss(TrainingError):
    """The loss became NaN or infinite; the last good state is kept."""


class IncompatibleCheckpoint(TrainingError):
    """A checkpoint belongs to another run: the differing options are named."""


class LostProcess(TrainingError):
    """Of several processes that train together, another one has died or cannot be reached."""
