"""Reasons of a rank's failure, told to the other ranks.

When a rank fails in the middle of a step, its peers wait for it in a collective, and would only see a lost
connection. So the failing rank writes its error to the rendezvous store, where the others look it up. One
that was killed or stopped writes nothing: it is known by its signs of life, which have ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from parallel.host_comm import TIMEOUT, HostComm, LostRankError, part_of
from parallel.liveness import GONE, INTERVAL, OWNER, Signs, named, time_for_signs
from parallel.store_calls import SilentStoreError, StoreCalls, within
from parallel.topology import Meeting, meet

PATIENCE_S = 5.0
"""Seconds for which a rank looks for the reason of a lost connection."""

OF_GLOO = ("gloo/transport", "Application timeout caused pair closure")
"""Words of gloo's errors. The second ones stand alone if a rank was stopped and goes on after the timeout."""


class RankFailedError(RuntimeError):
    """Another rank failed, and this one can't go on without it."""


class Failures:
    """Errors of one engine's ranks."""

    def __init__(self, comm: HostComm) -> None:
        """Open a part of the store for the ranks of `comm`. They make their Failures in the same order."""
        self._rank, self._life = comm.rank, comm.life
        part = within(comm.patience, lambda: part_of(comm.store, "failures", comm.rank))
        self._store = StoreCalls(part, PATIENCE_S)
        self._count = 0  # number of works begun, the same on all ranks
        self._worked = 0  # the last one that this rank ended without an error
        self._looks_at = 0.0  # time of the next look at the neighbour's signs of life

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
            if isinstance(error, SilentStoreError):
                raise RankFailedError(f"{work} failed: {error}") from error
            if isinstance(error, LostRankError):
                mine = f"rank {self._rank}: {_without(work, error)}"
                told = self._tell(mine)
                why = f": {_without(work, error)}" if told == mine else f" on {told}"
                raise RankFailedError(f"{work} failed{why}") from error
            if _is_lost_connection(error):
                raise RankFailedError(self._reason(work, error)) from error
            cause = _cause(error)
            self._tell(f"rank {self._rank}: {_text(cause)}")
            if cause is error:
                raise
            raise cause from None

    def look(self) -> None:
        """Look whether another rank has failed in this work, or in the last that this rank has ended well.

        Local. It is for a rank that waits where no error can reach it; it looks at its neighbour's signs of
        life too.

        Raises:
            RankFailedError: one has, or is lost.
        """
        for work in {self._count, self._worked}:
            try:
                told = self._told(work)
            except RuntimeError:  # the store's process has ended, or is silent
                return
            if told is not None:
                raise RankFailedError(f"another rank failed: {told}")
        if self._life is None or time.monotonic() < self._looks_at:
            return
        self._looks_at = time.monotonic() + self._life.interval
        if lost := self._life.lost_neighbour():
            raise RankFailedError(f"another rank failed: {self._tell(lost)}")

    def _tell(self, text: str) -> str:
        """Say why this work fails; return the words of the first rank that did."""
        try:
            return self._store.compare_set(str(self._count), "", text).decode()
        except RuntimeError:  # the store's host is gone, and nobody can read it
            return text

    def _is_first(self, key: str) -> bool:
        return self._store.compare_set(key, "", str(self._rank)).decode() == str(self._rank)

    def _told(self, work: int) -> str | None:
        return self._store.get(str(work)).decode() if self._store.check([str(work)]) else None

    def _reason(self, work: str, error: BaseException) -> str:
        """Return the error of the first rank that failed, or else which ranks give no more signs of life.

        `error` is that of the lost connection, which is told if there is nothing else.
        """
        why, pause, alive = "see its last output", 0.05, f"all alive/{self._count}"
        try:
            # One rank looks at the signs of all, and tells the others: they may be thousands.
            looks = self._life is not None and self._is_first(f"looks/{self._count}")
            signs: Signs = self._life.look() if self._life is not None and looks else {}
            seconds = max(PATIENCE_S, time_for_signs(signs))
            if self._life is not None and not looks:
                seconds += 6 * INTERVAL  # at most, until the one that looks has told what it saw
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if told := self._told(self._count):
                    return f"{work} failed on {told}"
                if self._life is not None and (reason := self._life.reason()):
                    return f"{work} failed: {reason.removeprefix(f'{work}: ')}"
                if not looks and self._store.check([alive]):
                    break
                time.sleep(pause)
                pause = min(1.5 * pause, 0.5)
            if self._life is not None and (gone := self._life.silent(signs)):
                told = f"{named(gone)}: no sign of life for {seconds:g} s: {GONE}; {why}"
                return f"{work} failed on {self._tell(told)}"
            if signs:
                self._store.set(alive, "")
            if self._store.check([alive]):
                return f"{work} failed, though all ranks give signs of life: {_text(error)}"
        except SilentStoreError as silent:
            why = str(silent)
        except RuntimeError:
            why = f"so is that to the rendezvous store, {OWNER}; {why}"
        return f"{work} failed: the connection to another rank was lost; {why}"


def connect(
    work: str, device_type: str, patience: float, timeout: timedelta | None
) -> tuple[Meeting, HostComm, Failures]:
    """Let the ranks meet, before they have a process group or after, and connect their CPUs. Collective.

    They get a new part of the store, apart from what an earlier attempt has left. `patience` is that of the
    connections, `timeout` the longest wait for a rank that hasn't come, by default half an hour.

    Raises:
        RankFailedError: a rank was lost, or didn't come; names `work`.
    """
    try:
        store, rank, size = meet(device_type, timeout)
    except dist.DistError as error:
        why = f"the ranks don't meet at the rendezvous store: {error}"
        raise RankFailedError(f"{work} failed: {why}") from error
    try:
        comm = HostComm.of(store, rank, size, doing=work, patience=patience, timeout=timeout or TIMEOUT)
        comm.doing = ""
        own = dist.PrefixStore(str(comm.part), store)  # type: ignore[attr-defined]
        return Meeting(own, rank, size), comm, Failures(comm)
    except LostRankError as error:
        raise RankFailedError(f"{work} failed: {_without(work, error)}") from error
    except SilentStoreError as error:
        raise RankFailedError(f"{work} failed: {error}") from error
    except dist.DistError as error:
        why = f"the connection to the rendezvous store is lost, {OWNER}: {error}"
        raise RankFailedError(f"{work} failed: {why}") from error


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _without(work: str, error: LostRankError) -> str:
    return str(error).removeprefix(f"{work}: ")


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
