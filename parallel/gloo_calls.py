"""Calls of gloo, whose waits can't be interrupted: a thread's, which is left behind if a rank is gone."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from queue import SimpleQueue
from threading import Event
from traceback import clear_frames
from typing import Any

import torch

UNUSED_TAG = 1
"""Tag of a message that never comes; all others have 0."""


class Call:
    """A call that a thread of the connections' own makes."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.ended = Event()
        self._work = work
        self._result: Any = None
        self._error: BaseException | None = None

    def __call__(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        finally:
            del self._work
            self.ended.set()

    def result(self) -> Any:
        """Return the result of a call that has ended, or raise its error."""
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._result


@cache
def let_gloo_finish_at_exit() -> None:
    """Make the interpreter pause before it exits, so that a successful run doesn't end with SIGABRT.

    Gloo's threads release the last collective's tensors after it has finished, and need the GIL for that. A
    thread that asks for the GIL while the interpreter exits aborts the process (pytorch/pytorch#190489).
    """
    atexit.register(time.sleep, 0.1)


def serve(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    """Make calls until None comes."""
    while (call := calls.get()) is not None:
        call()
        del call  # the connections end when their owner lets them go


def let_go(group: list[Any], ended: Event, error: BaseException, peer: int | None) -> None:
    """Close connections, which locals of the calls that failed keep open while somebody keeps the error.

    `peer` is the rank that a call of another thread still waits for, if there is one.
    """
    if peer is not None and not ended.is_set():
        # A call that takes too long ends all others of its group. Else that thread might wake up while the
        # interpreter exits, which aborts the process.
        with suppress(RuntimeError):
            group[0].recv([torch.empty(1, dtype=torch.uint8)], peer, UNUSED_TAG).wait(
                timedelta(milliseconds=1)
            )
    ended.wait()  # gloo aborts the process if they are closed under a call that waits
    group.clear()
    for kept in (error, error.__cause__, error.__context__):
        clear_frames(None if kept is None else kept.__traceback__)
