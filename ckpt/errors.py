"""The one exception that this package raises for what a user can meet."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, found, read or trusted. The message says what to do."""
