"""Reasons of a rank's failure, told to the other ranks.

When a rank fails in the middle of a step, its peers wait for it in a collective, and would only see a lost
connection. So the failing rank writes its error to the rendezvous store, where the others look it up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from parallel.store_calls import SilentStoreError, StoreCalls

PATIENCE_S = 5.0
"""Seconds for which a rank looks for the reason of a lost connection, and waits for the store's answer."""

OF_GLOO = ("gloo/transport", "Application timeout caused pair closure")
"""Words of gloo's errors. The second ones stand alone if a rank was stopped and goes on after the timeout."""


class RankFailedError(RuntimeError):
    """Another rank failed, and this one can't go on without it."""


class Failures:
    """Errors of one engine's ranks."""

    def __init__(self) -> None:
        """Open the engine's own part of the store. Collective."""
        self._rank = dist.get_rank()
        store = dist.distributed_c10d._get_default_store()
        nth = store.add(f"uni3d/failures/{self._rank}", 1)  # ranks create them in the same order
        own = dist.PrefixStore(f"uni3d/failures/{nth}", store)  # type: ignore[attr-defined]
        self._store = StoreCalls(own, PATIENCE_S)
        self._count = 0  # number of works begun, the same on all ranks
        self._worked = 0  # the last one that this rank ended without an error

    @contextmanager
    def told(self, work: str, *, alike: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Enclose work that the ranks do together; `work` names it in the message.

        An error of this rank is told to the others and raised unchanged. Errors of the types `alike` are
        those that all ranks raise, so they aren't told.

        Raises:
            RankFailedError: another rank failed in this work; names the rank and its error.
        """
        self._count += 1
        try:
            yield
            self._worked = self._count
        except alike:
            raise
        except BaseException as error:  # an interrupt too, as the others wait for this rank
            if _is_lost_connection(error):
                raise RankFailedError(self._reason(work)) from error
            cause = _cause(error)
            self._tell(work, cause)
            if cause is error:
                raise
            raise cause from None

    def look(self) -> None:
        """Look whether another rank has failed in this work, or in the last that this rank has ended well.

        Local. It is for a rank that waits where no error can reach it.

        Raises:
            RankFailedError: one has.
        """
        for work in {self._count, self._worked}:
            try:
                told = self._store.get(str(work)).decode() if self._store.check([str(work)]) else None
            except RuntimeError:  # the store's process has ended, or is silent
                return
            if told is not None:
                raise RankFailedError(f"another rank failed: {told}")

    def _tell(self, work: str, error: BaseException) -> None:
        text = " ".join(str(error).split())[:500]
        try:
            self._store.compare_set(
                str(self._count), "", f"rank {self._rank}: {type(error).__name__}: {text}"
            )
        except RuntimeError:  # the store's host is gone, and nobody can read it
            return

    def _reason(self, work: str) -> str:
        """Return the error of the first rank that failed."""
        deadline = time.monotonic() + PATIENCE_S
        try:
            while time.monotonic() < deadline:
                if self._store.check([str(self._count)]):
                    return f"{work} failed on {self._store.get(str(self._count)).decode()}"
                time.sleep(0.05)
        except SilentStoreError as error:
            return f"{work} failed: the connection to another rank was lost; {error}"
        except RuntimeError:  # its host is gone
            pass
        return f"{work} failed: the connection to another rank was lost; see its last output"


def _cause(error: BaseException) -> BaseException:
    """Return the model's own error, which torch's pipeline stages wrap in a page of their arguments."""
    if error.__cause__ is not None and "failed to run forward" in str(error):
        return error.__cause__
    return error


def _is_lost_connection(error: BaseException | None) -> bool:
    """Return whether a connection was lost. gloo has no error type of its own, so its message decides."""
    while error is not None:
        if isinstance(error, dist.DistError) or any(words in str(error) for words in OF_GLOO):
            return True
        error = error.__cause__
    return False
