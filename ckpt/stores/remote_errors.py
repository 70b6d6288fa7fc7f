"""Errors of fsspec's file systems: of any kind, with or without a number, in several lines or in none."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

_NUMBERS = {FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST, PermissionError: errno.EACCES}


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Turn any error into an OSError with a number, one line of text and the name of the place."""
    try:
        yield
    except OSError as error:
        text = _in_a_line(str(error.strerror or error)) or type(error).__name__
        number = next((number for kind, number in _NUMBERS.items() if isinstance(error, kind)), errno.EIO)
        error.errno, error.strerror, error.filename = error.errno or number, text, place
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {_in_a_line(str(error))}", place) from error


def _in_a_line(text: str) -> str:
    return " ".join(text.split())
