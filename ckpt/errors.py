"""Errors that users can meet. A mistake in this package's own code is an AssertionError instead."""

from collections.abc import Iterator
from contextlib import contextmanager


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, found, read or trusted. The message says what to do."""


class PartialLoadError(CheckpointError):
    """Data was found damaged while it was loaded: targets may be partly overwritten and can't be used."""


@contextmanager
def as_checkpoint_error(problem: str) -> Iterator[None]:
    """Turn errors of a file system or a store into a CheckpointError that begins with `problem`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{problem}: {' '.join(str(error.strerror or error).split())}") from error
