"""Errors that users can meet. A mistake in this package's own code is an AssertionError instead."""


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, found, read or trusted. The message says what to do."""


class PartialLoadError(CheckpointError):
    """Data was found damaged while it was loaded: targets may be partly overwritten and can't be used."""
