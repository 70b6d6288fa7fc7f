"""What this package raises for what a user can meet."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, found, read or trusted. The message says what to do."""


class PartialLoadError(CheckpointError):
    """Data turned out to be damaged while it was read: the targets may have changed, and can't be used."""
