"""Errors of fsspec's file systems: of any kind, with or without a number, in several lines or in none.

What may not be seen mustn't look like what doesn't exist: a run would begin anew beside its checkpoints. So a
FileNotFoundError counts as one only if the store's own answer, which it hides, doesn't say otherwise.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

_NUMBERS = {FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST, PermissionError: errno.EACCES}
_DENIED = (401, 403, 407)
_MISSING = (404, 410)
_WITHOUT_CREDENTIALS = ("Credential", "ProfileNotFound", "TokenRetrieval", "SSOToken", "AuthenticationError")
"""Parts of the names of errors of botocore, google-auth and azure-identity that have found no credentials."""
_GIVE = (
    "give them in the store's own variables (for S3 AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY) or in fsspec's configuration, which can also ask for anonymous access"
)
_CHECK = (
    "check which credentials the store's variables and fsspec's configuration give, and that these may list "
    "and read there, and write for a save"
)


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Turn any error into an OSError with a number, one line of text and the name of the place."""
    try:
        yield
    except Exception as error:
        if denied := _denial(error):
            raise PermissionError(errno.EACCES, denied, place) from error
        if isinstance(error, FileNotFoundError) and (behind := _failure_behind(error)):
            raise OSError(errno.EIO, f"{type(behind).__name__}: {_in_a_line(str(behind))}", place) from error
        if not isinstance(error, OSError):
            raise OSError(errno.EIO, f"{type(error).__name__}: {_in_a_line(str(error))}", place) from error
        number = next((number for kind, number in _NUMBERS.items() if isinstance(error, kind)), errno.EIO)
        error.errno, error.strerror, error.filename = error.errno or number, _text(error), place
        raise


def _denial(error: BaseException) -> str | None:
    """Return why the store lets nobody in, and what to do; None for any other error."""
    for each in _chain(error):
        if any(part in type(each).__name__ for part in _WITHOUT_CREDENTIALS):
            return f"there are no credentials ({_text(each)}): {_GIVE}"
    if isinstance(error, PermissionError) or _status(error) in _DENIED:
        return f"access is denied ({_text(error)}): {_CHECK}"
    return None


def _failure_behind(error: FileNotFoundError) -> BaseException | None:
    """Return what has kept a file system from looking, which it tells as an object that isn't there."""
    for each in _chain(error):
        status = _status(each)
        if status is not None:
            return None if status in _MISSING else each
        missing = isinstance(each, (FileNotFoundError, NotADirectoryError))
        of_connection = isinstance(each, OSError) or type(each).__module__.startswith("aiohttp")
        if of_connection and not missing:
            return each
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _status(error: BaseException) -> int | None:
    """Return the status of the store's answer, as aiohttp, azure, google or botocore keep it."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        answer = response.get("ResponseMetadata", {}) if isinstance(response, Mapping) else {}
        known = (getattr(each, name, None) for name in ("status", "status_code", "code"))
        for status in chain([answer.get("HTTPStatusCode")], known):
            if isinstance(status, int) and 400 <= status < 600:
                return status
    return None


def _text(error: BaseException) -> str:
    return _in_a_line(str(getattr(error, "strerror", None) or error)) or type(error).__name__


def _in_a_line(text: str) -> str:
    return " ".join(text.split())
