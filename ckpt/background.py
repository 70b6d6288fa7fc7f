"""Saves in the background: a thread that must finish, and readers of the same process that wait for it."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from ckpt.errors import CheckpointError

T = TypeVar("T")

_all: weakref.WeakSet[Background[Any]] = weakref.WeakSet()


class Background(Generic[T]):
    """A thread for work that must finish: the interpreter waits for it, and its error isn't lost."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self.result: T | None = None
        """Result of the work, once it has finished and until `wait` returns it."""
        self._error: BaseException | None = None
        self._run: str | None = None
        _all.add(self)
        atexit.register(self._at_exit)

    @property
    def failed(self) -> bool:
        """True if the work has failed and `wait` hasn't raised its error yet."""
        return self._error is not None

    def start(self, work: Callable[[], T], *, run: str | Path) -> None:
        """Start the work, a save into `run`. Earlier work must have been waited for."""
        assert self._thread is None, "one at a time"
        self._run = identity(run)

        def body() -> None:
            try:
                self.result = work()
            except BaseException as error:
                self._error = error

        # Not a daemon, so that the interpreter waits for it at exit.
        thread = threading.Thread(target=body, name=self._name, daemon=False)
        try:
            thread.start()
        except RuntimeError as error:  # out of threads; `wait` raises it like an error of the work
            self._error = error
        else:
            self._thread = thread

    def wait(self) -> T | None:
        """Wait for the work; return its result, or None if there was none. Raises its error, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        result, error, self.result, self._error = self.result, self._error, None, None
        if error is not None:
            raise error
        return result

    def _at_exit(self) -> None:
        """Exit with 1 if an error was never raised: a process whose checkpoint failed must not succeed."""
        if self._error is not None:
            print(f"{self._name} failed: {self._error}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)


def join_all() -> None:
    """Wait for the saves that this process has in the background; each keeps its error for its own `wait`.

    Called by everything that opens a run, so it returns at once in the thread of a save itself.
    """
    threads = [thread for background in list(_all) if (thread := background._thread) is not None]
    if threading.current_thread() in threads:
        return
    for thread in threads:
        thread.join()


def check_last_save(run: str | Path) -> None:
    """Raise the error of this process's last save into `run`, if its owner hasn't raised it yet.

    What was saved last isn't there then, and a reader who asks for the latest would get something older. The
    owner raises the error as well.

    Raises:
        CheckpointError: the last save failed.
    """
    asked = identity(run)
    for background in list(_all):
        if background._error is not None and background._run == asked:
            raise CheckpointError(
                f"the last save into {run} failed: {background._error}; save again, or name the tag of an "
                "older checkpoint"
            )


def identity(run: str | Path) -> str:
    """Return one name of a run for all the ways to write its path."""
    scheme, separator, rest = str(run).partition("://")
    if not separator or scheme in ("file", "local"):
        return os.path.realpath(rest if separator else scheme)
    return str(run).rstrip("/")
